"""A run of `dsjax grpo` on hardware that is not here: whether it fits, how long it takes, what it costs. No JAX.

A step is a share of a rollout, the scoring of its samples, and an update. What is assumed:

    rollout   All slots are busy until the samples are out: so many token steps as give all tokens, and no fewer than
              the longest sample has, which is one at the limit. A token step is a forward pass of one token a slot:
              weights gathered and read once, the latent cache read whole, room for the longest sample included.
    scoring   a forward pass over the rows by the policy, and one by the reference policy
    update    forward and backward over the same rows, as in any train step, without MTP

Samples fill rows without gaps, and rows fill whole microbatches. Prompts, rewards and validation take nothing.
tests/test_plan_rl.py holds the numbers against hand counts.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsjax.checks import FP8_PRECISIONS
from dsjax.config import Config
from dsjax.planning.collectives import flows, gathered_bytes
from dsjax.planning.counts import flops_per_token, kv_cache_bytes_per_token
from dsjax.planning.hardware import Hardware
from dsjax.planning.memory import FP32, LOGITS, MOMENTS, Memory, Term, memory
from dsjax.planning.plan import Knob, Plan, changes, has_splash, make_plan, placed_json
from dsjax.planning.roofline import EFFICIENCY, HBM_EFFICIENCY, StepTime, forward_time, node_of, step_time, without_mtp
from dsjax.planning.weights import Weight, weights
from dsjax.sections import ConfigError

RESPONSE_SHARE = 1 / 4  # mean length of a sample over the longest there may be, where nobody says it; assumed
# As in inference/decoding.py: the cache grows in powers of two, ahead of the tokens of one call.
SMALLEST_BUCKET, STEPS = 64, 32
ROLLOUT = "rollout"
EVERY_MOMENT = (ROLLOUT, *MOMENTS)
# What an update holds because of the weights alone, those of MTP included, which it does not compute.
STATE = ("parameters", "moments", "routing bias", "working copy", "gradients")
KEPT_IN_ROLLOUT = ("parameters", "moments", "routing bias")
PHASES = (ROLLOUT, "scoring", "update")  # of a step
CASES: dict[str, Callable[[StepTime], float]] = {
    "serial": lambda time: time.serial,
    "expected": lambda time: time.expected,
    "all hidden": lambda time: time.hidden,
    "no links": lambda time: time.compute + time.memory,
}


@dataclass(frozen=True)
class RLPlan:
    """A run of GRPO on a number of chips; all in closed form."""

    plan: Plan  # the update's, with the rollout among the moments of its memory; its tokens are those generated
    response_length: float  # tokens of a sample, on average
    slots: int  # samples that are decoded together, over the whole mesh
    token_steps: float  # of a rollout
    rows: int  # that are scored and trained on in a step; the batch in whole microbatches
    token_step: StepTime
    old: StepTime  # scoring by the policy: both passes where the sampling mask is kept
    reference: StepTime | None  # and by the reference policy; None without a KL term

    def phases(self, case: str) -> dict[str, float]:
        """Seconds of each part of a step, under one of CASES."""
        seconds, share = CASES[case], self.token_steps / self.plan.config.grpo.minibatches
        scoring = seconds(self.old) + (seconds(self.reference) if self.reference else 0.0)
        return dict(zip(PHASES, (share * seconds(self.token_step), scoring, seconds(self.plan.time)), strict=True))

    def step_seconds(self, case: str) -> float:
        """Of a whole step."""
        return sum(self.phases(case).values())

    def run_seconds(self, case: str) -> float:
        """Of all `training.total_steps`."""
        return self.plan.config.training.total_steps * self.step_seconds(case)

    def chip_hours(self, case: str) -> float:
        return self.run_seconds(case) * self.plan.chips / 3600

    def dollars(self, case: str) -> float | None:
        return None if self.plan.price is None else self.chip_hours(case) * self.plan.price

    def kilowatt_hours(self, case: str) -> float | None:
        """Of the chips alone."""
        watts = self.plan.chip.watts
        return None if watts is None else self.chip_hours(case) * watts / 1000

    @property
    def flops_by_phase(self) -> dict[str, float]:
        """Of a step's generated tokens, over the whole mesh: causal, without recomputation and empty rows."""
        config = self.plan.config
        tokens = config.training.batch_size * self.response_length
        trained = tokens * flops_per_token(config.model, max(1, round(self.response_length)))
        passes = 1 + (self.reference is not None)
        return dict(zip(PHASES, (trained / 3, passes * trained / 3, trained), strict=True))

    def mfu(self, case: str) -> float:
        """Against the BF16 peak."""
        peak = self.plan.chips * self.plan.chip.peak_flops_bf16
        return sum(self.flops_by_phase.values()) / (self.step_seconds(case) * peak)


