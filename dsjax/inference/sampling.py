"""How the next token is drawn: temperature, top-k, top-p, min-p, and a seed of each request's own.

What a request draws depends on its seed and on the position drawn for, not on what shares its batch.
"""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.config import ConfigError

SEEDS = 2**32
HOTTEST = 1e38  # the devices compute with FP32, which holds little more


@dataclass(frozen=True)
class Sampling:
    """What one request asks for.

    A text ends at `max_new_tokens`, at one of `stop_tokens` (which is the last token of the result), or where its text
    contains one of the `stop` strings (which the text is cut before).

    Raises ConfigError for a value of another type or outside its range.
    """

    max_new_tokens: int = 200
    temperature: float = 1.0  # 0: the likeliest token; otherwise from softmax(logits / temperature)
    top_k: int | None = None  # only among the k likeliest; equals of the last one count as it
    top_p: float = 1.0  # only among the likeliest that together have this probability
    min_p: float = 0.0  # only what has this share of the likeliest one's probability
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ConfigError(problem)


TYPES: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (Integral, "a whole number"),
    "temperature": (Real, "a number"),
    "top_k": (Integral | None, "a whole number, or None for no limit"),
    "top_p": (Real, "a number"),
    "min_p": (Real, "a number"),
    "seed": (Integral, "a whole number"),
}


def _problems(s: Sampling):
    for name, (kind, told) in TYPES.items():
        value = getattr(s, name)
        if isinstance(value, bool) or not isinstance(value, kind):
            yield f"{name} is {value!r}, but must be {told}"
    if not _are(Integral, s.stop_tokens):
        yield f"stop_tokens is {s.stop_tokens!r}, but must be a list or tuple of tokens"
    if not _are(str, s.stop):
        yield f"stop is {s.stop!r}, but must be a list or tuple of texts"
    if s.max_new_tokens < 1:
        yield f"max_new_tokens is {s.max_new_tokens}, but must be at least 1"
    if not 0 <= s.temperature <= HOTTEST:
        yield f"temperature is {s.temperature}, but must be 0 or a positive number up to {HOTTEST:g}"
    if s.top_k is not None and s.top_k < 1:
        yield f"top_k is {s.top_k}, but must be at least 1, or None for no limit"
    if not 0 < s.top_p <= 1:
        yield f"top_p is {s.top_p}, but must be above 0 and at most 1"
    if not 0 <= s.min_p < 1:
        yield f"min_p is {s.min_p}, but must be at least 0 and below 1"
    if not 0 <= s.seed < SEEDS:
        yield f"seed is {s.seed}, but must be at least 0 and below {SEEDS}"
    if any(not text for text in s.stop):
        yield "a stop string is empty; leave it out"


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, tuple | list) and all(isinstance(value, kind) for value in values)


class Draws(NamedTuple):
    """The Samplings of a batch, as arrays; a top_k of 0 is none."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    seed_B: jax.Array


def filtered(logits_BV: jax.Array, draws: Draws) -> jax.Array:
    """Logits whose softmax is what is drawn from: scaled, minus infinity for what the filters leave out.

    At temperature 0 they are the likeliest token's alone.
    """
    greedy_B1 = (draws.temperature_B == 0)[:, None]
    scaled_BV = logits_BV / jnp.where(greedy_B1, 1.0, draws.temperature_B[:, None])
    top_B1 = jnp.max(scaled_BV, axis=-1, keepdims=True)
    lowest_B1 = top_B1 + jnp.log(draws.min_p_B)[:, None]  # log 0 is minus infinity
    is_cut = jnp.any((draws.top_p_B < 1) | (draws.top_k_B > 0))
    lowest_B1 = jnp.maximum(lowest_B1, lax.cond(is_cut, _lowest_kept, _lowest, scaled_BV, draws))
    kept_BV = jnp.where(scaled_BV >= lowest_B1, scaled_BV, -jnp.inf)
    is_likeliest_BV = jnp.arange(logits_BV.shape[-1])[None] == jnp.argmax(logits_BV, axis=-1)[:, None]
    return jnp.where(greedy_B1, jnp.where(is_likeliest_BV, 0.0, -jnp.inf), kept_BV)


def _lowest(scaled_BV: jax.Array, draws: Draws) -> jax.Array:
    return jnp.full((len(scaled_BV), 1), -jnp.inf)


def _lowest_kept(scaled_BV: jax.Array, draws: Draws) -> jax.Array:
    """The lowest logit within top-k and, of what that leaves, top-p."""
    vocab = scaled_BV.shape[-1]
    sorted_BV = -jnp.sort(-scaled_BV, axis=-1)
    top_k_B1 = jnp.where(draws.top_k_B > 0, jnp.minimum(draws.top_k_B, vocab), vocab)[:, None]
    p_BV = jax.nn.softmax(jnp.where(jnp.arange(vocab)[None] < top_k_B1, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    is_kept_BV = (before_BV < draws.top_p_B[:, None]) & (p_BV > 0)
    last_B1 = jnp.maximum(jnp.sum(is_kept_BV, axis=-1, keepdims=True) - 1, 0)
    return jnp.take_along_axis(sorted_BV, last_B1, axis=-1)


def keys(draws: Draws, position_B: jax.Array) -> jax.Array:
    """A random key for each row's token at `position`."""
    return jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(draws.seed_B, position_B)


def draw(logits_BV: jax.Array, draws: Draws, position_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the token at `position` of each row, int32; its log-probability by the model, at temperature 1, unfiltered)."""

    def some(_: None) -> jax.Array:
        return jax.vmap(jax.random.categorical)(keys(draws, position_B), filtered(logits_BV, draws)).astype(jnp.int32)

    def greedy(_: None) -> jax.Array:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    token_B = lax.cond(jnp.any(draws.temperature_B > 0), some, greedy, None)
    return token_B, log_probability(logits_BV, token_B)


def log_probability(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """log softmax(logits) of one token a row."""
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
