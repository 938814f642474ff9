"""The whole network: a scan over dense layers, a scan over MoE layers, and the MTP module.

`Network` is the model as pure functions over plain trees of arrays: `init` makes them, `bind` puts them back
into the modules. Modules are made under a trace only (`jit`, `eval_shape`), so that no whole array of a large
model ever exists on one device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsjax.config import ConfigError, ModelConfig
from dsjax.model.attention import MLA
from dsjax.model.cache import LatentCache, Latents
from dsjax.model.layers import Linear, RMSNorm, SwiGLU, embed, rope_at, rope_table, weight
from dsjax.model.moe import Execution, MoE, RouterBias, RoutingStats
from dsjax.numerics.contraction import Working, working_copy
from dsjax.numerics.linear import product
from dsjax.numerics.recipe import Recipe
from dsjax.sharding import BATCH, shardings

# What the backward pass finds saved; the rest of a layer is computed again. "deepseek" recomputes norms, MLA
# up-projections, RoPE and SwiGLU outputs, as the report does [V3 §3.2.3], and keeps what is costly to remake.
SAVED_NAMES = ("mla_latent", "attention", "residual", "router", "gate_up")
REMAT: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "none": lambda f: f,
    "deepseek": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)),
    "full": jax.checkpoint,
}


class Spans(NamedTuple):
    """The positions of a batch's tokens in their samples, of which a row may hold several."""

    rope: jax.Array  # their angles: [2, T, P], or [2, B, T, P] of each row
    first_BT: jax.Array | None  # where each token's sample begins; None: where its row does


