"""What published runs cost, and what follows from it: MFU, dollars a trillion tokens, ratios. No JAX.

Every figure carries its status and where it is from, or how it was computed.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from dsjax.planning.counts import flops_per_token
from dsjax.planning.hardware import HARDWARE
from dsjax.planning.plan import Plan
from dsjax.planning.published import DEEPSEEK_V3, RUNS, V3_BATCH, V3_CLUSTER, V3_STEP_SECONDS, Published, Run

LENGTH = 4096  # tokens of a sequence in all of these runs' pretraining, as far as FLOPs are counted here
PRICE = HARDWARE["H800"].price_per_chip_hour or math.nan  # for every GPU, as DeepSeek's own bill assumes
PRICE_SOURCE = f"at ${PRICE:g} a GPU hour, the price in {HARDWARE['H800'].price_source}"


@dataclass(frozen=True)
class Figure:
    """One number of the comparison."""

    run: str
    name: str
    value: float
    unit: str
    status: str  # "stated", "measured", "estimated" or "computed"
    source: str  # a document; for what is computed, how


def figures() -> list[Figure]:
    """All figures, run by run."""
    found: list[Figure] = []
    for run in RUNS:
        found += _of_run(run)
        if run is DEEPSEEK_V3:
            found += _of_v3()
    return found


def _of_run(run: Run) -> list[Figure]:
    found: list[Figure] = []

    def add(name: str, unit: str, published: Published | None) -> None:
        if published is not None:
            found.append(Figure(run.name, name, published.value, unit, published.status, published.source))

    def compute(name: str, unit: str, value: float, how: str) -> float:
        found.append(Figure(run.name, name, value, unit, "computed", how))
        return value

    add("tokens", "tokens", run.tokens)
    for stage in run.stages:
        add(f"{stage.name}, hours", f"{run.chip} hours", stage.chip_hours)
        add(f"{stage.name}, cost", "dollars", stage.dollars)
    if run.stages:
        compute("hours, all stages", f"{run.chip} hours", total_hours(run), "sum of the stages")
        compute("cost, all stages", "dollars", sum(one.dollars.value for one in run.stages), "sum of the stages")
    else:
        add("pretraining, hours", f"{run.chip} hours", run.chip_hours)
    add("hours per trillion tokens", f"{run.chip} hours", run.hours_per_trillion)
    add("cost", "dollars", run.dollars)
    add("cost, more than", "dollars", run.at_least)
    add("FLOPs of pretraining", "FLOP", run.flops)
    add("MFU, as published", "share", run.mfu)

    hours = pretraining_hours(run)
    if run.hours_per_trillion is not None and hours is not None:
        compute("pretraining, hours", f"{run.chip} hours", hours, "hours per trillion tokens x tokens")
    if run.model is not None:
        per_token = flops_per_token(run.model, LENGTH)
        compute("FLOPs per token", "FLOP", per_token, "dsjax/planning/counts.py: 4,096 tokens, causal, without MTP")
        if run.tokens is not None:
            compute("FLOPs of pretraining", "FLOP", per_token * run.tokens.value, "FLOPs per token x tokens")
    total = pretraining_flops(run)
    if hours is None and total is not None and run.chip == DEEPSEEK_V3.chip:
        hours = total / v3_flops_per_hour()
        compute("pretraining, hours", f"{run.chip} hours", hours, "its FLOPs at DeepSeek-V3's FLOP/s a GPU")
    elif hours is not None and total is not None:
        peak = HARDWARE[run.chip].peak_flops_bf16
        compute("MFU", "share", total / (hours * 3600 * peak), f"FLOPs / (hours x {peak / 1e12:.0f} TFLOP/s in BF16)")
    if hours is not None:
        if not run.stages and run.dollars is None:
            compute("cost of pretraining", "dollars", hours * PRICE, PRICE_SOURCE)
        if run.tokens is not None:
            per_trillion = hours * PRICE / (run.tokens.value / 1e12)
            compute("cost per trillion tokens", "dollars", per_trillion, f"pretraining {PRICE_SOURCE}")
        if run is not DEEPSEEK_V3:
            compute("hours over DeepSeek-V3's", "ratio", hours / total_hours(DEEPSEEK_V3), "of all its stages")
    elif run.stages:
        compute("hours over DeepSeek-V3's", "ratio", total_hours(run) / total_hours(DEEPSEEK_V3), "of all its stages")
    if run.dollars is not None:
        v3 = sum(one.dollars.value for one in DEEPSEEK_V3.stages)
        compute("cost over DeepSeek-V3's", "ratio", run.dollars.value / v3, "of all its stages")
    return found


def _of_v3() -> list[Figure]:
    """What is known of V3's run beyond its bill."""
    run, peak = DEEPSEEK_V3.name, HARDWARE["H800"].peak_flops_bf16
    assert DEEPSEEK_V3.tokens is not None and DEEPSEEK_V3.chip_hours is not None and DEEPSEEK_V3.model is not None
    tokens, hours, chips = DEEPSEEK_V3.tokens.value, DEEPSEEK_V3.chip_hours.value, V3_CLUSTER.value
    step, whole = V3_STEP_SECONDS, V3_BATCH.value * LENGTH
    measured = whole * flops_per_token(DEEPSEEK_V3.model, LENGTH) / (step.value * chips * peak)
    every_pair = tokens * flops_per_token(DEEPSEEK_V3.model, LENGTH, causal=False) / (hours * 3600 * peak)
    with_mtp = tokens * flops_per_token(DEEPSEEK_V3.model, LENGTH, mtp=True) / (hours * 3600 * peak)
    return [
        Figure(run, "chips", chips, "H800", V3_CLUSTER.status, V3_CLUSTER.source),
        Figure(run, "days of pretraining", hours / chips / 24, "days", "computed", "hours / chips"),
        Figure(run, "tokens per second and chip", tokens / hours / 3600, "tokens/s", "computed", "tokens / hours"),
        Figure(run, "seconds per step", step.value, "s", step.status, step.source),
        Figure(run, "MFU of that step", measured, "share", "computed", "15,360 x 4,096 tokens in that time"),
        Figure(run, "MFU, all pairs counted", every_pair, "share", "computed", "attention as if it were not causal"),
        Figure(run, "MFU, with MTP", with_mtp, "share", "computed", "MTP module and its head counted"),
    ]


