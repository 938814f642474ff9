"""How tokens reach the ranks that own their experts, and how the sums come back; per device, inside shard_map.

`all_gather`: every rank of the expert axis sees all their tokens, computes its own experts, and the sums return by
reduce-scatter. `all_to_all`: a token goes once to each rank that owns one of its experts, however many live there, and
one sum returns. Where the expert axis spans nodes it goes in two legs: once to each node, to the rank at the sender's
place in it, and from there to the ranks of that node [V3 §3.2.2].

Under an FP8 recipe what goes to experts travels in E4M3 with power-of-two scales, what comes back in BF16 [V3 §3.3.3].
A leg carries a fixed number of rows from each rank to each other in one round; what is more goes in further rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.config import DispatchConfig, ModelConfig
from dsjax.model import dispatch as travel
from dsjax.model.experts import ExpertWeights, Tally, own_experts, put_together, taken_apart
from dsjax.numerics import fp8
from dsjax.numerics.recipe import Recipe, Scaling
from dsjax.planning.buffers import Buffer, seats
from dsjax.sharding import AXES


@dataclass(frozen=True)
class Leg:
    """One leg of the way: `ranks` of the expert axis, `stride` apart, exchange rows."""

    ranks: int
    stride: int  # ranks that each destination stands for: 1, or those of its node
    axis_size: int  # of the expert axis
    capacity: int  # rows from one rank to another in one round
    is_ragged: bool  # sends only the rows that there are; not on CPU, where XLA has no such collective

    @property
    def rows(self) -> int:
        """What arrives in one round, empty rows included."""
        return self.ranks * self.capacity

    @property
    def groups(self) -> list[list[int]] | None:
        """Who exchanges with whom; None: all."""
        if self.ranks == self.axis_size:
            return None
        span = self.ranks * self.stride
        return [
            [block + place * self.stride + offset for place in range(self.ranks)]
            for block in range(0, self.axis_size, span)
            for offset in range(self.stride)
        ]

    def place(self, rank: jax.Array) -> jax.Array:
        """Which of its group's destinations `rank` is."""
        return rank // self.stride % self.ranks

    def destination(self, owner: jax.Array, rank: jax.Array) -> jax.Array:
        """The place in the group of `rank` to send to for an expert of rank `owner`; `ranks` where none leads there."""
        span = self.ranks * self.stride
        return jnp.where(owner // span == rank // span, self.place(owner), self.ranks)


class Trip(NamedTuple):
    """Who travels in one round of a leg."""

    row_MK: jax.Array  # the row of the copy of each token that goes where its k-th expert lives; one past for no copy
    token_S: jax.Array  # the token in each row of the send buffer; M for an empty row
    send_R: jax.Array  # rows that go to each rank
    receive_R: jax.Array  # rows that come from each; read by the ragged collective only


def plan_legs(
    model: ModelConfig, dispatch: DispatchConfig, ranks: int, tokens: int, *, is_ragged: bool
) -> tuple[Leg, ...]:
    """The legs for `tokens` of each of `ranks` ranks: one, or across nodes and within them; see buffers.seats."""
    return tuple(
        Leg(one.ranks, one.stride, ranks, one.capacity, is_ragged) for one in seats(model, dispatch, ranks, tokens)
    )


def all_to_all(
    x_MD: jax.Array,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    weights: ExpertWeights,
    legs: tuple[Leg, ...],
    buffer: Buffer,
    recipe: Recipe,
    *,
    recompute: bool = False,
) -> tuple[jax.Array, Tally]:
    """y [M, D]: for each of this rank's tokens the weighted sum over its experts, wherever they live.

    `legs` lead from here to the experts; what arrives at the end of them goes through `own_experts` with `buffer`.
    `recompute` is that of `dispatch.in_rounds`.
    """
    if not legs:
        rank = lax.axis_index("expert")
        return own_experts(x_MD, experts_MK, weights_MK, weights, buffer, rank, recipe, recompute=recompute)
    leg, *rest = legs
    masters, copies = taken_apart(weights)
    by_place = _sort_by_destination(experts_MK // buffer.experts, leg)

    def one_round(operands, constants, r):
        (x_MD, weights_MK, masters), (by_place, experts_MK, copies) = operands, constants
        trip = take_seats(by_place, leg, r)
        x_SD = send(x_MD, trip, leg, None if recipe.measures else recipe.after_dispatch.activation)
        weights_SK = send(weights_MK, trip, leg, None)
        experts_SK = _outward(experts_MK + 1, trip, leg) - 1  # -1, which is no expert, in empty rows
        whole = put_together(masters, copies)
        arrived = (x_SD, experts_SK, weights_SK, whole)
        y_SD, tally = all_to_all(*arrived, tuple(rest), buffer, recipe, recompute=recompute)
        y_MD = collect(y_SD, trip, leg, None if recipe.measures else recipe.before_combine.gradient)
        left = jnp.sum(trip.send_R) - trip.send_R[leg.place(lax.axis_index("expert"))]
        is_near = leg.stride == 1 and leg.ranks < leg.axis_size
        return y_MD, tally._replace(near=tally.near + left) if is_near else tally._replace(far=left)

    operands, constants = (x_MD, weights_MK, masters), (by_place, experts_MK, copies)
    if leg.capacity >= len(x_MD):  # everything fits, whatever the routing
        return one_round(operands, constants, jnp.int32(0))
    # The same number everywhere: the rounds hold collectives, and every device has to take part.
    most = jnp.max(jnp.diff(by_place.starts_E))
    rounds = lax.pmax(jnp.maximum(1, -(-most // leg.capacity)), AXES)
    return travel.in_rounds(one_round, operands, constants, rounds, recompute=recompute)


def _sort_by_destination(owner_MK: jax.Array, leg: Leg) -> travel.Sorted:
    """Copies sorted by destination: the first of a token's experts that are reached the same way stands for all."""
    place_MK = leg.destination(owner_MK, lax.axis_index("expert"))
    earlier_KK = jnp.arange(place_MK.shape[1])[:, None] > jnp.arange(place_MK.shape[1])[None]
    is_same_MKK = place_MK[:, :, None] == place_MK[:, None, :]
    is_copy_MK = jnp.any(is_same_MKK & earlier_KK[None], axis=-1)
    return travel.sort_assignments(jnp.where(is_copy_MK, leg.ranks, place_MK), 0, leg.ranks)


def take_seats(by_place: travel.Sorted, leg: Leg, round_index: jax.Array | int) -> Trip:
    """Who travels in a round: of the copies to each rank the round_index-th `leg.capacity`."""
    tokens, choices = by_place.rank_MK.shape
    first = round_index * leg.capacity
    starts_R, counts_R = by_place.starts_E[:-1], jnp.diff(by_place.starts_E)
    place_MK = jnp.minimum(by_place.expert_MK, leg.ranks - 1)
    position_MK = by_place.rank_MK - starts_R[place_MK] - first
    here_MK = (by_place.expert_MK < leg.ranks) & (position_MK >= 0) & (position_MK < leg.capacity)
    row_MK = jnp.where(here_MK, place_MK * leg.capacity + position_MK, leg.rows)

    place_S, offset_S = jnp.divmod(jnp.arange(leg.rows, dtype=jnp.int32), leg.capacity)
    offset_S += first
    filled_S = offset_S < counts_R[place_S]
    source_S = jnp.where(filled_S, starts_R[place_S] + offset_S, 0)
    token_S = jnp.where(filled_S, by_place.order_A[source_S] // choices, tokens)
    send_R = jnp.clip(counts_R - first, 0, leg.capacity)
    receive_R = _padded(send_R, leg) if leg.is_ragged else send_R
    return Trip(row_MK, token_S, send_R, receive_R)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def send(x_MD: jax.Array, trip: Trip, leg: Leg, scaling: Scaling | None) -> jax.Array:
    """What arrives here, rows [S, D] in the order of the ranks; zero in empty rows."""
    return _as_bytes(x_MD, scaling, lambda a: _outward(a, trip, leg))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def collect(rows_SD: jax.Array, trip: Trip, leg: Leg, scaling: Scaling | None) -> jax.Array:
    """[M, D]: for each token the sum over what its copies have become. `scaling` is of the gradient."""
    return _homeward(rows_SD, trip, leg)


send.defvjp(
    lambda x_MD, trip, leg, scaling: (send(x_MD, trip, leg, scaling), trip),
    lambda leg, scaling, trip, drows_SD: (_homeward(drows_SD, trip, leg), None),
)
collect.defvjp(
    lambda rows_SD, trip, leg, scaling: (collect(rows_SD, trip, leg, scaling), trip),
    lambda leg, scaling, trip, dy_MD: (_as_bytes(dy_MD, scaling, lambda a: _outward(a, trip, leg)), None),
)


def _outward(a_MX: jax.Array, trip: Trip, leg: Leg) -> jax.Array:
    rows_SX = travel.rows_or_zero(a_MX, trip.token_S)
    return _ragged(rows_SX, trip.send_R, trip.receive_R, leg) if leg.is_ragged else _padded(rows_SX, leg)


def _homeward(rows_SD: jax.Array, trip: Trip, leg: Leg) -> jax.Array:
    back = _ragged(rows_SD, trip.receive_R, trip.send_R, leg) if leg.is_ragged else _padded(rows_SD, leg)
    return travel.sum_rows(back, trip.row_MK)


def _padded(rows: jax.Array, leg: Leg) -> jax.Array:
    return lax.all_to_all(rows, "expert", 0, 0, axis_index_groups=leg.groups, tiled=True)


def _ragged(rows: jax.Array, send_R: jax.Array, receive_R: jax.Array, leg: Leg) -> jax.Array:
    """As `_padded`, but what no rank sends stays at home, and is zero where it would have arrived."""
    here = leg.place(lax.axis_index("expert")).astype(jnp.int32)
    seats_R = leg.capacity * jnp.arange(leg.ranks, dtype=jnp.int32)
    return lax.ragged_all_to_all(
        rows,
        jnp.zeros_like(rows),
        seats_R,
        send_R,
        jnp.full_like(seats_R, leg.capacity * here),
        receive_R,
        axis_name="expert",
        axis_index_groups=leg.groups,
    )


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_tokens(x_MD: jax.Array, recipe: Recipe) -> jax.Array:
    """The tokens of all expert ranks, in the order of the ranks. Under an FP8 recipe as a product will take them."""
    return _as_bytes(x_MD, None if recipe.measures else recipe.after_dispatch.activation, _whole)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def scatter_sums(y_MD: jax.Array, recipe: Recipe) -> jax.Array:
    """The sum over expert ranks, of which each keeps its own tokens."""
    return lax.psum_scatter(y_MD, "expert", scatter_dimension=0, tiled=True)


gather_tokens.defvjp(
    lambda x_MD, recipe: (gather_tokens(x_MD, recipe), None),
    lambda recipe, _, dx_MD: (scatter_sums(dx_MD, recipe),),
)
scatter_sums.defvjp(
    lambda y_MD, recipe: (scatter_sums(y_MD, recipe), None),
    lambda recipe, _, dy_MD: (_as_bytes(dy_MD, None if recipe.measures else recipe.before_combine.gradient, _whole),),
)


def _whole(a: jax.Array) -> jax.Array:
    return lax.all_gather(a, "expert", axis=0, tiled=True)


def _as_bytes(x_MD: jax.Array, scaling: Scaling | None, carry: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`carry(x)`, in E4M3 where `scaling` cuts each token by itself; else the tiles would be others on arrival."""
    if scaling is None or scaling.free != 1:
        return carry(x_MD)
    tiles = (1, scaling.contracted)
    q_MD, scale = fp8.quantize(x_MD, tiles, scaling.scale_format)
    # As bytes, which every backend's collectives take.
    values = lax.bitcast_convert_type(carry(lax.bitcast_convert_type(q_MD, jnp.uint8)), fp8.E4M3)
    scales = fp8.from_exponents(carry(fp8.exponents(scale)))
    return fp8.apply_scales(values.astype(jnp.float32), scales, tiles).astype(x_MD.dtype)
