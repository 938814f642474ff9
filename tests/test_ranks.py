"""One of two real processes is told to stop, killed, or stuck: the other one ends as it should."""

import os
import signal
import socket
import subprocess
import time

import pytest
from test_distributed import command, folder  # noqa: F401  the fixture

from dsjax.training import checkpoint
from dsjax.training.monitor import read_rows
from dsjax.training.workdir import CHECKPOINTS, METRICS

pytestmark = pytest.mark.slow


@pytest.fixture
def pair(repository, folder):  # noqa: F811
    """Two processes, one CPU device each, that train together without end; and where."""
    workdir = folder / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(repository), "JAX_PLATFORMS": "cpu"}
    started = []

    def begin(*flags):
        words = [
            *command(folder, workdir, "--config.training.total_steps=100000", "--config.checkpoint.every_steps=5"),
            f"--config.monitor.compile_cache={repository / '.cache' / 'processes'}",
            *("--coordinator", f"127.0.0.1:{port}", "--processes", "2", *flags),
        ]
        for rank in range(2):
            log = (folder / f"log-{rank}").open("w")
            one = [*words, "--process", str(rank)]
            started.append(subprocess.Popen(one, env=environment, stdout=log, stderr=subprocess.STDOUT))
        end = time.monotonic() + 400
        # A save goes on behind the steps: its checkpoint has to be there, too.
        while len(read_rows(workdir / METRICS)) < 7 or checkpoint.latest(workdir / CHECKPOINTS) is None:
            assert all(one.poll() is None for one in started) and time.monotonic() < end, told(folder)
            time.sleep(0.05)
        return started

    yield begin, workdir
    for one in started:
        one.kill()
        one.wait()


def told(folder):  # noqa: F811
    return [(folder / f"log-{rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_either_process_stops_both_at_the_same_saved_step(pair, folder, rank):  # noqa: F811
    begin, workdir = pair
    both = begin()
    start = time.monotonic()
    both[rank].send_signal(signal.SIGTERM)
    assert [one.wait(timeout=30) for one in both] == [0, 0], told(folder)
    assert time.monotonic() - start < 30
    last = read_rows(workdir / METRICS)[-1]["step"]
    assert checkpoint.latest(workdir / CHECKPOINTS) == last
    assert checkpoint.is_verifiable(workdir / CHECKPOINTS, last) and not checkpoint.damage(workdir / CHECKPOINTS, last)
    assert "interrupted; the same command goes on from here" in told(folder)[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_process_ends_the_other_within_seconds(pair, folder, rank):  # noqa: F811
    begin, workdir = pair
    both = begin()
    both[rank].kill()
    start = time.monotonic()
    assert both[1 - rank].wait(timeout=30) not in (0, 2), told(folder)
    assert time.monotonic() - start < 5
    newest = checkpoint.latest(workdir / CHECKPOINTS)
    assert newest and not checkpoint.damage(workdir / CHECKPOINTS, newest)


def test_a_stuck_process_ends_the_other_with_the_stacks_of_its_threads(pair, folder):  # noqa: F811
    begin, _ = pair
    # JAX itself ends the other, without stacks, 100 s after the last heartbeat, which may be 50 s old.
    both = begin("--config.monitor.watchdog_seconds=40")
    both[1].send_signal(signal.SIGSTOP)
    start = time.monotonic()
    assert both[0].wait(timeout=300) == 1, told(folder)
    assert 30 < time.monotonic() - start < 100
    assert "no step has ended for 40 s" in told(folder)[0] and "in advance" in told(folder)[0]
