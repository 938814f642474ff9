"""The run: from a config and a directory to a trained model, however often it is interrupted.

A run goes on from its newest checkpoint by itself, with the same losses to the last bit: beside the arrays, all of its
state is two integers, steps done and sequences seen.
"""

import contextlib
import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import dsjax
from dsjax.config import Config, ConfigError, to_dict
from dsjax.data import tokenizer
from dsjax.data.loader import Loader
from dsjax.data.prepare import Prepared, prepare
from dsjax.hub.architecture import is_published
from dsjax.planning import counts
from dsjax.sharding import check_batch, make_mesh
from dsjax.training import checkpoint
from dsjax.training.diagnostics import measure_quantisation
from dsjax.training.interrupt import EXIT_CODES, Interrupt
from dsjax.training.machine import machine, use_compile_cache
from dsjax.training.monitor import Monitor, Step, dollars, duration, magnitude, read_rows
from dsjax.training.report import report
from dsjax.training.schedule import Schedule
from dsjax.training.start import begin
from dsjax.training.state import TrainState, abstract_state
from dsjax.training.step import evaluate_step, place_batch, pretrain_step
from dsjax.training.workdir import CHECKPOINTS, LOSS_PLOT, METRICS, PLOTS, TOKENIZER, claim, write_config


@dataclass(frozen=True)
class Summary:
    """How a call of `train` ended."""

    step: int  # steps done
    tokens: int
    validation_loss: float | None  # nats per token, as last measured by this call
    validation_nats_per_byte: float | None
    seconds: float  # of the whole run
    cost_usd: float
    exit_code: int  # 0, also after SIGTERM; 1: the last checkpoint could not be written; 130: SIGINT


@dataclass(frozen=True)
class Position:
    """Where a run stands."""

    step: int  # steps done
    sequences: int  # sequences seen


