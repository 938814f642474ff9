"""Several real processes train as one, joined the way a SLURM cluster joins them, or by launch/processes.sh."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsjax.training import checkpoint
from dsjax.training.export import export
from dsjax.training.monitor import read_rows
from dsjax.training.workdir import CHECKPOINTS, METRICS

LIMIT = 1500  # seconds for a run of a minute or two, on a machine that has other things to do

CONFIG = """
from dsjax.config import base_config

def get_config():
    config = base_config()
    config.model.update(
        hidden_size=32, num_hidden_layers=2, intermediate_size=48, moe_intermediate_size=16, n_routed_experts=8,
        num_experts_per_tok=2, num_attention_heads=2, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8)
    config.mesh.expert = 2
    config.data.update(sources=("text_files:{folder}/text",), sequence_length=16, directory="{folder}/data",
                       validation_fraction=0.2)
    config.training.update(total_steps=4, batch_size=8)
    config.optimizer.decay_tokens = 1000
    config.evaluation.sequences = 8
    config.precision = "fp32"
    config.hardware.peak_flops_per_second = 1e11
    config.monitor.compile_cache = None
    return config
"""


def command(folder, workdir, *flags):
    config = folder / "config.py"
    return [sys.executable, "-m", "dsjax", "train", "--config", str(config), "--workdir", str(workdir), *flags]


def inherited() -> dict[str, str]:
    """The environment for a process of its own: no simulated devices, and programs that compile quickly."""
    return {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}


def slurm(rank: int, job: str) -> dict[str, str]:
    """What `srun` sets for one of two tasks on this machine."""
    task = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    task |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "JAX_PLATFORMS": "cpu"}
    return inherited() | task | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}


def alone(folder, workdir, *flags) -> subprocess.CompletedProcess:
    """Training in one process."""
    words = command(folder, workdir, *flags)
    return subprocess.run(words, env=inherited(), capture_output=True, text=True, timeout=LIMIT)


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    return [row["loss"] for row in rows] + [rows[-1]["validation_loss"]]


# Loads a published checkpoint, experts on one process each, and writes it again.
COPY = """
import sys
import jax
jax.distributed.initialize()
from dsjax import hub
from dsjax.config import MeshConfig
from dsjax.sharding import make_mesh
model = hub.load(sys.argv[1], make_mesh(MeshConfig(1, 1, 2)))
local = model.params["moe_layers"]["mlp"]["experts"]["gate_proj"].addressable_shards
assert [shard.data.shape[1] for shard in local] == [4]
hub.save(sys.argv[2], model)
"""


@pytest.fixture
def folder(tmp_path):
    """A directory with a text and the configuration that trains on it."""
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} squared is {number * number}. " * (number + 5))
    (tmp_path / "config.py").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


@pytest.fixture
def processes(repository, folder):
    """(N, arguments) -> launch/processes.sh N, started, in an environment that is installed already."""
    programs = folder / "environment" / "bin"
    programs.mkdir(parents=True)
    bodies = {"python": '[ "$1" != -m ] && exec {} "$@"', "pip": "exit 1", "dsjax": 'exec {} -m dsjax "$@"'}
    for name, body in bodies.items():  # nothing is installed, whatever changes meanwhile
        (programs / name).write_text(f"#!/bin/sh\n{body.format(shlex.quote(sys.executable))}\n")
        (programs / name).chmod(0o755)
    stamp = (repository / "setup.cfg").read_text() + (repository / "pyproject.toml").read_text()
    (programs.parent / "installed-plots").write_text(stamp)
    environment = inherited() | {"DSJAX_VENV": str(programs.parent), "PYTHONPATH": str(repository)}
    cache = f"--config.monitor.compile_cache={repository / '.cache' / 'processes'}"

    def start(number: int, *arguments: str) -> subprocess.Popen:
        script = str(repository / "launch" / "processes.sh")
        words = ["bash", script, str(number), *arguments, "--config", str(folder / "config.py"), cache]
        return subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
        )

    return start


@pytest.mark.slow
def test_a_run_begun_on_four_processes_goes_on_with_two(folder, processes):
    one, several = folder / "one", folder / "several"
    ran = alone(folder, one, "--devices", "4")
    assert ran.returncode == 0, ran.stderr
    for number, total_steps, mesh in ((4, 2, "data 2 x expert 2"), (2, 4, "expert 2")):
        ran = processes(number, "--workdir", str(several), f"--config.training.total_steps={total_steps}")
        out, errors = ran.communicate(timeout=LIMIT)
        assert ran.returncode == 0, errors
        assert f"on {number} x cpu ({mesh})" in out
        assert f"{number} processes, by the command line" in errors
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)


def last_step(workdir: Path) -> int:
    """The last step in the metrics, 0 before the first."""
    rows = read_rows(workdir / METRICS)
    return rows[-1]["step"] if rows else 0


def wait_until(condition, ran: subprocess.Popen) -> None:
    """Waits until `condition()` holds while the run goes on."""
    limit = time.monotonic() + LIMIT
    while not condition():
        assert ran.poll() is None and time.monotonic() < limit, ran.communicate()
        time.sleep(0.2)


def process_ids(workdir: Path) -> dict[str, int]:
    """Number of the process to its id, of those that train in `workdir`."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode().split("\0")[:-1]
        except OSError:
            continue
        if str(workdir) in words and "-m" in words:
            found[words[-1]] = int(entry.parent.name)
    return found


