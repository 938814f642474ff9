"""What checkpoints cost a run, and how long a run takes to go on: `dsjax bench --checkpoint`."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from dsjax.config import Config, ConfigError, to_dict
from dsjax.planning import layout
from dsjax.sharding import make_mesh
from dsjax.training import checkpoint
from dsjax.training.bench import WARM_UP_STEPS, Timed, rounded
from dsjax.training.monitor import read_rows
from dsjax.training.workdir import METRICS

ROUNDS = 3  # stretches without a save and with one, in turns
RESTART_SECONDS = 1800.0  # to wait for the first step


def checkpoint_bench(config: Config, steps: int = 50) -> dict[str, Any]:
    """Times `steps` steps without and with a save at their beginning, and a run's way back to its next step.

    Args:
      config: model, mesh, batch and precision; the whole batch of config.training is one step.
      steps: from one save to the next.

    Returns:
      step_seconds (of a step of the median stretch without a save), saving_step_seconds (the same with one),
      checkpoint_cost (by how much the second is above the first, as a share), save_blocks_seconds (how long a save
      holds up the run), save_seconds (until it is on the disk, digests included), checkpoint_bytes, restart_seconds
      (from the start of `dsjax train` to the end of the first step that a checkpoint does not hold, programs being
      compiled already), and what was run.
    """
    mesh = make_mesh(layout.resolve(config, jax.device_count()).mesh)
    timed = Timed(config, mesh)
    for _ in range(WARM_UP_STEPS):
        timed.step()
    with tempfile.TemporaryDirectory(prefix="dsjax-bench-") as folder:
        directory = Path(folder) / "checkpoints"
        saver = checkpoint.Saver(directory, keep_last=1)
        _save(saver, timed, config, 1)  # the first one creates threads
        saver.finish()
        plain, saving, blocks, whole = [], [], [], []
        for number in range(ROUNDS):
            plain.append(_stretch(timed, steps))
            start = time.perf_counter()
            _save(saver, timed, config, 2 + number)
            blocks.append(time.perf_counter() - start)
            saving.append(_stretch(timed, steps) + blocks[-1])
            saver.finish()
            start = time.perf_counter()
            _save(saver, timed, config, 100 + number)
            saver.finish()
            whole.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        step, saving_step = statistics.median(plain) / steps, statistics.median(saving) / steps
        return {
            "step_seconds": rounded(step),
            "saving_step_seconds": rounded(saving_step),
            "checkpoint_cost": rounded(statistics.median(b / a for a, b in zip(plain, saving, strict=True)) - 1),
            "save_blocks_seconds": rounded(statistics.median(blocks)),
            "save_seconds": rounded(statistics.median(whole)),
            "checkpoint_bytes": size,
            "restart_seconds": rounded(_restart_seconds(config, Path(folder))),
            "steps": steps,
            "devices": mesh.size,
            "device_kind": jax.devices()[0].device_kind,
        }


def _save(saver: checkpoint.Saver, timed: Timed, config: Config, step: int) -> None:
    if problem := saver.save(timed.state, {"step": step, "config": to_dict(config)}):
        raise ConfigError(f"{problem} Set TMPDIR to a place with more room.")


def _stretch(timed: Timed, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        timed.step()
    return time.perf_counter() - start


def _restart_seconds(config: Config, folder: Path) -> float:
    """Trains two steps in a process of its own, then goes on in another, which is timed."""
    values = to_dict(config)
    values["optimizer"]["decay_tokens"] = values["optimizer"]["decay_tokens"] or 10**12  # not stretched to the end
    values["evaluation"]["every_steps"] = values["checkpoint"]["every_steps"] = None
    values["checkpoint"]["keep_best"] = values["checkpoint"]["keep_every"] = None
    values["init_from"] = None
    file, workdir = folder / "config.py", folder / "run"
    text = "import ml_collections, json\n\ndef get_config():\n    return ml_collections.ConfigDict(json.loads({!r}))\n"
    for total_steps in (2, 4):
        values["training"]["total_steps"] = total_steps
        file.write_text(text.format(json.dumps(values)))
        words = [sys.executable, "-m", "dsjax", "train", "--config", str(file), "--workdir", str(workdir)]
        start = time.perf_counter()
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log, env=dict(os.environ))
            found = _wait_for_step(process, workdir, total_steps - 1, start)
        if process.wait():
            raise ConfigError(f"the run could not be started: {(folder / 'log').read_text()[-500:]}")
    return found


def _wait_for_step(process: subprocess.Popen, workdir: Path, step: int, start: float) -> float:
    """Seconds from `start` until the run has finished `step`."""
    while process.poll() is None and time.perf_counter() - start < RESTART_SECONDS:
        if any(row["step"] >= step for row in read_rows(workdir / METRICS)):
            break
        time.sleep(0.01)
    return time.perf_counter() - start
