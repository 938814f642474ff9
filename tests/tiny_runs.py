"""A tiny run that tests share, in this process or in one of its own."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
import small

from dsjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    HardwareConfig,
    MeshConfig,
    ModelConfig,
    MonitorConfig,
    OptimizerConfig,
    TrainingConfig,
    to_dict,
)
from dsjax.training import loop, summary, validation
from dsjax.training.monitor import read_rows
from dsjax.training.workdir import METRICS

STEPS = 6
T = 16
# Losses that must come back to the last bit, and what moves them.
EXACT = (
    "step",
    "tokens",
    "loss",
    "mtp_loss",
    "balance_loss",
    "grad_norm",
    "lr",
    "batch_size",
    "expert_load_max_over_mean",
)


def tiny_run(folder: Path) -> Config:
    """A tiny model on 2 x 4 devices whose batch, learning rate, bias speed and MTP weight all change within 6 steps."""
    text = folder / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"{number} squared is {number * number}. " * (number + 5))
    return Config(
        model=ModelConfig(
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            n_routed_experts=8,
            num_experts_per_tok=2,
            num_attention_heads=2,
            q_lora_rank=None,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
        ),
        mesh=MeshConfig(data=2, expert=4),
        dispatch=small.ROOMY,
        data=DataConfig(
            sources=(f"text_files:{text}",),
            sequence_length=T,
            validation_fraction=0.2,
            directory=str(folder / "data"),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_tokens=32 * T, decay_tokens=64 * T),
        training=TrainingConfig(
            total_steps=STEPS,
            batch_size=24,
            microbatch_size=8,
            initial_batch_size=8,
            batch_ramp_tokens=40 * T,
            mtp_loss_weight_final=0.1,
            mtp_switch_tokens=40 * T,
            bias_update_tokens=50 * T,
        ),
        checkpoint=CheckpointConfig(every_steps=None),
        evaluation=EvaluationConfig(every_steps=4, sequences=8),
        hardware=HardwareConfig(peak_flops_per_second=1e12),  # else it is measured
        monitor=MonitorConfig(compile_cache=None, expert_load_every_steps=2),
        precision="fp32",
    )


def change(config: Config, section: str, **values) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


@contextlib.contextmanager
def quick_runs(draws: Callable[[Path], bool] = lambda workdir: False) -> Iterator[None]:
    """Runs in here that need the same programs share them; those in processes of their own compile theirs.

    draws: whether a run in that directory draws its pictures, too.
    """
    compiled = {}

    def key(config: Config) -> tuple:
        optimizer = dataclasses.replace(config.optimizer, learning_rate=1, decay_learning_rate=0, decay_tokens=None)
        training = config.training
        shapes = (config.data.sequence_length, training.batch_size, training.microbatch_size, training.loss_chunk_size)
        how = (config.dispatch, config.precision, config.fp8, training.remat, config.divergence.skip_nonfinite)
        return (config.model, config.mesh, optimizer, *shapes, *how)

    def compile_step(config, *rest, original=loop.compile_step):
        if (name := ("step", key(config))) not in compiled:
            compiled[name] = original(config, *rest)
        return compiled[name]

    def evaluate_step(config, *rest, original=validation.evaluate_step):
        if (name := ("evaluate", key(config))) not in compiled:
            compiled[name] = original(config, *rest)
        return compiled[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_step", compile_step)
        patch.setattr(validation, "evaluate_step", evaluate_step)
        patch.setattr(summary, "draw", lambda workdir, draw=summary.draw: draw(workdir) if draws(workdir) else "")
        yield


def exact(workdir):
    return [{name: row[name] for name in EXACT} for row in read_rows(workdir / METRICS)]


WORKER = """
import importlib, json, sys
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[3])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from dsjax.config import from_dict
run = getattr(importlib.import_module(sys.argv[4]), sys.argv[5])
print("ready", flush=True)
sys.exit(run(from_dict(json.loads(sys.argv[1])), sys.argv[2]).exit_code)
"""


def start(config: Config, workdir, run: Callable = loop.train) -> subprocess.Popen:
    arguments = [json.dumps(to_dict(config)), str(workdir), jax.config.jax_compilation_cache_dir]
    arguments += [run.__module__, run.__name__]
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.02)
