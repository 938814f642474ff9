"""The mixture of experts: routed ones, reached by dispatch, and a shared one beside them [V3 §2.1.2]."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from dsjax.config import DispatchConfig, ModelConfig
from dsjax.model import dispatch as travel
from dsjax.model.layers import SwiGLU, weight
from dsjax.model.routing import Choice, route, sequence_balance_loss
from dsjax.numerics.contraction import Weight, Working
from dsjax.numerics.grouped_matmul import Groups
from dsjax.numerics.linear import linear, swiglu_linear
from dsjax.numerics.recipe import Recipe
from dsjax.sharding import BATCH, gather


@dataclass(frozen=True)
class Execution:
    """How the model is run, as opposed to what it computes: results differ by the rounding of `recipe` at most."""

    mesh: Mesh
    recipe: Recipe
    dispatch: DispatchConfig = DispatchConfig()
    remat: str = "none"

    @property
    def dispatch_form(self) -> str:
        """The dispatch form that runs: "auto" is "local" on one expert rank and "all_gather" on more."""
        if self.dispatch.form != "auto":
            return self.dispatch.form
        return "local" if self.mesh.shape["expert"] == 1 else "all_gather"


class RoutingStats(NamedTuple):
    """What a MoE layer tells of a batch."""

    load_E: jax.Array  # assignments to each expert over the whole batch, FP32
    balance_loss: jax.Array  # mean over sequences, times aux_loss_alpha
    dropped: jax.Array  # assignments that no expert computed; always 0, and counted rather than assumed
    rounds: jax.Array  # rounds of the rank that needed most


class RouterBias(nnx.Variable):
    """The bias that only chooses: state, never seen by the optimizer."""


class Gate(nnx.Module):
    """Router weights [D, E] and, for "noaux_tc", the load-balancing bias."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        experts = config.n_routed_experts
        self.weight = weight(rngs, (config.hidden_size, experts), ("embed", "router"), config.initializer_range)
        biased = config.topk_method == "noaux_tc"
        self.e_score_correction_bias = (
            RouterBias(jnp.zeros((experts,), jnp.float32), axes=("router",)) if biased else None
        )


