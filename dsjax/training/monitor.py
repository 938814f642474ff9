"""What a run tells while it works: `metrics.jsonl` is the truth; the console line and TensorBoard are views of it.

A row of metrics.jsonl is one step, written once and in order. Only process 0 writes and prints.
"""

import errno
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from dsjax.config import Config, ConfigError
from dsjax.planning import counts
from dsjax.training.machine import Machine
from dsjax.training.workdir import EXPERT_LOAD, METRICS

NOT_IN_ROWS = ("expert_load", "weight")  # of a step's metrics: told elsewhere, or not at all


@dataclass(frozen=True)
class Step:
    """A dispatched step."""

    step: int  # steps done after it
    sequences: int  # sequences seen after it
    batch_size: int
    hyperparameters: Mapping[str, Any]
    metrics: Mapping[str, Any]  # still being computed: arrays, or mappings of them


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; a line that is not a JSON object, as a killed process leaves it, is skipped."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        return [row for row in map(_parse, file) if row is not None]


def drop_rows_after(path: Path, step: int) -> None:
    """Rewrites a .jsonl file so that it ends with `step`; what came later will be done again, and was paid for."""
    if not path.exists():
        return
    rows = read_rows(path)
    kept = [row for row in rows if row.get("step", 0) <= step]
    if kept and "cost_usd" in rows[-1]:
        kept[-1] |= {name: rows[-1].get(name) for name in ("seconds", "cost_usd")}
    _rewrite(path, kept)


def settle(path: Path, seconds: float, cost_usd: float) -> None:
    """Puts what a run has taken in all into its last row: what came after it, such as saving, was paid for too."""
    if rows := read_rows(path):
        rows[-1] |= {"seconds": seconds, "cost_usd": cost_usd}
        _rewrite(path, rows)


def append_line(path: Path, line: str) -> None:
    """Appends `line` whole, or raises and leaves nothing of it, so that the next one begins on a line of its own.

    In one call to the system, so that lines of several writers do not mix, and a full disk keeps nothing of it. A kill
    may cut a long one, of megabytes: who goes on with the file must see to its end. Raises OSError.
    """
    data = line.encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if os.write(descriptor, data) < len(data):  # the disk took a part
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(_line(row) for row in rows), encoding="utf-8")
    os.replace(temporary, path)


