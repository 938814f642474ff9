"""Where tokens travel: from each device's tokens to rows sorted by expert, and back.

`lay_out` decides which buffer row holds which assignment (a token and one of its experts); `dispatch` fills the
buffer and `combine` adds the rows back to their tokens. Both move by gathering, and each is the other's backward
pass, so that no scatter-add appears anywhere. `gather_tokens` and `scatter_sums` do the same between expert ranks:
under an FP8 recipe what goes to experts travels in E4M3, what comes back in BF16 [V3 §3.3.3].

A buffer holds a fixed number of assignments. When a rank has more, `in_rounds` repeats the work with the next
ones: no token is ever dropped, and memory stays that of one buffer. All of this runs per device, inside shard_map.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.numerics import fp8
from dsjax.numerics.grouped_matmul import row_block
from dsjax.numerics.recipe import Recipe, Scaling


class Buffer(NamedTuple):
    """The static shape of a dispatch buffer."""

    experts: int  # local experts
    assignments: int  # real rows at most, in one round
    block: int  # groups begin at multiples of this

    @property
    def rows(self) -> int:
        """Rows with room for every group's alignment."""
        return (self.assignments // self.block + self.experts) * self.block


class Layout(NamedTuple):
    """Who is where in a buffer, in one round."""

    row_MK: jax.Array  # the buffer row of each assignment; `rows` for one that is not in this round
    token_C: jax.Array  # the token in each buffer row; M for an empty row
    assignment_C: jax.Array  # the flat assignment (token * K + choice) in each buffer row; M * K for an empty row
    sizes_E: jax.Array  # rows of each group, a multiple of the block


class Sorted(NamedTuple):
    """Assignments sorted by local expert, those of other ranks last."""

    order_A: jax.Array  # flat assignments in sorted order
    rank_MK: jax.Array  # the position of each assignment in that order
    starts_E: jax.Array  # where each expert's assignments begin; one entry more, the end of the last
    expert_MK: jax.Array  # local expert, or the number of local experts for a foreign one


def make_buffer(tokens: int, choices: int, experts: int, ranks: int, capacity_factor: float) -> Buffer:
    """A buffer for `capacity_factor` times the load of one of `ranks` ranks when all are equally loaded.

    Args:
      tokens: tokens that this rank sees.
      choices: experts per token.
      experts: experts of this rank.
      ranks: expert ranks; with one, every assignment is its own and the buffer holds them all.
      capacity_factor: room over the balanced load.
    """
    total = tokens * choices
    # A token counts once per local expert, so a rank with few experts cannot get more than this.
    most = tokens * min(choices, experts)
    room = total if ranks == 1 else min(most, math.ceil(capacity_factor * total / ranks))
    return Buffer(experts, room, row_block(room, experts))


def sort_assignments(experts_MK: jax.Array, first_expert: jax.Array | int, experts: int) -> Sorted:
    """Sorts assignments by expert for the rank that owns `experts` of them from `first_expert` on."""
    local_MK = experts_MK - first_expert
    local_MK = jnp.where((local_MK >= 0) & (local_MK < experts), local_MK, experts)
    order_A = jnp.argsort(local_MK.reshape(-1), stable=True).astype(jnp.int32)
    rank_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(order_A.size, dtype=jnp.int32), unique_indices=True)
    counts_E = jnp.sum(local_MK.reshape(-1, 1) == jnp.arange(experts)[None], axis=0, dtype=jnp.int32)
    starts_E = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(counts_E, dtype=jnp.int32)])
    return Sorted(order_A, rank_A.reshape(experts_MK.shape), starts_E, local_MK)