def make_rl_plan(config: Config, chip: Hardware, chips: int, response_length: float | None = None) -> RLPlan:
    """The plan of `dsjax grpo` under `config` on `chips` chips.

    Args:
      config: of the run.
      chip: the hardware.
      chips: how many.
      response_length: tokens of a sample on average; None: a quarter of the longest.

    Raises:
      ConfigError: the microbatch, the experts or the weights do not divide over the devices, or samples cannot be so
        long.
    """
    longest = longest_sample(config)
    length = RESPONSE_SHARE * longest if response_length is None else response_length
    if not 0 < length <= longest:
        raise ConfigError(
            f"samples of {length:g} tokens on average cannot be: they have 1 to {longest}, the smaller of"
            " grpo.max_new_tokens and data.sequence_length; give a --response-length between"
        )
    plan = make_plan(config, chip, chips, 0.0)
    config, sizes, form = plan.config, plan.sizes, plan.config.dispatch.form
    training, devices = config.training, plan.devices
    slots = -(-config.grpo.slots // devices) * devices
    samples = training.batch_size * config.grpo.minibatches
    micro = training.sequences_per_microbatch
    rows = micro * math.ceil(math.ceil(training.batch_size * length / config.data.sequence_length) / micro)
    trained = without_mtp(_with(config, training=dataclasses.replace(training, batch_size=rows)))
    scored = _with(trained, fp8=dataclasses.replace(config.fp8, working_copy=False))
    forward = forward_time(scored, sizes, form, chip)
    plan = dataclasses.replace(
        plan,
        tokens=float(training.total_steps * training.batch_size * length),
        memory=_memory(config, plan, slots),
        time=step_time(trained, sizes, form, chip),
        flows=flows(trained, sizes, form, node_of(chip, devices)),
    )
    return RLPlan(
        plan=plan,
        response_length=length,
        slots=slots,
        token_steps=max(longest, samples * length / min(slots, samples)),
        rows=rows,
        token_step=_token_step(scored, plan, slots),
        old=_twice(forward) if config.grpo.keep_sampling_mask else forward,
        reference=forward if config.grpo.kl_coefficient else None,
    )


def longest_sample(config: Config) -> int:
    """Tokens that one may have, its prompt being short."""
    return min(config.grpo.max_new_tokens, config.data.sequence_length)


def cache_room(config: Config) -> int:
    """Positions that the latent cache has for each slot when the longest sample has come to its end."""
    needed = min(longest_sample(config) + STEPS, config.model.max_position_embeddings)
    return max(SMALLEST_BUCKET, 1 << (needed - 1).bit_length())


def knobs(rl: RLPlan) -> list[Knob]:
    """What saves memory, each change by itself, the one that saves most first; seconds are of a step."""
    plan, found = rl.plan, []
    config = plan.config
    tried = list(changes(plan))
    if rl.slots > plan.devices:
        slots = max(plan.devices, rl.slots // 2)
        tried.append((f"grpo.slots={slots}", _with(config, grpo=dataclasses.replace(config.grpo, slots=slots))))
    if config.grpo.kl_coefficient:
        without = dataclasses.replace(config.grpo, kl_coefficient=0.0)
        tried.append(("grpo.kl_coefficient=0", _with(config, grpo=without)))
    for change, other in tried:
        try:
            changed = make_rl_plan(other, plan.chip, plan.chips, rl.response_length)
        except ConfigError:
            continue  # what does not come out even is no remedy
        if changed.plan.memory.peak < plan.memory.peak:
            found.append(Knob(change, changed.plan.memory.peak, changed.step_seconds("expected")))
    return sorted(found, key=lambda knob: knob.peak)


def as_json(rl: RLPlan) -> dict[str, Any]:
    """Everything of a plan, for machines; bytes, seconds, dollars."""

    def run(case: str) -> dict[str, Any]:
        return {
            "step_seconds": rl.step_seconds(case),
            "phases": rl.phases(case),
            "mfu": rl.mfu(case),
            "days": rl.run_seconds(case) / 86400,
            "chip_hours": rl.chip_hours(case),
            "dollars": rl.dollars(case),
            "kwh": rl.kilowatt_hours(case),
        }

    plan = rl.plan
    steps = plan.config.training.total_steps
    found = placed_json(plan) | {
        "steps": steps,
        "samples_per_step": plan.config.training.batch_size,
        "response_length": rl.response_length,
        "slots": rl.slots,
        "cache_room": cache_room(plan.config),
        "token_steps_per_rollout": rl.token_steps,
        "rows_per_step": rl.rows,
        "model_flops_per_step": rl.flops_by_phase,
        "model_flops": steps * sum(rl.flops_by_phase.values()),
        "time": {
            "token_step": dataclasses.asdict(rl.token_step),
            "scoring_old": dataclasses.asdict(rl.old),
            "scoring_reference": None if rl.reference is None else dataclasses.asdict(rl.reference),
            "update": dataclasses.asdict(plan.time),
        },
        "traffic_of_update": [dataclasses.asdict(flow) for flow in plan.flows],
        "run": {case.replace(" ", "_"): run(case) for case in CASES},
    }
    if not plan.fits:
        found["knobs"] = [dataclasses.asdict(knob) for knob in knobs(rl)]
    return found


def _with(config: Config, **sections: Any) -> Config:
    return dataclasses.replace(config, **sections)


def _twice(time: StepTime) -> StepTime:
    return StepTime(2 * time.compute, 2 * time.memory, 2 * time.fast, 2 * time.slow)


def _token_step(scored: Config, plan: Plan, slots: int) -> StepTime:
    """A forward pass of one token a slot, and attention to the whole cache in its absorbed form."""
    model, chip, each = scored.model, plan.chip, slots // plan.devices
    one_token = _with(
        scored,
        training=dataclasses.replace(scored.training, batch_size=slots, microbatch_size=slots),
        data=dataclasses.replace(scored.data, sequence_length=1),
        dispatch=dataclasses.replace(scored.dispatch, chunks=1),
    )
    forward = forward_time(one_token, plan.sizes, scored.dispatch.form, chip)
    positions = each * cache_room(scored) * chip.devices_per_chip
    width = 2 * model.kv_lora_rank + model.qk_rope_head_dim  # scores over latent and rotary key, sums of latents
    flops = 2 * positions * model.num_hidden_layers * model.num_attention_heads * width
    slower = 4 if scored.precision == "fp32" else 1
    core = flops * slower / (EFFICIENCY["attention"] * chip.peak_flops_bf16)
    read = positions * _cache_bytes(scored) / (HBM_EFFICIENCY * chip.hbm_bytes_per_s)
    return dataclasses.replace(forward, compute=forward.compute + core, memory=forward.memory + read)


def _cache_bytes(config: Config) -> int:
    """Of one position of one sample, in all layers."""
    return kv_cache_bytes_per_token(config.model, FP32 if config.precision == "fp32" else 2)


def _memory(config: Config, plan: Plan, slots: int) -> Memory:
    """A device's, with the rollout as one more moment of a step."""
    sizes = plan.sizes
    lean = memory(without_mtp(config), sizes, config.dispatch.form, splash=has_splash(config, plan.chip))
    terms = [term for term in plan.memory.terms if term.category in STATE]
    terms += [term for term in lean.terms if term.category not in STATE]
    terms = [
        dataclasses.replace(term, alive=(ROLLOUT, *term.alive)) if term.category in KEPT_IN_ROLLOUT else term
        for term in terms
    ]
    terms += _rollout(config, plan, slots)
    return Memory(tuple(term for term in terms if term.bytes), EVERY_MOMENT)


def _rollout(config: Config, plan: Plan, slots: int) -> list[Term]:
    """The reference policy and the engine: its copy of the weights, its cache, and a token step."""
    sizes, model, each = plan.sizes, config.model, slots // plan.devices
    listed, width = weights(model), FP32 if config.precision == "fp32" else 2
    biases = sum(term.bytes for term in plan.memory.terms if term.category == "routing bias")
    reference = FP32 * sum(one.per_device(sizes) for one in listed) + biases
    # FP32 is multiplied as it is, and FP8 rounded from it: there the engine has no copy of its own.
    has_copy = width == 2 and config.precision not in FP8_PRECISIONS
    copy = width * sum(one.per_device(sizes) for one in listed if _is_cast(one)) if has_copy else 0
    room = cache_room(config)
    cache = each * room * _cache_bytes(config)
    main = weights(without_mtp(config).model)
    read = _with(config, fp8=dataclasses.replace(config.fp8, working_copy=False))

    def whole(one: Weight) -> float:
        held = one.size / (sizes["expert"] if one.is_expert else 1)
        return held / one.layers * gathered_bytes(one, read) * (one.per_device(sizes) < held)

    experts = sum(whole(one) for one in main if one.is_expert)
    dense = max(whole(one) for one in main if not one.is_expert and one.part != "embedding")
    scores = 2 * each * model.num_attention_heads * room * FP32
    return [
        Term("reference policy", "FP32 weights", reference * bool(config.grpo.kl_coefficient), EVERY_MOMENT),
        Term("engine", "matrices in BF16", copy, (ROLLOUT,)),
        Term("latent cache", f"{each} samples of {room:,} positions", cache, (ROLLOUT,)),
        Term("latent cache", "the smaller one, while it grows", cache / 2 * (room > SMALLEST_BUCKET), (ROLLOUT,)),
        Term("gathered weights", "experts of a layer, whole, for a token step", experts, (ROLLOUT,)),
        Term("gathered weights", "the largest dense weight, for a token step", dense, (ROLLOUT,)),
        Term("engine", "scores over the cache, of a layer", scores, (ROLLOUT,)),
        Term("engine", "logits of a token step", LOGITS * FP32 * each * model.vocab_size, (ROLLOUT,)),
    ]


def _is_cast(one: Weight) -> bool:
    """Whether the engine casts it to the compute dtype: matrices, but not the gate."""
    return len(one.shape) - (one.axes[0] == "layers") >= 2 and not one.name.endswith("mlp.gate.weight")
