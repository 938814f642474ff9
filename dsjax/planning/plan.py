"""A run on hardware that nobody has rented yet: whether it fits, how long it takes, what it costs. No JAX."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsjax.config import Config
from dsjax.planning import layout
from dsjax.planning.collectives import Flow, flows
from dsjax.planning.hardware import Hardware
from dsjax.planning.memory import Memory, memory
from dsjax.planning.placement import AXES
from dsjax.planning.roofline import StepTime, model_flops_per_step, node_of, step_time, utilisation
from dsjax.sections import ConfigError

USABLE = 0.9  # share of a device's memory: the rest is the runtime's, and what fragments


@dataclass(frozen=True)
class Plan:
    """A configuration on a number of chips; all in closed form."""

    config: Config  # nothing left open
    chosen: str  # what was left open, and how it was closed
    chip: Hardware
    chips: int
    tokens: float  # of the whole run
    memory: Memory
    time: StepTime
    flows: tuple[Flow, ...]

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices_per_chip

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self.config.mesh, axis) for axis in AXES}

    @property
    def limit(self) -> float:
        """Bytes that a device may hold."""
        return USABLE * self.chip.memory_bytes / self.chip.devices_per_chip

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.limit

    @property
    def price(self) -> float | None:
        """Dollars a chip and hour."""
        own = self.config.hardware.price_per_chip_hour
        return self.chip.price_per_chip_hour if own is None else own

    def run_seconds(self, step_seconds: float) -> float:
        """The whole run, if every step took as long a token as one of the largest batch."""
        return self.tokens / (self.config.training.batch_size * self.config.data.sequence_length) * step_seconds

    def chip_hours(self, step_seconds: float) -> float:
        return self.run_seconds(step_seconds) * self.chips / 3600

    def dollars(self, step_seconds: float) -> float | None:
        return None if self.price is None else self.chip_hours(step_seconds) * self.price

    def kilowatt_hours(self, step_seconds: float) -> float | None:
        """Of the chips alone."""
        return None if self.chip.watts is None else self.chip_hours(step_seconds) * self.chip.watts / 1000

    def mfu(self, step_seconds: float, *, mtp: bool = False) -> float:
        return utilisation(self.config, step_seconds, self.chip, self.chips, mtp=mtp)


def make_plan(config: Config, chip: Hardware, chips: int, tokens: float) -> Plan:
    """The plan of `config` on `chips` chips, for a run of `tokens` tokens.

    Raises:
      ConfigError: the batch, the experts or the weights do not divide over the devices.
    """
    devices = chips * chip.devices_per_chip
    config, changed = layout.with_even_batch(config, devices)
    resolved = layout.resolve(config, devices)
    sizes, form = {axis: getattr(resolved.mesh, axis) for axis in AXES}, resolved.dispatch.form
    return Plan(
        resolved,
        "; ".join(filter(None, (changed, layout.explain(config, resolved)))),
        chip,
        chips,
        tokens,
        memory(resolved, sizes, form, splash=has_splash(resolved, chip)),
        step_time(resolved, sizes, form, chip),
        flows(resolved, sizes, form, node_of(chip, devices)),
    )


def has_splash(config: Config, chip: Hardware) -> bool:
    """Whether attention runs in the TPU's kernel."""
    return chip.torus_dimensions > 0 and config.precision == "bf16" and config.data.sequence_length % 128 == 0


