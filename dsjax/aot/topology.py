"""The devices of a pod that is not here, as their compilers know them.

libtpu and XLA's CUDA plugin compile for a named topology without a chip: the first from the package libtpu (extra
`plan-tpu`), the second from JAX's CUDA wheels (extra `plan-gpu`), which want no driver.
"""

import ctypes
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsjax.sections import ConfigError

GPUS_PER_NODE = 8
M_ARENA_MAX = -8  # of glibc's mallopt


@dataclass(frozen=True)
class TPU:
    """How libtpu calls a generation, and how its chips are joined."""

    name: str
    torus: int  # dimensions
    largest: int  # chips along one of them
    devices_per_chip: int = 1


@dataclass(frozen=True)
class GPU:
    """What XLA wants to know of a GPU [openxla/xla, xla/backends/gpu/target_config/specs]."""

    description: str
    compute_capability: tuple[int, int]
    cores: int
    clock_ghz: float
    memory_bytes: int
    memory_bytes_per_s: int
    l2_bytes: int


TPUS = {
    "v4": TPU("v4", 3, 16),
    "v5e": TPU("v5e", 2, 16),
    "v5p": TPU("v5p", 3, 28),
    "v6e": TPU("v6e", 2, 16),
    "tpu7x": TPU("tpu7x", 3, 28, devices_per_chip=2),
}
H100 = GPU("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 84_942_979_072, 3_352_320_000_000, 50 * 2**20)
GPUS = {
    "H100": H100,
    "H800": H100,  # the same chip and memory behind slower links
    "H200": GPU("NVIDIA H200", (9, 0), 132, 1.98, 150_754_820_096, 4_800_000_000_000, 50 * 2**20),
    "B200": GPU("NVIDIA B200", (10, 0), 148, 1.965, 191_514_411_008, 7_672_320_000_000, 132_644_864),
}


def set_environment(hardware: str) -> None:
    """What has to stand before JAX is imported, for `devices` to find no chip and look for none."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Else the compiler keeps, for all that it makes of an operation, where in Python that was written.
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
    _share_one_arena()
    if hardware in TPUS:
        # Not on a TPU VM; and other processes may compile at the same time.
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        }


def _share_one_arena() -> None:
    """Lets all threads take memory from one heap.

    glibc gives each thread of the compiler a heap of its own, and what is free in one serves no other. With the
    locations that was 1.5 of 10 GiB for all of V3 on v5p.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library has nothing of the kind
        mallopt(M_ARENA_MAX, 1)


def devices(hardware: str, chips: int, torus: Sequence[int] | None = None) -> list[Any]:
    """The devices of `chips` chips, in the order of the topology.

    Args:
      hardware: a name of `TPUS` or `GPUS`.
      chips: how many; JAX shows each TPU7x as two devices.
      torus: sizes of the TPU slice, as in (8, 8, 16); None: as near to a cube or a square as there is.

    Raises:
      ConfigError: no compiler for this hardware is installed, or there is no such slice.
    """
    if torus is not None and hardware not in TPUS:
        raise ConfigError(f"--topology is of TPU slices, but {hardware} is none; leave it out")
    if hardware in TPUS:
        return _describe("tpu", "plan-tpu", topology_name=slice_name(hardware, chips, torus))
    if hardware not in GPUS:
        raise ConfigError(f"nothing compiles for {hardware} ahead of time; what does: {', '.join((*GPUS, *TPUS))}")
    per_node = GPUS_PER_NODE if chips % GPUS_PER_NODE == 0 else chips
    if chips % GPUS_PER_NODE and chips > GPUS_PER_NODE:
        raise ConfigError(f"{chips} GPUs are not whole nodes: give a multiple of {GPUS_PER_NODE}")
    nodes = f"1x{chips // per_node}x{per_node}"
    return _describe("cuda", "plan-gpu", target_config=target_config(GPUS[hardware]), topology=nodes)


def read_sides(text: str | None) -> tuple[int, ...] | None:
    """The sides of a slice written as in "8x8x16".

    Raises ConfigError for anything else.
    """
    if text is None:
        return None
    sides = text.split("x")
    if not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ConfigError(f"--topology is {text}, but must be the sides of a slice, as in 8x8x16")
    return tuple(map(int, sides))


def slice_name(hardware: str, chips: int, torus: Sequence[int] | None = None) -> str:
    """What libtpu calls a slice, as in "v5p:8x8x16".

    Sides are 1, 2 or multiples of 4; of all slices of `chips` the one whose sides differ least.
    """
    tpu = TPUS[hardware]
    sides = [1, 2, *range(4, tpu.largest + 1, 4)] if tpu.torus == 3 else [1, 2, 4, 8, 16]
    fitting = [
        sizes for sizes in itertools.combinations_with_replacement(sides, tpu.torus) if math.prod(sizes) == chips
    ]
    if torus is not None:
        if tuple(sorted(torus)) not in fitting:
            raise ConfigError(
                f"{hardware} has no slice of {'x'.join(map(str, torus))} for {chips} chips: its {tpu.torus} sides must"
                f" multiply to {chips}, each 1, 2 or a multiple of 4"
            )
        return f"{tpu.name}:{'x'.join(map(str, torus))}"
    if not fitting:
        possible = sorted({math.prod(s) for s in itertools.combinations_with_replacement(sides, tpu.torus)})
        near = sorted(sorted(possible, key=lambda n: abs(n - chips))[:2])
        raise ConfigError(f"there is no {hardware} slice of {chips} chips; near are {' and '.join(map(str, near))}")
    best = min(fitting, key=lambda sizes: max(sizes) / min(sizes))
    return f"{tpu.name}:{'x'.join(map(str, best if tpu.torus == 3 else best[::-1]))}"


def _describe(platform: str, extra: str, **description: str) -> list[Any]:
    from jax.experimental import topologies

    try:
        name = description.pop("topology_name", "")
        return list(topologies.get_topology_desc(name, platform, **description).devices)
    except Exception as error:  # JAX raises what the plugin does, and something else where there is no plugin
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"no compiler for {platform} came up ({reason}); install it with pip install 'dsjax[{extra}]'"
        ) from error


def target_config(gpu: GPU) -> str:
    """The GPU as the text proto that XLA's CUDA plugin reads."""
    major, minor = gpu.compute_capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.memory_bytes_per_s}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{gpu.description}"
"""
