"""lm-evaluation-harness through its own model API; needs the extra `eval`."""

import sys
from collections.abc import Sequence
from typing import Any

from dsjax.config import ConfigError
from dsjax.inference.engine import Engine
from dsjax.inference.loading import load
from dsjax.inference.sampling import Sampling
from dsjax.inference.scoring import score

NEW_TOKENS = 256  # where a task does not say how long an answer may be


def harness_model(engine: Engine) -> Any:
    """An `lm_eval.api.model.LM` that asks this engine. Raises ConfigError where lm-evaluation-harness is missing."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ConfigError(f"tasks need lm-evaluation-harness ({error}): pip install 'dsjax[eval]'") from error

    class Model(LM):
        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return continuation_scores(engine, [request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return [text_score(engine, request.args[0]) for request in requests]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return answers(engine, [request.args for request in requests])

    return Model()


def continuation_scores(engine: Engine, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """(log-probability, whether greedy decoding would write it) of each continuation after its context.

    The two are encoded as one text; a context that is too long loses its beginning.
    """
    assert engine.tokenizer is not None
    room = engine.config.model.max_position_embeddings + 1
    sequences, counts = [], []
    for context, continuation in pairs:
        head = engine.tokenizer.encode(context)
        whole = engine.tokenizer.encode(context + continuation)
        count = max(1, len(whole) - len(head)) if whole else 0
        sequences.append([engine.tokenizer.eos_id, *whole][-room:])
        counts.append(min(count, len(sequences[-1]) - 1))
    scores = score(engine, sequences, counts)
    return [(float(one.log_probs.sum()), bool(one.is_greedy.all())) for one in scores]


def text_score(engine: Engine, text: str) -> float:
    """The log-probability of a text after an end-of-document token; each token once, with as much context as fits."""
    assert engine.tokenizer is not None
    tokens, room = (
        [engine.tokenizer.eos_id, *engine.tokenizer.encode(text)],
        engine.config.model.max_position_embeddings,
    )
    sequences, counts, done = [], [], 1
    while done < len(tokens):
        end = min(done - 1 + room, len(tokens) - 1) + 1
        sequences.append(tokens[max(0, end - room - 1) : end])
        counts.append(end - done)
        done = end
    return float(sum(one.log_probs.sum() for one in score(engine, sequences, counts)))


def answers(engine: Engine, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """What follows each context, greedy unless its arguments say otherwise, without the string that ended it.

    Where a context and the answer asked for exceed max_position_embeddings, the answer gets what the context leaves,
    or half of the positions if that is more, and the context loses its beginning; a warning counts both.
    """
    assert engine.tokenizer is not None
    positions, cut, shortened = engine.config.model.max_position_embeddings, 0, 0
    prompts, samplings = [], []
    for context, how in asked:
        until = how.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(text for text in until if text)
        drawn = bool(how.get("do_sample", how.get("temperature", 0)))
        wanted = int(how.get("max_gen_toks", NEW_TOKENS))
        prompt = engine.tokenizer.encode(context) or [engine.tokenizer.eos_id]
        room = min(wanted, max(positions - len(prompt), positions // 2))
        cut += len(prompt) > positions - room
        shortened += room < wanted
        sampling = Sampling(
            room,
            float(how.get("temperature", 1.0)) if drawn else 0.0,
            top_k=how.get("top_k") or None,
            top_p=float(how.get("top_p", 1.0)),
            stop=until,
        )
        prompts.append(prompt[-(positions - room) :])
        samplings.append(sampling)
    if cut or shortened:
        print(
            f"WARNING: within max_position_embeddings = {positions}, {cut} of {len(prompts)} contexts lose their"
            f" beginning, and {shortened} answers may not become as long as their tasks allow",
            file=sys.stderr,
            flush=True,
        )
    return [result.text or "" for result in engine.generate(prompts, samplings)]


def run_tasks(
    path: str, tasks: Sequence[str], limit: int | None = None, tokenizer: str | None = None
) -> dict[str, Any]:
    """The harness's results of its tasks, by name; `limit`: examples of each."""
    model = harness_model(load(path, tokenizer=tokenizer))
    try:
        from lm_eval import simple_evaluate
    except ImportError as error:
        raise ConfigError(f"tasks need lm-evaluation-harness ({error}): pip install 'dsjax[eval]'") from error
    found = simple_evaluate(model=model, tasks=list(tasks), limit=limit)
    return {} if found is None else found["results"]
