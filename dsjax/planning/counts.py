"""Closed-form counts of a model: parameters, training FLOPs, cache bytes. Dataclasses and integers only, no JAX.

One rule for each part, so that the sums can be checked against a published figure by hand.
"""

import dataclasses
from dataclasses import dataclass

from dsjax.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """How many numbers each part of a model holds, over all its layers, and what one token passes through.

    Embeddings tied to the head count once, as the embedding.

    `total` is what a published checkpoint counts: everything but the MTP module, the routing biases included.
    The biases are state, not weights: `trainable` leaves them out.
    """

    embedding: int
    head: int
    attention: int  # with the norms of its latents and, where it has them, biases
    norms: int  # two a layer and the last one
    dense_feed_forward: int
    routed_experts: int
    shared_experts: int
    gate: int
    routing_bias: int
    mtp: int  # what MTP adds, its routing biases included; it shares embedding and head
    active: int  # of `total`, for one token: the chosen experts instead of all, embedding and head included
    mtp_active: int  # for one token through the MTP module, the shared embedding and head included

    @property
    def total(self) -> int:
        parts = (self.embedding, self.head, self.attention, self.norms, self.dense_feed_forward)
        return sum(parts) + self.routed_experts + self.shared_experts + self.gate + self.routing_bias

    @property
    def trainable(self) -> int:
        """What the optimizer updates, without MTP."""
        return self.total - self.routing_bias


def parameters(model: ModelConfig) -> Parameters:
    """Counts `model` part by part; the sums equal the published ones exactly."""
    layers, moe_layers, hidden = model.num_hidden_layers, model.num_moe_layers, model.hidden_size
    vocabulary = model.vocab_size * hidden
    expert = _swiglu(hidden, model.moe_intermediate_size)
    bias = _routing_bias(model)
    gate = model.n_routed_experts * hidden
    shared = _swiglu(hidden, model.shared_intermediate_size)
    moe = model.n_routed_experts * expert + shared + gate + bias
    unused = (model.n_routed_experts - model.num_experts_per_tok) * expert

    block = _attention(model) + 2 * hidden + moe
    # enorm, hnorm and the norm before the shared head; the projection of [embedding, hidden]
    mtp = model.num_nextn_predict_layers * (block + 3 * hidden + 2 * hidden * hidden)
    counts = Parameters(
        embedding=vocabulary,
        head=0 if model.tie_word_embeddings else vocabulary,
        attention=layers * _attention(model),
        norms=layers * 2 * hidden + hidden,
        dense_feed_forward=model.first_k_dense_replace * _swiglu(hidden, model.intermediate_size),
        routed_experts=moe_layers * model.n_routed_experts * expert,
        shared_experts=moe_layers * shared,
        gate=moe_layers * gate,
        routing_bias=moe_layers * bias,
        mtp=mtp,
        active=0,
        mtp_active=model.num_nextn_predict_layers * (mtp - unused + (2 - model.tie_word_embeddings) * vocabulary),
    )
    return dataclasses.replace(counts, active=counts.total - moe_layers * unused)


def flops_per_token(model: ModelConfig, sequence_length: int, *, causal: bool = True, mtp: bool = False) -> float:
    """FLOPs to train on one token: forward and backward (twice the forward), without recomputation.

    A multiply and an add are two; looking up an embedding is free. Attention is counted in its expanded form;
    `causal` counts the pairs that are attended, otherwise all. `mtp` adds the MTP module and its pass through
    the head. 250.46e9 for DeepSeek-V3 at 4,096 tokens.
    """
    return sum(flops_by_part(model, sequence_length, causal=causal, mtp=mtp).values())


def flops_by_part(
    model: ModelConfig, sequence_length: int, *, causal: bool = True, mtp: bool = False
) -> dict[str, float]:
    """The parts of `flops_per_token`; with `mtp`, the MTP module's are among them."""
    hidden, depth = model.hidden_size, model.num_nextn_predict_layers if mtp else 0
    pairs = (sequence_length + 1) / 2 if causal else sequence_length
    layers, moe_layers = model.num_hidden_layers + depth, model.num_moe_layers + depth
    width = model.moe_intermediate_size
    multiplies = {
        "attention projections": layers * (_attention(model) - _latent_norms(model) - _biases(model)),
        "attention core": layers * pairs * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim),
        "dense feed-forward": model.first_k_dense_replace * _swiglu(hidden, model.intermediate_size),
        "routed experts": moe_layers * _swiglu(hidden, model.num_experts_per_tok * width),
        "shared experts": moe_layers * _swiglu(hidden, model.shared_intermediate_size),
        "gate": moe_layers * model.n_routed_experts * hidden,
        "head": (1 + depth) * model.vocab_size * hidden,
        "MTP projection": depth * 2 * hidden**2,
    }
    return {part: 3 * 2 * float(count) for part, count in multiplies.items()}


def kv_cache_bytes_per_token(model: ModelConfig, bytes_per_number: int = 2) -> int:
    """What the latent cache of MLA keeps of one token in all layers: the latent and the shared rotary key."""
    return model.num_hidden_layers * (model.kv_lora_rank + model.qk_rope_head_dim) * bytes_per_number


def dense_equivalent(model: ModelConfig) -> ModelConfig:
    """A dense model with the active parameters of `model`, to time the cost of routing.

    Every layer gets the same feed-forward: the mean of what a token passes through in `model` (its dense layers,
    chosen and shared experts, gates), to the nearest multiple of 8. MTP is off, as its block is always routed.
    """
    dense = model.first_k_dense_replace * _swiglu(model.hidden_size, model.intermediate_size)
    routed = model.num_moe_layers * _active_feed_forward(model)
    width = (dense + routed) / (model.num_hidden_layers * _swiglu(model.hidden_size, 1))
    return dataclasses.replace(
        model,
        intermediate_size=8 * max(1, round(width / 8)),
        first_k_dense_replace=model.num_hidden_layers,
        num_nextn_predict_layers=0,
    )


def _swiglu(hidden: int, width: int) -> int:
    return 3 * hidden * width


def _latent_norms(model: ModelConfig) -> int:
    return model.kv_lora_rank + (model.q_lora_rank or 0)


def _attention(model: ModelConfig) -> int:
    """The projections of MLA and the norms of its latents, of one layer."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    if model.q_lora_rank is None:
        query = hidden * heads * model.qk_head_dim
    else:
        query = model.q_lora_rank * (hidden + heads * model.qk_head_dim)
    down = hidden * (model.kv_lora_rank + model.qk_rope_head_dim)
    up = model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    output = heads * model.v_head_dim * hidden
    return query + down + up + output + _latent_norms(model) + _biases(model)


def _biases(model: ModelConfig) -> int:
    """Of q_a_proj, kv_a_proj_with_mqa and o_proj."""
    down = model.kv_lora_rank + model.qk_rope_head_dim
    return model.attention_bias * ((model.q_lora_rank or 0) + down + model.hidden_size)


def _routing_bias(model: ModelConfig) -> int:
    """Only `noaux_tc` chooses with a bias."""
    return model.n_routed_experts if model.topk_method == "noaux_tc" else 0


def _active_feed_forward(model: ModelConfig) -> int:
    """Weights that one token is multiplied by in an MoE layer: its experts, the shared ones, the gate."""
    experts = model.num_experts_per_tok + model.n_shared_experts
    return (
        _swiglu(model.hidden_size, experts * model.moe_intermediate_size) + model.n_routed_experts * model.hidden_size
    )