def rounds_needed(by_expert: Sorted, buffer: Buffer) -> jax.Array:
    """How many buffers full this rank's assignments make; at least 1."""
    return jnp.maximum(1, -(-by_expert.starts_E[-1] // buffer.assignments))


def lay_out(by_expert: Sorted, buffer: Buffer, round_index: jax.Array | int) -> Layout:
    """The layout of one round: the round_index-th `buffer.assignments` of the sorted assignments."""
    tokens, choices = by_expert.rank_MK.shape
    first = round_index * buffer.assignments
    starts_E = jnp.clip(by_expert.starts_E - first, 0, buffer.assignments)  # within the round; E + 1 entries
    counts_E = jnp.diff(starts_E)
    sizes_E = -(-counts_E // buffer.block) * buffer.block
    rows_E = jnp.cumsum(sizes_E) - sizes_E  # the first row of each group

    expert_MK = jnp.minimum(by_expert.expert_MK, buffer.experts - 1)
    position_MK = by_expert.rank_MK - first
    here_MK = (by_expert.expert_MK < buffer.experts) & (position_MK >= 0) & (position_MK < buffer.assignments)
    row_MK = jnp.where(here_MK, position_MK - starts_E[expert_MK] + rows_E[expert_MK], buffer.rows)

    block_starts = jnp.arange(0, buffer.rows, buffer.block, dtype=jnp.int32)
    owner_blocks = jnp.searchsorted(rows_E + sizes_E, block_starts, side="right")
    owner_C = jnp.repeat(jnp.minimum(owner_blocks, buffer.experts - 1), buffer.block)
    offset_C = jnp.arange(buffer.rows, dtype=jnp.int32) - rows_E[owner_C]
    filled_C = offset_C < counts_E[owner_C]
    source_C = jnp.where(filled_C, first + starts_E[owner_C] + offset_C, 0)
    assignment_C = jnp.where(filled_C, by_expert.order_A[source_C], tokens * choices)
    return Layout(row_MK, assignment_C // choices, assignment_C, sizes_E)


def _rows_or_zero(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] along the first dimension; zero where the index is one past the end."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def dispatch(x_MD: jax.Array, layout: Layout) -> jax.Array:
    """Buffer rows [C, D]: each the token that the layout puts there, zero where it puts none."""
    return _rows_or_zero(x_MD, layout.token_C)


@jax.custom_vjp
def combine(rows_CD: jax.Array, layout: Layout) -> jax.Array:
    """[M, D]: for each token the sum over its rows in the buffer."""
    choices = range(layout.row_MK.shape[1])
    parts = [_rows_or_zero(rows_CD, layout.row_MK[:, k]).astype(jnp.float32) for k in choices]
    return sum(parts[1:], parts[0]).astype(rows_CD.dtype)


dispatch.defvjp(
    lambda x_MD, layout: (dispatch(x_MD, layout), layout),
    lambda layout, drows_CD: (combine(drows_CD, layout), None),
)
combine.defvjp(
    lambda rows_CD, layout: (combine(rows_CD, layout), layout),
    lambda layout, dy_MD: (dispatch(dy_MD, layout), None),
)


@jax.custom_vjp
def dispatch_weights(weights_MK: jax.Array, layout: Layout) -> jax.Array:
    """The routing weight of each buffer row, [C]; zero in empty rows."""
    return _rows_or_zero(weights_MK.reshape(-1), layout.assignment_C)


dispatch_weights.defvjp(
    lambda weights_MK, layout: (dispatch_weights(weights_MK, layout), layout),
    lambda layout, d_C: (_rows_or_zero(d_C, layout.row_MK), None),
)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_tokens(x_MD: jax.Array, recipe: Recipe) -> jax.Array:
    """The tokens of all expert ranks, in the order of the ranks. Under an FP8 recipe as a product will take them."""
    return _gather(x_MD, None if recipe.measures else recipe.after_dispatch.activation)


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
    lambda recipe, _, dy_MD: (_gather(dy_MD, None if recipe.measures else recipe.before_combine.gradient),),
)


def _gather(x_MD: jax.Array, scaling: Scaling | None) -> jax.Array:
    whole = partial(lax.all_gather, axis_name="expert", axis=0, tiled=True)
    if scaling is None or scaling.free != 1:  # tiles that need more than one token would be others after the journey
        return whole(x_MD)
    tiles = (1, scaling.contracted)
    q_MD, scale = fp8.quantize(x_MD, tiles, scaling.scale_format)
    # As bytes, which every backend's collectives take.
    bytes_MD = whole(lax.bitcast_convert_type(q_MD, jnp.uint8))
    values = lax.bitcast_convert_type(bytes_MD, fp8.E4M3).astype(jnp.float32)
    return fp8.apply_scales(values, fp8.from_exponents(whole(fp8.exponents(scale))), tiles).astype(x_MD.dtype)


Round = Callable[[Any, Any, jax.Array], jax.Array]  # (differentiable, constants, round_index) -> y


def in_rounds(one_round: Round, operands: Any, constants: Any, rounds: jax.Array) -> jax.Array:
    """The sum of `one_round(operands, constants, r)` over r = 0 .. rounds - 1.

    Round 0 is ordinary code. Later ones run in a loop with a traced trip count, zero when the load is balanced,
    whose backward pass loops over the gradients of the same rounds.
    """
    first = one_round(operands, constants, jnp.int32(0))
    return first + _later_rounds(one_round, jnp.zeros_like(first), operands, constants, rounds)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _later_rounds(one_round: Round, zero: jax.Array, operands: Any, constants: Any, rounds: jax.Array) -> jax.Array:
    return lax.fori_loop(1, rounds, lambda r, y: y + one_round(operands, constants, r), zero)


def _later_rounds_fwd(one_round: Round, zero, operands, constants, rounds):
    return _later_rounds(one_round, zero, operands, constants, rounds), (operands, constants, rounds)


def _later_rounds_bwd(one_round: Round, kept, dy: jax.Array):
    operands, constants, rounds = kept

    def add_gradient(r, total):
        _, pull = jax.vjp(lambda ops: one_round(ops, constants, r), operands)
        return jax.tree.map(jnp.add, total, pull(dy)[0])

    gradients = lax.fori_loop(1, rounds, add_gradient, jax.tree.map(jnp.zeros_like, operands))
    return jnp.zeros_like(dy), gradients, None, None


_later_rounds.defvjp(_later_rounds_fwd, _later_rounds_bwd)
