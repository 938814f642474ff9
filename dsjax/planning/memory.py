"""What one device holds during a train step, term by term, and which moment holds most. No JAX.

The peak is the largest sum over the moments of a step; each term says what it is and in which of them it is alive:

    loss          the last chunk of logits of the head: all layers' inputs are kept, no gradient of a layer exists yet
    feed-forward  backward through a layer's experts, or dense feed-forward: of its attention what was computed again
    attention     backward through the attention of a layer
    update        clipping and AdamW: no activation is left

Sizes of arrays are exact; how many of a kind are alive at once (the factors in `_experts` and `_attention`) follows the
order of the operations, and differs by compiler. tests/test_plan_memory.py compares the sums with compiled steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dsjax.checks import FP8_PRECISIONS
from dsjax.config import Config
from dsjax.planning.buffers import Buffer, buffer_for, make_buffer, seats
from dsjax.planning.collectives import gathered_bytes
from dsjax.planning.weights import Weight, weights

MOMENTS = ("loss", "feed-forward", "attention", "update")
ALWAYS, BACKWARD = MOMENTS, ("feed-forward", "attention")
FP32 = 4
# As in model/causal.py, which works through blocks of queries where it has no kernel.
QUERY_BLOCKS, MIN_QUERY_BLOCK, SCORE_BYTES = 8, 128, 2**29
# Bytes of scales for a value that is kept in E4M3: FP32 or an exponent for each tile.
SCALES = {"fp8_deepseek": 4 / 128, "fp8_deepseek_ue8m0": 1 / 128, "fp8_gradient_blocks": 4 / 128, "mxfp8": 1 / 32}
LOGITS = 3  # arrays of a chunk's logits that are alive at once: exponentials, their gradient, one on the way


@dataclass(frozen=True)
class Term:
    """Bytes of one device."""

    category: str
    name: str
    bytes: float
    alive: tuple[str, ...]  # moments


@dataclass(frozen=True)
class Memory:
    """All terms of a device."""

    terms: tuple[Term, ...]
    moments: tuple[str, ...] = MOMENTS

    def at(self, moment: str) -> float:
        """Bytes at a moment."""
        return sum(term.bytes for term in self.terms if moment in term.alive)

    @property
    def moment(self) -> str:
        """The moment that holds most."""
        return max(self.moments, key=self.at)

    @property
    def peak(self) -> float:
        """Bytes at that moment."""
        return self.at(self.moment)

    @property
    def state(self) -> float:
        """What a step is given: parameters, moments, routing biases; a compiler calls them arguments."""
        return sum(term.bytes for term in self.terms if term.category in ("parameters", "moments", "routing bias"))

    def by_category(self) -> dict[str, float]:
        """What is alive at the peak."""
        sums: dict[str, float] = {}
        for term in self.terms:
            if self.moment in term.alive:
                sums[term.category] = sums.get(term.category, 0) + term.bytes
        return sums


@dataclass(frozen=True)
class _Shapes:
    """Numbers that several terms need."""

    tokens: int  # of a microbatch, on a device
    compute: int  # bytes of an activation
    fp8: bool
    arrived: int  # rows that reach a rank's experts from others, of one chunk
    buffer: Buffer
    experts: int  # of a rank
    rounds: int  # loops over rounds around the experts, each of which adds up gradients of its own


def memory(config: Config, sizes: Mapping[str, int], form: str, *, splash: bool) -> Memory:
    """The terms of a device's memory under `config` on a mesh of `sizes`.

    Args:
      config: of the run; the largest batch counts.
      sizes: devices along each mesh axis.
      form: the dispatch form in force.
      splash: whether attention has the TPU's kernel, which holds no scores.

    Raises:
      ConfigError: a weight that the mesh does not divide.
    """
    shapes = _shapes(config, sizes, form)
    terms = [
        *_state(config, sizes),
        *_kept(config, sizes, shapes),
        *_head(config, sizes, shapes),
        *_attention(config, shapes, splash=splash),
        *(_experts(config, shapes) if _has_experts(config) else ()),
        *_dense(config, shapes),
    ]
    return Memory(tuple(term for term in terms if term.bytes))


def _has_experts(config: Config) -> bool:
    return config.model.num_moe_layers + config.model.num_nextn_predict_layers > 0


def tokens_of_microbatch(config: Config, sizes: Mapping[str, int]) -> int:
    """Tokens that a device has of a microbatch; a part of a sequence rounded up, where they do not divide."""
    devices = math.prod(sizes.values())
    return math.ceil(config.training.sequences_per_microbatch * config.data.sequence_length / devices)


def _shapes(config: Config, sizes: Mapping[str, int], form: str) -> _Shapes:
    model, dispatch, ranks = config.model, config.dispatch, sizes["expert"]
    tokens = tokens_of_microbatch(config, sizes)
    chunk, experts = math.ceil(tokens / dispatch.chunks), model.n_routed_experts // ranks
    choices, rounds = model.num_experts_per_tok, 0
    if form == "all_to_all":
        legs = seats(model, dispatch, ranks, chunk)
        arrived = legs[-1].rows
        buffer = buffer_for(dispatch.capacity_factor * chunk * choices, arrived, choices, experts)
        held = chunk
        for leg in legs:
            rounds += leg.capacity < held
            held = leg.rows
    else:
        arrived = chunk * (ranks if form == "all_gather" else 1)
        buffer = make_buffer(arrived, choices, experts, ranks, dispatch.capacity_factor)
    rounds += buffer.assignments < arrived * min(choices, experts)
    compute = FP32 if config.precision == "fp32" else 2
    return _Shapes(tokens, compute, config.precision in FP8_PRECISIONS, arrived, buffer, experts, rounds)


def _state(config: Config, sizes: Mapping[str, int]) -> list[Term]:
    listed = weights(config.model)
    held = sum(one.per_device(sizes) for one in listed)
    moment = 2 if config.optimizer.moment_dtype == "bfloat16" else FP32
    copied = sum(one.per_device(sizes) for one in listed if one.is_quantised) if config.fp8.working_copy else 0
    routers = config.model.num_moe_layers + config.model.num_nextn_predict_layers
    biases = routers * config.model.n_routed_experts if config.model.topk_method == "noaux_tc" else 0
    is_accumulated = config.training.batch_size > config.training.sequences_per_microbatch
    at_last = BACKWARD if is_accumulated else (*BACKWARD, "update")
    return [
        Term("parameters", "FP32 master weights", FP32 * held, ALWAYS),
        Term("moments", "Adam's m and v", 2 * moment * held, ALWAYS),
        Term("routing bias", "routing biases, on every device", FP32 * biases, ALWAYS),
        Term("working copy", "weights in E4M3, made once a step", copied, ("loss", *BACKWARD)),
        Term("gradients", "FP32 sums over microbatches", FP32 * held * is_accumulated, ALWAYS),
        Term("gradients", "FP32 gradients of one microbatch", FP32 * held, at_last),
    ]


def _kept(config: Config, sizes: Mapping[str, int], shapes: _Shapes) -> list[Term]:
    model, remat = config.model, config.training.remat
    routed = model.num_moe_layers + model.num_nextn_predict_layers
    alive = ("loss", *BACKWARD)
    found = [
        Term("activations", f"{name}, of {layers} layers", layers * shapes.tokens * size, alive)
        for layers, is_routed in ((model.first_k_dense_replace, False), (routed, True))
        for name, size in kept_per_token(config, shapes, is_routed=is_routed).items()
        if layers
    ]
    if remat == "none" and sizes["fsdp"] > 1 and _has_experts(config):
        whole = sum(one.size * gathered_bytes(one, config) for one in weights(model) if one.is_expert)
        found.append(Term("activations", "gathered experts of all layers", whole / sizes["expert"], alive))
    return found


def kept_per_layer(config: Config, sizes: Mapping[str, int], form: str) -> dict[str, float]:
    """Bytes per token that a MoE layer keeps for the backward pass, by name; as training/saved.py reads them."""
    return kept_per_token(config, _shapes(config, sizes, form), is_routed=True)


def kept_per_token(config: Config, shapes: _Shapes, *, is_routed: bool) -> dict[str, float]:
    """The same, for a MoE layer or a dense one."""
    model, remat, size = config.model, config.training.remat, shapes.compute
    hidden, heads = model.hidden_size, model.num_attention_heads
    values = heads * model.v_head_dim
    kept: dict[str, float] = {"layer input": hidden * size}
    if remat == "full":
        return kept
    stored = 1 + SCALES.get(config.precision, 0) if shapes.fp8 else size
    dense = model.shared_intermediate_size if is_routed else model.intermediate_size
    gate_up: float = 2 * dense * stored
    if is_routed:
        rows = shapes.buffer.rows * config.dispatch.chunks / shapes.tokens
        gate_up += rows * 2 * model.moe_intermediate_size * stored
    kept |= {
        "MLA latents": (model.kv_lora_rank + model.qk_rope_head_dim + (model.q_lora_rank or 0)) * size,
        "attention output": values * 1.5 + values / 128 + FP32 * heads if shapes.fp8 else values * size + FP32 * heads,
        "SwiGLU inputs": gate_up,
    }
    if not shapes.fp8:
        kept["residual"] = hidden * size
    if is_routed:
        kept["router logits"] = FP32 * model.n_routed_experts
    if remat == "none":
        kept["everything else"] = _else_per_token(config, shapes, is_routed=is_routed)
    return kept


def _else_per_token(config: Config, shapes: _Shapes, *, is_routed: bool) -> float:
    """What is kept without recomputation, about: norms in FP32, inputs of Linears, queries, keys, values, rows."""
    model, size = config.model, shapes.compute
    hidden, heads = model.hidden_size, model.num_attention_heads
    latents = (model.q_lora_rank or 0) + model.kv_lora_rank
    kept: float = 2 * FP32 * (2 * hidden + latents)  # norms: their input and what it becomes
    kept += size * (2 * hidden + latents + heads * (2 * model.qk_head_dim + model.v_head_dim))
    if is_routed:
        rows = (shapes.buffer.rows + shapes.arrived) * config.dispatch.chunks / shapes.tokens
        kept += FP32 * (hidden + 3 * model.n_routed_experts) + rows * hidden * size
    return kept


def _head(config: Config, sizes: Mapping[str, int], shapes: _Shapes) -> list[Term]:
    """The output head, whole: its gradient is FP32, and reduced after the last chunk of tokens."""
    model = config.model
    table = model.vocab_size * model.hidden_size
    chunk = min(config.training.loss_chunk_size, shapes.tokens)
    is_cut = sizes["fsdp"] * sizes["expert"] > 1
    gathered = table * shapes.compute if is_cut or shapes.compute != FP32 else 0
    # With MTP, the compiler lets the gradient of one of the two heads wait while layers run backwards.
    waits = BACKWARD if model.num_nextn_predict_layers else ()
    hidden = shapes.tokens * model.hidden_size * shapes.compute
    return [
        Term("logits and head", "head in the compute dtype, whole", gathered, ("loss",)),
        Term("logits and head", "FP32 gradient of the head, whole", FP32 * table, ("loss", *waits)),
        Term("logits and head", "logits of a chunk, FP32", LOGITS * FP32 * chunk * model.vocab_size, ("loss",)),
        Term("logits and head", "hidden states and their gradient", 2 * hidden, ("loss",)),
    ]


def _attention(config: Config, shapes: _Shapes, *, splash: bool) -> list[Term]:
    model, size = config.model, shapes.compute
    per_head, heads = shapes.tokens * model.num_attention_heads, model.num_attention_heads
    arrays = per_head * (2 * model.qk_head_dim + 2 * model.v_head_dim) * size
    wide = 2 * per_head * model.qk_head_dim * FP32
    found = [
        Term("attention", "queries, keys, values and output", arrays, BACKWARD),
        Term("attention", "queries and keys in FP32", wide, BACKWARD),
        Term("attention", "their gradients", arrays + wide, ("attention",)),
    ]
    if not splash:
        length = config.data.sequence_length
        block = min(length, max(MIN_QUERY_BLOCK, -(-length // QUERY_BLOCKS)))
        sequences = max(1, shapes.tokens // length)
        one = FP32 * sequences * block * length
        fits = max(1, SCORE_BYTES // one)
        group = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fits)
        found.append(Term("attention", "scores of a block, and their gradients", 3 * one * group, ("attention",)))
    return found


def _experts(config: Config, shapes: _Shapes) -> list[Term]:
    model, size = config.model, shapes.compute
    hidden, width, rows = model.hidden_size, model.moe_intermediate_size, shapes.buffer.rows
    matrices = shapes.experts * 3 * hidden * width
    gathered = matrices * gathered_bytes(next(one for one in weights(model) if one.is_expert), config)
    # A round, and for each loop over rounds its sums and what it adds; and the sums over chunks.
    gradients = 1 + 2 * shapes.rounds + (config.dispatch.chunks > 1)
    return [
        Term("dispatch", "rows between ranks, out and back", 4 * shapes.arrived * hidden * size, ("feed-forward",)),
        Term("dispatch", "sums of rows in FP32", 4 * shapes.arrived * hidden * FP32, ("feed-forward",)),
        Term("dispatch", "rows of the experts", rows * (4 * hidden + 5 * width) * size, ("feed-forward",)),
        Term("gathered weights", "experts of a layer, whole", gathered, ("feed-forward",)),
        Term("gathered weights", "their FP32 gradients", gradients * matrices * FP32, ("feed-forward",)),
    ]


def _dense(config: Config, shapes: _Shapes) -> list[Term]:
    """One dense weight at a time, whole, with its FP32 gradient; and a layer's states in FP32."""
    model = config.model
    dense = [one for one in weights(model) if not one.is_expert and one.part not in ("embedding", "head")]

    def whole(one: Weight) -> float:
        return one.size / one.layers * (gathered_bytes(one, config) + FP32)

    wide = 3 * shapes.tokens * model.hidden_size * FP32
    feed_forward = 5 * shapes.tokens * model.intermediate_size * shapes.compute if model.first_k_dense_replace else 0
    found = [
        Term("gathered weights", "the largest dense weight and its FP32 gradient", max(map(whole, dense)), BACKWARD),
        Term("activations", "states of a layer in FP32", wide, BACKWARD),
    ]
    if not _has_experts(config):
        found.append(Term("activations", "dense feed-forward", feed_forward, ("feed-forward",)))
    return found
