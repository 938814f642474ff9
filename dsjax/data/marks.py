"""What a row of samples says of its tokens, in the same integers as the tokens themselves.

A sample is a prompt and an answer. Two flags stand above the token: that a sample begins here, so that attention and
positions begin anew, and that the token belongs to an answer, so that its prediction is trained. They are not arrays
of their own because then a row is what it is for plain text, one int32 array of sequence_length + 1: loader, resume,
placement of batches and files need not know of samples.

The functions take a NumPy or a JAX array of int32 and give one of the same shape.
"""

from typing import Any

import numpy as np

from dsjax.config import ConfigError

BEGINS = 1 << 29  # the first token of a sample
ANSWER = 1 << 30  # a token whose prediction is trained


def token_of(row: Any) -> Any:
    """The tokens, without flags."""
    return row & (BEGINS - 1)


def begins(row: Any) -> Any:
    """Whether a sample begins at each token."""
    return (row & BEGINS) != 0


def is_answer(row: Any) -> Any:
    """Whether each token's prediction is trained."""
    return (row & ANSWER) != 0


def marked(prompt: list[int], answer: list[int]) -> np.ndarray:
    """A sample as int32 [tokens]: its first token begins it; those of the answer are trained, unless one is the first,
    which nothing comes before to predict it from.

    Raises ConfigError for a token that leaves no place for the flags.
    """
    sample = np.array([*prompt, *answer], np.int64)
    if sample.max() >= BEGINS:
        raise ConfigError(
            f"token {sample.max()} cannot be marked as part of a sample, which takes one below 2**29; use a tokenizer"
            " with a smaller vocabulary"
        )
    sample[max(1, len(prompt)) :] |= ANSWER
    sample[0] |= BEGINS
    return sample.astype(np.int32)
