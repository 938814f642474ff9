"""Where tokens go within a device: to rows sorted by expert, and back. How they get to it, exchange.py says.

`lay_out` decides which buffer row holds which assignment (a token and one of its experts); `dispatch` fills the
buffer and `combine` adds the rows back to their tokens. Both move by gathering, and each is the other's backward
pass, so that no scatter-add appears anywhere.

A buffer holds a fixed number of assignments. When a rank has more, `in_rounds` repeats the work with the next
ones: no token is ever dropped, and memory stays that of one buffer. All of this runs per device, inside shard_map.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.planning.buffers import Buffer

# Names of loops over rounds: over all, which turns once at least, and over those after the first, which mostly does not
# turn. Who counts a program's work reads them there.
EVERY_ROUND, LATER_ROUNDS = "every_round", "later_rounds"


class Layout(NamedTuple):
    """Who is where in a buffer, in one round."""

    row_MK: jax.Array  # the buffer row of each assignment; one past the last for one that is not in this round
    token_C: jax.Array  # the token in each buffer row; M for an empty row
    assignment_C: jax.Array  # the flat assignment (token * K + choice) in each buffer row; M * K for an empty row
    sizes_E: jax.Array  # rows of each group, a multiple of the block


class Sorted(NamedTuple):
    """Assignments sorted by local expert, those of other ranks last."""

    order_A: jax.Array  # flat assignments in sorted order
    rank_MK: jax.Array  # the position of each assignment in that order
    starts_E: jax.Array  # where each expert's assignments begin; one entry more, the end of the last
    expert_MK: jax.Array  # local expert, or the number of local experts for a foreign one


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


def rows_or_zero(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] along the first dimension; zero where the index is one past the end."""
    return x.at[index].get(mode="fill", fill_value=0)


def sum_rows(rows_CD: jax.Array, row_MK: jax.Array) -> jax.Array:
    """[M, D]: for each token the sum over its rows, in FP32; a row one past the end is zero."""
    parts = [rows_or_zero(rows_CD, row_MK[:, k]).astype(jnp.float32) for k in range(row_MK.shape[1])]
    return sum(parts[1:], parts[0]).astype(rows_CD.dtype)


@jax.custom_vjp
def dispatch(x_MD: jax.Array, layout: Layout) -> jax.Array:
    """Buffer rows [C, D]: each the token that the layout puts there, zero where it puts none."""
    return rows_or_zero(x_MD, layout.token_C)


@jax.custom_vjp
def combine(rows_CD: jax.Array, layout: Layout) -> jax.Array:
    """[M, D]: for each token the sum over its rows in the buffer."""
    return sum_rows(rows_CD, layout.row_MK)


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
    return rows_or_zero(weights_MK.reshape(-1), layout.assignment_C)


dispatch_weights.defvjp(
    lambda weights_MK, layout: (dispatch_weights(weights_MK, layout), layout),
    lambda layout, d_C: (rows_or_zero(d_C, layout.row_MK), None),
)


# (differentiable, constants, round_index) -> (y, a tree of counts)
Round = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]


def in_rounds(
    one_round: Round, operands: Any, constants: Any, rounds: jax.Array, *, recompute: bool
) -> tuple[jax.Array, Any]:
    """The sums of what `one_round(operands, constants, r)` returns over r = 0 .. rounds - 1.

    Round 0 is ordinary code, which keeps for its backward pass what it likes. Later ones run in a loop with a traced
    trip count, zero when the load is balanced, whose backward pass computes each of them again. The counts have no
    gradient.

    recompute: round 0 is computed again too, as the layer around it would be, and runs in the loop: one copy of the
      code where there would be two, and one where there would be eight in a journey of two legs.
    """
    if recompute:
        shapes = jax.eval_shape(one_round, operands, constants, jnp.int32(0))
        zeros = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes)
        return _rounds_from(0, one_round, zeros, operands, constants, rounds)
    first = one_round(operands, constants, jnp.int32(0))
    later = _rounds_from(1, one_round, jax.tree.map(jnp.zeros_like, first), operands, constants, rounds)
    return jax.tree.map(jnp.add, first, later)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounds_from(start: int, one_round: Round, zeros: Any, operands: Any, constants: Any, rounds: jax.Array) -> Any:
    add = lambda r, sums: jax.tree.map(jnp.add, sums, one_round(operands, constants, r))  # noqa: E731
    return _loop(start, rounds, add, zeros)


def _rounds_from_fwd(start: int, one_round: Round, zeros, operands, constants, rounds):
    return _rounds_from(start, one_round, zeros, operands, constants, rounds), (operands, constants, rounds)


def _rounds_from_bwd(start: int, one_round: Round, kept, dsums: Any):
    operands, constants, rounds = kept

    def add_gradient(r, total):
        _, pull, _ = jax.vjp(lambda ops: one_round(ops, constants, r), operands, has_aux=True)
        return jax.tree.map(jnp.add, total, pull(dsums[0])[0])

    gradients = _loop(start, rounds, add_gradient, jax.tree.map(jnp.zeros_like, operands))
    return None, gradients, None, None


def _loop(start: int, rounds: jax.Array, body: Callable[[jax.Array, Any], Any], first: Any) -> Any:
    with jax.named_scope(LATER_ROUNDS if start else EVERY_ROUND):
        return lax.fori_loop(start, rounds, body, first)


_rounds_from.defvjp(_rounds_from_fwd, _rounds_from_bwd)
