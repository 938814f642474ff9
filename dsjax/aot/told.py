"""A compiled step beside its plan: as text, as JSON, and closed form against compiled."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from dsjax.aot.compile import CompiledStep
from dsjax.planning.collectives import tokens_per_device
from dsjax.planning.plan import Plan, knobs
from dsjax.planning.roofline import flops_per_token_with_recomputation

GiB = 2**30
# What the compilers make of the collectives of the plan's closed form.
FAMILIES = {
    "all-gather": ("all-gather", "collective-permute"),
    "reduce-scatter": ("reduce-scatter",),
    "all-reduce": ("all-reduce",),
    "all-to-all": ("all-to-all", "ragged-all-to-all"),
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One quantity of a device and step, in closed form and compiled."""

    name: str
    unit: str
    closed_form: float
    compiled: float

    @property
    def ratio(self) -> float | None:
        return self.compiled / self.closed_form if self.closed_form else None


def compare(plan: Plan, step: CompiledStep) -> list[Comparison]:
    """Closed form against compiled."""
    closed = plan.memory
    gradients = sum(term.bytes for term in closed.terms if term.name.startswith("FP32 sums"))
    tokens = tokens_per_device(plan.config, plan.sizes)
    state = sum(step.state_bytes.values())
    found = [
        Comparison("peak memory", "GiB", closed.peak / GiB, step.peak_bytes / GiB),
        Comparison("state", "GiB", closed.state / GiB, state / GiB),
        Comparison("sums of gradients", "GiB", gradients / GiB, step.gradient_bytes * bool(gradients) / GiB),
        Comparison(
            "products", "TFLOP", tokens * flops_per_token_with_recomputation(plan.config) / 1e12, step.flops / 1e12
        ),
    ]
    for family, kinds in FAMILIES.items():
        moved = sum(flow.total for flow in plan.flows if flow.collective == family)
        sent = sum(row.bytes_sent for row in step.traffic if row.kind in kinds)
        found.append(Comparison(family, "GB", moved / 1e9, sent / 1e9))
    return found


def as_json(plan: Plan, step: CompiledStep) -> dict[str, Any]:
    """All figures of a compiled step; bytes and FLOPs are of one device and step."""
    return dataclasses.asdict(step) | {
        "temporary_bytes": step.temporary_bytes,
        "limit_bytes": plan.limit,
        "fits": step.peak_bytes <= plan.limit,
        "closed_form": [dataclasses.asdict(one) | {"ratio": one.ratio} for one in compare(plan, step)],
    }


def as_text(plan: Plan, step: CompiledStep) -> str:
    """What the compiler said, for a terminal."""
    return "\n".join([*_memory(plan, step), *_traffic(step), *_arrays(step), *_comparison(plan, step)])


def _memory(plan: Plan, step: CompiledStep) -> Iterator[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in step.mesh.items())
    over = step.peak_bytes - plan.limit
    yield (
        f"compiled for {mesh} of {step.device_kind}: traced in {step.trace_seconds:.0f} s, compiled in"
        f" {step.compile_seconds:.0f} s"
    )
    verdict = "it fits" if over <= 0 else f"{over / GiB:.1f} GiB too much"
    yield f"peak of a device {step.peak_bytes / GiB:.1f} GiB, of {plan.limit / GiB:.1f} GiB that it may hold: {verdict}"
    parts = step.state_bytes | {"gradients": step.gradient_bytes, "temporaries": step.temporary_bytes}
    yield from (f"  {name:<14} {size / GiB:8.2f} GiB" for name, size in parts.items())
    if over > 0 and (remedies := knobs(plan)):
        best, saved = remedies[0], (plan.memory.peak - remedies[0].peak) / GiB
        yield f"  what helps most, by closed form: {best.change} saves {saved:.1f} GiB"


def _traffic(step: CompiledStep) -> Iterator[str]:
    yield "collectives of a device and step; a buffer counts whole, however many of its rows are filled"
    yield f"  {'kind':<20} {'devices':>7} {'times':>7} {'GB sent':>10}"
    for row in step.traffic:
        where = "  between nodes" if row.crosses_nodes else ""
        yield f"  {row.kind:<20} {row.group:>7} {row.count:>7} {row.bytes_sent / 1e9:>10.2f}{where}"


def _arrays(step: CompiledStep) -> Iterator[str]:
    yield "largest arrays"
    yield from (f"  {one.bytes / GiB:6.2f} GiB  {one.shape}  {one.source}".rstrip() for one in step.largest)


def _comparison(plan: Plan, step: CompiledStep) -> Iterator[str]:
    yield f"closed form against compiled{'':<10} {'closed form':>12} {'compiled':>12}    ratio"
    for one in compare(plan, step):
        ratio = "-" if one.ratio is None else f"{one.ratio:.2f}"
        yield f"  {one.name:<24} {one.unit:<9} {one.closed_form:>14.4g} {one.compiled:>12.4g} {ratio:>8}"
