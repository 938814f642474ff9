"""`dsjax checkpoint`: what a run has saved, whether it is as it was written, and what to keep of it."""

import datetime
from pathlib import Path

from dsjax.config import CheckpointConfig, ConfigError
from dsjax.training import checkpoint
from dsjax.training.lock import lock
from dsjax.training.monitor import magnitude
from dsjax.training.retention import kept
from dsjax.training.workdir import CHECKPOINTS, read_config


def list_checkpoints(run: str | Path) -> list[str]:
    """A line for each checkpoint of a run, the oldest first, below a head.

    Raises:
      ConfigError: `run` holds no checkpoint.
    """
    directory = _directory(run)
    lines = [f"{'step':>10}  {'tokens':>8}  {'validation':>10}  {'size':>8}  {'written':<19}  digests"]
    for step in checkpoint.steps(directory):
        path = directory / str(step)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        written = datetime.datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")
        digests = "yes" if checkpoint.is_verifiable(directory, step) else "none"
        try:
            meta = checkpoint.read_meta(directory, step)
        except checkpoint.Damaged as error:
            lines.append(f"{step:>10}  {'':>8}  {'':>10}  {magnitude(size) + 'B':>8}  {written}  {error.reason}")
            continue
        loss = meta.get("validation_loss")
        told = "" if loss is None else f"{loss:.4f}"
        tokens = magnitude(meta.get("tokens", 0))
        lines.append(f"{step:>10}  {tokens:>8}  {told:>10}  {magnitude(size) + 'B':>8}  {written}  {digests}")
    return lines + [f"{path.name}: damaged, set aside" for path in _set_aside(directory)]


def verify_checkpoints(run: str | Path, step: int | None = None) -> tuple[list[str], bool]:
    """(a line for each checkpoint, or for that of `step`; whether all of them are sound).

    Raises:
      ConfigError: `run` holds no checkpoint, or none of `step`.
    """
    directory = _directory(run)
    present = checkpoint.steps(directory)
    if step is not None and step not in present:
        raise checkpoint.Damaged(directory, step, "it is not there")
    lines, sound = [], True
    for one in present if step is None else [step]:
        problem = checkpoint.damage(directory, one)
        sound = sound and problem is None
        if problem:
            lines.append(f"step {one}: damaged: {problem}")
        elif checkpoint.is_verifiable(directory, one):
            lines.append(f"step {one}: every file is as it was written")
        else:
            lines.append(f"step {one}: readable, but written without digests")
    return lines, sound


def prune_checkpoints(run: str | Path, policy: CheckpointConfig | None = None) -> list[str]:
    """Deletes what `policy` (None: the run's own) does not keep, and what was set aside; a line for each deletion.

    Raises:
      ConfigError: `run` holds no checkpoint, or is in use.
    """
    directory = _directory(run)
    with lock(Path(run)):
        policy = policy or read_config(Path(run)).checkpoint
        # A rotten one takes no place from a sound one.
        sound = [step for step in checkpoint.steps(directory) if checkpoint.damage(directory, step) is None]
        if not sound:
            raise ConfigError(f"no checkpoint in {directory} is sound; nothing was deleted")
        losses = {step: checkpoint.validation_loss(directory, step) for step in sound}
        keep = kept(sound, losses, keep_last=policy.keep_last, keep_every=policy.keep_every, keep_best=policy.keep_best)
        lines = []
        for path in _set_aside(directory):
            checkpoint.delete(directory, path.name)
            lines.append(f"deleted: {path.name}")
        for step in sorted(set(checkpoint.steps(directory)) - keep):
            checkpoint.delete(directory, step)
            lines.append(f"deleted: {step}")
    return [*lines, f"kept: {', '.join(map(str, sorted(keep)))}"]


def _directory(run: str | Path) -> Path:
    directory = Path(run) / CHECKPOINTS
    if not checkpoint.steps(directory) and not _set_aside(directory):
        raise ConfigError(f"{run} holds no checkpoint of a dsjax run; give the --workdir of a run that saved one")
    return directory


def _set_aside(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"*{checkpoint.DAMAGED}"))
