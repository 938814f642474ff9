"""Meshes, microbatches, remat policies and chunks of a configuration, tried in closed form and ranked. No JAX."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from dsjax.config import Config, MeshConfig
from dsjax.planning import layout
from dsjax.planning.hardware import Hardware
from dsjax.planning.memory import memory
from dsjax.planning.plan import USABLE, Plan, has_splash, make_plan, slices_of
from dsjax.planning.roofline import node_of, step_time

REMATS = ("none", "deepseek", "full")
CHUNKS = (1, 2, 4, 8, 16)
MOST_SEQUENCES = 16  # of a device, in a microbatch
# What a search settles by itself; told where the configuration has it otherwise.
SETTLED = (
    *("training.initial_batch_size", "training.batch_ramp_tokens", "evaluation.sequences"),
    *("dispatch.form", "dispatch.ranks_per_node"),
)


@dataclass(frozen=True)
class Candidate:
    """A configuration that fits."""

    config: Config
    asked: Config  # what was searched from
    peak: float  # bytes
    step_seconds: float  # expected

    @property
    def overrides(self) -> str:
        """What to put on the command line for it, behind what was searched from."""
        config = self.config
        values = {f"mesh.{axis}": getattr(config.mesh, axis) for axis in ("data", "fsdp", "expert")}
        values |= {
            "training.batch_size": config.training.batch_size,
            "training.microbatch_size": config.training.microbatch_size,
            "training.remat": config.training.remat,
            "dispatch.chunks": config.dispatch.chunks,
        }
        for name in SETTLED:
            value = attrgetter(name)(config)
            if value != attrgetter(name)(self.asked):
                values[name] = value
        return " ".join(f"--config.{name}={value}" for name, value in values.items())


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    tried: int
    ranked: list[Candidate]  # those that fit, the quickest first
    least: Candidate | None  # of those that do not fit, the one that lacks least
    batch_size: int  # sequences; the nearest to what was asked that divides over the devices


def search(config: Config, chip: Hardware, chips: int) -> Found:
    """Everything that comes out even, and of it what fits, ranked by the expected time of a step a token."""
    devices = chips * chip.devices_per_chip
    batch = layout.nearest_batch(config.training.batch_size, devices)
    limit = USABLE * chip.memory_bytes / chip.devices_per_chip
    slices = slices_of(chip, chips)
    tried, ranked, least = 0, [], None
    for mesh in meshes(config, devices):
        sizes = dataclasses.asdict(mesh)
        crosses = chip.torus_dimensions == 0 and node_of(chip, devices) is not None and mesh.expert > chip.fast_chips
        node = chip.fast_chips if crosses else None
        if (node is not None and mesh.expert % node) or mesh.data % slices:
            continue
        for micro in _microbatches(batch, devices):
            for remat in REMATS:
                fitting = None
                for one in _chunked(_changed(config, mesh, batch, micro, remat, node), devices):
                    form = layout.dispatch_form(one.model, one.dispatch, mesh.expert)
                    peak = memory(one, sizes, form, splash=has_splash(one, chip)).peak
                    tried += 1
                    if peak <= limit:
                        fitting = Candidate(one, config, peak, step_time(one, sizes, form, chip).expected)
                        break  # more chunks save memory, not time
                    if least is None or peak < least.peak:
                        least = Candidate(one, config, peak, math.nan)
                if fitting is not None:
                    ranked.append(fitting)
    return Found(tried, sorted(ranked, key=lambda one: one.step_seconds), None if ranked else least, batch)


def best_plan(found: Found, chip: Hardware, chips: int, tokens: float) -> Plan | None:
    """The plan of the first candidate."""
    best = found.ranked[0] if found.ranked else found.least
    return None if best is None else make_plan(best.config, chip, chips, tokens)


def meshes(config: Config, devices: int) -> Iterator[MeshConfig]:
    """All meshes that divide the devices, the experts and the weights."""
    most = math.gcd(config.model.n_routed_experts, devices) if layout.has_experts(config.model) else 1
    for expert in layout.divisors(most):
        for fsdp in layout.divisors(devices // expert):
            if layout.weights_divide(config.model, fsdp * expert):
                yield MeshConfig(devices // (expert * fsdp), fsdp, expert)


def _microbatches(batch: int, devices: int) -> list[int]:
    each = batch // devices
    return [devices * n for n in layout.divisors(each) if n <= MOST_SEQUENCES]


def _changed(config: Config, mesh: MeshConfig, batch: int, micro: int, remat: str, node: int | None) -> Config:
    training = dataclasses.replace(
        config.training,
        batch_size=batch,
        microbatch_size=micro,
        remat=remat,
        initial_batch_size=None,
        batch_ramp_tokens=0,
    )
    dispatch = dataclasses.replace(config.dispatch, form="auto", ranks_per_node=node)
    devices = mesh.data * mesh.fsdp * mesh.expert
    sequences = layout.nearest_batch(config.evaluation.sequences, devices)  # a run refuses what does not divide
    evaluation = dataclasses.replace(config.evaluation, sequences=sequences)
    return dataclasses.replace(config, mesh=mesh, training=training, dispatch=dispatch, evaluation=evaluation)


def _chunked(config: Config, devices: int) -> Iterator[Config]:
    tokens = config.training.sequences_per_microbatch * config.data.sequence_length // devices
    has_chunks = layout.has_experts(config.model)
    for chunks in CHUNKS if has_chunks else (1,):
        if tokens % chunks == 0:
            yield dataclasses.replace(config, dispatch=dataclasses.replace(config.dispatch, chunks=chunks))