def of_plan(plan: Plan) -> list[Figure]:
    """What a run of your own would cost under a plan, beside DeepSeek-V3."""
    time, name = plan.time, f"your run on {plan.chips:,} {plan.chip.name}"
    v3_hours, v3_dollars = total_hours(DEEPSEEK_V3), sum(one.dollars.value for one in DEEPSEEK_V3.stages)
    length = plan.config.data.sequence_length
    how = "dsjax/planning/counts.py: causal, without MTP"
    per_token = flops_per_token(plan.config.model, length)
    found = [
        Figure(name, "tokens", plan.tokens, "tokens", "stated", "the configuration, or --tokens"),
        Figure(name, "FLOPs per token", per_token, "FLOP", "computed", how),
    ]
    for case, seconds in (("expected", time.expected), ("serial", time.serial), ("all hidden", time.hidden)):
        source = f"dsjax/planning/roofline.py: {case}"
        told = [
            ("MFU", plan.mfu(seconds), "share", source),
            ("hours", plan.chip_hours(seconds), f"{plan.chip.name} hours", source),
            ("days", plan.run_seconds(seconds) / 86400, "days", source),
            ("hours over DeepSeek-V3's", plan.chip_hours(seconds) / v3_hours, "ratio", source),
        ]
        dollars = plan.dollars(seconds)
        if dollars is not None:
            own = plan.config.hardware.price_per_chip_hour is not None
            whose = "hardware.price_per_chip_hour" if own else plan.chip.price_source
            price = f"{source}, at ${plan.price:g} an hour: {whose}"
            told += [
                ("cost", dollars, "dollars", price),
                ("cost per trillion tokens", dollars / plan.tokens * 1e12, "dollars", price),
                ("cost over DeepSeek-V3's", dollars / v3_dollars, "ratio", price),
            ]
        found += [Figure(name, f"{figure}, {case}", value, unit, "estimated", by) for figure, value, unit, by in told]
    return found


def total_hours(run: Run) -> float:
    """Chip hours of all stages."""
    return sum(stage.chip_hours.value for stage in run.stages)


def pretraining_hours(run: Run) -> float | None:
    """Chip hours, as published."""
    if run.chip_hours is not None:
        return run.chip_hours.value
    if run.hours_per_trillion is not None and run.tokens is not None:
        return run.hours_per_trillion.value * run.tokens.value / 1e12
    return None


def pretraining_flops(run: Run) -> float | None:
    """As published, else in closed form."""
    if run.flops is not None:
        return run.flops.value
    if run.model is not None and run.tokens is not None:
        return flops_per_token(run.model, LENGTH) * run.tokens.value
    return None


def v3_flops_per_hour() -> float:
    """Of one H800, in V3's pretraining."""
    total, hours = pretraining_flops(DEEPSEEK_V3), pretraining_hours(DEEPSEEK_V3)
    assert total is not None and hours is not None
    return total / hours


def as_json(found: list[Figure]) -> dict[str, Any]:
    """For machines."""
    return {"figures": [asdict(one) for one in found]}


def as_text(found: list[Figure]) -> str:
    """For a terminal: a block a run, a line a figure, and the sources as footnotes."""
    sources = {source: number for number, source in enumerate(dict.fromkeys(one.source for one in found), 1)}
    lines, run = [], ""
    for one in found:
        if one.run != run:
            run = one.run
            lines += ["", run]
        told = f"{one.name:<36}{shown(one.value, one.unit):>22}"
        lines.append(f"  {told}  {one.status:<9} [{sources[one.source]}]")
    lines += ["", "sources", *(f"  [{number}] {source}" for source, number in sources.items())]
    return "\n".join(lines[1:])


def shown(value: float, unit: str) -> str:
    """A value with its unit, as many digits as are known of it."""
    if unit == "dollars":
        small = (f"${value:,.2f}" if value >= 1 else f"${value:.2g}") if value < 1e3 else f"${value / 1e3:,.0f}K"
        return f"${value / 1e6:.3f}M" if value >= 1e6 else small
    if unit == "share":
        return f"{value:.1%}"
    if unit == "ratio":
        return f"{value:.1f} x" if value >= 10 else f"{value:.2f} x" if value >= 0.01 else f"{value:.1g} x"
    if unit == "FLOP":
        if value >= 1e15:
            return f"{value:.2e} FLOP"
        return f"{value / 1e9:.1f} GFLOP" if value >= 1e9 else f"{value / 1e6:.1f} MFLOP"
    if unit == "tokens":
        return f"{value / 1e12:.3g}T tokens" if value >= 1e11 else f"{value:,.0f} tokens"
    if unit.endswith("hours") and value >= 1e3:
        return f"{value / 1e3:,.1f}".removesuffix(".0") + f"K {unit}"
    if value < 1:
        return f"{value:.2g} {unit}"
    return f"{value:,.1f} {unit}" if value < 1000 and value != int(value) else f"{value:,.0f} {unit}"