class Monitor:
    """Turns finished steps into rows, and shows them.

    The cost is that of all chips since the run began, resumed parts and compilation included.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        machine: Machine,
        total_tokens: int | None,
        done: int = 0,
        stream: TextIO | None = None,
    ):
        """`done`: steps that a resumed run has behind it; rows after them are dropped, their cost is not.

        `total_tokens`: of the whole run; None where steps are of any size. Raises ConfigError if TensorBoard is wanted
        and not installed.
        """
        self.cost_usd = self.seconds = 0.0
        self._config, self._workdir, self._machine = config, workdir, machine
        self._total_tokens, self._done = total_tokens, done
        self._writes = jax.process_index() == 0
        self._console = Console(stream if stream is not None else sys.stdout, enabled=self._writes)
        has_mtp = config.model.num_nextn_predict_layers > 0
        self._flops_per_token = counts.flops_per_token(config.model, config.data.sequence_length, mtp=has_mtp)
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)  # tokens and seconds of the last steps
        self._validation_loss: float | None = None
        self._validation_accuracy: float | None = None  # on held-out problems
        self._warned: set[str] = set()
        self._notes: dict[str, Any] = {}  # for the next row
        self._tensorboard = _tensorboard(workdir, done) if config.monitor.tensorboard and self._writes else None
        if self._writes:
            self._take_over(done)
        self._past = (self.seconds, self.cost_usd)
        self._started = time.monotonic()
        self.restart_clock()

    def rewind(self, step: int, notes: Mapping[str, Any]) -> None:
        """Drops the rows after `step`, which is gone back to; `notes` are fields of the row that comes next."""
        self._notes = dict(notes)
        if self._tensorboard:
            self._tensorboard.close()
            self._tensorboard = _tensorboard(self._workdir, step)
        if self._writes:
            for name in (METRICS, EXPERT_LOAD):
                drop_rows_after(self._workdir / name, step)

    def restart_clock(self) -> None:
        """Says that the next step begins now: what was done since the last one is not part of it."""
        self._mark = time.perf_counter()

    def measure(self, step: Step) -> dict[str, Any]:
        """The row of `step`; waits until it is computed."""
        values = jax.device_get(dict(step.metrics))
        quantisation = values.pop("quantisation", None)
        metrics = {name: np.asarray(value) for name, value in values.items()}
        now = time.perf_counter()
        step_seconds, self._mark = now - self._mark, now
        self._pass_time()
        tokens = step.batch_size * self._config.data.sequence_length
        rate = tokens / step_seconds
        load_LE = metrics.get("expert_load")
        row = {
            "step": step.step,
            "tokens": step.sequences * self._config.data.sequence_length,
            "loss": metrics["loss"],
            "mtp_loss": metrics.get("mtp_loss") if self._config.model.num_nextn_predict_layers else None,
            "balance_loss": metrics.get("balance_loss"),
            "grad_norm": metrics["grad_norm"],
            "lr": step.hyperparameters["learning_rate"],
            "batch_size": step.batch_size,
            "step_seconds": step_seconds,
            "tokens_per_second": rate,
            "mfu": self._mfu(rate),
            "expert_load_max_over_mean": None if load_LE is None else np.max(_over_mean(load_LE)),
            "dropped_tokens": int(metrics.get("dropped_tokens", 0)),
            "dispatch_rounds": metrics.get("dispatch_rounds"),
            "dispatch_bytes": metrics.get("dispatch_bytes"),
            "dispatch_bytes_in_node": metrics.get("dispatch_bytes_in_node"),
            "cost_usd": self.cost_usd,
            "seconds": self.seconds,
        }
        if "update_skipped" in metrics:
            row["update_skipped"] = bool(metrics["update_skipped"])
        # What one kind of training has and others have not.
        row |= {name: value for name, value in metrics.items() if name not in row and name not in NOT_IN_ROWS}
        row |= self._notes
        self._notes = {}
        if quantisation:  # only some steps measure it
            row["quantisation"] = quantisation
        self._recent.append((tokens, step_seconds))
        self._write_expert_load(step.step, load_LE)
        return row

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends `row` to metrics.jsonl and shows it; what is not a finite number is written as null, and told."""
        row = {name: _plain(value) for name, value in row.items()}
        if row.get("update_skipped"):
            self.warn(f"loss or gradient of step {row['step']} is not finite: its update is left out")
        for name in ("loss", "grad_norm", "validation_loss"):
            if name in row and row[name] is None:
                self.warn(f"{name} is not a finite number at step {row['step']}", once=f"{name} is not finite")
        self._validation_loss = row.get("validation_loss") or self._validation_loss
        if row.get("validation_accuracy") is not None:
            self._validation_accuracy = row["validation_accuracy"]
        self._append(METRICS, row)
        if self._tensorboard:
            for name, value in _scalars(row):
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(name, value, row["step"])
        self._console.progress(self._progress(row))

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.say(text)

    def warn(self, text: str | None, once: str | None = None) -> None:
        """Prints a warning that stays; `once` names a kind of which only the first is told. None: nothing to tell."""
        if text and once not in self._warned:
            self._warned |= {once} if once else set()
            self._console.say(f"WARNING: {text}")

    def cost(self) -> str:
        """What the run has cost until now, and why."""
        self._pass_time()
        return f"{dollars(self.cost_usd)} ({self._machine.note})"

    def close(self) -> None:
        """Shows the last step, if it was not, ends the progress line and settles the account."""
        self._console.finish()
        if self._writes:
            self._pass_time()
            try:
                settle(self._workdir / METRICS, self.seconds, self.cost_usd)
            except OSError:  # the disk is full, which was told; the rows stand as they are
                pass
        if self._tensorboard:
            self._tensorboard.close()

    def _take_over(self, done: int) -> None:
        """Goes on from the rows of an earlier part of this run."""
        last = (read_rows(self._workdir / METRICS) or [{}])[-1]
        self.seconds, self.cost_usd = _number(last.get("seconds")), _number(last.get("cost_usd"))
        for name in (METRICS, EXPERT_LOAD):
            drop_rows_after(self._workdir / name, done)

    def _pass_time(self) -> None:
        here = time.monotonic() - self._started
        self.seconds = self._past[0] + here
        self.cost_usd = self._past[1] + here / 3600 * self._machine.dollars_per_hour

    def _write_expert_load(self, step: int, load_LE: np.ndarray | None) -> None:
        every = self._config.monitor.expert_load_every_steps
        if load_LE is not None and every and (step == 1 or step % every == 0):
            self._append(EXPERT_LOAD, {"step": step, "load": np.round(_over_mean(load_LE), 3).tolist()})

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        try:
            append_line(self._workdir / name, _line(row))
        except OSError as error:
            self.warn(f"{self._workdir / name} cannot be written ({error.strerror}); training goes on", once=name)

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs of forward and backward, causal attention, MTP included, over the peak of all chips."""
        peak = self._machine.peak_flops_per_second
        return tokens_per_second * self._flops_per_token / peak if peak else None

    def _progress(self, row: Mapping[str, Any]) -> list[str]:
        """What the progress line shows, the most important first."""
        tokens, seconds = map(sum, zip(*self._recent, strict=True))
        loss, mtp, mfu = row["loss"], row["mtp_loss"], self._mfu(tokens / seconds)
        parts = [
            f"step {row['step']}/{self._config.training.total_steps}",
            "loss nan" if loss is None else f"loss {loss:.4f}",
            f"ETA {duration(self._seconds_left(row, tokens / seconds))}",
            f"reward {row['reward']:.3f}" if row.get("reward") is not None else "",
            f"{magnitude(tokens / seconds)} tok/s",
            "" if self._validation_loss is None else f"val {self._validation_loss:.4f}",
            "" if self._validation_accuracy is None else f"accuracy {self._validation_accuracy:.1%}",
            "" if mfu is None else f"MFU {mfu:.1%}",
            dollars(row["cost_usd"]),
            "" if mtp is None else f"mtp {mtp:.4f}",
            f"lr {row['lr']:.2e}",
        ]
        return [part for part in parts if part]

    def _seconds_left(self, row: Mapping[str, Any], tokens_per_second: float) -> float:
        if self._total_tokens is not None:
            # A batch size that changed makes it a guess.
            return max(0, self._total_tokens - row["tokens"]) / tokens_per_second
        per_step = (self.seconds - self._past[0]) / max(1, row["step"] - self._done)
        return per_step * (self._config.training.total_steps - row["step"])


class Console:
    """One updating line on a terminal; plain lines, not too many, anywhere else."""

    def __init__(self, stream: TextIO, enabled: bool = True):
        self._stream, self._enabled = stream, enabled
        self._terminal = stream.isatty()
        self._interval = 0.1 if self._terminal else 5.0  # seconds
        self._shown = -math.inf
        self._held_back: list[str] | None = None
        self._line_is_open = False

    def progress(self, parts: list[str]) -> None:
        """Shows as many of `parts` as fit; on the terminal in place of the ones before."""
        self._held_back = parts
        if time.monotonic() - self._shown >= self._interval:
            self._show()

    def say(self, text: str) -> None:
        """Prints a line that stays, above the progress line."""
        self._print(("\r\x1b[K" if self._line_is_open else "") + text + "\n")
        self._line_is_open = False

    def finish(self) -> None:
        """Shows what was held back, and leaves the line."""
        if self._held_back:
            self._show()
        if self._line_is_open:
            self._print("\n")
        self._line_is_open = False

    def _show(self) -> None:
        parts, self._held_back = self._held_back or [], None
        self._shown = time.monotonic()
        if not self._terminal:
            self._print("  ".join(parts) + "\n")
            return
        width = shutil.get_terminal_size().columns - 1
        while len("  ".join(parts)) > width and len(parts) > 1:
            parts = parts[:-1]
        # Over the old line, then erase what is left of it: no flicker.
        self._print("\r" + "  ".join(parts)[:width] + "\x1b[K")
        self._line_is_open = True

    def _print(self, text: str) -> None:
        if not self._enabled:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # whoever read the output is gone; the run goes on, and metrics.jsonl has it all
            self._enabled = False


def duration(seconds: float) -> str:
    """As a clock shows it: 0:07, 12:30, 3:05:00, 54d 04h."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def magnitude(number: float) -> str:
    """With three digits and a letter: 950, 12.3k, 2.46M, 14.8T."""
    for letter in ("", "k", "M", "B", "T"):
        if abs(number) < 999.5 or letter == "T":
            break
        number /= 1000
    digits = 0 if not letter or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f}{letter}"


def dollars(amount: float) -> str:
    """With cents, or with hundredths of them where there is less than one: $5,576,000.00, $0.0045."""
    return f"${amount:,.2f}" if amount >= 0.01 or amount == 0 else f"${amount:.4f}"


def _over_mean(load_LE: np.ndarray) -> np.ndarray:
    """The load of each expert over the mean of its layer; 1 everywhere is perfect balance."""
    load_LE = np.asarray(load_LE, np.float64)
    return load_LE / np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-9)


def _scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The names and numbers of `row`; those of a mapping within it as NAME/NAME."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif not isinstance(value, list):
            yield prefix + name, value


def _plain(value: Any) -> Any:
    """As JSON can hold it: NaN and infinity become None, in a mapping too."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _finite(text: str) -> float | None:
    return number if math.isfinite(number := float(text)) else None


def _number(value: Any) -> float:
    """What another process wrote, if it is a number; else 0."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line, parse_float=_finite, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step", 0)) is int else None


def _tensorboard(workdir: Path, done: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "monitor.tensorboard needs tensorboardX: pip install 'dsjax[tensorboard]', or set it to False"
        ) from error
    return SummaryWriter(str(workdir / "tensorboard"), purge_step=done + 1)
