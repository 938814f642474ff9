"""Where a run stands, whether it may go on under this config, and its state at that place."""

import hashlib
import json
import shutil
from collections.abc import Sequence
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
from dsjax.training import checkpoint
from dsjax.training.changes import check_same_run
from dsjax.training.divergence import Skips
from dsjax.training.monitor import Monitor
from dsjax.training.processes import any_of
from dsjax.training.start import begin
from dsjax.training.state import TrainState, abstract_state
from dsjax.training.workdir import CHECKPOINTS, TOKENIZER


@dataclass(frozen=True)
class Position:
    """Where a run stands."""

    step: int  # steps done
    sequences: int  # sequences trained on
    skips: Skips = ()  # where the data order was left out


@dataclass(frozen=True)
class Start:
    """From where a run goes on."""

    position: Position
    changes: list[str]  # in its config since
    warnings: list[str]
    losses: list[float | None]  # of the steps before, for `divergence.Watch`


def keep_tokenizer(workdir: Path, name: str, step: int = 0) -> None:
    """Copies a tokenizer of files into the run's directory: without it, a run that outlives them is worth nothing.

    Whole or not at all. After its first `step` a run keeps the copy that it has; before, it may have begun with another
    tokenizer. Raises ConfigError where it cannot be copied.
    """
    directory, temporary = workdir / TOKENIZER, workdir / f".{TOKENIZER}.tmp"
    if name in tokenizer.NAMES or (step > 0 and tokenizer.beside(directory) is not None):
        return
    text = tokenizer.load(name)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        text.write(temporary)
        if not (Path(name).expanduser().parent / tokenizer.CONFIG).is_file():
            # Made up, as a published checkpoint needs it; a chat template would be rendered otherwise with it.
            (temporary / tokenizer.CONFIG).unlink(missing_ok=True)
        if directory.exists():
            shutil.rmtree(directory)
        temporary.rename(directory)
    except OSError as error:
        raise ConfigError(
            f"the tokenizer {name!r} cannot be copied to {directory} ({error.strerror}); look at the space and rights"
            " there, or choose another --workdir"
        ) from error


def find_start(config: Config, workdir: Path, fingerprint: str, allowed: Sequence[str] = ()) -> Start:
    """Where the run in `workdir` stands: at its newest checkpoint that is as it was written.

    Damaged ones after it are set aside. `allowed`: fields of `config` that may change, see `check_same_run`.

    Raises:
      ConfigError: it cannot go on under `config` with data of this fingerprint, or no checkpoint is sound.
    """
    directory = workdir / CHECKPOINTS
    warnings: list[str] = []
    step = checkpoint.newest_sound(
        directory,
        lambda step, reason: warnings.append(_set_aside(directory, step, reason)),
        verify=config.checkpoint.verify,
    )
    if step is not None:
        if config.checkpoint.verify and not checkpoint.is_verifiable(directory, step):
            warnings.append(f"the checkpoint of step {step} has no digests to verify it with: it is taken as it is")
        meta = checkpoint.read_meta(directory, step)
        changes = check_same_run(meta, config, fingerprint, allowed)
        skips = tuple((int(first), int(offset)) for first, offset in meta.get("skips", ()))
        return Start(Position(meta["step"], meta["sequences"], skips), changes, warnings, meta.get("losses", []))
    if lost := sorted(path.name for path in directory.glob(f"*{checkpoint.DAMAGED}")):
        told = " ".join(warnings) or f"{', '.join(lost)} cannot be read."
        raise ConfigError(
            f"{directory} holds no sound checkpoint to go on from; put a copy there, or start a new run with another"
            f" --workdir: {told}"
        )
    return Start(Position(0, 0), [], [], [])


def _set_aside(directory: Path, step: int, reason: str) -> str:
    """Gives a damaged checkpoint another name, and a sentence about it; all processes wait until it has it."""
    if jax.process_index() == 0:
        try:
            checkpoint.set_aside(directory, step)
        except OSError as error:
            raise ConfigError(
                f"the checkpoint {directory / str(step)} is damaged ({reason}) and cannot be set aside "
                f"({error.strerror}); delete it"
            ) from error
    any_of(False)  # nobody looks at the directory before that is done
    return f"the checkpoint of step {step} is damaged ({reason}) and now called {step}{checkpoint.DAMAGED}."


def load_state(config: Config, mesh: Mesh, workdir: Path, position: Position) -> TrainState:
    """The state at `position`, on the devices."""
    if position.step == 0:
        return begin(config, mesh)
    # Its files were verified when it was chosen.
    target = abstract_state(config, mesh)
    state = checkpoint.restore(workdir / CHECKPOINTS, position.step, target, verify=False)
    if int(state.step) != position.step:
        raise ConfigError(
            f"the checkpoint {workdir / CHECKPOINTS / str(position.step)} holds arrays of step {int(state.step)};"
            " delete it to go on from an earlier one"
        )
    return state


def check_agreement(config: Config, workdir: Path, fingerprint: str) -> None:
    """Raises ConfigError unless all processes are about to train the same thing from the same place."""
    if jax.process_count() == 1:
        return
    values = to_dict(config)
    values["data"].pop("directory")  # may differ from host to host; what is in it may not
    told = json.dumps([values, checkpoint.steps(workdir / CHECKPOINTS), fingerprint]).encode()
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(told).digest(), np.uint8))
    if (digests != digests[0]).any():
        raise ConfigError(
            "the processes disagree about the config, the prepared data or the checkpoints; give all of them the"
            " same command, Python and --config.data.directory, and a --workdir that all of them see"
        )


def describe(
    config: Config, position: Position, losses: list[float | None], fingerprint: str, monitor: Monitor
) -> dict[str, Any]:
    """What a checkpoint holds beside the arrays."""
    return {
        "dsjax": dsjax.__version__,
        "step": position.step,
        "sequences": position.sequences,
        "tokens": position.sequences * config.data.sequence_length,
        "skips": [list(skip) for skip in position.skips],
        "losses": losses,
        "config": to_dict(config),
        "data_fingerprint": fingerprint,
        "rng": {"seed": config.training.seed},
        "seconds": monitor.seconds,
        "cost_usd": monitor.cost_usd,
    }
