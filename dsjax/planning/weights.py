"""Every weight of a model by name: its shape, its logical axes and how many devices share it. No JAX.

The names, shapes and axes are those of the parameter tree that model/transformer.py declares; a test holds both
against each other.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dsjax.config import ModelConfig
from dsjax.planning.placement import cuts


@dataclass(frozen=True)
class Weight:
    """One array of the parameter tree; layers of a kind are stacked along the first dimension."""

    name: str  # its path in the tree
    part: str  # the field of counts.Parameters that counts it
    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def layers(self) -> int:
        """How many layers are stacked in it."""
        return self.shape[0] if self.axes[0] == "layers" else 1

    @property
    def is_expert(self) -> bool:
        """Whether it is a matrix of the routed experts."""
        return "expert" in self.axes

    @property
    def is_quantised(self) -> bool:
        """Whether FP8 recipes quantise it: projections and experts, but not MTP's eh_proj."""
        return "_proj" in self.name and "eh_proj" not in self.name and not self.name.endswith(".bias")

    def placed(self, sizes: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
        """The mesh axes that cut each dimension; raises ConfigError for a dimension that `sizes` does not divide."""
        return cuts(self.axes, self.shape, sizes, self.name)

    def ways(self, sizes: Mapping[str, int]) -> int:
        """Into how many parts the mesh cuts it."""
        return math.prod(sizes[axis] for dim in self.placed(sizes) for axis in dim)

    def per_device(self, sizes: Mapping[str, int]) -> int:
        """How many of its numbers a device holds."""
        return self.size // self.ways(sizes)


@functools.lru_cache
def weights(model: ModelConfig) -> tuple[Weight, ...]:
    """All weights of `model`, in the order in which a token meets them; without routing biases, which are state."""
    return tuple(_weights(model))


def _weights(model: ModelConfig) -> Iterator[Weight]:
    hidden, vocab = model.hidden_size, model.vocab_size
    yield Weight("embed_tokens", "embedding", (vocab, hidden), ("vocab", "embed"))
    if model.first_k_dense_replace:
        yield from _stacked("dense_layers", model.first_k_dense_replace, _block(model, routed=False))
    if model.num_moe_layers:
        yield from _stacked("moe_layers", model.num_moe_layers, _block(model, routed=True))
    yield Weight("norm.weight", "norms", (hidden,), ("norm",))
    if not model.tie_word_embeddings:
        yield Weight("lm_head", "head", (hidden, vocab), ("embed", "vocab"))
    if model.num_nextn_predict_layers:
        yield from (Weight(f"mtp.{name}.weight", "mtp", (hidden,), ("norm",)) for name in ("enorm", "hnorm"))
        yield Weight("mtp.eh_proj.weight", "mtp", (2 * hidden, hidden), ("concat", "embed"))
        for one in _block(model, routed=True):
            yield Weight(f"mtp.block.{one.name}", "mtp", one.shape, one.axes)
        yield Weight("mtp.norm.weight", "mtp", (hidden,), ("norm",))


def _stacked(name: str, layers: int, block: Iterator[Weight]) -> Iterator[Weight]:
    for one in block:
        yield Weight(f"{name}.{one.name}", one.part, (layers, *one.shape), ("layers", *one.axes))


def _block(model: ModelConfig, *, routed: bool) -> Iterator[Weight]:
    hidden, width = model.hidden_size, model.moe_intermediate_size
    yield Weight("input_layernorm.weight", "norms", (hidden,), ("norm",))
    yield from _attention(model)
    yield Weight("post_attention_layernorm.weight", "norms", (hidden,), ("norm",))
    if not routed:
        yield from _swiglu("mlp", "dense_feed_forward", hidden, model.intermediate_size)
        return
    experts = model.n_routed_experts
    yield Weight("mlp.gate.weight", "gate", (hidden, experts), ("embed", "router"))
    for name in ("gate_proj", "up_proj"):
        yield Weight(f"mlp.experts.{name}", "routed_experts", (experts, hidden, width), ("expert", "embed", "mlp"))
    yield Weight("mlp.experts.down_proj", "routed_experts", (experts, width, hidden), ("expert", "mlp", "embed"))
    if model.n_shared_experts:
        yield from _swiglu("mlp.shared_experts", "shared_experts", hidden, model.shared_intermediate_size)


def _swiglu(name: str, part: str, hidden: int, width: int) -> Iterator[Weight]:
    for matrix in ("gate_proj", "up_proj"):
        yield Weight(f"{name}.{matrix}.weight", part, (hidden, width), ("embed", "mlp"))
    yield Weight(f"{name}.down_proj.weight", part, (width, hidden), ("mlp", "embed"))


def _attention(model: ModelConfig) -> Iterator[Weight]:
    hidden, heads, rank = model.hidden_size, model.num_attention_heads, model.kv_lora_rank

    def matrix(name: str, shape: tuple[int, int], axes: tuple[str, str], has_bias: int = False) -> Iterator[Weight]:
        yield Weight(f"self_attn.{name}.weight", "attention", shape, axes)
        if has_bias:
            yield Weight(f"self_attn.{name}.bias", "attention", shape[1:], ("bias",))

    if model.q_lora_rank is None:
        yield from matrix("q_proj", (hidden, heads * model.qk_head_dim), ("embed", "heads"))
    else:
        latent = model.q_lora_rank
        yield from matrix("q_a_proj", (hidden, latent), ("embed", "latent"), model.attention_bias)
        yield Weight("self_attn.q_a_layernorm.weight", "attention", (latent,), ("norm",))
        yield from matrix("q_b_proj", (latent, heads * model.qk_head_dim), ("latent", "heads"))
    down, up = rank + model.qk_rope_head_dim, heads * (model.qk_nope_head_dim + model.v_head_dim)
    yield from matrix("kv_a_proj_with_mqa", (hidden, down), ("embed", "latent"), model.attention_bias)
    yield Weight("self_attn.kv_a_layernorm.weight", "attention", (rank,), ("norm",))
    yield from matrix("kv_b_proj", (rank, up), ("latent", "heads"))
    yield from matrix("o_proj", (heads * model.v_head_dim, hidden), ("heads", "embed"), model.attention_bias)
