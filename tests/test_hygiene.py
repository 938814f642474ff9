"""A long run keeps the memory, files and threads that it had when it was young."""

import os
import statistics
import time
from pathlib import Path

import jax
import pytest
from forks import Forks
from tiny_runs import T, change, tiny_run

from dsjax.config import to_dict
from dsjax.training.monitor import read_rows
from dsjax.training.workdir import METRICS

STEPS = 2000


def figures(process: int) -> tuple[int, int, int]:
    """(resident bytes, open files, threads) of a process."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    files = len(os.listdir(f"/proc/{process}/fd"))
    return int(status["VmRSS"].split()[0]) * 1024, files, int(status["Threads"])


@pytest.mark.slow
def test_memory_and_handles_are_flat_over_two_thousand_steps(tmp_path):
    config = tiny_run(tmp_path)
    config = change(config, "mesh", data=1, expert=1)
    config = change(config, "training", total_steps=STEPS, batch_size=8, batch_ramp_tokens=40 * T)
    config = change(config, "checkpoint", every_steps=50)
    config = change(config, "evaluation", every_steps=50)
    config = change(config, "monitor", device_check_every_steps=100)
    workdir, seen = tmp_path / "workdir", []
    with Forks(1, jax.config.jax_compilation_cache_dir) as forks:
        run = forks.start(to_dict(config), workdir, tmp_path / "log")
        end = time.monotonic() + 3000
        while run.code() is None:
            assert time.monotonic() < end, run.output()[-2000:]
            try:
                rows = read_rows(workdir / METRICS)
                seen.append((rows[-1]["step"] if rows else 0, *figures(run.process)))
            except (OSError, KeyError):
                pass  # it has ended meanwhile
            time.sleep(0.3)
        assert run.wait() == 0, run.output()[-2000:]
    assert len(read_rows(workdir / METRICS)) == STEPS
    quarters = []
    for low in range(0, STEPS, STEPS // 4):
        columns = zip(*(one[1:] for one in seen if low < one[0] <= low + STEPS // 4), strict=True)
        quarters.append([statistics.median(column) for column in columns])
    told = f"bytes, files and threads in each quarter of the run: {quarters}"
    print(told)
    (memory, files, threads), (memory_after, files_after, threads_after) = quarters[1], quarters[3]
    assert memory_after - memory < 32e6 and files_after - files <= 4 and threads_after - threads <= 4, told
