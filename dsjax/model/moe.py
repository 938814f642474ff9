"""The mixture of experts: routed ones, reached by dispatch, and a shared one beside them [V3 §2.1.2]."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from dsjax.config import ConfigError, DispatchConfig, ModelConfig
from dsjax.model.exchange import all_to_all, gather_tokens, plan_legs, scatter_sums
from dsjax.model.experts import ExpertWeights, Tally, expert_specs, few_tokens, gather_fsdp, own_experts, suits_few
from dsjax.model.layers import SwiGLU, weight
from dsjax.model.routing import Choice, route, sequence_balance_loss
from dsjax.numerics.recipe import Recipe
from dsjax.planning import layout
from dsjax.planning.buffers import buffer_for, make_buffer
from dsjax.sharding import BATCH, gather


@dataclass(frozen=True)
class Execution:
    """How the model is run, as opposed to what it computes: results differ by the rounding of `recipe` at most."""

    mesh: Mesh
    recipe: Recipe
    dispatch: DispatchConfig = DispatchConfig()
    remat: str = "none"
    # For inference: layers one after the other, each with arrays of its own, instead of scanned; on CPUs a scan copies
    # every layer's weights. `transformer.unstack` makes such parameters.
    unrolled: bool = False
    few_tokens: bool = False  # for inference: batches of a few tokens take their experts' weights without sorting
    tells_routes: bool = False  # RoutingStats have every token's experts

    def dispatch_form(self, model: ModelConfig) -> str:
        """The dispatch form that runs; "auto" is what moves the fewest bytes."""
        return layout.dispatch_form(model, self.dispatch, self.mesh.shape["expert"])


class RoutingStats(NamedTuple):
    """What a MoE layer tells of a batch."""

    load_E: jax.Array  # assignments to each expert over the whole batch, FP32
    balance_loss: jax.Array  # mean over sequences, times aux_loss_alpha
    dropped: jax.Array  # assignments that no expert computed; always 0, and counted rather than assumed
    rounds: jax.Array  # buffers full of the rank that needed most
    far: jax.Array  # copies of tokens sent to other expert ranks; in two levels, to other nodes
    near: jax.Array  # in two levels, copies sent on within a node
    experts_BTK: jax.Array | None = None  # where Execution.tells_routes


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


class MoE(nnx.Module):
    """Routed experts plus the shared expert; the shared one has weight 1 and is not scaled."""

    def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs):
        self.gate = Gate(config, rngs)
        self.experts = Experts(config, rngs)
        width, std = config.shared_intermediate_size, config.initializer_range
        self.shared_experts = SwiGLU(config.hidden_size, width, std, execution.recipe, rngs) if width else None
        self.config, self.execution = config, execution

    def __call__(self, x_BTD: jax.Array, given_BTK: jax.Array | None = None) -> tuple[jax.Array, RoutingStats]:
        """[B, T, D] -> [B, T, D] and what the router did; `given_BTK` as of `route`."""
        experts, bias = self.experts, self.gate.e_score_correction_bias
        matrices = (experts.gate_proj, experts.up_proj, experts.down_proj)
        weights = ExpertWeights(*(matrix.get_value() for matrix in matrices))
        bias_E = None if bias is None else bias[...]
        y_BTD, stats = routed_experts(
            x_BTD, self.gate.weight[...], bias_E, weights, self.config, self.execution, given_BTK
        )
        return y_BTD if self.shared_experts is None else y_BTD + self.shared_experts(x_BTD), stats


def routed_experts(
    x_BTD: jax.Array,
    router_DE: jax.Array,
    bias_E: jax.Array | None,
    weights: ExpertWeights,
    config: ModelConfig,
    execution: Execution,
    given_BTK: jax.Array | None = None,
) -> tuple[jax.Array, RoutingStats]:
    """Routes every token and adds up its experts' outputs; one shard_map over the whole mesh."""

    def local(x_BTD, router_DE, bias_E, weights, given_BTK):
        choice = route(checkpoint_name(router_logits(x_BTD, router_DE), "router"), bias_E, config, given_BTK)
        whole = gather_fsdp(weights, execution.recipe, execution.mesh)
        y_MD, tally = _in_chunks(x_BTD, choice, whole, config, execution)
        experts_1 = jnp.arange(config.n_routed_experts)[None]
        load_E = jnp.sum(choice.experts_BTK.reshape(-1, 1) == experts_1, axis=0, dtype=jnp.float32)
        balance = jnp.mean(sequence_balance_loss(choice, config))
        per_device = jax.tree.map(lambda s: s[None], (load_E, balance, tally))
        return y_MD.reshape(x_BTD.shape), per_device, choice.experts_BTK if execution.tells_routes else None

    bias_spec, given_spec = None if bias_E is None else PartitionSpec(), None if given_BTK is None else BATCH
    y_BTD, (load_XE, balance_X, tally), experts_BTK = jax.shard_map(
        local,
        mesh=execution.mesh,
        in_specs=(BATCH, PartitionSpec(), bias_spec, expert_specs(weights), given_spec),
        out_specs=(BATCH, BATCH, BATCH),
        check_vma=False,
    )(x_BTD, router_DE, bias_E, weights, given_BTK)
    assignments = x_BTD.shape[0] * x_BTD.shape[1] * config.num_experts_per_tok
    total = jax.tree.map(lambda count_X: jnp.sum(count_X.astype(jnp.float32)), tally)
    rounds = jnp.max(tally.rounds).astype(jnp.float32)
    dropped = assignments - jnp.sum(tally.computed)
    sums = (jnp.sum(load_XE, 0), jnp.mean(balance_X), dropped, rounds, total.far, total.near)
    return y_BTD, RoutingStats(*sums, experts_BTK)


