"""What a run tells at its beginning and its end."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dsjax.config import Config, ConfigError
from dsjax.hub.architecture import is_published
from dsjax.planning import counts, layout
from dsjax.training import checkpoint
from dsjax.training.interrupt import EXIT_CODES, Interrupt
from dsjax.training.monitor import Monitor, dollars, duration, magnitude, read_rows
from dsjax.training.report import report
from dsjax.training.resume import Position, Start
from dsjax.training.validation import validation_line
from dsjax.training.workdir import CHECKPOINTS, LOSS_PLOT, METRICS, PLOTS, REWARD_PLOT

DIVERGED = 2  # exit codes: starting it again does not help, as with a mistake of the user's
FAULTY = 1  # it does, elsewhere


@dataclass(frozen=True)
class Summary:
    """How a call of `train` ended."""

    step: int  # steps done
    tokens: int
    validation_loss: float | None  # nats per token, as last measured by this call
    validation_nats_per_byte: float | None
    seconds: float  # of the whole run
    cost_usd: float
    exit_code: int  # 0, also after SIGTERM; 1: the last save failed, or a device is faulty; 2: diverged; 130: SIGINT


@dataclass(frozen=True)
class End:
    """Where a call of `train` has come to."""

    position: Position
    latest: dict[str, Any]  # the last row of metrics with a validation loss, if there was one
    halted: str | None = None  # why the run must not go on
    exit_code: int = 0  # then


def introduce(monitor: Monitor, config: Config, mesh: Mesh, workdir: Path, start: Start) -> None:
    """Says what is about to happen."""
    position = start.position
    parameters = counts.parameters(config.model)
    mtp = f" + {magnitude(parameters.mtp)} of MTP" if parameters.mtp else ""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "no parallelism"
    device = mesh.devices.flat[0].device_kind
    monitor.say(
        f"{magnitude(parameters.total)} parameters{mtp}, {magnitude(parameters.active)} active, {config.precision}, "
        f"on {mesh.size} x {device} ({axes}); run directory {workdir}"
    )
    chosen = layout.explain(config, layout.resolve(config, mesh.size))
    if chosen and mesh.size > 1:
        monitor.say(chosen)
    for warning in start.warnings:
        monitor.warn(warning)
    if position.step:
        changes = "".join(f"\n  changed: {change}" for change in start.changes)
        monitor.say(f"going on after step {position.step}{changes}")
    elif config.init_from:
        monitor.say(
            f"beginning with the weights of {config.init_from}, and so with its architecture; tokenizer"
            f" {config.data.tokenizer}"
        )
        if config.data.tokenizer == "bytes" and is_published(Path(config.init_from)):
            monitor.warn(
                "no tokenizer was found beside the weights, so tokens are taken to be bytes; if they are not, stop and"
                " name the right one with --config.data.tokenizer"
            )


def already_complete(config: Config, workdir: Path, start: Start) -> Summary:
    """Says that there is nothing to do, and what came out."""
    position = start.position
    meta = checkpoint.read_meta(workdir / CHECKPOINTS, position.step)
    if jax.process_index() == 0:
        for warning in start.warnings:
            print(f"WARNING: {warning}")
        print(
            f"the run in {workdir} is complete: it has {position.step} steps; for more, raise "
            f"--config.training.total_steps above {position.step}"
        )
        validated = [row for row in read_rows(workdir / METRICS) if row.get("validation_loss") is not None]
        if validated:
            print(f"{validation_line(validated[-1])}, cost {dollars(meta['cost_usd'])}")
        if (workdir / PLOTS / LOSS_PLOT).exists():
            print(f"loss plot: {workdir / PLOTS / LOSS_PLOT}")
    tokens = position.sequences * config.data.sequence_length
    return Summary(position.step, tokens, None, None, meta["seconds"], meta["cost_usd"], 0)


def conclude(config: Config, workdir: Path, end: End, monitor: Monitor, interrupt: Interrupt) -> Summary:
    """Draws the plots, says what came out and how to go on."""
    position, latest = end.position, end.latest
    tokens = position.sequences * config.data.sequence_length
    cost = monitor.cost()
    is_complete = position.step == config.training.total_steps and not end.halted
    saved = checkpoint.steps(workdir / CHECKPOINTS)
    lines = [
        f"{position.step} of {config.training.total_steps} steps, {magnitude(tokens)} tokens "
        f"in {duration(monitor.seconds)}, cost {cost}",
        f"checkpoints: {workdir / CHECKPOINTS} ({', '.join(map(str, saved)) or 'none'})",
    ]
    if is_complete:
        lines.insert(1, validation_line(latest))
        lines.append(draw(workdir))
    elif end.halted:
        lines.append(f"stopped: {end.halted}")
    else:
        lines.append("interrupted; the same command goes on from here")
    for line in lines:
        monitor.say(line)
    stopped = EXIT_CODES[interrupt.requested] if interrupt.requested and not is_complete else 0
    exit_code = stopped if position.step in saved else 1
    return Summary(
        step=position.step,
        tokens=tokens,
        validation_loss=latest.get("validation_loss"),
        validation_nats_per_byte=latest.get("validation_nats_per_byte"),
        seconds=monitor.seconds,
        cost_usd=monitor.cost_usd,
        exit_code=end.exit_code if end.halted else exit_code,
    )


def draw(workdir: Path) -> str:
    """Draws the report, where matplotlib is installed; says where it is."""
    if jax.process_index() != 0:
        return ""
    try:
        page = report(workdir)
    except ConfigError as error:
        return str(error)
    what = "reward" if (workdir / PLOTS / REWARD_PLOT).exists() else "loss"
    plot = REWARD_PLOT if what == "reward" else LOSS_PLOT
    return f"{what} plot: {workdir / PLOTS / plot}; report: {page}"
