"""Several real processes train as one, joined the way a SLURM cluster joins them."""

import json
import os
import re
import subprocess
import sys

import pytest

from dsjax.training.export import export
from dsjax.training.workdir import METRICS

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


def slurm(rank: int, job: str) -> dict[str, str]:
    """What `srun` sets for one of two tasks on this machine."""
    task = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    task |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "JAX_PLATFORMS": "cpu"}
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return inherited | task | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}


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


@pytest.mark.slow
def test_two_processes_train_as_one_with_two_devices(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} squared is {number * number}. " * (number + 5))
    (tmp_path / "config.py").write_text(CONFIG.format(folder=tmp_path))
    one, two = tmp_path / "one", tmp_path / "two"
    alone = subprocess.run(command(tmp_path, one, "--devices", "2"), capture_output=True, text=True, timeout=500)
    assert alone.returncode == 0, alone.stderr
    for total_steps in (2, 4):  # the second time they go on
        told = together(tmp_path, two, f"--config.training.total_steps={total_steps}")
        assert [code for code, _, _ in told] == [0, 0], told
        assert "on 2 x cpu (expert 2)" in told[0][1]
        assert not re.search(r"step \d", told[1][1])  # only the first process tells and writes
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    published, copy = tmp_path / "published", tmp_path / "copy"
    export(one, published, "float32")
    begun = [tmp_path / "begun_one", tmp_path / "begun_two"]
    words = command(tmp_path, begun[0], "--devices", "2", f"--config.init_from={published}")
    assert subprocess.run(words, capture_output=True, timeout=500).returncode == 0
    told = together(tmp_path, begun[1], f"--config.init_from={published}")
    assert [code for code, _, _ in told] == [0, 0], told
    assert losses(begun[1]) == pytest.approx(losses(begun[0]), rel=1e-5)
    assert losses(begun[0])[0] < losses(one)[0] - 0.01
    told = both([sys.executable, "-c", COPY, str(published), str(copy)])
    assert [code for code, _, _ in told] == [0, 0], told
    assert (copy / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()
    told = together(tmp_path, tmp_path / "three", of_second=["--config.training.seed=7"])
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
    return [(task.returncode, *told) for task, told in [(task, task.communicate(timeout=500)) for task in tasks]]
