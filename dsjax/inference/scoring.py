"""How likely given tokens are: one pass over whole sequences, no decoding."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from dsjax.config import ConfigError
from dsjax.inference.decoding import bucket
from dsjax.inference.engine import Engine
from dsjax.sharding import BATCH


class Score(NamedTuple):
    """Of the last tokens of one sequence."""

    log_probs: np.ndarray  # of each token, given all before it
    is_greedy: np.ndarray  # whether it is the likeliest


def score(engine: Engine, sequences: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Score]:
    """Scores the last `counts[i]` tokens of each sequence; at least one token is before them.

    Raises ConfigError for a sequence beyond max_position_embeddings, or without a token before those scored.
    """
    limit = engine.config.model.max_position_embeddings
    for tokens, count in zip(sequences, counts, strict=True):
        if len(tokens) > limit + 1 or not 0 <= count < len(tokens):
            raise ConfigError(
                f"a sequence of {len(tokens)} tokens, {count} of them scored: at least one must come before them, and"
                f" at most max_position_embeddings = {limit}"
            )
    scores: list[Any] = [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    rows = engine.slots
    for start in range(0, len(order), rows):
        group = order[start : start + rows]
        width = bucket(max(len(sequences[i]) for i in group) - 1)
        tokens_BT = np.zeros((rows, width + 1), np.int32)
        for row, i in enumerate(group):
            tokens_BT[row, : len(sequences[i])] = sequences[i]
        placed = jax.device_put(tokens_BT, NamedSharding(engine.mesh, BATCH))
        log_probs, greedy = jax.device_get(engine.programs.score(*engine.weights, placed))
        for row, i in enumerate(group):
            where = slice(len(sequences[i]) - 1 - counts[i], len(sequences[i]) - 1)
            scores[i] = Score(log_probs[row, where], greedy[row, where])
    return scores
