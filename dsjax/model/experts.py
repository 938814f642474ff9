"""The routed experts that live on one device: their weights, gathered, and the feed-forward of sorted rows."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from dsjax.model import dispatch as travel
from dsjax.numerics.contraction import Weight, Working, quantized, quantized_weight, rows_times
from dsjax.numerics.grouped_matmul import Groups
from dsjax.numerics.linear import linear, swiglu_linear
from dsjax.numerics.recipe import Recipe
from dsjax.planning.buffers import Buffer
from dsjax.sharding import gather


class ExpertWeights(NamedTuple):
    """One entry for each matrix of the routed experts: the arrays, or their PartitionSpecs."""

    gate_EDF: Any
    up_EDF: Any
    down_EFD: Any


EMBED = ExpertWeights(1, 1, 2)  # their dimension that is cut over fsdp
FEW_TOKENS = 32  # so many rows times a matrix still cost little more than reading it
FEW_ASSIGNMENTS = 32  # as many matrices read one after the other, as code and as time


def expert_specs(weights: ExpertWeights) -> ExpertWeights:
    """How they enter shard_map, each as it lives on the mesh."""

    def one(weight: Weight, dim: int) -> Any:
        spec: Any = PartitionSpec("expert", *[None] * (dim - 1), "fsdp")
        scales: Any = PartitionSpec("expert")
        return Working(spec, spec, scales) if isinstance(weight, Working) else spec

    return ExpertWeights(*map(one, weights, EMBED))


def gather_fsdp(weights: ExpertWeights, recipe: Recipe, mesh: Mesh) -> ExpertWeights:
    """This rank's experts, whole: in E4M3 where there is a working copy, in BF16 where they are multiplied in it.

    The backward pass of the gather is the reduce-scatter of their gradients, in FP32.
    """

    def one(weight: Weight, dim: int) -> Weight:
        if isinstance(weight, Working):
            later = gather_later(weight.master, dim, mesh)
            return Working(later, gather(weight.values, ("fsdp",), dim, mesh), weight.scale)
        if recipe.is_fp8 or recipe.dtype == weight.dtype or mesh.shape["fsdp"] == 1:
            return gather(weight, ("fsdp",), dim, mesh)
        rounded = lax.stop_gradient(weight).astype(recipe.dtype)
        return Working(gather_later(weight, dim, mesh), gather(rounded, ("fsdp",), dim, mesh), None)

    return ExpertWeights(*map(one, weights, EMBED))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_later(master: jax.Array, dim: int, mesh: Mesh) -> jax.Array:
    """The shape of a gathered master weight that nothing reads, for its gradient to come back through."""
    whole = list(master.shape)
    whole[dim] *= mesh.shape["fsdp"]
    return jnp.zeros(whole, master.dtype)


def _gather_later_bwd(dim: int, mesh: Mesh, _, gradient: jax.Array) -> tuple[jax.Array]:
    if mesh.shape["fsdp"] > 1:
        gradient = lax.psum_scatter(gradient, "fsdp", scatter_dimension=dim, tiled=True)
    return (gradient,)


gather_later.defvjp(lambda master, dim, mesh: (gather_later(master, dim, mesh), None), _gather_later_bwd)


class Tally(NamedTuple):
    """What a device did of a batch's assignments; int32."""

    computed: jax.Array  # assignments that its experts computed
    rounds: jax.Array  # buffers that they filled
    far: jax.Array  # copies of tokens that it sent to other ranks; with two levels, to other nodes
    near: jax.Array  # with two levels, those that it sent on within its node


def own_experts(
    x_MD: jax.Array,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    weights: ExpertWeights,
    buffer: Buffer,
    rank: jax.Array | int,
    recipe: Recipe,
    *,
    recompute: bool = False,
) -> tuple[jax.Array, Tally]:
    """y [M, D]: for each token the weighted sum over those of its experts that this rank owns.

    Args:
      x_MD: tokens.
      experts_MK: their experts, by number in the whole layer; those of other ranks are passed over.
      weights_MK: the routing weight of each.
      weights: the matrices of this rank's experts, whole.
      buffer: what one round holds; there are as many rounds as it takes.
      rank: place on the expert axis.
      recipe: how to multiply.
      recompute: the backward pass computes everything again, see `dispatch.in_rounds`.
    """
    masters, copies = taken_apart(weights)
    by_expert = travel.sort_assignments(experts_MK, rank * buffer.experts, buffer.experts)

    def one_round(operands, constants, r):
        (x_MD, weights_MK, masters), (by_expert, copies) = operands, constants
        weights = put_together(masters, copies)
        layout = travel.lay_out(by_expert, buffer, r)
        rows_CD = travel.dispatch(x_MD, layout)
        weights_C = travel.dispatch_weights(weights_MK, layout)
        y_MD = travel.combine(_feed_forward(rows_CD, weights_C, layout.sizes_E, weights, buffer, recipe), layout)
        computed = jnp.sum(layout.row_MK < buffer.rows, dtype=jnp.int32)
        return y_MD, Tally(computed, jnp.int32(1), jnp.int32(0), jnp.int32(0))

    operands, constants = (x_MD, weights_MK, masters), (by_expert, copies)
    if buffer.assignments >= len(x_MD) * min(experts_MK.shape[1], buffer.experts):  # all fits, whatever the routing
        return one_round(operands, constants, jnp.int32(0))
    rounds = travel.rounds_needed(by_expert, buffer)
    return travel.in_rounds(one_round, operands, constants, rounds, recompute=recompute)


