"""How long a train step takes: from its products, the memory it reads and writes, and its links. No JAX.

Four times of one device, each as if the rest took none:

    compute   FLOPs of every product, recomputation included, at a share of the peak (EFFICIENCY)
    memory    state, weights and activations through HBM
    fast      collectives within a node or slice
    slow      collectives between nodes or slices

Serial: one after the other, their sum. Hidden: all at once, the longest. Expected, between the two: products and memory
one after the other, the two links beside each other, and HIDDEN of the longer link's time behind the rest.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsjax.checks import FP8_PRECISIONS
from dsjax.config import Config
from dsjax.planning.collectives import Flow, flows, forward_flows, gathered_bytes, tokens_per_device
from dsjax.planning.counts import flops_by_part, flops_per_token
from dsjax.planning.hardware import Hardware
from dsjax.planning.memory import FP32, kept_per_layer
from dsjax.planning.weights import weights

# Share of the peak that products reach. FP8: DeepGEMM's README of 26 Feb 2025, 1,025 to 1,358 TFLOP/s of an H800's
# 1,979 at 4,096 rows (990 and 590 where K is 1,536 and 512), grouped 1,093 to 1,297. Others: assumed.
EFFICIENCY = {"fp8": 0.6, "bf16": 0.7, "attention": 0.6}
HBM_EFFICIENCY = 0.8  # assumed
LINK_EFFICIENCY = 0.85  # assumed; DeepEP's README measures 43 to 58 GB/s of 50 nominal, and 153 to 158 of NVLink's 160
HIDDEN = 0.5  # assumed; DeepSeek hides nearly all by hand, a compiler some
QUANTISED = ("attention projections", "dense feed-forward", "routed experts", "shared experts")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one device."""

    compute: float
    memory: float
    fast: float
    slow: float

    @property
    def serial(self) -> float:
        return self.compute + self.memory + self.fast + self.slow

    @property
    def hidden(self) -> float:
        return max(self.compute, self.memory, self.fast, self.slow)

    @property
    def expected(self) -> float:
        exposed = max(self.fast, self.slow) * (1 - HIDDEN)
        return max(self.compute + self.memory, self.fast, self.slow, self.compute + self.memory + exposed)


def step_time(config: Config, sizes: Mapping[str, int], form: str, chip: Hardware) -> StepTime:
    """The four times of a step of the run's largest batch.

    Args:
      config: of the run.
      sizes: devices along each mesh axis.
      form: the dispatch form in force.
      chip: the hardware.
    """
    moved = flows(config, sizes, form, node_of(chip, _devices(sizes)))
    again = {part: _again(config, part) for part in flops_by_part(config.model, 1, mtp=True)}
    return _times(config, sizes, chip, again, _hbm_bytes(config, sizes, form), moved)


def forward_time(config: Config, sizes: Mapping[str, int], form: str, chip: Hardware) -> StepTime:
    """The same of a forward pass over a step's tokens, MTP left out: nothing is kept for a backward pass."""
    config = without_mtp(config)
    moved = forward_flows(config, sizes, form, node_of(chip, _devices(sizes)))
    third = dict.fromkeys(flops_by_part(config.model, 1, mtp=True), 1 / 3)
    return _times(config, sizes, chip, third, _forward_bytes(config, sizes, form), moved)


def without_mtp(config: Config) -> Config:
    """`config` of the main model alone."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_nextn_predict_layers=0))


def _devices(sizes: Mapping[str, int]) -> int:
    return sizes["data"] * sizes["fsdp"] * sizes["expert"]


def _times(
    config: Config,
    sizes: Mapping[str, int],
    chip: Hardware,
    passes: Mapping[str, float],
    hbm_bytes: float,
    moved: Sequence[Flow],
) -> StepTime:
    """Of a step's tokens; `passes` are the FLOPs of each part over those of forward and backward."""
    share = chip.devices_per_chip
    compute = tokens_per_device(config, sizes) * _seconds_per_token(config, chip, passes) * share
    memory = hbm_bytes * share / (HBM_EFFICIENCY * chip.hbm_bytes_per_s)
    fast = sum(one.fast * _hops(one, sizes, chip) for one in moved) * share / (LINK_EFFICIENCY * chip.fast_bytes_per_s)
    slow = sum(one.slow for one in moved) * share / (LINK_EFFICIENCY * chip.slow_bytes_per_s)
    return StepTime(compute, memory, fast, slow)


def node_of(chip: Hardware, devices: int) -> int | None:
    """How many consecutive devices share the fast link; None: all of them."""
    near = chip.fast_chips * chip.devices_per_chip
    return near if near < devices else None


def model_flops_per_step(config: Config, *, mtp: bool) -> float:
    """Causal, without recomputation, over the whole mesh."""
    tokens = config.training.batch_size * config.data.sequence_length
    return tokens * flops_per_token(config.model, config.data.sequence_length, mtp=mtp)


def utilisation(config: Config, seconds: float, chip: Hardware, chips: int, *, mtp: bool) -> float:
    """MFU against the BF16 peak, as DeepSeek counts its 39.1%; with `mtp`, MTP too, as a run's monitor does."""
    return model_flops_per_step(config, mtp=mtp) / (seconds * chips * chip.peak_flops_bf16)