def train(config: Config, workdir: str | Path) -> Summary:
    """Trains until `config.training.total_steps`, from the newest checkpoint in `workdir` if there is one.

    The first SIGINT or SIGTERM finishes the step, saves and returns; a second one ends the process.

    Raises:
      ConfigError: `workdir` holds something else, or a run that cannot go on under this config; the data or the mesh
        cannot be used.
    """
    workdir = Path(workdir)
    use_compile_cache(config.monitor.compile_cache)
    mesh = make_mesh(config.mesh)
    check_fit(config, mesh)
    claim(workdir)
    prepared = prepare(config.data)
    loader = Loader(prepared, config.data, config.training.seed)
    position, changes = find_start(config, workdir, loader.fingerprint)
    check_agreement(config, position, loader.fingerprint)
    if position.step >= config.training.total_steps:
        return already_complete(config, workdir, position)
    if jax.process_index() == 0:
        write_config(workdir, config)
        keep_tokenizer(workdir, config.data.tokenizer)

    schedule = Schedule(config.training, config.optimizer, config.data.sequence_length)
    chips = machine(config.hardware, config.precision)
    saver = checkpoint.Saver(workdir / CHECKPOINTS, config.checkpoint.keep_last)
    latest: dict[str, Any] = {}
    in_flight: deque[Step] = deque()
    with contextlib.ExitStack() as stack:
        # With several processes JAX watches for SIGTERM itself, so that all of them stop at the same step.
        interrupt = stack.enter_context(Interrupt(enabled=jax.process_count() == 1))
        state = load_state(config, mesh, workdir, position)
        # Not before: it drops the rows of steps that will be done again.
        monitor = Monitor(config, workdir, chips, schedule.remaining(0), position.step)
        stack.enter_context(contextlib.closing(monitor))
        introduce(monitor, config, mesh, workdir, position, changes)
        train_step = compile_step(config, mesh, state, monitor)
        validate = make_validation(config, mesh, prepared)
        every = config.monitor.quantisation_every_steps
        measure = measure_quantisation(config, mesh) if every else None
        if config.init_from and position.step == 0:
            monitor.say(f"before the first step: {validation_line(validate(state))}")
        interrupt.has_begun = True
        monitor.restart_clock()
        for tokens, batch_size in batches(config, mesh, loader, schedule, position):
            settings = schedule.hyperparameters(position.sequences)
            microbatches = np.int32(batch_size // config.training.sequences_per_microbatch)
            values = {name: np.float32(value) for name, value in settings.items()}
            measured = measure(state, tokens, values) if measure and is_due(position.step + 1, every) else {}
            state, metrics = train_step(state, tokens, microbatches, values)
            metrics |= {"quantisation": measured}
            position = Position(position.step + 1, position.sequences + batch_size)
            in_flight.append(Step(position.step, position.sequences, batch_size, settings, metrics))

            stop = should_stop(interrupt, position.step)
            is_last = position.step == config.training.total_steps
            is_saved = stop or is_last or is_due(position.step, config.checkpoint.every_steps)
            is_validated = is_last or (not stop and is_due(position.step, config.evaluation.every_steps))
            # One step runs ahead of the host, so that the devices never wait for it.
            ahead = 0 if is_saved or is_validated or not can_run_ahead() else 1
            rows = [monitor.measure(in_flight.popleft()) for _ in range(len(in_flight) - ahead)]
            if is_validated:
                rows[-1] |= validate(state)
                latest = rows[-1]
            for row in rows:
                monitor.write(row)
            if is_saved:
                monitor.warn(saver.save(state, describe(config, position, loader.fingerprint, monitor)))
            if is_saved or is_validated:
                monitor.restart_clock()
            if stop:
                break
        monitor.warn(saver.finish())
    return conclude(config, workdir, position, latest, monitor, interrupt)


def check_fit(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError unless batches fit the mesh and tokens fit the vocabulary."""
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


def keep_tokenizer(workdir: Path, name: str) -> None:
    """Copies a tokenizer of files into the run's directory: without it, a run that outlives them is worth nothing."""
    directory = workdir / TOKENIZER
    if name in tokenizer.NAMES or directory.exists():
        return
    directory.mkdir()
    tokenizer.load(name).write(directory)


def find_start(config: Config, workdir: Path, fingerprint: str) -> tuple[Position, list[str]]:
    """Where the run in `workdir` stands, and what has changed in its config since.

    Raises:
      ConfigError: it cannot go on under `config` with data of this fingerprint.
    """
    step = checkpoint.latest(workdir / CHECKPOINTS)
    if step is None:
        return Position(0, 0), []
    meta = checkpoint.read_meta(workdir / CHECKPOINTS, step)
    changes = checkpoint.check_same_run(meta, config, fingerprint)
    return Position(meta["step"], meta["sequences"]), changes


def load_state(config: Config, mesh: Mesh, workdir: Path, position: Position) -> TrainState:
    """The state at `position`, on the devices."""
    if position.step == 0:
        return begin(config, mesh)
    state = checkpoint.restore(workdir / CHECKPOINTS, position.step, abstract_state(config, mesh))
    if int(state.step) != position.step:
        raise ConfigError(
            f"the checkpoint {workdir / CHECKPOINTS / str(position.step)} holds arrays of step {int(state.step)};"
            " delete it to go on from an earlier one"
        )
    return state


def check_agreement(config: Config, position: Position, fingerprint: str) -> None:
    """Raises ConfigError unless all processes are about to train the same thing from the same place."""
    if jax.process_count() == 1:
        return
    values = to_dict(config)
    values["data"].pop("directory")  # may differ from host to host; what is in it may not
    told = json.dumps([values, position.step, position.sequences, fingerprint]).encode()
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(told).digest(), np.uint8))
    if (digests != digests[0]).any():
        raise ConfigError(
            "the processes disagree about the config, the prepared data or the newest checkpoint; give all of them the"
            " same command, Python and --config.data.directory, and a --workdir that all of them see"
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
    return compiled


def make_validation(config: Config, mesh: Mesh, prepared: list[Prepared]) -> Callable[[TrainState], dict[str, float]]:
    """A function that measures a state on `evaluation.sequences` rows, the same ones whatever the training seed.

    Its result are fields of a row of metrics.jsonl: nats per token, and nats per byte of the text that a token stands
    for. Where the split has fewer rows, all of them are read, and as many twice as fill the last batch.
    """
    loader = Loader(prepared, config.data, seed=0, split="validation")
    evaluate = evaluate_step(config, mesh)
    size = math.gcd(config.evaluation.sequences, config.training.sequences_per_microbatch)

    def place(start: int) -> jax.Array:
        rows = lambda indices: loader.rows([start + index for index in indices])  # noqa: E731
        return place_batch(rows, (size, config.data.sequence_length + 1), mesh)

    sequences = min(config.evaluation.sequences, -(-loader.num_rows // size) * size)
    parts = [place(start) for start in range(0, sequences, size)]

    def validate(state: TrainState) -> dict[str, float]:
        # Each is waited for: on CPU, two programs in flight would wait for each other's processes.
        measured = [jax.device_get(evaluate(state, tokens)) for tokens in parts]
        loss, mtp_loss = (float(np.mean([one[name] for one in measured])) for name in ("loss", "mtp_loss"))
        row = {"validation_loss": loss, "validation_nats_per_byte": loss / loader.bytes_per_token}
        return row | ({"validation_mtp_loss": mtp_loss} if config.model.num_nextn_predict_layers else {})

    return validate


def batches(
    config: Config, mesh: Mesh, loader: Loader, schedule: Schedule, start: Position
) -> Iterator[tuple[jax.Array, int]]:
    """The batches from `start` to the end of the run, each with its number of sequences.

    The next one is read and placed in a thread while the current one is used. A batch has the shape of the largest;
    what a smaller one leaves over is zero and not read.
    """
    shape = batch_shape(config)

    def load(sequences: int, size: int) -> jax.Array:
        def rows(indices: range) -> np.ndarray:
            found = loader.rows([sequences + index for index in indices if index < size])
            return np.pad(found, ((0, len(indices) - len(found)), (0, 0)))

        return place_batch(rows, shape, mesh)

    sequences, size = start.sequences, schedule.batch_size(start.sequences)
    with ThreadPoolExecutor(1, "batches") as thread:
        following = thread.submit(load, sequences, size)
        for _ in range(start.step, config.training.total_steps):
            tokens, tokens_size = following.result(), size
            sequences += size
            size = schedule.batch_size(sequences)
            following = thread.submit(load, sequences, size)
            yield tokens, tokens_size


def batch_shape(config: Config) -> tuple[int, int, int]:
    """[microbatches, sequences, tokens] of the largest batch."""
    size = config.training.sequences_per_microbatch
    return config.training.batch_size // size, size, config.data.sequence_length + 1


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


def describe(config: Config, position: Position, fingerprint: str, monitor: Monitor) -> dict[str, Any]:
    """What a checkpoint holds beside the arrays."""
    return {
        "dsjax": dsjax.__version__,
        "step": position.step,
        "sequences": position.sequences,
        "tokens": position.sequences * config.data.sequence_length,
        "config": to_dict(config),
        "data_fingerprint": fingerprint,
        "rng": {"seed": config.training.seed},
        "seconds": monitor.seconds,
        "cost_usd": monitor.cost_usd,
    }


def introduce(
    monitor: Monitor, config: Config, mesh: Mesh, workdir: Path, position: Position, changes: list[str]
) -> None:
    """Says what is about to happen."""
    parameters = counts.parameters(config.model)
    mtp = f" + {magnitude(parameters.mtp)} of MTP" if parameters.mtp else ""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "no parallelism"
    device = mesh.devices.flat[0].device_kind
    monitor.say(
        f"{magnitude(parameters.total)} parameters{mtp}, {magnitude(parameters.active)} active, {config.precision}, "
        f"on {mesh.size} x {device} ({axes}); run directory {workdir}"
    )
    if position.step:
        monitor.say(f"going on after step {position.step}" + "".join(f"\n  changed: {change}" for change in changes))
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


def already_complete(config: Config, workdir: Path, position: Position) -> Summary:
    """Says that there is nothing to do, and what came out."""
    meta = checkpoint.read_meta(workdir / CHECKPOINTS, position.step)
    if jax.process_index() == 0:
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


def validation_line(row: dict[str, Any]) -> str:
    return (
        f"validation loss {row['validation_loss']:.4f} nats per token, "
        f"{row['validation_nats_per_byte']:.4f} nats per byte"
    )


def conclude(
    config: Config,
    workdir: Path,
    position: Position,
    latest: dict[str, Any],
    monitor: Monitor,
    interrupt: Interrupt,
) -> Summary:
    """Draws the plots, says what came out and how to go on."""
    tokens = position.sequences * config.data.sequence_length
    cost = monitor.cost()
    is_complete = position.step == config.training.total_steps
    saved = checkpoint.steps(workdir / CHECKPOINTS)
    lines = [
        f"{position.step} of {config.training.total_steps} steps, {magnitude(tokens)} tokens "
        f"in {duration(monitor.seconds)}, cost {cost}",
        f"checkpoints: {workdir / CHECKPOINTS} ({', '.join(map(str, saved)) or 'none'})",
    ]
    if is_complete:
        lines.insert(1, validation_line(latest))
        lines.append(draw(workdir))
    else:
        lines.append("interrupted; the same command goes on from here")
    for line in lines:
        monitor.say(line)
    stopped = EXIT_CODES[interrupt.requested] if interrupt.requested and not is_complete else 0
    return Summary(
        step=position.step,
        tokens=tokens,
        validation_loss=latest.get("validation_loss"),
        validation_nats_per_byte=latest.get("validation_nats_per_byte"),
        seconds=monitor.seconds,
        cost_usd=monitor.cost_usd,
        exit_code=stopped if position.step in saved else 1,
    )


def draw(workdir: Path) -> str:
    """Draws the report, where matplotlib is installed; says where it is."""
    if jax.process_index() != 0:
        return ""
    try:
        page = report(workdir)
    except ConfigError as error:
        return str(error)
    return f"loss plot: {workdir / PLOTS / LOSS_PLOT}; report: {page}"