def router_logits(x_BTD: jax.Array, router_DE: jax.Array) -> jax.Array:
    """[B, T, E], in FP32 whatever the recipe."""
    wide = (x_BTD.astype(jnp.float32), router_DE.astype(jnp.float32))
    return jnp.einsum("btd,de->bte", *wide, precision=lax.Precision.HIGHEST)


def _in_chunks(
    x_BTD: jax.Array, choice: Choice, weights: ExpertWeights, config: ModelConfig, execution: Execution
) -> tuple[jax.Array, Tally]:
    """(y [M, D], what this rank did): this device's tokens, `dispatch.chunks` parts one after the other."""
    count = execution.dispatch.chunks
    per_token = (x_BTD, choice.experts_BTK, choice.weights_BTK)
    tokens = x_BTD.shape[0] * x_BTD.shape[1]
    if tokens % count:
        raise ConfigError(
            f"dispatch.chunks = {count} does not divide the {tokens} tokens that each device has of a microbatch:"
            " choose a divisor"
        )
    chunks = [a.reshape(count, tokens // count, a.shape[-1]) for a in per_token]

    def run(chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, Tally]:
        x_MD, experts_MK, weights_MK = chunk
        return _exchange(x_MD, experts_MK, weights_MK, weights, config, execution)

    if count == 1:
        return run(tuple(a[0] for a in chunks))
    # Else the layer, computed again, would keep what every chunk needs.
    one = jax.checkpoint(run) if execution.remat == "full" else run
    _, (y, tally) = lax.scan(lambda _, chunk: (None, one(chunk)), None, tuple(chunks))
    sums = jax.tree.map(lambda counts: jnp.sum(counts, 0), tally)
    return y.reshape(tokens, -1), sums._replace(rounds=jnp.max(tally.rounds))


def _exchange(
    x_MD: jax.Array,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    weights: ExpertWeights,
    config: ModelConfig,
    execution: Execution,
) -> tuple[jax.Array, Tally]:
    """(y [M, D], what this rank did), by the dispatch form in force."""
    recipe, dispatch = execution.recipe, execution.dispatch
    ranks, experts = execution.mesh.shape["expert"], config.n_routed_experts // execution.mesh.shape["expert"]
    form, (tokens, choices) = execution.dispatch_form(config), experts_MK.shape
    recompute = execution.remat == "full"
    if form == "all_to_all":
        is_ragged = execution.mesh.devices.flat[0].platform != "cpu"
        legs = plan_legs(config, dispatch, ranks, tokens, is_ragged=is_ragged)
        room = dispatch.capacity_factor * tokens * choices
        buffer = buffer_for(room, legs[-1].rows, choices, experts)
        return all_to_all(x_MD, experts_MK, weights_MK, weights, legs, buffer, recipe, recompute=recompute)
    if form == "local":
        if execution.few_tokens and suits_few(tokens, choices, experts, recipe):
            return few_tokens(x_MD, experts_MK, weights_MK, weights, 0, recipe)
        buffer = make_buffer(tokens, choices, experts, 1, dispatch.capacity_factor)
        return own_experts(x_MD, experts_MK, weights_MK, weights, buffer, 0, recipe, recompute=recompute)
    x_MD = gather_tokens(x_MD, recipe)
    experts_MK, weights_MK = (gather(a, ("expert",), 0, execution.mesh) for a in (experts_MK, weights_MK))
    rank = lax.axis_index("expert")
    if execution.few_tokens and suits_few(ranks * tokens, choices, experts, recipe):
        y_MD, tally = few_tokens(x_MD, experts_MK, weights_MK, weights, rank * experts, recipe)
    else:
        buffer = make_buffer(ranks * tokens, choices, experts, ranks, dispatch.capacity_factor)
        y_MD, tally = own_experts(x_MD, experts_MK, weights_MK, weights, buffer, rank, recipe, recompute=recompute)
    return scatter_sums(y_MD, recipe), tally._replace(far=jnp.int32((ranks - 1) * tokens))
