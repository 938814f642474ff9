"""Checkpoints of a run: `DIRECTORY/<step>/` holds the train state and, as JSON beside it, everything else.

The state is stored as a flat mapping from dotted names ("params.moe.gate") to arrays, so that a checkpoint can be
compared, listed and restored in part without knowing our classes. Orbax writes into a temporary directory and renames
it when complete: what bears a step's number is whole, what a killed process left behind does not and is ignored.
"""

import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from dsjax.config import Config, ConfigError, from_dict, to_dict

UNFINISHED = "*.orbax-checkpoint-tmp*"
DELETED = "*.deleted"

# What decides the arrays, their meaning, and the order of the data: a run that goes on cannot change it.
FIXED = ("model.", "data.", "training.seed", "optimizer.moment_dtype")
FREE = ("data.directory", "data.tokenizer")  # where they lie; what they are, the fingerprint of the data tells


class Saver:
    """Writes checkpoints in the background, one at a time, and keeps the last `keep_last`.

    `save` and `finish` never raise for what happens on the disk: they return a sentence, and training goes on with
    the earlier checkpoints untouched. An old checkpoint is deleted only after a newer one is complete.
    """

    def __init__(self, directory: Path, keep_last: int):
        self._directory = directory.absolute()
        self._keep_last = keep_last
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[str | None] | None = None
        if jax.process_index() == 0:
            _remove(directory, UNFINISHED)
            _remove(directory, DELETED)

    def save(self, state: Any, meta: Mapping[str, Any]) -> str | None:
        """Begins to save `state` as step `meta["step"]`; returns after the copy to the host.

        Args:
          state: a pytree of jax.Array; it may be donated to the next step at once.
          meta: JSON: step, sequences, tokens, config, data fingerprint and whatever else the run needs to go on.

        Returns:
          None, or a sentence about what went wrong, now or with the save before.
        """
        problem = self.finish()
        step = int(meta["step"])
        if step in steps(self._directory):
            return problem
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with _context():
                response = ocp.save_async(self._directory / str(step), _flat(state), custom_metadata=dict(meta))
        except Exception as error:  # a disk can fail in any way; none may end the training
            return " ".join(filter(None, (problem, self._failed(step, error))))
        self._pending = self._thread.submit(self._complete, step, response)
        return problem

    def finish(self) -> str | None:
        """Waits until the last save is complete; returns None, or a sentence about why it is not."""
        pending, self._pending = self._pending, None
        return pending.result() if pending else None

    def _complete(self, step: int, response: Any) -> str | None:
        try:
            response.result()
            if jax.process_index() == 0:
                for old in steps(self._directory)[: -self._keep_last]:
                    _delete(self._directory / str(old))
        except Exception as error:
            return self._failed(step, error)
        return None

    def _failed(self, step: int, error: Exception) -> str:
        if jax.process_index() == 0:
            _remove(self._directory, UNFINISHED)
        last = latest(self._directory)
        kept = "there is no earlier one" if last is None else f"the one of step {last} is kept"
        return f"the checkpoint of step {step} could not be written to {self._directory} ({_reason(error)}); {kept}."


def steps(directory: Path) -> list[int]:
    """The steps of all complete checkpoints in `directory`, ascending; none if there is no such directory."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def latest(directory: Path) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    return max(steps(directory), default=None)


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    """What was passed as `meta` when `step` was saved.

    Raises:
      ConfigError: that checkpoint is damaged or not ours.
    """
    meta = _metadata(directory, step).custom_metadata
    if not isinstance(meta, dict) or "config" not in meta:
        raise ConfigError(_damaged(directory, step, "it holds no config of a dsjax run"))
    return meta


def restore(directory: Path, step: int, abstract_state: Any, *, part: bool = False) -> Any:
    """The state of `step`, onto any mesh.

    Args:
      directory: the run's `checkpoints/`.
      step: a step in it.
      abstract_state: pytree of jax.ShapeDtypeStruct with shardings: the tree, shapes and dtypes wanted.
      part: whether `abstract_state` may be a part of what was saved, such as {"params": ...}.

    Raises:
      ConfigError: the checkpoint holds other arrays, and which; or it is damaged.
    """
    wanted = _flat(abstract_state)
    stored = _metadata(directory, step).metadata
    if not isinstance(stored, Mapping):  # so orbax tells of damage there
        raise ConfigError(_damaged(directory, step, "the list of its arrays is damaged"))
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
        raise ConfigError(_damaged(directory, step, _reason(error))) from error
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [restored[name] for name in wanted])


def check_same_run(meta: Mapping[str, Any], config: Config, fingerprint: str) -> list[str]:
    """Whether the run saved with `meta` can go on under `config` and data of this fingerprint.

    Returns:
      What has changed and may change, one "name: old -> new" each.

    Raises:
      ConfigError: the architecture, seed or data changed; lists every difference.
    """
    old, new = _fields(to_dict(from_dict(meta["config"]))), _fields(to_dict(config))
    changed = [name for name in old | new if old.get(name) != new.get(name)]
    told = {name: f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in changed}
    if "init_from" in told:
        told["init_from"] += " (without effect: the run goes on with its own weights)"
    refused = [text for name, text in told.items() if name.startswith(FIXED) and name not in FREE]
    if not refused and meta["data_fingerprint"] != fingerprint:
        refused = [f"the prepared data: fingerprint {meta['data_fingerprint']} -> {fingerprint}"]
        refused += [told[name] for name in FREE if name in told]
    if refused:
        begun = meta["config"].get("init_from")
        remedy = f"give --config.init_from={begun} again" if begun and not config.init_from else "put it back as it was"
        raise ConfigError(
            f"this run was begun with something else and cannot go on ({'; '.join(refused)}); "
            f"{remedy}, or start a new run with another --workdir"
        )
    return list(told.values())


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


def _fields(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat |= _fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _metadata(directory: Path, step: int) -> Any:
    try:
        with _context():
            return ocp.metadata(directory.absolute() / str(step))
    except Exception as error:
        raise ConfigError(_damaged(directory, step, _reason(error))) from error


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


def _damaged(directory: Path, step: int, reason: str) -> str:
    if step not in steps(directory):
        return f"there is no checkpoint of step {step} in {directory}; there are {steps(directory) or 'none'}"
    earlier = [other for other in steps(directory) if other < step]
    remedy = f"delete it to go on from step {earlier[-1]}" if earlier else "there is no earlier one"
    return f"the checkpoint {directory / str(step)} cannot be read ({reason}); {remedy}"


def _remove(directory: Path, pattern: str) -> None:
    for path in directory.glob(pattern):
        shutil.rmtree(path, ignore_errors=True)


def _delete(path: Path) -> None:
    # Renamed first: half of a deleted checkpoint must not look like a whole one.
    shutil.rmtree(path.rename(path.with_name(path.name + DELETED[1:])))
