"""The train step of a configuration, compiled for a pod, and what the compiler says of it."""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.aot.hlo import Array, Program
from dsjax.aot.work import flops_per_device
from dsjax.config import Config
from dsjax.sections import ConfigError
from dsjax.sharding import AXES, check_batch
from dsjax.training.schedule import Schedule
from dsjax.training.state import TrainState, abstract_state
from dsjax.training.step import pretrain_step

LARGEST_ARRAYS = 8
# Without hardware there is nothing to tune on.
OPTIONS: dict[str, dict[str, Any]] = {"gpu": {"xla_gpu_autotune_level": 0}}


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind and group size in one step."""

    kind: str
    group: int  # devices
    crosses_nodes: bool  # on GPUs; a TPU slice has one kind of link
    count: int
    bytes_sent: float  # by one device


@dataclass(frozen=True)
class CompiledStep:
    """What one device holds and does in one step."""

    mesh: dict[str, int]
    device_kind: str
    trace_seconds: float
    compile_seconds: float
    peak_bytes: int  # of the program, by the compiler: state, gradients and temporaries
    state_bytes: dict[str, int]  # "parameters", "moments", "other": what the step is given
    gradient_bytes: int  # the FP32 sums over microbatches, cut like the parameters
    flops: float  # of matrix products, recomputation and empty rows included
    traffic: list[Traffic]
    largest: list[Array]

    @property
    def temporary_bytes(self) -> int:
        """Everything else at the peak: kept activations, gathered weights, buffers."""
        return self.peak_bytes - sum(self.state_bytes.values()) - self.gradient_bytes


def compile_step(
    config: Config, mesh: Mesh, devices_per_node: int | None, tell: Callable[[str], None] = lambda _: None
) -> CompiledStep:
    """Compiles the real step: forward, backward, accumulation, clipping, AdamW, bias update.

    Args:
      config: everything about it; the largest batch of the run.
      mesh: of devices that need not be here, see `topology.devices`.
      devices_per_node: on GPUs those that share fast links; None: all links are alike.
      tell: is called with a sentence before what takes long.

    Raises:
      ConfigError: the batch does not spread over the mesh, or the compiler refused, mostly for memory.
    """
    size = config.training.sequences_per_microbatch
    check_batch("training.microbatch_size", size, mesh)
    microbatches, length = config.training.batch_size // size, config.data.sequence_length
    state = abstract_state(config, mesh)
    batch = jax.ShapeDtypeStruct(
        (microbatches, size, length + 1), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(None, AXES))
    )
    schedule = Schedule(config.training, config.optimizer, length)
    values = {name: np.float32(value) for name, value in schedule.hyperparameters(0).items()}

    tell("tracing the train step")
    start = time.monotonic()
    traced = pretrain_step(config, mesh).trace(state, batch, np.int32(microbatches), values)
    lowered = traced.lower()
    trace_seconds = time.monotonic() - start
    tell(f"compiling it for {mesh.size} devices; minutes, however deep the model")
    start = time.monotonic()
    compiled = _compile(lowered, mesh)
    compile_seconds = time.monotonic() - start

    program = Program(compiled.as_text() or "", microbatches)
    analysis: Any = compiled.memory_analysis()
    state_bytes = _state_bytes(state)
    state_bytes["other"] = int(analysis.argument_size_in_bytes) - sum(state_bytes.values())
    return CompiledStep(
        mesh=dict(mesh.shape),
        device_kind=mesh.devices.flat[0].device_kind,
        trace_seconds=trace_seconds,
        compile_seconds=compile_seconds,
        peak_bytes=int(analysis.peak_memory_in_bytes),
        state_bytes=state_bytes,
        gradient_bytes=_bytes_per_device(state.params),
        flops=flops_per_device(traced.jaxpr.jaxpr, mesh.size, microbatches),
        traffic=_traffic(program, devices_per_node),
        largest=program.largest_arrays(LARGEST_ARRAYS),
    )


def _compile(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    try:
        return lowered.compile(OPTIONS.get(mesh.devices.flat[0].platform))
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in reason:
            raise
        raise ConfigError(f"the step does not fit the memory of this chip: {reason}") from error


def _state_bytes(state: TrainState) -> dict[str, int]:
    return {"parameters": _bytes_per_device(state.params), "moments": _bytes_per_device(state.opt_state)}


def _bytes_per_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _traffic(program: Program, devices_per_node: int | None) -> list[Traffic]:
    counts: Counter[tuple[str, int, bool]] = Counter()
    sent: Counter[tuple[str, int, bool]] = Counter()
    for one, times in program.collectives.items():
        nodes = {member // devices_per_node for member in one.members} if devices_per_node else {0}
        key = (one.kind, len(one.members), len(nodes) > 1)
        counts[key] += times
        sent[key] += times * one.bytes_sent  # type: ignore[assignment]
    rows = [Traffic(*key, count, float(sent[key])) for key, count in counts.items() if sent[key]]
    return sorted(rows, key=lambda row: -row.bytes_sent)
