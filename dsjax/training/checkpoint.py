"""Checkpoints of a run: `DIRECTORY/<step>/` holds the train state and, as JSON beside it, everything else.

The state is stored as a flat mapping from dotted names ("params.moe.gate") to arrays, so that a checkpoint can be
compared, listed and restored in part without knowing our classes. Orbax writes into a temporary directory and renames
it when complete: what bears a step's number is whole, what a killed process left behind does not and is ignored.
"""

import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from dsjax.config import ConfigError
from dsjax.training import integrity
from dsjax.training.processes import any_of
from dsjax.training.retention import kept

UNFINISHED = ("*.orbax-checkpoint-tmp*", "*.unverified", "*.deleted")  # what a killed process leaves behind
DAMAGED = ".damaged"  # set aside: no longer a step, but there to be looked at
OTHERS_SECONDS = 600.0  # to wait for digests of other processes


class Damaged(ConfigError):
    """A checkpoint that cannot be read, or not as it was written; `reason` is the clause that says how."""

    def __init__(self, directory: Path, step: int, reason: str):
        self.reason = reason
        present = steps(directory)
        earlier = [other for other in present if other < step]
        remedy = f"delete it to go on from step {earlier[-1]}" if earlier else "there is no earlier one"
        sentence = f"the checkpoint {directory / str(step)} cannot be read ({reason}); {remedy}"
        if step not in present:
            sentence = f"there is no checkpoint of step {step} in {directory}; there are {present or 'none'}"
        super().__init__(sentence)