class Places(NamedTuple):
    """Where new tokens stand in their sequences, and how they attend to what is cached."""

    start_B: jax.Array  # of row b they are at positions start[b], start[b] + 1, ...
    rope_2BTP: jax.Array
    absorbed: bool
    visible: int  # positions of the cache that are read


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, dense or routed."""

    def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs, *, routed: bool):
        hidden, recipe = config.hidden_size, execution.recipe
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.self_attn = MLA(config, recipe, execution.mesh, rngs)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.mlp: MoE | SwiGLU
        if routed:
            self.mlp = MoE(config, execution, rngs)
        else:
            self.mlp = SwiGLU(hidden, config.intermediate_size, config.initializer_range, recipe, rngs)
        self.mesh, self.low_precision = execution.mesh, recipe.is_fp8

    def __call__(
        self, x_BTD: jax.Array, spans: Spans, given_BTK: jax.Array | None = None
    ) -> tuple[jax.Array, RoutingStats | None]:
        with jax.named_scope("attention"):
            x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), *spans)
        return self._feed_forward(x_BTD, given_BTK)

    def cached(
        self, x_BTD: jax.Array, latents: Latents, layer: Any, places: Places
    ) -> tuple[jax.Array, Latents, jax.Array | None]:
        """The block on new tokens; the cache has the ones before, and these in the result.

        Returns:
          (x, the cache, the experts of each token where the execution tells them).
        """
        with jax.named_scope("attention"):
            y_BTD, latents = self.self_attn.cached(
                self.input_layernorm(x_BTD),
                places.rope_2BTP,
                latents,
                layer,
                places.start_B,
                absorbed=places.absorbed,
                visible=places.visible,
            )
        x_BTD, stats = self._feed_forward(x_BTD + y_BTD)
        return x_BTD, latents, None if stats is None else stats.experts_BTK

    def _feed_forward(
        self, x_BTD: jax.Array, given_BTK: jax.Array | None = None
    ) -> tuple[jax.Array, RoutingStats | None]:
        if not self.low_precision:
            x_BTD = checkpoint_name(x_BTD, "residual")
        h_BTD, stats = self.post_attention_layernorm(x_BTD), None
        with jax.named_scope("feed_forward"):
            if isinstance(self.mlp, MoE):
                y_BTD, stats = self.mlp(h_BTD, given_BTK)
            else:
                y_BTD = self.mlp(h_BTD)
        batch_sharding = jax.sharding.NamedSharding(self.mesh, BATCH)
        return lax.with_sharding_constraint(x_BTD + y_BTD, batch_sharding), stats


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs, unrolled: bool = False) -> Any:
    """One module whose every array carries a leading dimension of `count` layers, each drawn on its own; None for 0.

    `unrolled`: a list of `count` stacks of one layer.
    """
    if count == 0:
        return None
    if unrolled:
        return nnx.List([stack(make, 1, rngs) for _ in range(count)])
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    layers = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(jax.random.split(rngs.params(), count))
    is_variable = lambda v: isinstance(v, nnx.Variable)  # noqa: E731
    layers = jax.tree.map(lambda v: v.replace(axes=("layers", *v.axes)), layers, is_leaf=is_variable)
    return nnx.merge(graphdef, layers)


def scan_layers(
    layers: Any, x_BTD: jax.Array, spans: Spans, remat: str, given_LBTK: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    """Runs a stack: (x after the last layer, each layer's RoutingStats stacked); `given_LBTK` as of `route`."""
    if isinstance(layers, nnx.List):
        each = []
        for i, layer in enumerate(layers):
            given = None if given_LBTK is None else given_LBTK[i : i + 1]
            x_BTD, stats = scan_layers(layer, x_BTD, spans, remat, given)
            each.append(stats)
        return x_BTD, jax.tree.map(lambda *parts: jnp.concatenate(parts), *each)
    graphdef, state = nnx.split(layers)

    def one_layer(x_BTD, inputs):
        layer, given_BTK = inputs
        return nnx.merge(graphdef, layer)(x_BTD, spans, given_BTK)

    return lax.scan(REMAT[remat](one_layer), x_BTD, (state, given_LBTK))


def scan_cached(
    layers: Any, x_BTD: jax.Array, stacks: tuple[Latents, ...], places: Places
) -> tuple[jax.Array, tuple[Latents, ...], jax.Array | None]:
    """Runs the layers on new tokens: (x after the last one, the cache with these tokens, their experts in each layer).

    The cache is carried whole and written in place: as a scan's inputs and outputs it would be copied for every token.
    """
    if layers is None:
        return x_BTD, stacks, None
    written, routes = [], []
    for part, latents in zip(layers if isinstance(layers, nnx.List) else [layers], stacks, strict=True):
        graphdef, state = nnx.split(part)

        def one_layer(carry, inputs, graphdef=graphdef):
            layer, index = inputs
            x_BTD, latents, experts_BTK = nnx.merge(graphdef, layer).cached(*carry, index, places)
            return (x_BTD, latents), experts_BTK

        count = latents.rope_LBSH.shape[0]
        if count == 1:
            (x_BTD, latents), experts = one_layer((x_BTD, latents), (jax.tree.map(lambda a: a[0], state), 0))
            experts = jax.tree.map(lambda a: a[None], experts)
        else:
            (x_BTD, latents), experts = lax.scan(one_layer, (x_BTD, latents), (state, jnp.arange(count)))
        written.append(latents)
        routes.append(experts)
    return x_BTD, tuple(written), None if routes[0] is None else jnp.concatenate(routes)


class MTP(nnx.Module):
    """Multi-token prediction of depth 1 [V3 §2.2]; embedding and output head are the main model's."""

    def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs):
        hidden, std = config.hidden_size, config.initializer_range
        self.enorm = RMSNorm(hidden, config.rms_norm_eps)
        self.hnorm = RMSNorm(hidden, config.rms_norm_eps)
        # The embedding's half comes first, as in the released weights (eq. 21 prints the reverse).
        self.eh_proj = Linear((2 * hidden, hidden), ("concat", "embed"), std, execution.recipe.high, rngs)
        self.block = Block(config, execution, rngs, routed=True)
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        self.remat = execution.remat

    def __call__(self, next_BTD: jax.Array, hidden_BTD: jax.Array, spans: Spans):
        """From the embedding of token i+1 and the hidden state of token i, normalised states that predict i+2."""
        joined = jnp.concatenate([self.enorm(next_BTD), self.hnorm(hidden_BTD)], axis=-1)
        graphdef, state = nnx.split(self.block)

        def run(state, x_BTD):
            return nnx.merge(graphdef, state)(x_BTD, spans)

        y_BTD, stats = REMAT[self.remat](run)(state, self.eh_proj(joined))
        return self.norm(y_BTD), stats

    def cached(
        self, next_BTD: jax.Array, hidden_BTD: jax.Array, stacks: tuple[Latents, ...], places: Places
    ) -> tuple[jax.Array, tuple[Latents, ...]]:
        """`__call__` on new tokens, and the cache of the module's layer with them."""
        joined = jnp.concatenate([self.enorm(next_BTD), self.hnorm(hidden_BTD)], axis=-1)
        y_BTD, latents, _ = self.block.cached(self.eh_proj(joined), stacks[0], 0, places)
        return self.norm(y_BTD), (latents,)


class Extended(NamedTuple):
    """What a pass over new tokens gives."""

    hidden_BTD: jax.Array  # normalised, ready for the output head
    mtp_input_BTD: jax.Array  # the hidden states that MTP receives
    cache: LatentCache
    routes_LBTK: jax.Array | None  # each token's experts in every MoE layer, where Execution.tells_routes