def suits_few(tokens: int, choices: int, experts: int, recipe: Recipe) -> bool:
    """Whether `few_tokens` is the quicker form, and has the products that it needs."""
    has_products = recipe.native is None and recipe.accumulation == "fp32"
    return has_products and (tokens * choices <= FEW_ASSIGNMENTS or experts <= tokens * choices <= FEW_TOKENS * choices)


def few_tokens(
    x_MD: jax.Array,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    weights: ExpertWeights,
    first: jax.Array | int,
    recipe: Recipe,
) -> tuple[jax.Array, Tally]:
    """What `own_experts` computes, to rounding, for the few tokens of a decoding step; no backward pass of its own.

    Where assignments are fewer than experts, each reads its expert's matrices; else every expert takes every token, for
    all are read anyway, and the routing weight of what was not chosen is 0.

    first: the number of this rank's first expert in the layer.
    """
    count = jax.tree.leaves(weights)[0].shape[0]
    local_MK = experts_MK - first
    is_own_MK = (local_MK >= 0) & (local_MK < count)
    weights_MK = jnp.where(is_own_MK, weights_MK, 0.0)
    tally = Tally(jnp.sum(is_own_MK, dtype=jnp.int32), jnp.int32(1), jnp.int32(0), jnp.int32(0))

    def one_expert(expert: jax.Array | int, x_MD: jax.Array, weight_M: jax.Array) -> jax.Array:
        gate, up, down = (jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, expert, 0, False), w) for w in weights)
        rows = partial(_rows, recipe=recipe.after_dispatch)
        hidden_MF = jax.nn.silu(rows(x_MD, gate)) * rows(x_MD, up)
        # The sum over experts is FP32, as after dispatch.
        y_MD = _rows(hidden_MF * weight_M[:, None].astype(hidden_MF.dtype), down, recipe.before_combine)
        return y_MD.astype(jnp.float32)

    if experts_MK.size < count:
        own_MK = jnp.clip(local_MK, 0, count - 1)
        each = [
            sum(one_expert(own_MK[m, k], x_MD[m : m + 1], weights_MK[m : m + 1, k]) for k in range(experts_MK.shape[1]))
            for m in range(len(x_MD))
        ]
        return jnp.concatenate(each).astype(recipe.dtype), tally
    is_chosen_MKE = local_MK[..., None] == jnp.arange(count)[None, None]
    weights_EM = jnp.sum(jnp.where(is_chosen_MKE, weights_MK[..., None], 0.0), axis=1).T

    def add(expert: jax.Array, y_MD: jax.Array) -> jax.Array:
        return y_MD + one_expert(expert, x_MD, weights_EM[expert])

    if count <= FEW_ASSIGNMENTS:
        y_MD = jnp.sum(jnp.stack([one_expert(e, x_MD, weights_EM[e]) for e in range(count)]), axis=0)
    else:
        y_MD = lax.fori_loop(0, count, add, jnp.zeros(x_MD.shape, jnp.float32))
    return y_MD.astype(recipe.dtype), tally


def _rows(x_MD: jax.Array, weight: Weight, recipe: Recipe) -> jax.Array:
    operand = quantized(x_MD.astype(recipe.dtype), recipe.activation, -1, None, recipe)
    return rows_times(operand, quantized_weight(weight, recipe.weight, -2, recipe), None, recipe, transposed=False)


def taken_apart(weights: ExpertWeights) -> tuple[ExpertWeights, ExpertWeights]:
    """(what has gradients, what has none: working copies, None where there is none)."""
    is_working = [isinstance(weight, Working) for weight in weights]
    masters = [weight.master if known else weight for weight, known in zip(weights, is_working, strict=True)]
    copies = [
        (weight.values, weight.scale) if known else None for weight, known in zip(weights, is_working, strict=True)
    ]
    return ExpertWeights(*masters), ExpertWeights(*copies)


def put_together(masters: ExpertWeights, copies: ExpertWeights) -> ExpertWeights:
    """The way back from `taken_apart`."""
    together = lambda master, copy: master if copy is None else Working(master, *copy)  # noqa: E731
    return ExpertWeights(*map(together, masters, copies))


def _feed_forward(
    rows_CD: jax.Array,
    weights_C: jax.Array,
    sizes_E: jax.Array,
    weights: ExpertWeights,
    buffer: Buffer,
    recipe: Recipe,
) -> jax.Array:
    """Each row through its expert's SwiGLU, scaled by its routing weight.

    The weight is applied before the down projection, so that the backward pass needs neither its output nor
    the combine again.
    """
    groups = Groups(sizes_E, buffer.block)
    gate_CF = linear(rows_CD, weights.gate_EDF, recipe.after_dispatch, groups)
    up_CF = linear(rows_CD, weights.up_EDF, recipe.after_dispatch, groups)
    return swiglu_linear(gate_CF, up_CF, weights.down_EFD, recipe.before_combine, groups, weights_C)
