"""The run: from a config and a directory to a trained model, however often it is interrupted.

A run goes on from its newest checkpoint by itself, with the same losses to the last bit: beside the arrays, all of its
state is two integers, steps done and sequences seen.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dsjax.config import Config, ConfigError
from dsjax.data import tokenizer
from dsjax.data.loader import Loader
from dsjax.data.prepare import prepare
from dsjax.planning import layout
from dsjax.sharding import check_batch, check_nodes, make_mesh
from dsjax.training import checkpoint
from dsjax.training.batches import batch_shape, batches
from dsjax.training.device_check import DeviceCheck, HardwareFault
from dsjax.training.diagnostics import measure_quantisation
from dsjax.training.divergence import Halt, Spike, Watch
from dsjax.training.interrupt import Interrupt
from dsjax.training.lock import lock
from dsjax.training.machine import machine, use_compile_cache
from dsjax.training.monitor import Monitor, Step
from dsjax.training.processes import meet, refused_by_all
from dsjax.training.recovery import Recovery, Trail
from dsjax.training.resume import Position, Start, check_agreement, describe, find_start, keep_tokenizer, load_state
from dsjax.training.schedule import Schedule
from dsjax.training.state import TrainState
from dsjax.training.step import place_batch, pretrain_step
from dsjax.training.summary import DIVERGED, FAULTY, End, Summary, already_complete, conclude, introduce
from dsjax.training.validation import make_validation, validation_line
from dsjax.training.watchdog import Watchdog
from dsjax.training.workdir import CHECKPOINTS, claim, write_config


def train(config: Config, workdir: str | Path, allow_change: Sequence[str] = ()) -> Summary:
    """Trains until `config.training.total_steps`, from the newest checkpoint in `workdir` if there is one.

    `allow_change` names fields that may differ from those that the checkpoint was written under, such as
    "optimizer.learning_rate". The first SIGINT or SIGTERM finishes the step, saves and returns; a second one ends the
    process.

    Raises:
      ConfigError: `workdir` holds something else, or a run that cannot go on under this config; the data or the mesh
        cannot be used.
    """
    workdir = Path(workdir)
    use_compile_cache(config.monitor.compile_cache)
    with contextlib.ExitStack() as stack:
        with refused_by_all():
            mesh = make_mesh(layout.resolve(config, jax.device_count()).mesh)
            check_fit(config, mesh)
            claim(workdir)
            if jax.process_index() == 0:
                stack.enter_context(lock(workdir))
            prepared = prepare(config.data)
            loader = Loader(prepared, config.data, config.training.seed)
        # With several processes JAX watches for SIGTERM itself, so that all of them stop at the same step.
        interrupt = stack.enter_context(Interrupt(enabled=jax.process_count() == 1))
        check_agreement(config, workdir, loader.fingerprint)
        start = find_start(config, workdir, loader.fingerprint, allow_change)
        position = start.position
        if position.step >= config.training.total_steps:
            return already_complete(config, workdir, start)
        with refused_by_all():
            if jax.process_index() == 0:
                write_config(workdir, config)
                keep_tokenizer(workdir, config.data.tokenizer, position.step)

        schedule = Schedule(config.training, config.optimizer, config.data.sequence_length)
        chips = machine(config.hardware, config.precision)
        keep = config.checkpoint
        saver = checkpoint.Saver(workdir / CHECKPOINTS, keep.keep_last, keep.keep_every, keep.keep_best)
        watchdog = Watchdog(config.monitor.watchdog_seconds)
        state = load_state(config, mesh, workdir, position)
        # Not before: it drops the rows of steps that will be done again.
        monitor = Monitor(config, workdir, chips, schedule.remaining(0), position.step)
        stack.enter_context(contextlib.closing(monitor))
        introduce(monitor, config, mesh, workdir, start)
        every = config.monitor.quantisation_every_steps
        run = Run(
            config=config,
            workdir=workdir,
            allow_change=allow_change,
            mesh=mesh,
            loader=loader,
            schedule=schedule,
            saver=saver,
            monitor=monitor,
            interrupt=interrupt,
            watchdog=watchdog,
            train_step=compile_step(config, mesh, state, monitor),
            validate=make_validation(config, mesh, prepared),
            measure=measure_quantisation(config, mesh) if every else None,
            device_check=DeviceCheck(config, mesh) if config.monitor.device_check_every_steps else None,
        )
        if config.init_from and position.step == 0:
            monitor.say(f"before the first step: {validation_line(run.validate(state))}")
        interrupt.has_begun = True
        stack.enter_context(watchdog)
        end = to_the_end(run, state, start)
        monitor.warn(saver.finish())
    return conclude(config, workdir, end, monitor, interrupt)


@dataclass(frozen=True)
class Run:
    """What every step of a run needs, and no step changes."""

    config: Config
    workdir: Path
    allow_change: Sequence[str]
    mesh: Mesh
    loader: Loader
    schedule: Schedule
    saver: checkpoint.Saver
    monitor: Monitor
    interrupt: Interrupt
    watchdog: Watchdog
    train_step: Callable[..., Any]
    validate: Callable[[TrainState], dict[str, float]]
    measure: Callable[..., Any] | None  # of quantisation
    device_check: DeviceCheck | None


def to_the_end(run: Run, state: TrainState, start: Start) -> End:
    """Trains to the last step, or until it is asked to stop; goes back where the loss leaps up, as configured."""
    recovery = Recovery(run.config, run.workdir, run.loader, run.monitor, run.allow_change)
    trail: Trail = {}
    try:
        while True:
            latest, spike = advance(run, state, start, trail)
            if spike is None:
                return End(trail[max(trail)], latest)
            run.monitor.warn(run.saver.finish())
            start = recovery.go_back(spike, trail)
            run.watchdog.beat()
            del state  # before there is another one
            state = load_state(run.config, run.mesh, run.workdir, start.position)
    except Halt as halt:
        batch = recovery.keep_batch(halt.step, trail)
        told = f"{halt}; the run ends here, and {batch} holds the batch of that step"
        return End(trail[halt.step], {}, told, DIVERGED)
    except HardwareFault as fault:
        told = f"{fault}; nothing was saved since, and on other devices the same command goes on"
        return End(trail[max(trail)], {}, told, FAULTY)


def advance(run: Run, state: TrainState, start: Start, trail: Trail) -> tuple[dict[str, Any], Spike | None]:
    """Trains from `start` until the run ends, is asked to stop, or the loss leaps up.

    Returns:
      (the last row of metrics with a validation loss, the spike if that is why); `trail` has the last positions.
    """
    config, monitor, position = run.config, run.monitor, start.position
    watch = Watch(config.divergence, start.losses)
    latest: dict[str, Any] = {}
    in_flight: deque[Step] = deque()
    trail.clear()
    trail[position.step] = position
    monitor.restart_clock()
    for tokens, batch_size in batches(config, run.mesh, run.loader, run.schedule, position):
        state, step = do_step(run, state, position, tokens, batch_size)
        position = Position(step.step, step.sequences, position.skips)
        in_flight.append(step)
        trail[position.step] = position
        trail.pop(position.step - config.divergence.skip_steps - 3, None)

        stop = should_stop(run.interrupt, position.step)
        is_last = position.step == config.training.total_steps
        is_saved = stop or is_last or is_due(position.step, config.checkpoint.every_steps)
        is_validated = is_last or (not stop and is_due(position.step, config.evaluation.every_steps))
        # One step runs ahead of the host, so that the devices never wait for it.
        is_checked = run.device_check is not None and is_due(position.step, config.monitor.device_check_every_steps)
        ahead = 0 if is_saved or is_validated or is_checked or not can_run_ahead() else 1
        rows = [monitor.measure(in_flight.popleft()) for _ in range(len(in_flight) - ahead)]
        for row in rows:
            if is_validated and row is rows[-1]:
                latest = row | run.validate(state)
                row = latest
            monitor.write(row)
            if spike := watch.judge(row):
                return latest, None if stop else spike
        if is_checked and run.device_check and (problem := run.device_check.problem(state)):
            raise HardwareFault(f"after step {position.step} {problem}: a device, or a link between two, is at fault")
        if is_saved:
            run.watchdog.beat()
            meta = describe(config, position, watch.losses, run.loader.fingerprint, monitor)
            meta["validation_loss"] = latest.get("validation_loss") if is_validated else None
            monitor.warn(run.saver.save(state, meta))
        if is_saved or is_validated or is_checked:
            monitor.restart_clock()
        run.watchdog.beat()
        if stop:
            break
    return latest, None


def do_step(
    run: Run, state: TrainState, position: Position, tokens: jax.Array, batch_size: int
) -> tuple[TrainState, Step]:
    """Dispatches the step after `position`."""
    settings = run.schedule.hyperparameters(position.sequences)
    microbatches = np.int32(batch_size // run.config.training.sequences_per_microbatch)
    values = {name: np.float32(value) for name, value in settings.items()}
    measured = {}
    if run.measure and is_due(position.step + 1, run.config.monitor.quantisation_every_steps):
        measured = run.measure(state, tokens, values)
    state, metrics = run.train_step(state, tokens, microbatches, values)
    metrics |= {"quantisation": measured}
    return state, Step(position.step + 1, position.sequences + batch_size, batch_size, settings, metrics)


def check_fit(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError unless batches and nodes fit the mesh and tokens fit the vocabulary."""
    check_nodes(config.dispatch.ranks_per_node, mesh)
    check_batch("training.microbatch_size", config.training.sequences_per_microbatch, mesh)
    check_batch("evaluation.sequences", config.evaluation.sequences, mesh)
    needed = tokenizer.load(config.data.tokenizer).vocab_size
    if needed > config.model.vocab_size:
        remedy = f"set --config.model.vocab_size={needed} or more"
        if config.init_from:
            remedy = "give the one that the weights were trained with as --config.data.tokenizer"
        raise ConfigError(
            f"the tokenizer {config.data.tokenizer!r} has {needed} tokens, but model.vocab_size is "
            f"{config.model.vocab_size}; {remedy}"
        )


def compile_step(config: Config, mesh: Mesh, state: TrainState, monitor: Monitor) -> Callable[..., Any]:
    """The train step, compiled before the clock of the first step starts."""
    monitor.say("compiling the train step; quick where it was compiled before")
    start = time.monotonic()
    shape = batch_shape(config)
    nothing = place_batch(lambda indices: np.zeros((len(indices), shape[-1]), np.int32), shape, mesh)
    schedule = Schedule(config.training, config.optimizer, config.data.sequence_length)
    values = {name: np.float32(value) for name, value in schedule.hyperparameters(0).items()}
    compiled = pretrain_step(config, mesh).lower(state, nothing, np.int32(1), values).compile()
    monitor.say(f"train step compiled in {time.monotonic() - start:.1f} s")
    meet()
    return compiled


def is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def can_run_ahead() -> bool:
    """Whether two steps may be in flight: on CPU, collectives of several processes would wait for each other."""
    return jax.process_count() == 1 or jax.default_backend() != "cpu"


def should_stop(interrupt: Interrupt, step: int) -> bool:
    """Whether to stop after `step`; the same answer in every process."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return interrupt.requested is not None