@pytest.mark.slow
def test_a_lost_process_ends_all_and_a_signal_saves(folder, processes):
    workdir = folder / "run"
    arguments = ("--workdir", str(workdir), "--config.training.total_steps=100000", "--config.checkpoint.every_steps=5")
    ran = processes(2, *arguments)
    # A save goes on behind the steps: rows alone do not mean that there is a checkpoint.
    wait_until(lambda: last_step(workdir) > 5 and checkpoint.latest(workdir / CHECKPOINTS), ran)
    ids = process_ids(workdir)
    assert sorted(ids) == ["0", "1"]
    os.kill(ids["1"], signal.SIGKILL)
    start = time.monotonic()
    _, errors = ran.communicate(timeout=LIMIT)
    assert ran.returncode not in (0, 2), errors
    assert "and the others with it" in errors and time.monotonic() - start < 60
    assert process_ids(workdir) == {}

    killed_at = last_step(workdir)
    ran = processes(2, *arguments)
    wait_until(lambda: last_step(workdir) > killed_at, ran)  # rows of steps done twice are dropped first
    ran.send_signal(signal.SIGINT)
    out, errors = ran.communicate(timeout=LIMIT)
    assert ran.returncode == 130, errors
    assert re.search(r"going on after step \d*[05]\b", out), out
    assert "interrupted; the same command goes on from here" in out
    assert checkpoint.latest(workdir / CHECKPOINTS) == last_step(workdir)


@pytest.mark.slow
def test_bench_prints_once_for_all_processes(folder, processes):
    ran = processes(2, "bench", "--steps", "10")
    out, errors = ran.communicate(timeout=LIMIT)
    assert ran.returncode == 0, errors
    figures = json.loads(out)
    assert figures["devices"] == 2 and figures["mesh"] == {"data": 1, "fsdp": 1, "expert": 2}
    assert figures["tokens_per_second"] > 0 and 0 < figures["mfu"] < 1


