"""dsjax generate: one prompt, a file of prompts, or a conversation."""

import sys
from typing import Any

from jax.sharding import Mesh

from dsjax.config import Config
from dsjax.data.chat import find_template
from dsjax.inference.chat import Conversation
from dsjax.inference.engine import Engine
from dsjax.inference.loading import load
from dsjax.inference.prefix import PrefixCache
from dsjax.inference.prompt_file import complete_file
from dsjax.inference.sampling import Sampling
from dsjax.inference.startup import Startup

SAMPLING = ("top_k", "top_p", "min_p", "stop")  # keywords that belong to Sampling; the others are the engine's


def generate(
    path: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    tokenizer: str | None = None,
    **more: Any,
) -> str:
    """The prompt and its continuation by the newest checkpoint of a run, or by a published checkpoint.

    Args:
      path: the directory of either.
      prompt: text; an empty one starts a new document.
      max_new_tokens: at most so many; the end of the document ends the text before.
      temperature: 0 takes the likeliest token; otherwise one is drawn from softmax(logits / temperature).
      seed: of the draws.
      tokenizer: as config.data.tokenizer; None: the run's, or the one beside the published weights.
      more: other fields of Sampling (top_k, top_p, min_p, stop) and keywords of Engine; `prefix_cache` is a directory.

    Raises:
      ConfigError: there is no usable checkpoint, or prompt and continuation exceed max_position_embeddings.
    """
    startup = Startup()
    engine, asked = _ready(path, tokenizer, {"slots": 1, **more}, (max_new_tokens, temperature, seed))
    [result] = engine.generate([prompt], asked)
    print(startup.told(), file=sys.stderr)
    _leave(engine)
    assert engine.tokenizer is not None and result.text is not None
    return (engine.tokenizer.decode(result.prompt) if prompt else "") + result.text


def generate_file(
    path: str,
    prompts: str,
    out: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    tokenizer: str | None = None,
    **more: Any,
) -> str:
    """Continues every prompt of a JSONL file into another one, going on where an interrupted call stopped; a summary.

    The arguments are those of `generate`, the files those of `prompt_file.complete_file`.
    """
    engine, asked = _ready(path, tokenizer, more, (max_new_tokens, temperature, seed))
    try:
        return complete_file(engine, prompts, out, asked, find_template(engine.config.data.tokenizer))
    finally:
        _leave(engine)


def chat(
    path: str, max_new_tokens: int, temperature: float, seed: int, tokenizer: str | None = None, **more: Any
) -> None:
    """A conversation on the terminal, until the input ends; answers appear as they are written.

    The prompt is the model's chat template where it has one; otherwise a plain transcript of user and assistant.
    """
    engine, asked = _ready(path, tokenizer, {"slots": 1, **more}, (max_new_tokens, temperature, seed))
    if engine.prefix_cache is None:
        engine.prefix_cache = PrefixCache()  # each turn begins with all the turns before
    talk = Conversation(engine, asked, find_template(engine.config.data.tokenizer))
    try:
        while (line := _read_line()) is not None:
            for piece in talk.answer(line):
                print(piece, end="", flush=True)
            print()
    finally:
        _leave(engine)


def _read_line() -> str | None:
    """The next line that is not empty; None where the input ends."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if is_terminal else "")
        except EOFError:
            return None
        if line.strip():
            return line


def _ready(
    path: str, tokenizer: str | None, more: dict[str, Any], asked: tuple[int, float, int]
) -> tuple[Engine, Sampling]:
    max_new_tokens, temperature, seed = asked
    how = {name: value for name, value in more.items() if name in SAMPLING}
    sampling = Sampling(max_new_tokens, temperature, seed=seed, **how)
    options = {name: value for name, value in more.items() if name not in SAMPLING}
    if options.get("prefix_cache") is not None:
        options["prefix_cache"] = PrefixCache(directory=options["prefix_cache"])
    return load(path, tokenizer=tokenizer, **options), sampling


def _leave(engine: Engine) -> None:
    """Keeps prefixes for the next process, where there is a directory for them."""
    if engine.prefix_cache is not None:
        engine.prefix_cache.flush()


def decode(
    config: Config,
    mesh: Mesh,
    params: Any,
    router_bias: Any,
    prompt_ids: list[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    eos_id: int | None,
) -> list[int]:
    """The tokens that follow `prompt_ids`, without the end-of-document token that may have ended them."""
    stops = () if eos_id is None else (eos_id,)
    engine = Engine(config, params, router_bias, mesh, slots=1)
    [result] = engine.generate([prompt_ids], Sampling(max_new_tokens, temperature, seed=seed, stop_tokens=stops))
    return result.tokens[:-1] if result.tokens[-1] == eos_id else result.tokens
