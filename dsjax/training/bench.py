"""How fast the train step runs here, against what the same machine's matmuls can do, and what it keeps in memory.

Steps of the model, of the baselines and bare matmuls take turns, so that a machine that slows down slows all of
them, and the ratios hold.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsjax.config import Config, FP8Config
from dsjax.numerics.recipe import Recipe, recipe
from dsjax.planning import counts, layout
from dsjax.sharding import check_batch, check_nodes, make_mesh
from dsjax.training.machine import matmul, seconds
from dsjax.training.processes import meet
from dsjax.training.saved import saved_bytes
from dsjax.training.schedule import Schedule
from dsjax.training.state import build_network, init_state
from dsjax.training.step import place_batch, pretrain_step

WARM_UP_STEPS = 3
MATMUL_REPEATS = 3  # in a row, of which the best counts: the first finds the caches full of something else


def bench(config: Config, baselines: Sequence[str] = (), steps: int = 20) -> dict[str, Any]:
    """Times the train step on random tokens.

    Args:
      config: model, mesh, batch and precision; the whole batch of config.training is one step.
      baselines: "dense" also times a dense model of equal active parameters, the name of a precision the same model
        in that precision.
      steps: timed steps, after a warm-up.

    Returns:
      tokens_per_second (of the median step), model_tflops_per_second (closed form, causal, without recomputation),
      matmul_tflops_per_second (a 2048 x 2048 x 2048 matmul in the compute dtype; on accelerators of all devices
      together, by those of this process), mfu (their ratio), compile_seconds, peak_memory_bytes (of one device, by the
      compiler), products (what multiplies), saved_bytes_per_token_per_layer (see `saved_bytes`), that of BF16, their
      ratio, and what was run. For each baseline: its own figures, and the ratio of the median step times.
    """
    config = layout.resolve(config, jax.device_count())
    mesh = make_mesh(config.mesh)
    check_nodes(config.dispatch.ranks_per_node, mesh)
    meet()
    timed = {"model": Timed(config, mesh)} | {name: Timed(_baseline(config, name), mesh) for name in baselines}
    multiply, matmul_flops = matmul(recipe(config.precision).high, jax.local_devices())
    matmul_flops *= jax.process_count()  # all of them multiply at once
    for _ in range(WARM_UP_STEPS):
        for one in timed.values():
            one.step()
        multiply()
    matmul_seconds = []
    for _ in range(steps):
        for one in timed.values():
            one.step_seconds.append(seconds(one.step))
        matmul_seconds.append(min(seconds(multiply) for _ in range(MATMUL_REPEATS)))

    rate = matmul_flops / statistics.median(matmul_seconds)
    figures = (
        timed["model"].figures(rate)
        | _saved_figures(config, mesh)
        | {
            "matmul_tflops_per_second": rounded(rate / 1e12),
            "steps": steps,
            "precision": config.precision,
            "devices": mesh.size,
            "mesh": dict(mesh.shape),
            "dispatch": config.dispatch.form,
            "device_kind": jax.devices()[0].device_kind,
        }
    )
    for name in baselines:
        figures[name] = timed[name].figures(rate)
        figures[f"step_time_over_{name}"] = rounded(timed["model"].median_seconds / timed[name].median_seconds)
    return figures


def _baseline(config: Config, name: str) -> Config:
    if name == "dense":
        return dataclasses.replace(config, model=counts.dense_equivalent(config.model))
    return dataclasses.replace(config, precision=name, fp8=FP8Config())


def what_multiplies(how: Recipe) -> str:
    """By what the products of a Linear are computed: the recipe's name, or for FP8 the kernels or the emulation."""
    if how.native:
        return f"native: Pallas kernels ({how.native})"
    if not how.is_fp8:
        return how.name
    if how.accumulation != "fp32":
        return f"emulated: FP32 products summed as {how.accumulation}"
    return f"emulated: {'BF16' if how.operand_dtype == 'bfloat16' else 'FP32'} products of dequantised operands"


def _saved_figures(config: Config, mesh: Mesh) -> dict[str, Any]:
    ours, bf16 = (saved_bytes(one, mesh) for one in (config, _baseline(config, "bf16")))
    return {
        "saved_bytes_per_token_per_layer": {kind: rounded(size) for kind, size in ours.items()},
        "saved_bytes_per_token_per_layer_bf16": {kind: rounded(size) for kind, size in bf16.items()},
        "saved_bytes_over_bf16": rounded(ours["total"] / bf16["total"]),
    }


class Timed:
    """A compiled train step, its state, and the seconds its steps took."""

    def __init__(self, config: Config, mesh: Mesh):
        training, length = config.training, config.data.sequence_length
        micro = training.sequences_per_microbatch
        check_batch("training.microbatch_size", micro, mesh)
        count = training.batch_size // micro
        rng = np.random.default_rng(training.seed)
        rows = rng.integers(0, config.model.vocab_size, (training.batch_size, length + 1), np.int32)
        self.tokens = training.batch_size * length
        has_mtp = config.model.num_nextn_predict_layers > 0
        self.flops = self.tokens * counts.flops_per_token(config.model, length, mtp=has_mtp)
        self.parameters = counts.parameters(config.model)
        self.products = what_multiplies(build_network(config, mesh).execution.recipe)
        self.step_seconds: list[float] = []

        self.state = init_state(config, mesh)
        batch = place_batch(lambda indices: rows[list(indices)], (count, micro, length + 1), mesh)
        schedule = Schedule(training, config.optimizer, length)
        hyperparameters = {k: np.float32(v) for k, v in schedule.hyperparameters(0).items()}
        self._arguments = (batch, np.int32(count), hyperparameters)
        start = time.perf_counter()
        self._compiled = pretrain_step(config, mesh).lower(self.state, *self._arguments).compile()
        self.compile_seconds = time.perf_counter() - start
        meet()

    def step(self) -> None:
        """One step, to its end."""
        self.state, metrics = self._compiled(self.state, *self._arguments)
        jax.block_until_ready((self.state, metrics))

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.step_seconds)

    def figures(self, matmul_flops_per_second: float) -> dict[str, Any]:
        flops_per_second = self.flops / self.median_seconds
        return {
            "tokens_per_second": rounded(self.tokens / self.median_seconds),
            "model_tflops_per_second": rounded(flops_per_second / 1e12),
            "mfu": rounded(flops_per_second / matmul_flops_per_second),
            "step_seconds": rounded(self.median_seconds),
            "compile_seconds": rounded(self.compile_seconds),
            "peak_memory_bytes": _peak_memory_bytes(self._compiled),
            "parameters": self.parameters.trainable + self.parameters.mtp,
            "active_parameters": self.parameters.active,
            "products": self.products,
        }


def _peak_memory_bytes(compiled: jax.stages.Compiled) -> int:
    """What one device holds at most during the step: weights, optimizer state and temporaries."""
    stats: Any = compiled.memory_analysis()
    # XLA:CPU leaves temporaries out of its peak; elsewhere the peak is right and the sum is above it.
    if jax.devices()[0].platform == "cpu":
        return int(stats.argument_size_in_bytes + stats.temp_size_in_bytes)
    return int(stats.peak_memory_in_bytes)


def rounded(value: float) -> float:
    """Four significant digits, whatever the size: a figure of a small machine does not become 0."""
    return float(f"{value:.4g}")