def flops_per_token_with_recomputation(config: Config) -> float:
    """What is multiplied for a token: forward, backward, MTP, and what is computed again; empty rows not counted."""
    parts = flops_by_part(config.model, config.data.sequence_length, mtp=True)
    return sum(flops * _again(config, part) for part, flops in parts.items())


def _seconds_per_token(config: Config, chip: Hardware, passes: Mapping[str, float]) -> float:
    """On one whole chip."""
    parts = flops_by_part(config.model, config.data.sequence_length, mtp=True)
    is_native = config.precision.startswith("fp8_deepseek") and chip.peak_flops_fp8 is not None
    seconds = 0.0
    for part, flops in parts.items():
        peak, efficiency = chip.peak_flops_bf16, EFFICIENCY["bf16"]
        if part == "attention core":
            efficiency = EFFICIENCY["attention"]
        elif is_native and part in QUANTISED:
            peak, efficiency = chip.peak_flops_fp8 or peak, EFFICIENCY["fp8"]
        slower = 4 if config.precision == "fp32" or (config.precision in FP8_PRECISIONS and not is_native) else 1
        seconds += flops * passes[part] * slower / (peak * efficiency)
    return seconds


def _again(config: Config, part: str) -> float:
    """All FLOPs of a part over those of forward and backward; a forward pass is a third of them.

    Attention keeps no scores: its backward pass makes them again, the query's and key's of the forward's two products.
    """
    remat, model = config.training.remat, config.model
    of_scores = model.qk_head_dim / (model.qk_head_dim + model.v_head_dim)
    scores = of_scores / 3 if part == "attention core" else 0.0
    if part in ("head", "MTP projection") or remat == "none":
        return 1 + scores
    if remat == "full":
        return 1 + scores + 1 / 3
    if part != "attention projections":
        return 1 + scores
    up = model.num_attention_heads * model.kv_lora_rank * (model.qk_nope_head_dim + model.v_head_dim)
    up += model.num_attention_heads * model.qk_head_dim * (model.q_lora_rank or 0)
    down = model.hidden_size * (model.kv_lora_rank + model.qk_rope_head_dim + (model.q_lora_rank or 0))
    output = model.hidden_size * model.num_attention_heads * model.v_head_dim
    made_again = up + (output if config.precision in FP8_PRECISIONS else 0)
    return 1 + made_again / (3 * (up + down + output))


def _hbm_bytes(config: Config, sizes: Mapping[str, int], form: str) -> float:
    """Read and written in a step, about: every value of state, weights and activations as often as it is needed.

    Weights: written where they are gathered, read by each product; gradients FP32, written, read and added up.
    Activations: each value that a layer would keep is written and read once in each pass, and twice in the backward.
    """
    microbatches = config.training.batch_size // config.training.sequences_per_microbatch
    listed = weights(config.model)
    held = sum(one.per_device(sizes) for one in listed)
    moment = 2 if config.optimizer.moment_dtype == "bfloat16" else FP32
    update = held * (2 * FP32 + 4 * moment + 2 * FP32)
    per_microbatch: float = 3 * FP32 * held
    for one in listed:
        whole = one.size / (sizes["expert"] if one.is_expert else 1)
        if one.part != "embedding":
            per_microbatch += whole * (5 * gathered_bytes(one, config) + 2 * FP32)
    keeps_all = dataclasses.replace(config, training=dataclasses.replace(config.training, remat="none"))
    per_token = sum(kept_per_layer(keeps_all, sizes, form).values())
    layers = config.model.num_hidden_layers + config.model.num_nextn_predict_layers
    passes = 3 if config.training.remat == "none" else 4
    return update + microbatches * per_microbatch + tokens_per_device(config, sizes) * layers * per_token * 2 * passes


def _forward_bytes(config: Config, sizes: Mapping[str, int], form: str) -> float:
    """Read and written in a forward pass, about: weights written where they are gathered and read by each product, each
    value that a layer makes written and read once."""
    microbatches = config.training.batch_size // config.training.sequences_per_microbatch
    per_microbatch = 0.0
    for one in weights(config.model):
        if one.part != "embedding":
            whole = one.size / (sizes["expert"] if one.is_expert else 1)
            per_microbatch += whole * gathered_bytes(one, config) * (1 + (one.per_device(sizes) < whole))
    keeps_all = dataclasses.replace(config, training=dataclasses.replace(config.training, remat="none"))
    per_token = sum(kept_per_layer(keeps_all, sizes, form).values())
    moved = tokens_per_device(config, sizes) * config.model.num_hidden_layers * per_token * 2
    return microbatches * per_microbatch + moved


def _hops(flow: Flow, sizes: Mapping[str, int], chip: Hardware) -> float:
    """Links of a torus that a byte passes on average: in an all-to-all a quarter of each side, in a ring one."""
    if chip.torus_dimensions == 0 or flow.collective != "all-to-all":
        return 1.0
    group = sizes["expert"] * (sizes["fsdp"] if flow.cause.startswith("embedding") else 1)
    return max(1.0, chip.torus_dimensions * group ** (1 / chip.torus_dimensions) / 4)
