"""Runs that are killed at any moment, again and again, end with the losses of one that was left alone, bit for bit."""

import random
import signal
import time

import jax
import numpy as np
import pytest
from forks import Forks
from tiny_runs import T, change, exact, tiny_run

from dsjax.config import Config, to_dict
from dsjax.sharding import make_mesh
from dsjax.training import checkpoint
from dsjax.training.monitor import read_rows
from dsjax.training.state import abstract_state
from dsjax.training.workdir import CHECKPOINTS, METRICS

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL)
SAVE_EVERY = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Batch, learning rate, bias speed and MTP weight change while it is killed; two devices, experts on each."""
    config = tiny_run(tmp_path_factory.mktemp("run"))
    config = change(config, "mesh", data=1, expert=2)
    config = change(config, "checkpoint", every_steps=SAVE_EVERY)
    config = change(config, "evaluation", every_steps=None)
    config = change(config, "hardware", peak_flops_per_second=1e12)
    config = change(config, "optimizer", warmup_tokens=1000 * T, decay_tokens=4000 * T)
    return change(
        config,
        "training",
        batch_size=8,
        microbatch_size=2,
        initial_batch_size=2,
        batch_ramp_tokens=2000 * T,
        mtp_switch_tokens=500 * T,
        bias_update_tokens=1500 * T,
    )


def done(workdir) -> int:
    rows = read_rows(workdir / METRICS)
    return rows[-1]["step"] if rows else 0


def kill_somewhere(rng, run, workdir) -> str:
    """Ends `run` at a moment of a random kind; says which kind."""
    kind = rng.choice(["while it starts", "after some steps", "after some steps", "during a save", "during a save"])
    number = rng.choice(SIGNALS)
    began = time.monotonic()
    if kind == "while it starts":
        time.sleep(rng.uniform(0, 4))
    else:
        target = newest(workdir) + rng.randint(1, 2 * SAVE_EVERY)
        if kind == "during a save":  # which begins when the row of its step has been written
            target = -(-target // SAVE_EVERY) * SAVE_EVERY
        before = done(workdir)
        # Rows that are done again are dropped when the run begins.
        while not newest(workdir) < target <= done(workdir) or done(workdir) == before:
            assert time.monotonic() - began < 300, run.output()
            if newest(workdir) >= target or run.code() is not None:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
    if run.code() is None:
        run.kill(number)
    code = run.wait()
    assert code in {signal.SIGINT: (130, 1), signal.SIGTERM: (0, -15), signal.SIGKILL: (-9,)}[number], run.output()
    return f"{kind}, {number.name}"


def newest(workdir) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return checkpoint.latest(workdir / CHECKPOINTS) or 0


def arrays(config, workdir, step):
    target = abstract_state(config, make_mesh(config.mesh, jax.devices()[:2]))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoint.restore(workdir / CHECKPOINTS, step, target))]


def survive(config, folder, kills, seed):
    """Kills a run `kills` times, lets it end, and compares it with one that was left alone."""
    rng = random.Random(seed)
    killed, whole = folder / "killed", folder / "whole"
    endless = change(config, "training", total_steps=100_000)
    counted: dict[str, int] = {}
    unfinished = 0
    with Forks(2, jax.config.jax_compilation_cache_dir) as forks:
        for _ in range(kills):
            run = forks.start(to_dict(endless), killed, folder / "log")
            kind = kill_somewhere(rng, run, killed)
            counted[kind] = counted.get(kind, 0) + 1
            unfinished += bool(list(killed.glob("checkpoints/*.unverified*")))
            print(f"{sum(counted.values())}: {kind}; {done(killed)} steps", flush=True)
        steps = done(killed) + 4
        last = change(config, "training", total_steps=steps)
        for workdir in (killed, whole):
            run = forks.start(to_dict(last), workdir, folder / "log")
            assert run.wait() == 0, run.output()
    assert [row["step"] for row in read_rows(killed / METRICS)] == list(range(1, steps + 1))
    assert exact(killed) == exact(whole)
    for array, want in zip(arrays(last, killed, steps), arrays(last, whole, steps), strict=True):
        np.testing.assert_array_equal(array, want)
    print(f"{kills} kills over {steps} steps: {counted}; {unfinished} left an unfinished checkpoint behind")
    return unfinished


@pytest.mark.slow
def test_a_run_killed_fifty_times_is_bitwise_the_one_left_alone(config, tmp_path):
    assert survive(config, tmp_path, kills=50, seed=2) > 0