class Experts(nnx.Module):
    """The weights of all routed experts."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        std = config.initializer_range
        self.gate_proj = weight(rngs, (experts, hidden, width), ("expert", "embed", "mlp"), std)
        self.up_proj = weight(rngs, (experts, hidden, width), ("expert", "embed", "mlp"), std)
        self.down_proj = weight(rngs, (experts, width, hidden), ("expert", "mlp", "embed"), std)


class ExpertWeights(NamedTuple):
    """One entry for each matrix of the routed experts: the arrays, or their PartitionSpecs."""

    gate_EDF: Any
    up_EDF: Any
    down_EFD: Any


EMBED = ExpertWeights(1, 1, 2)  # their dimension that is cut over fsdp


def expert_specs(weights: ExpertWeights) -> ExpertWeights:
    """How they enter shard_map, each as it lives on the mesh."""

    def one(weight: Weight, dim: int) -> Any:
        spec: Any = PartitionSpec("expert", *[None] * (dim - 1), "fsdp")
        scales: Any = PartitionSpec("expert")
        return Working(spec, spec, scales) if isinstance(weight, Working) else spec

    return ExpertWeights(*map(one, weights, EMBED))


class MoE(nnx.Module):
    """Routed experts plus the shared expert; the shared one has weight 1 and is not scaled."""

    def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs):
        self.gate = Gate(config, rngs)
        self.experts = Experts(config, rngs)
        width, std = config.shared_intermediate_size, config.initializer_range
        self.shared_experts = SwiGLU(config.hidden_size, width, std, execution.recipe, rngs) if width else None
        self.config, self.execution = config, execution

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, RoutingStats]:
        """[B, T, D] -> [B, T, D] and what the router did."""
        experts, bias = self.experts, self.gate.e_score_correction_bias
        matrices = (experts.gate_proj, experts.up_proj, experts.down_proj)
        weights = ExpertWeights(*(matrix.get_value() for matrix in matrices))
        y_BTD, stats = routed_experts(
            x_BTD, self.gate.weight[...], None if bias is None else bias[...], weights, self.config, self.execution
        )
        return y_BTD if self.shared_experts is None else y_BTD + self.shared_experts(x_BTD), stats


def routed_experts(
    x_BTD: jax.Array,
    router_DE: jax.Array,
    bias_E: jax.Array | None,
    weights: ExpertWeights,
    config: ModelConfig,
    execution: Execution,
) -> tuple[jax.Array, RoutingStats]:
    """Routes every token and adds up its experts' outputs; one shard_map over the whole mesh."""

    def local(x_BTD, router_DE, bias_E, weights):
        choice = route(checkpoint_name(router_logits(x_BTD, router_DE), "router"), bias_E, config)
        y_MD, dropped, rounds = _exchange(x_BTD, choice, _gather_fsdp(weights, execution.mesh), execution)
        experts_1 = jnp.arange(config.n_routed_experts)[None]
        load_E = jnp.sum(choice.experts_BTK.reshape(-1, 1) == experts_1, axis=0, dtype=jnp.float32)
        balance = jnp.mean(sequence_balance_loss(choice.scores_BTE, config))
        per_device = jax.tree.map(lambda s: s[None], (load_E, balance, dropped, rounds))
        return y_MD.reshape(x_BTD.shape), per_device

    bias_spec = None if bias_E is None else PartitionSpec()
    y_BTD, (load_XE, balance_X, dropped_X, rounds_X) = jax.shard_map(
        local,
        mesh=execution.mesh,
        in_specs=(BATCH, PartitionSpec(), bias_spec, expert_specs(weights)),
        out_specs=(BATCH, BATCH),
        check_vma=False,
    )(x_BTD, router_DE, bias_E, weights)
    stats = RoutingStats(jnp.sum(load_XE, 0), jnp.mean(balance_X), jnp.sum(dropped_X), jnp.max(rounds_X))
    return y_BTD, stats


def router_logits(x_BTD: jax.Array, router_DE: jax.Array) -> jax.Array:
    """[B, T, E], in FP32 whatever the recipe."""
    wide = (x_BTD.astype(jnp.float32), router_DE.astype(jnp.float32))
    return jnp.einsum("btd,de->bte", *wide, precision=lax.Precision.HIGHEST)


def _gather_fsdp(weights: ExpertWeights, mesh: Mesh) -> ExpertWeights:
    """This rank's experts, whole. The backward pass of the gather is the reduce-scatter of their gradients."""

    def one(weight: Weight, dim: int) -> Weight:
        if not isinstance(weight, Working):
            return gather(weight, ("fsdp",), dim, mesh)
        return Working(
            _gather_later(weight.master, dim, mesh), gather(weight.values, ("fsdp",), dim, mesh), weight.scale
        )

    return ExpertWeights(*map(one, weights, EMBED))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_later(master: jax.Array, dim: int, mesh: Mesh) -> jax.Array:
    """The shape of a gathered master weight that nothing reads, for its gradient to come back through."""
    whole = list(master.shape)
    whole[dim] *= mesh.shape["fsdp"]
    return jnp.zeros(whole, master.dtype)


def _gather_later_bwd(dim: int, mesh: Mesh, _, gradient: jax.Array) -> tuple[jax.Array]:
    if mesh.shape["fsdp"] > 1:
        gradient = lax.psum_scatter(gradient, "fsdp", scatter_dimension=dim, tiled=True)
    return (gradient,)


_gather_later.defvjp(lambda master, dim, mesh: (_gather_later(master, dim, mesh), None), _gather_later_bwd)