# Reads the batches of a run as training does, and asserts which rows were asked of the loader here.
ROWS = """
import sys
import numpy as np
from dsjax.training.cluster import Membership, join
me = int(sys.argv[2])
join(Membership("127.0.0.1:" + sys.argv[1], 2, me, "a test"))
from dsjax.config import Config, MeshConfig, TrainingConfig, DataConfig
from dsjax.sharding import make_mesh
from dsjax.training.batches import batches
from dsjax.training.resume import Position
from dsjax.training.schedule import Schedule

class Loader:
    asked = []
    def rows(self, indices):
        self.asked += indices
        return np.array([[index] * 5 for index in indices], np.int32).reshape(-1, 5)

config = Config(
    data=DataConfig(sequence_length=4), training=TrainingConfig(total_steps=2, batch_size=8, microbatch_size=4)
)
schedule = Schedule(config.training, config.optimizer, 4)
for step, (tokens, size) in enumerate(batches(config, make_mesh(MeshConfig()), Loader(), schedule, Position(0, 0))):
    assert tokens.shape == (2, 4, 5) and size == 8
    (shard,) = tokens.addressable_shards
    first = 8 * step + 2 * me
    assert shard.data[:, :, 0].tolist() == [[first, first + 1], [first + 4, first + 5]]
assert {index % 4 // 2 for index in Loader.asked} == {me}, Loader.asked
assert {index for index in Loader.asked if index < 16} == {index for index in range(16) if index % 4 // 2 == me}
"""


# One is later than the 30 s that gloo gives a new group, as it is when it has compiled for longer.
LATE = """
import sys, time
import numpy as np
from dsjax.training.cluster import Membership, join
me = int(sys.argv[2])
join(Membership("127.0.0.1:" + sys.argv[1], 2, me, "a test"))
from dsjax.training.processes import any_of, meet
meet()
time.sleep(40 * me)
start = time.monotonic()
meet()
assert time.monotonic() - start > 20 * (1 - me)
assert any_of(me == 1) and not any_of(False)
"""


def pair(program: str, timeout: float = 120) -> None:
    """Runs `program PORT PROCESS` as two processes, neither of which may fail."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", program, port, str(process)],
            env=inherited() | {"JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    told = [task.communicate(timeout=timeout)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], told


def test_each_process_loads_only_its_rows():
    pair(ROWS)


@pytest.mark.slow
def test_processes_meet_however_late_one_is():
    pair(LATE, LIMIT)


@pytest.mark.slow
def test_two_processes_train_as_one_with_two_devices(folder):
    one, two = folder / "one", folder / "two"
    ran = alone(folder, one, "--devices", "2")
    assert ran.returncode == 0, ran.stderr
    for total_steps in (2, 4):  # the second time they go on
        told = together(folder, two, f"--config.training.total_steps={total_steps}")
        assert [code for code, _, _ in told] == [0, 0], told
        assert "on 2 x cpu (expert 2)" in told[0][1]
        assert not re.search(r"step \d", told[1][1])  # only the first process tells and writes
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    published, copy = folder / "published", folder / "copy"
    export(one, published, "float32")
    begun = [folder / "begun_one", folder / "begun_two"]
    assert alone(folder, begun[0], "--devices", "2", f"--config.init_from={published}").returncode == 0
    told = together(folder, begun[1], f"--config.init_from={published}")
    assert [code for code, _, _ in told] == [0, 0], told
    assert losses(begun[1]) == pytest.approx(losses(begun[0]), rel=1e-5)
    assert losses(begun[0])[0] < losses(one)[0] - 0.01
    told = both([sys.executable, "-c", COPY, str(published), str(copy)])
    assert [code for code, _, _ in told] == [0, 0], told
    assert (copy / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()
    told = together(folder, folder / "three", of_second=["--config.training.seed=7"])
    assert [code for code, _, _ in told] == [2, 2]
    assert all("the processes disagree about the config" in error for _, _, error in told)


def together(folder, workdir, *flags, of_second=()):
    """(exit code, output, errors) of each of two processes that train."""
    first = command(folder, workdir, "--distributed", *flags)
    return both(first, [*first, *of_second])


def both(first, second=None):
    """(exit code, output, errors) of two commands, joined."""
    job = str(os.getpid())  # the port is made of it
    tasks = [
        subprocess.Popen(words, env=slurm(rank, job), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank, words in enumerate((first, second or first))
    ]
    return [(task.returncode, *told) for task, told in [(task, task.communicate(timeout=LIMIT)) for task in tasks]]
