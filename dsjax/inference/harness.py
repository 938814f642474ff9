"""lm-evaluation-harness through its own model API; needs the extra `eval`."""

import dataclasses
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
    """What follows each context, greedy unless its arguments say otherwise, without the string that ended it."""
    assert engine.tokenizer is not None
    prompts, samplings = [], []
    for context, how in asked:
        until = how.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(text for text in until if text)
        drawn = bool(how.get("do_sample", how.get("temperature", 0)))
        sampling = Sampling(
            int(how.get("max_gen_toks", NEW_TOKENS)),
            float(how.get("temperature", 1.0)) if drawn else 0.0,
            top_k=how.get("top_k") or None,
            top_p=float(how.get("top_p", 1.0)),
            stop=until,
        )
        room = engine.config.model.max_position_embeddings - sampling.max_new_tokens
        if room < 1:
            sampling, room = dataclasses.replace(sampling, max_new_tokens=1), room + sampling.max_new_tokens - 1
        prompts.append((engine.tokenizer.encode(context) or [engine.tokenizer.eos_id])[-room:])
        samplings.append(sampling)
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
