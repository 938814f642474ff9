"""What a run runs on: its chips, their peak, their price; what this machine's own matmuls reach; its cache."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.config import HardwareConfig
from dsjax.numerics.recipe import Recipe, recipe
from dsjax.planning import hardware

MATMUL_SIZE = 2048


@dataclass(frozen=True)
class Machine:
    """All chips of a run together."""

    chips: int
    peak_flops_per_second: float | None  # None: unknown, and MFU with it
    dollars_per_hour: float
    note: str  # how the price came about


def machine(config: HardwareConfig, precision: str) -> Machine:
    """What runs here, what it can do and costs: from `config`, else from the hardware table by device.

    MFU on accelerators is against the BF16 peak, under FP8 recipes too, and unknown for FP32, of which data sheets tell
    no matmul rate. A CPU is one machine, however many devices are simulated on it: its peak is measured, it costs
    nothing unless a price is given, and the row of `config.name` is for the planner.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        rate = config.peak_flops_per_second or matmul_flops_per_second(recipe(precision).high)
        hosts = jax.process_count()
        price = config.price_per_chip_hour
        note = "CPU: free; hardware.price_per_chip_hour sets a price" if price is None else _priced(hosts, price)
        return Machine(hosts, rate * hosts, (price or 0.0) * hosts, note)
    row = hardware.find(config.name or device.device_kind)
    chips = jax.device_count() // (row.devices_per_chip if row else 1)
    peak, price = config.peak_flops_per_second, config.price_per_chip_hour
    if row:
        peak = row.peak_flops_bf16 if peak is None and precision != "fp32" else peak
        price = row.price_per_chip_hour if price is None else price
    if price is None:
        note = f"no price known for {device.device_kind}; set hardware.price_per_chip_hour"
    else:
        note = _priced(chips, price)
    return Machine(chips, None if peak is None else peak * chips, (price or 0.0) * chips, note)


def _priced(chips: int, price: float) -> str:
    return f"{chips} x ${price:g} per hour"


def matmul(how: Recipe, devices: Sequence[Any]) -> tuple[Callable[[], Any], float]:
    """(a function that does a 2048 x 2048 x 2048 matmul in the compute dtype on each device, its FLOPs).

    Simulated devices share one machine, which does one matmul.
    """
    devices = devices[:1] if devices[0].platform == "cpu" else devices
    ones = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), how.dtype)
    copies = [jax.device_put(ones, device) for device in devices]
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=how.precision))
    return lambda: jax.block_until_ready([multiply(a) for a in copies]), len(copies) * 2.0 * MATMUL_SIZE**3


def matmul_flops_per_second(how: Recipe, repeats: int = 5) -> float:
    """The rate of one device: the median of a few, after one that compiles."""
    run, flops = matmul(how, jax.local_devices()[:1])
    run()
    return flops / statistics.median(seconds(run) for _ in range(repeats))


def seconds(run: Callable[[], Any]) -> float:
    """How long `run()` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def use_compile_cache(directory: str | None) -> None:
    """Keeps every compiled program in `directory` for the next start; None leaves JAX as it is."""
    if directory is not None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