class Outputs(NamedTuple):
    """What a forward pass gives; `hidden` states are normalised and ready for the output head."""

    hidden_BTD: jax.Array
    mtp_hidden_BTD: jax.Array | None  # position i predicts token i+2
    stats_L: RoutingStats | None  # one entry a MoE layer, MTP's last


class Transformer(nnx.Module):
    """The modules, named as in the published checkpoints."""

    def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs):
        std, hidden, vocab = config.initializer_range, config.hidden_size, config.vocab_size
        self.embed_tokens = weight(rngs, (vocab, hidden), ("vocab", "embed"), std)
        self.lm_head = None if config.tie_word_embeddings else weight(rngs, (hidden, vocab), ("embed", "vocab"), std)
        self.norm = RMSNorm(hidden, config.rms_norm_eps)

        def layers(count: int, routed: bool) -> Any:
            return stack(lambda rngs: Block(config, execution, rngs, routed=routed), count, rngs, execution.unrolled)

        self.dense_layers = layers(config.first_k_dense_replace, False)
        self.moe_layers = layers(config.num_moe_layers, True)
        self.mtp = MTP(config, execution, rngs) if config.num_nextn_predict_layers else None
        self.config, self.execution = config, execution

    def __call__(
        self,
        tokens_BT: jax.Array,
        next_BT: jax.Array | None = None,
        first_BT: jax.Array | None = None,
        given_LBTK: jax.Array | None = None,
    ) -> Outputs:
        """Hidden states of `tokens`; with the tokens that follow them (`next_BT`), MTP's as well.

        first_BT: int32, the place in its row where each token's sample begins: positions count from there, and nothing
            before it is seen. None: every row is one sample.
        given_LBTK: experts that tokens are to go to, in every MoE layer but MTP's; -1, or None: as the routers choose.
        """
        remat = self.execution.remat
        spans = Spans(rope_table(self.config, tokens_BT.shape[1]), None)
        if first_BT is not None:
            spans = Spans(rope_at(self.config, jnp.arange(tokens_BT.shape[1])[None] - first_BT), first_BT)
        x_BTD = self._embed(tokens_BT)
        stats = []
        if self.dense_layers is not None:
            x_BTD, _ = scan_layers(self.dense_layers, x_BTD, spans, remat)
        if self.moe_layers is not None:
            x_BTD, stats_L = scan_layers(self.moe_layers, x_BTD, spans, remat, given_LBTK)
            stats.append(stats_L)
        hidden_BTD = self.norm(x_BTD)
        mtp_BTD = None
        if self.mtp is not None and next_BT is not None:
            with jax.named_scope("mtp"):
                before = hidden_BTD if self.config.mtp_hidden_state == "post_norm" else x_BTD
                mtp_BTD, mtp_stats = self.mtp(self._embed(next_BT), before, spans)
            stats.append(jax.tree.map(lambda s: s[None], mtp_stats))
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stats) if stats else None
        return Outputs(hidden_BTD, mtp_BTD, joined)

    def extend(
        self,
        tokens_BT: jax.Array,
        start_B: jax.Array,
        cache: LatentCache,
        *,
        absorbed: bool,
        visible: int | None = None,
    ) -> Extended:
        """The next tokens of each row, at positions start, start + 1, ..., over a cache that has the ones before.

        Rows of different lengths share a call: what a row holds beyond its own tokens is rubbish that is written, seen
        by nobody who comes before it, and written over later. A row whose `start` is the cache's length writes nothing.
        `visible`, at least the highest position + 1, is how much of the cache is read; None: all of it.
        """
        places = self._places(tokens_BT, start_B, cache, absorbed, visible)
        x_BTD, dense, _ = scan_cached(self.dense_layers, self._embed(tokens_BT), cache.dense, places)
        x_BTD, moe, routes_LBTK = scan_cached(self.moe_layers, x_BTD, cache.moe, places)
        hidden_BTD = self.norm(x_BTD)
        mtp_input_BTD = hidden_BTD if self.config.mtp_hidden_state == "post_norm" else x_BTD
        return Extended(hidden_BTD, mtp_input_BTD, LatentCache(dense, moe, cache.mtp), routes_LBTK)

    def extend_mtp(
        self,
        next_BT: jax.Array,
        hidden_BTD: jax.Array,
        start_B: jax.Array,
        cache: LatentCache,
        *,
        absorbed: bool,
        visible: int | None = None,
    ) -> tuple[jax.Array, LatentCache]:
        """MTP's normalised states at the positions that `extend` gave `hidden` for; position i predicts token i+2.

        next_BT: the token after each position.
        """
        assert self.mtp is not None
        places = self._places(next_BT, start_B, cache, absorbed, visible)
        with jax.named_scope("mtp"):
            y_BTD, latents = self.mtp.cached(self._embed(next_BT), hidden_BTD, cache.mtp, places)
        return y_BTD, cache._replace(mtp=latents)

    def _places(
        self, tokens_BT: jax.Array, start_B: jax.Array, cache: LatentCache, absorbed: bool, visible: int | None
    ) -> Places:
        positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])[None]
        rope_2BTP = rope_at(self.config, positions_BT)
        return Places(start_B, rope_2BTP, absorbed, cache.length if visible is None else visible)

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        return embed(self.embed_tokens[...], tokens_BT, self.execution.mesh, self.execution.recipe)

    @property
    def head_DV(self) -> jax.Array:
        """The output head: its own weight, or the embedding where the two are tied."""
        return self.embed_tokens[...].T if self.lm_head is None else self.lm_head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> FP32 [..., V]; for a few positions, training uses `losses.cross_entropy`."""
        return product("...d,dv->...v", hidden, self.head_DV, self.execution.recipe, jnp.float32)


def unstack(tree: Any) -> Any:
    """Parameters or routing biases as a network with `unrolled` layers takes them: each layer an array of its own."""

    def parts(stacked: Any) -> dict[int, Any]:
        count = jax.tree.leaves(stacked)[0].shape[0]
        return {i: jax.tree.map(lambda a: a[i : i + 1], stacked) for i in range(count)}  # noqa: B023

    return {name: parts(part) if name in ("dense_layers", "moe_layers") else part for name, part in tree.items()}


def is_quantised(path: Any) -> bool:
    """Whether FP8 recipes quantise the parameter at this path of the tree: projections, experts, but not eh_proj."""
    names = [str(key.key) for key in path]
    return any("_proj" in name for name in names) and "eh_proj" not in names and names[-1] != "bias"


def with_copies(params: Any, copies: Any) -> Any:
    """`params` with its working copies in E4M3 attached; gradients are the masters'."""
    join = lambda master, copy: master if copy is None else Working(master, *copy)  # noqa: E731
    return jax.tree.map(join, params, copies)