def _exchange(
    x_BTD: jax.Array, choice: Choice, weights: ExpertWeights, execution: Execution
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(y [M, D], assignments that no round of this rank computed, rounds), by the dispatch form in force."""
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    experts_MK = choice.experts_BTK.reshape(len(x_MD), -1)
    weights_MK = choice.weights_BTK.reshape(len(x_MD), -1)
    recipe, capacity = execution.recipe, execution.dispatch.capacity_factor
    if execution.dispatch_form == "local":
        return _own_experts(x_MD, experts_MK, weights_MK, weights, 1, 0, recipe, capacity)
    # all_gather: every rank of the expert axis sees all their tokens, computes its own experts, and the sums
    # return by reduce-scatter. Cheaper than sending each token to its ranks while there are fewer ranks than K.
    ranks = execution.mesh.shape["expert"]
    x_MD = travel.gather_tokens(x_MD, recipe)
    experts_MK, weights_MK = (gather(a, ("expert",), 0, execution.mesh) for a in (experts_MK, weights_MK))
    rank = lax.axis_index("expert")
    y_MD, dropped, rounds = _own_experts(x_MD, experts_MK, weights_MK, weights, ranks, rank, recipe, capacity)
    return travel.scatter_sums(y_MD, recipe), dropped, rounds


def _own_experts(
    x_MD: jax.Array,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    weights: ExpertWeights,
    ranks: int,
    rank: jax.Array | int,
    recipe: Recipe,
    capacity_factor: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(y [M, D] of the experts that this rank owns, assignments that no round computed, rounds)."""
    masters, copies = _taken_apart(weights)
    count = len(masters.gate_EDF)
    tokens, choices = experts_MK.shape
    buffer = travel.make_buffer(tokens, choices, count, ranks, capacity_factor)
    by_expert = travel.sort_assignments(experts_MK, rank * count, count)

    def one_round(operands, constants, r):
        (x_MD, weights_MK, masters), (by_expert, copies) = operands, constants
        weights = _put_together(masters, copies)
        layout = travel.lay_out(by_expert, buffer, r)
        rows_CD = travel.dispatch(x_MD, layout)
        weights_C = travel.dispatch_weights(weights_MK, layout)
        return travel.combine(_feed_forward(rows_CD, weights_C, layout.sizes_E, weights, buffer, recipe), layout)

    operands, constants = (x_MD, weights_MK, masters), (by_expert, copies)
    if buffer.assignments >= tokens * min(choices, count):  # everything fits, whatever the routing
        y_MD, rounds = one_round(operands, constants, jnp.int32(0)), jnp.int32(1)
    else:
        rounds = travel.rounds_needed(by_expert, buffer)
        y_MD = travel.in_rounds(one_round, operands, constants, rounds)
    placed = lambda r: jnp.sum(travel.lay_out(by_expert, buffer, r).row_MK < buffer.rows, dtype=jnp.int32)  # noqa: E731
    computed = lax.fori_loop(1, rounds, lambda r, count: count + placed(r), placed(jnp.int32(0)))
    return y_MD, by_expert.starts_E[-1] - computed, rounds.astype(jnp.float32)


def _taken_apart(weights: ExpertWeights) -> tuple[ExpertWeights, ExpertWeights]:
    """(what has gradients, what has none: working copies, None where there is none)."""
    is_working = [isinstance(weight, Working) for weight in weights]
    masters = [weight.master if known else weight for weight, known in zip(weights, is_working, strict=True)]
    copies = [
        (weight.values, weight.scale) if known else None for weight, known in zip(weights, is_working, strict=True)
    ]
    return ExpertWeights(*masters), ExpertWeights(*copies)


def _put_together(masters: ExpertWeights, copies: ExpertWeights) -> ExpertWeights:
    together = lambda master, copy: master if copy is None else Working(master, *copy)  # noqa: E731
    return ExpertWeights(*map(together, masters, copies))


def _feed_forward(
    rows_CD: jax.Array,
    weights_C: jax.Array,
    sizes_E: jax.Array,
    weights: ExpertWeights,
    buffer: travel.Buffer,
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
