"""Speculative decoding: the MTP module proposes the token after next, and the model accepts or replaces it [V3 §5.4.3].

One step feeds the newest token and the draft of the next one; the model's logits after both come from the same pass.
The draft x, drawn from MTP's distribution q, is accepted with probability min(1, p(x) / q(x)); where it is not, the
token is drawn from max(p - q, 0), normalised. So tokens are distributed as the model's own draws, and at temperature 0
they are the model's own. An accepted draft gives a second token, drawn from the logits after it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.inference import sampling
from dsjax.inference.decoding import STEPS, Emitted, State, nothing_emitted, placed
from dsjax.inference.sampling import Draws
from dsjax.model.transformer import Network

# Keys of one position: for its draft, for accepting that, and for what replaces it. A token that no draft was made for
# is drawn with the position's own key, as without speculation.
DRAFT, ACCEPT, REPLACE = 1, 2, 3


def decode(
    net: Network, params: Any, bias: Any, state: State, keep_B: jax.Array, steps: jax.Array
) -> tuple[State, Emitted]:
    """As `decoding`'s, up to two tokens a step; rows of the result have room for twice the steps."""
    slots, room = len(keep_B), state.cache.length

    def step(carry):
        i, state, emitted = carry
        model = net.bind(params, bias)
        active_B = state.active_B
        start_B = jnp.where(active_B, state.length_B, room)
        draft_B = _draft(state)
        out = model.extend(jnp.stack([state.last_B, draft_B], axis=1), start_B, state.cache, absorbed=True)
        logits_B2V = model.logits(out.hidden_BTD)
        first_B, accepted_B = verify(logits_B2V[:, 0], state.draft_BV, draft_B, state.draws, state.length_B + 1)
        second_B, _ = sampling.draw(logits_B2V[:, 1], state.draws, state.length_B + 2)

        ends_B = _ends(state, first_B, 1)
        has_first_B, has_second_B = active_B, active_B & accepted_B & ~ends_B
        goes_on_B = jnp.where(has_second_B, ~_ends(state, second_B, 2), ~ends_B) & active_B

        # MTP on the same two positions, now that the tokens after them are known.
        following_B2 = jnp.stack([first_B, second_B], axis=1)
        mtp_B2D, cache = model.extend_mtp(following_B2, out.mtp_input_BTD, start_B, out.cache, absorbed=True)
        newest_B1 = has_second_B.astype(jnp.int32)[:, None]
        mtp_BD = jnp.take_along_axis(mtp_B2D, newest_B1[..., None], axis=1)[:, 0]

        state = state._replace(
            cache=cache,
            last_B=jnp.where(has_second_B, second_B, jnp.where(has_first_B, first_B, state.last_B)),
            length_B=state.length_B + has_first_B + has_second_B,
            active_B=goes_on_B,
            draft_BV=model.logits(mtp_BD),
        )
        for token_B, logits_BV, has_B in (
            (first_B, logits_B2V[:, 0], has_first_B),
            (second_B, logits_B2V[:, 1], has_second_B),
        ):
            emitted = _append(emitted, token_B, sampling.log_probability(logits_BV, token_B), has_B)
        drafted, taken = emitted.drafted_B + active_B, emitted.accepted_B + (active_B & accepted_B)
        return i + 1, state, emitted._replace(drafted_B=drafted, accepted_B=taken)

    def unfinished(carry):
        i, state, _ = carry
        return (i < steps) & jnp.any(state.active_B)

    state = state._replace(active_B=state.active_B & keep_B)
    _, state, emitted = lax.while_loop(unfinished, step, (jnp.int32(0), state, nothing_emitted(slots, 2 * STEPS)))
    return placed(net, state), emitted


def verify(
    logits_BV: jax.Array, draft_logits_BV: jax.Array | None, draft_B: jax.Array, draws: Draws, position_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(the token at `position`, whether it is the draft), distributed as the model's logits say.

    draft_logits_BV: what the draft was drawn from, by `draft_token`.
    """
    assert draft_logits_BV is not None

    def greedy(_: None) -> jax.Array:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def some(_: None) -> jax.Array:
        p_BV = jax.nn.softmax(sampling.filtered(logits_BV, draws))
        q_BV = jax.nn.softmax(sampling.filtered(draft_logits_BV, draws))
        chosen = lambda a_BV: jnp.take_along_axis(a_BV, draft_B[:, None], axis=-1)[:, 0]  # noqa: E731
        uniform_B = jax.vmap(jax.random.uniform)(_keys(draws, position_B, ACCEPT))
        accepted_B = uniform_B * chosen(q_BV) < chosen(p_BV)
        # Where p <= q everywhere to rounding, a draft that is not accepted has probability 0; p stands in for it.
        rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
        rest_BV = jnp.where(jnp.sum(rest_BV, axis=-1, keepdims=True) > 0, rest_BV, p_BV)
        other_B = jax.vmap(jax.random.categorical)(_keys(draws, position_B, REPLACE), jnp.log(rest_BV))
        return jnp.where(accepted_B, draft_B, other_B).astype(jnp.int32)

    token_B = lax.cond(jnp.any(draws.temperature_B > 0), some, greedy, None)
    return token_B, token_B == draft_B


def draft_token(draft_logits_BV: jax.Array, draws: Draws, position_B: jax.Array) -> jax.Array:
    """MTP's proposal for `position`, drawn as a token of the model would be."""

    def greedy(_: None) -> jax.Array:
        return jnp.argmax(draft_logits_BV, axis=-1).astype(jnp.int32)

    def some(_: None) -> jax.Array:
        drawn = jax.vmap(jax.random.categorical)
        return drawn(_keys(draws, position_B, DRAFT), sampling.filtered(draft_logits_BV, draws)).astype(jnp.int32)

    return lax.cond(jnp.any(draws.temperature_B > 0), some, greedy, None)


def _draft(state: State) -> jax.Array:
    assert state.draft_BV is not None
    return draft_token(state.draft_BV, state.draws, state.length_B + 1)


def _keys(draws: Draws, position_B: jax.Array, purpose: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(sampling.keys(draws, position_B))


def _ends(state: State, token_B: jax.Array, count: int) -> jax.Array:
    """Whether a request ends with this token, the count-th of the step."""
    is_stop_B = jnp.any(token_B[:, None] == state.stops_BX, axis=-1)
    return is_stop_B | (state.length_B + count + 1 >= state.limit_B)


def _append(emitted: Emitted, token_B: jax.Array, log_prob_B: jax.Array, has_B: jax.Array) -> Emitted:
    rows_B = jnp.arange(len(token_B))
    place_B = jnp.where(has_B, emitted.count_B, emitted.tokens_BT.shape[1])
    return emitted._replace(
        tokens_BT=emitted.tokens_BT.at[rows_B, place_B].set(token_B, mode="drop"),
        log_probs_BT=emitted.log_probs_BT.at[rows_B, place_B].set(log_prob_B, mode="drop"),
        count_B=emitted.count_B + has_B,
    )
