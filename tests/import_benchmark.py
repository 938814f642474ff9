"""How fast a published checkpoint is read, and how much memory that takes; a script.

    python tests/import_benchmark.py [--gigabytes 2] [--devices 8]

Makes a synthetic checkpoint of DeepSeek-V2-Lite's sizes with fewer layers, in BF16, and reads it in turns with the
safetensors library (`load_file`, nothing else done with it) and with `hub.load`. Prints JSON: bytes per second of both,
their ratio, and the peak of the process's memory beyond the arrays themselves, which is what `hub.load` needs beside
them.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from dsjax.__main__ import SIMULATED_FLAGS
from dsjax.config import ModelConfig, load
from dsjax.hub.architecture import published_config
from dsjax.hub.safetensors import Writer

REPOSITORY = Path(__file__).parents[1]
TURNS = 3
BYTES_PER_LAYER = 1.17e9  # of 64 experts in BF16


def synthetic_model(gigabytes: float) -> ModelConfig:
    """V2-Lite with a small vocabulary and as many layers, or as wide experts, as make about so many bytes."""
    lite = load(str(REPOSITORY / "configs" / "deepseek_v2_lite.py")).model
    layers = max(1, round(gigabytes * 1e9 / BYTES_PER_LAYER))
    width = round(lite.moe_intermediate_size * min(1.0, gigabytes * 1e9 / BYTES_PER_LAYER))
    return dataclasses.replace(lite, vocab_size=8192, num_hidden_layers=1 + layers, moe_intermediate_size=width)


def write_synthetic(directory: Path, model: ModelConfig) -> int:
    """A whole checkpoint of random BF16 numbers; returns its bytes."""
    import jax

    from dsjax.config import MeshConfig
    from dsjax.hub import names
    from dsjax.model.moe import Execution
    from dsjax.model.transformer import network
    from dsjax.numerics.recipe import recipe
    from dsjax.sharding import make_mesh

    net = network(model, Execution(make_mesh(MeshConfig(), jax.devices()[:1]), recipe("fp32")))
    places = names.places(names.flat(net.shapes) | names.flat(net.bias_shapes), model)
    dtype = np.dtype(ml_dtypes.bfloat16)
    noise = (0.02 * np.random.default_rng(0).standard_normal(1 << 26, np.float32)).astype(dtype)
    with Writer(directory, {name: (dtype, place.shape) for name, place in places.items()}) as writer:
        for name, place in places.items():
            writer.add(name, noise[: math.prod(place.shape)].reshape(place.shape))
    (directory / "config.json").write_text(json.dumps(published_config(model, "bfloat16", None, None, None)))
    return sum(2 * math.prod(place.shape) for place in places.values())


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(directory: Path, reader: str, mesh: str) -> dict[str, float]:
    """In a process of its own: seconds that one reader takes, and its peak of memory above that of the result."""
    if reader == "library":
        from safetensors.numpy import load_file

        start = time.perf_counter()
        tensors = [load_file(file) for file in sorted(directory.glob("*.safetensors"))]
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tensors": sum(map(len, tensors))}
    import jax

    from dsjax import hub
    from dsjax.config import MeshConfig
    from dsjax.sharding import make_mesh

    sizes = tuple(map(int, mesh.split("x")))
    on = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    jax.device_put(np.zeros(1), jax.devices()[0]).block_until_ready()
    before = memory("VmRSS")
    start = time.perf_counter()
    loaded = hub.load(directory, on, "bfloat16")
    jax.block_until_ready((loaded.params, loaded.router_bias))
    seconds = time.perf_counter() - start
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves((loaded.params, loaded.router_bias)))
    return {"seconds": seconds, "arrays": arrays, "beside_arrays": memory("VmHWM") - before - arrays}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--mesh", default="1x1x1", help="data x fsdp x expert, simulated; default: one device")
    parser.add_argument("--measure", nargs=2, metavar=("DIR", "READER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = SIMULATED_FLAGS.format(devices=math.prod(map(int, args.mesh.split("x"))))
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1], args.mesh)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        size = write_synthetic(Path(scratch), synthetic_model(args.gigabytes))
        results: dict[str, list[dict[str, float]]] = {"library": [], "hub": []}
        for _ in range(TURNS):
            for reader, found in results.items():
                command = [sys.executable, __file__, "--mesh", args.mesh, "--measure", scratch, reader]
                found.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    library, ours = (size / min(one["seconds"] for one in found) for found in results.values())
    print(
        json.dumps(
            {
                "checkpoint_gb": size / 1e9,
                "library_gb_per_second": library / 1e9,
                "hub_gb_per_second": ours / 1e9,
                "ratio": ours / library,
                "peak_gb_beside_arrays": max(one["beside_arrays"] for one in results["hub"]) / 1e9,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