class Saver:
    """Writes checkpoints in the background, one at a time, and deletes those that `retention.kept` does not keep.

    `save` and `finish` never raise for what happens on the disk: they return a sentence, and training goes on with
    the earlier checkpoints untouched. A checkpoint gets its name when it is whole and its digests are written; only
    then are earlier ones deleted.
    """

    def __init__(self, directory: Path, keep_last: int, keep_every: int | None = None, keep_best: int | None = None):
        self._directory = directory.absolute()
        self._keep = partial(kept, keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
        self._losses: dict[int, float | None] = {}  # validation losses of what lies in the directory
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[str | None] | None = None
        if jax.process_index() == 0:
            for pattern in UNFINISHED:
                _remove(directory, pattern)
            if keep_best:
                self._losses = {step: validation_loss(directory, step) for step in steps(directory)}

    def save(self, state: Any, meta: Mapping[str, Any]) -> str | None:
        """Begins to save `state` as step `meta["step"]`; returns after the copy to the host.

        Args:
          state: a pytree of jax.Array; it may be donated to the next step at once.
          meta: JSON: step, sequences, tokens, config, data fingerprint and whatever else the run needs to go on;
            `validation_loss` decides which are the best.

        Returns:
          None, or a sentence about what went wrong, now or with the save before.
        """
        problem = self.finish()
        step = int(meta["step"])
        if step in steps(self._directory):
            return problem
        self._losses[step] = meta.get("validation_loss")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with _context():
                response = ocp.save_async(self._unfinished(step), _flat(state), custom_metadata=dict(meta))
        except Exception as error:  # a disk can fail in any way; none may end the training
            return " ".join(filter(None, (problem, self._failed(step, error))))
        self._pending = self._thread.submit(self._complete, step, response)
        return problem

    def finish(self) -> str | None:
        """Waits until the last save is complete; returns None, or a sentence about why it is not."""
        pending, self._pending = self._pending, None
        return pending.result() if pending else None

    def _unfinished(self, step: int) -> Path:
        return self._directory / f"{step}.unverified"

    def _complete(self, step: int, response: Any) -> str | None:
        try:
            response.result()
            _seal(self._unfinished(step), self._directory / str(step))
            if jax.process_index() == 0:
                self._prune()
        except Exception as error:
            return self._failed(step, error)
        return None

    def _prune(self) -> None:
        present = steps(self._directory)
        for old in set(present) - self._keep(present, self._losses):
            delete(self._directory, old)
            self._losses.pop(old, None)

    def _failed(self, step: int, error: Exception) -> str:
        if jax.process_index() == 0:
            for pattern in UNFINISHED:
                _remove(self._directory, pattern)
        last = latest(self._directory)
        earlier = "there is no earlier one" if last is None else f"the one of step {last} is kept"
        return f"the checkpoint of step {step} could not be written to {self._directory} ({_reason(error)}); {earlier}."


def _seal(unfinished: Path, finished: Path) -> None:
    """Digests of all files, each process of its part; then the checkpoint gets its name.

    The processes wait for each other by looking into the directory that all of them write to.
    """
    index, count = jax.process_index(), jax.process_count()
    _wait(lambda: unfinished.exists(), f"{unfinished} did not appear")
    own = integrity.lines(unfinished, integrity.share(unfinished, index, count))
    part = f"{integrity.SUMS}.{{}}".format
    if index:
        integrity.seal(unfinished, own, part(index))
        _wait(lambda: finished.exists() or not unfinished.exists(), f"{finished} did not appear")
        if not finished.exists():
            raise OSError("the first process could not complete it")
        return
    _wait(lambda: all((unfinished / part(i)).exists() for i in range(1, count)), "not all processes wrote digests")
    bodies = [own, *(integrity.body(unfinished, part(i)) for i in range(1, count))]
    if any(body is None for body in bodies):
        raise OSError("the digests of another process are damaged")
    integrity.seal(unfinished, "".join(map(str, bodies)))
    for i in range(1, count):
        (unfinished / part(i)).unlink()
    os.rename(unfinished, finished)


def _wait(condition: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + OTHERS_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise OSError(f"{otherwise} within {OTHERS_SECONDS} s")
        time.sleep(0.05)


def steps(directory: Path) -> list[int]:
    """The steps of all complete checkpoints in `directory`, ascending; none if there is no such directory."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def latest(directory: Path) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    return max(steps(directory), default=None)


def newest_sound(directory: Path, pass_over: Callable[[int, str], None], *, verify: bool = True) -> int | None:
    """The newest step that is as it was written, or None where none is; all processes verify a part, and agree.

    Args:
      directory: the run's `checkpoints/`.
      pass_over: is given the step of each damaged one before the next is looked at, and a clause that says what is
        wrong with it.
      verify: whether to look at all; without it, the newest is taken as it is.
    """
    seen: set[int] = set()
    while left := [step for step in steps(directory) if step not in seen]:
        step = left[-1]
        seen.add(step)
        found = damage(directory, step, jax.process_index(), jax.process_count()) if verify else None
        if not any_of(found is not None):
            return step
        # Gone, it was not damaged: the run that writes here has deleted it meanwhile, and has a newer one.
        if not any_of(not (directory / str(step)).is_dir()):
            pass_over(step, found or "another process says how")
    return None


def _to_stderr(sentence: str) -> None:
    if jax.process_index() == 0:
        print(f"WARNING: {sentence}", file=sys.stderr, flush=True)


def newest_to_read(directory: Path, warn: Callable[[str], None] = _to_stderr) -> int | None:
    """The same for who only reads a run: nothing is renamed. None where nothing has been saved.

    Args:
      directory: the run's `checkpoints/`.
      warn: is given a sentence about those that were passed over.

    Raises:
      ConfigError: there are checkpoints, and none is sound.
    """
    lost = [f"{path.name} was set aside" for path in sorted(directory.glob(f"*{DAMAGED}"))]
    passed: list[str] = []
    sound = newest_sound(
        directory, lambda step, reason: passed.append(f"the checkpoint of step {step} is damaged ({reason})")
    )
    if sound is None and (passed or lost):
        raise ConfigError(
            f"{directory} holds no sound checkpoint; put a sound copy of one there, or take another run:"
            f" {'; '.join(passed + lost)}"
        )
    if passed:
        warn(f"{'; '.join(passed)}; that of step {sound} is taken")
    return sound


def damage(directory: Path, step: int, index: int = 0, count: int = 1) -> str | None:
    """A clause about what is wrong with a checkpoint, or None; without digests, only what is read of it here shows.

    index, count: compare only that part of the files, as one of several processes does.
    """
    path = directory / str(step)
    if integrity.is_sealed(path) and (changed := integrity.damage(path, index, count)):
        return changed
    try:
        read_meta(directory, step)
    except Damaged as error:
        return error.reason
    return None


def is_verifiable(directory: Path, step: int) -> bool:
    """Whether there are digests of this checkpoint; those written by earlier versions have none."""
    return integrity.is_sealed(directory / str(step))


def set_aside(directory: Path, step: int) -> Path:
    """Renames a damaged checkpoint, so that it is no longer one but can still be looked at."""
    target = directory / f"{step}{DAMAGED}"
    shutil.rmtree(target, ignore_errors=True)
    return (directory / str(step)).rename(target)


def delete(directory: Path, name: int | str) -> None:
    """Removes a checkpoint, or what was set aside."""
    path = directory / str(name)
    # Renamed first: half of a deleted checkpoint must not look like a whole one.
    shutil.rmtree(path.rename(path.with_name(path.name + ".deleted")))


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    """What was passed as `meta` when `step` was saved.

    Raises:
      ConfigError: that checkpoint is damaged or not ours.
    """
    meta = _metadata(directory, step).custom_metadata
    if not isinstance(meta, dict) or not isinstance(meta.get("config"), dict):
        raise Damaged(directory, step, "it holds no config of a dsjax run")
    wrong = [name for name, is_right in META.items() if name in meta and not is_right(meta[name])]
    if meta.get("step", step) != step:
        wrong.insert(0, "step")
    if wrong:
        raise Damaged(directory, step, f"its {wrong[0]} is {str(meta[wrong[0]])[:80]!r}")
    return meta


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


META: dict[str, Callable[[Any], bool]] = {  # what each entry of a checkpoint's meta must be, where it is there
    "step": _is_count,
    "sequences": _is_count,
    "tokens": _is_count,
    "seconds": _is_number,
    "cost_usd": _is_number,
    "data_fingerprint": lambda value: isinstance(value, str),
    "validation_loss": lambda value: value is None or _is_number(value),
    "losses": lambda value: isinstance(value, list) and all(one is None or _is_number(one) for one in value),
    "skips": lambda value: (
        isinstance(value, list)
        and all(isinstance(skip, list) and len(skip) == 2 and all(map(_is_count, skip)) for skip in value)
    ),
}


def restore(directory: Path, step: int, abstract_state: Any, *, part: bool = False, verify: bool = True) -> Any:
    """The state of `step`, onto any mesh.

    Args:
      directory: the run's `checkpoints/`.
      step: a step in it.
      abstract_state: pytree of jax.ShapeDtypeStruct with shardings: the tree, shapes and dtypes wanted.
      part: whether `abstract_state` may be a part of what was saved, such as {"params": ...}.
      verify: whether to compare all files with their digests first.

    Raises:
      ConfigError: the checkpoint holds other arrays, and which; or it is damaged.
    """
    if verify and (problem := damage(directory, step)):
        raise Damaged(directory, step, problem)
    wanted = _flat(abstract_state)
    stored = _metadata(directory, step).metadata
    if not isinstance(stored, Mapping):  # so orbax tells of damage there
        raise Damaged(directory, step, "the list of its arrays is damaged")
    difference = _difference(stored, wanted, part)
    if difference:
        raise ConfigError(
            f"the checkpoint {directory / str(step)} does not fit this model: {difference}; "
            "use the config it was trained with, or another --workdir"
        )
    try:
        with _context(part):
            restored = ocp.load(directory.absolute() / str(step), wanted)
    except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
        raise Damaged(directory, step, _reason(error)) from error
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [restored[name] for name in wanted])


def _context(part: bool = False) -> ocp.Context:
    # Orbax tells of one failed save in hundreds of lines, from several threads; we tell it in one sentence.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    context = ocp.Context()
    # Replica-parallel saving compiles a program per shape before the first save: 10-22 s for a small model.
    context.array.saving.use_replica_parallel = False
    # Created in the background, a directory that cannot be created leaves threads waiting for it.
    context.asynchronous.create_directories_asynchronously = False
    context.pytree.loading.partial_load = part
    return context


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _metadata(directory: Path, step: int) -> Any:
    try:
        with _context():
            return ocp.metadata(directory.absolute() / str(step))
    except Exception as error:
        raise Damaged(directory, step, _reason(error)) from error


def _difference(stored: Mapping[str, Any], wanted: Mapping[str, Any], part: bool) -> str | None:
    """One clause that says how the stored arrays differ from the wanted ones, or None."""
    kinds = {
        "missing there": [name for name in wanted if name not in stored],
        "unknown here": [] if part else [name for name in stored if name not in wanted],
        "of another shape or dtype": [
            f"{name} ({_kind(stored[name])} there, {_kind(wanted[name])} here)"
            for name in wanted
            if name in stored and _kind(stored[name]) != _kind(wanted[name])
        ],
    }
    clauses = [f"{kind}: {names[0]}{_and_more(names)}" for kind, names in kinds.items() if names]
    return "; ".join(clauses) or None


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _kind(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _reason(error: Exception) -> str:
    if "No space left on device" in str(error):
        return "no space left on the device"
    lines = str(error).partition("See full TensorStore details")[0].strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def _remove(directory: Path, pattern: str) -> None:
    for path in directory.glob(pattern):
        shutil.rmtree(path, ignore_errors=True)


def validation_loss(directory: Path, step: int) -> float | None:
    """As measured when `step` was saved; None if it was not, or cannot be read."""
    try:
        loss = read_meta(directory, step).get("validation_loss")
    except Damaged:
        return None
    return loss if isinstance(loss, float) else None
