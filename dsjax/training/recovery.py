"""After a spike of the loss: back to the last good checkpoint, past the batches that may have caused it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsjax.config import Config
from dsjax.data.loader import Loader
from dsjax.training.divergence import Halt, Spike, leave_out, place
from dsjax.training.monitor import Monitor
from dsjax.training.resume import Position, Start, find_start

Trail = dict[int, Position]  # the positions after the last steps


class Recovery:
    """Goes back as often as `config.divergence.max_rollbacks` allows."""

    def __init__(self, config: Config, workdir: Path, loader: Loader, monitor: Monitor, allowed: Sequence[str] = ()):
        """`allowed`: what may have changed in `config` since a checkpoint, as in `find_start`."""
        self._config, self._workdir, self._loader, self._monitor = config, workdir, loader, monitor
        self._allowed = allowed
        self._from = -1  # the checkpoint that was gone back to last
        self._rollbacks: list[dict[str, Any]] = []  # to it

    def go_back(self, spike: Spike, trail: Trail) -> Start:
        """Where to go on: the position of the newest sound checkpoint, from where the offending batches are left out.

        Raises:
          Halt: it has been gone back to often enough.
        """
        limit, skip_steps = self._config.divergence.max_rollbacks, self._config.divergence.skip_steps
        start = find_start(self._config, self._workdir, self._loader.fingerprint, self._allowed)
        if start.position.step != self._from:
            self._from, self._rollbacks = start.position.step, []
        told = (
            f"the loss of step {spike.step} is {spike.loss:.4f}, where the mean of the steps before is"
            f" {spike.mean:.4f} and their standard deviation {spike.std:.4f}"
        )
        if len(self._rollbacks) >= limit:
            raise Halt(f"{told}; going back to step {self._from} has not helped {limit} times", spike.step)
        # Skips of earlier rollbacks to the same checkpoint are not in it.
        now = trail[spike.step]
        first = trail[max(spike.step - skip_steps, self._from)].sequences
        skips = leave_out(first, now.sequences, now.skips)
        left_out = [place(first, now.skips), place(now.sequences, now.skips)]
        self._rollbacks.append(
            {"step": spike.step, "loss": spike.loss, "mean": spike.mean, "std": spike.std, "left_out": left_out}
        )
        self._monitor.warn(
            f"{told}: going back to step {self._from}; sequences {left_out[0]} to {left_out[1] - 1} of the data order"
            " are left out"
        )
        self._monitor.rewind(self._from, {"rollbacks": self._rollbacks})
        position = Position(start.position.step, start.position.sequences, skips)
        return Start(position, start.changes, start.warnings, start.losses)

    def keep_batch(self, step: int, trail: Trail) -> Path:
        """Writes the batch of `step` to the run's directory, for someone to look at.

        The file has `tokens` [sequences, T + 1], `indices` of these sequences in the data order, and `step`.
        """
        path = self._workdir / f"batch-{step}.npz"
        before, after = trail[step - 1], trail[step]
        indices = [place(sequence, after.skips) for sequence in range(before.sequences, after.sequences)]
        if jax.process_index() == 0:
            np.savez(path, tokens=self._loader.rows(indices), indices=np.asarray(indices), step=np.asarray(step))
        return path