def slices_of(chip: Hardware, chips: int) -> int:
    """How many TPU slices so many chips are; 1 for GPUs, whose nodes may cut any axis."""
    return -(-chips // chip.fast_chips) if chip.torus_dimensions else 1


@dataclass(frozen=True)
class Knob:
    """One change of a plan, and the peak it leads to."""

    change: str  # as an override of the command line
    peak: float  # bytes
    step_seconds: float


def knobs(plan: Plan) -> list[Knob]:
    """What saves memory, each change by itself, the one that saves most first."""
    found = []
    for change, config in changes(plan):
        try:
            other = make_plan(config, plan.chip, plan.chips, plan.tokens)
        except ConfigError:
            continue  # what does not come out even is no remedy
        if other.memory.peak < plan.memory.peak:
            found.append(Knob(change, other.memory.peak, other.time.expected))
    return sorted(found, key=lambda knob: knob.peak)


def changes(plan: Plan) -> Iterator[tuple[str, Config]]:
    """What may save memory, one at a time: (as overrides of the command line, the configuration with it)."""
    config, devices = plan.config, plan.devices

    def change(section: str, **values: Any) -> tuple[str, Config]:
        told = ",".join(f"{section}.{name}={value}" for name, value in values.items())
        return told.replace(",", " "), dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **values)}
        )

    for remat in ("deepseek", "full"):
        if remat != config.training.remat:
            yield change("training", remat=remat)
    micro = config.training.sequences_per_microbatch
    for size in range(devices, micro, devices):
        if config.training.batch_size % size == 0 and micro % size == 0:
            yield change("training", microbatch_size=size)
            break
    tokens = micro * config.data.sequence_length // devices
    for chunks in (2, 4, 8):
        if chunks > config.dispatch.chunks and tokens % chunks == 0:
            yield change("dispatch", chunks=chunks)
    mesh = config.mesh
    for factor in (2, 4, 8):
        if mesh.data % factor == 0:
            yield change("mesh", data=mesh.data // factor, fsdp=mesh.fsdp * factor)
            told, spread = change("mesh", data=mesh.data // factor, expert=mesh.expert * factor)
            # On one rank nothing moved, which is settled by now.
            dispatch = dataclasses.replace(config.dispatch, form="auto")
            yield told, spread if mesh.expert > 1 else dataclasses.replace(spread, dispatch=dispatch)
    if config.fp8.working_copy:
        yield change("fp8", working_copy=False)
    if config.training.loss_chunk_size > 512:
        yield change("training", loss_chunk_size=config.training.loss_chunk_size // 4)


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything of a plan, for machines; bytes, seconds, dollars."""
    time = plan.time

    def run(seconds: float) -> dict[str, float | None]:
        return {
            "step_seconds": seconds,
            "mfu": plan.mfu(seconds),
            "mfu_with_mtp": plan.mfu(seconds, mtp=True),
            "days": plan.run_seconds(seconds) / 86400,
            "chip_hours": plan.chip_hours(seconds),
            "dollars": plan.dollars(seconds),
            "kwh": plan.kilowatt_hours(seconds),
        }

    found = placed_json(plan) | {
        "model_flops_per_step": model_flops_per_step(plan.config, mtp=False),
        "time": dataclasses.asdict(time),
        "traffic": [dataclasses.asdict(flow) for flow in plan.flows],
        "run": {"serial": run(time.serial), "expected": run(time.expected), "hidden": run(time.hidden)},
    }
    if not plan.fits:
        found["knobs"] = [dataclasses.asdict(knob) for knob in knobs(plan)]
    return found


def placed_json(plan: Plan) -> dict[str, Any]:
    """Where a plan's run is and what a device holds, without its times."""
    return {
        "hardware": dataclasses.asdict(plan.chip),
        "chips": plan.chips,
        "devices": plan.devices,
        "mesh": plan.sizes,
        "dispatch": plan.config.dispatch.form,
        "chosen": plan.chosen,
        "tokens": plan.tokens,
        "memory": {
            "peak": plan.memory.peak,
            "state": plan.memory.state,
            "moment": plan.memory.moment,
            "limit": plan.limit,
            "fits": plan.fits,
            "by_category": plan.memory.by_category(),
            "terms": [dataclasses.asdict(term) for term in plan.memory.terms],
        },
    }


def notes(plan: Plan) -> list[str]:
    """What a reader should know beside the figures."""
    found, training = [], plan.config.training
    if plan.config.init_from is not None and not Path(plan.config.init_from).expanduser().exists():
        found.append(f"there is no {plan.config.init_from} to begin with: the architecture is the config file's")
    if plan.config.evaluation.sequences % plan.devices:
        found.append(layout.uneven("evaluation.sequences", plan.config.evaluation.sequences, plan.devices))
    crossing = plan.config.dispatch.form == "all_to_all" and node_of(plan.chip, plan.devices) is not None
    if crossing and plan.config.dispatch.ranks_per_node is None and plan.sizes["expert"] > plan.chip.fast_chips:
        found.append(
            f"tokens go to every rank by itself; dispatch.ranks_per_node={plan.chip.fast_chips} sends them once to each"
            " node"
        )
    slices = slices_of(plan.chip, plan.chips)
    if plan.sizes["data"] % slices:
        found.append(
            f"mesh.data = {plan.sizes['data']} does not divide over {slices} slices of {plan.chip.fast_chips} chips,"
            " and would be refused: make it a multiple"
        )
    tokens = training.sequences_per_microbatch * plan.config.data.sequence_length // plan.devices
    if tokens % plan.config.dispatch.chunks:
        found.append(f"dispatch.chunks = {plan.config.dispatch.chunks} does not divide the {tokens} tokens of a device")
    if plan.chip.peak_flops_fp8 is None and plan.config.precision.startswith(("fp8", "mxfp8")):
        found.append(
            f"{plan.chip.name} has no FP8 units: precision={plan.config.precision} is emulated, slowly; take bf16"
        )
    if plan.chip.estimated:
        found.append(f"no maker states {', '.join(plan.chip.estimated)} of {plan.chip.name}")
    return found
