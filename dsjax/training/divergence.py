"""Losses that are no numbers or leap up: when to go back, which batches to leave out, when to give up. No JAX."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dsjax.config import DivergenceConfig


class Halt(Exception):
    """A run that must not go on, told in one clause; `step` is the one that was too much."""

    def __init__(self, sentence: str, step: int):
        self.step = step
        super().__init__(sentence)


@dataclass(frozen=True)
class Spike:
    """A loss far above the ones before it."""

    step: int  # steps done after it
    loss: float  # nats per token, as the mean
    mean: float
    std: float


class Watch:
    """Judges every step of a run by the losses before it, the same in every process and after every restart."""

    def __init__(self, config: DivergenceConfig, losses: Iterable[float | None] = ()):
        """`losses`: of the steps before, None where a step was skipped; as `losses` gave them to a checkpoint."""
        self._config = config
        self._losses: deque[float | None] = deque(losses, maxlen=config.window)

    @property
    def losses(self) -> list[float | None]:
        """What the next step is compared with."""
        return list(self._losses)

    def judge(self, row: Mapping[str, Any]) -> Spike | None:
        """A spike if the step of this row of metrics is one; otherwise the row becomes part of the past.

        Raises:
          Halt: too many of the last steps were skipped.
        """
        config, loss = self._config, float(row["loss"])
        if row.get("update_skipped"):
            self._losses.append(None)
            skipped = sum(one is None for one in self._losses)
            if skipped > config.max_skipped or skipped == config.window:
                allowed = f"divergence.max_skipped = {config.max_skipped}"
                raise Halt(
                    f"{skipped} of the last {len(self._losses)} steps had a loss or gradient that is not finite,"
                    f" {f'more than {allowed}' if skipped > config.max_skipped else 'all that divergence.window sees'}",
                    row["step"],
                )
            return None
        past = [one for one in self._losses if one is not None]
        if config.spike_std is not None and 2 * len(past) >= config.window and math.isfinite(loss):
            mean, std = statistics.fmean(past), statistics.pstdev(past)
            if loss > mean + max(config.spike_std * std, config.spike_rise):
                return Spike(row["step"], loss, mean, std)
        self._losses.append(loss if math.isfinite(loss) else None)
        return None


# (trained sequence, offset): from that sequence on, the data order is read so many sequences further.
Skips = tuple[tuple[int, int], ...]


def place(sequence: int, skips: Skips) -> int:
    """Where in the data order the `sequence`-th trained sequence lies."""
    return sequence + next((offset for start, offset in reversed(skips) if sequence >= start), 0)


def leave_out(first: int, end: int, skips: Skips) -> Skips:
    """`skips`, and that trained sequences `first` to `end` - 1 are replaced by what follows them in the data order."""
    kept = tuple(skip for skip in skips if skip[0] < first)
    return (*kept, (first, place(end, skips) - first))