def working_copies(params: Any, recipe: Recipe) -> Any:
    """A working copy of each parameter that the recipe quantises, None for the others."""
    return jax.tree_util.tree_map_with_path(
        lambda path, weight: working_copy(weight, recipe) if is_quantised(path) else None, params
    )


@dataclass(frozen=True)
class Network:
    """A model of one configuration as functions over plain trees (nested dicts of arrays)."""

    config: ModelConfig
    execution: Execution
    graphdef: Any
    axes: Any  # logical axes of every parameter
    shapes: Any  # jax.ShapeDtypeStruct of every parameter
    bias_shapes: Any  # and of every routing bias, which are replicated

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """(parameters, routing biases); call it inside jit with out_shardings."""
        model = Transformer(self.config, self.execution, nnx.Rngs(key))
        _, params, bias = _split(model)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(bias)

    def bind(self, params: Any, bias: Any) -> Transformer:
        """The modules holding these arrays."""
        return nnx.merge(self.graphdef, params, bias)

    def param_shardings(self) -> Any:
        """Where every parameter lives on the mesh. Raises ConfigError for an indivisible dimension."""
        return shardings(self.axes, self.shapes, self.execution.mesh)


def _split(model: Transformer) -> tuple[Any, Any, Any]:
    """(structure, parameters, routing biases)."""
    graphdef, params, bias = nnx.split(model, nnx.Param, RouterBias)  # type: ignore[misc]
    return graphdef, params, bias


def network(config: ModelConfig, execution: Execution) -> Network:
    """The network of a configuration, without allocating anything."""
    if execution.remat not in REMAT:
        raise ConfigError(f"unknown training.remat {execution.remat!r}; known are {', '.join(REMAT)}")
    abstract = nnx.eval_shape(lambda: Transformer(config, execution, nnx.Rngs(0)))
    graphdef, params, bias = _split(abstract)
    is_variable = lambda v: isinstance(v, nnx.Variable)  # noqa: E731
    axes = jax.tree.map(lambda v: v.axes, params, is_leaf=is_variable)
    return Network(
        config, execution, graphdef, nnx.to_pure_dict(axes), nnx.to_pure_dict(params), nnx.to_pure_dict(bias)
    )
