"""How much memory a device needs as the mesh grows and each device's tokens stay the same: weak scaling, simulated.

    python tests/weak_scaling.py [CONFIG] [--config.section.field=value ...]

For 1, 2, 4 and 8 devices it compiles the train step of CONFIG (default: configs/tiny.py) and asks the compiler what one
device holds: arguments (weights, optimizer state, batch) and temporaries. The expert axis takes the devices up to
EXPERTS ranks, then data the rest. Compiling takes a minute or so each time; nothing is trained.
"""

import dataclasses
import os
import sys
from pathlib import Path

DEVICES = (1, 2, 4, 8)
EXPERTS = 4
SEQUENCES = 4  # of each device
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # buffers stay as they are
ALLOWED_GROWTH = 0.10  # of temporaries, from 1 device to 8


def on(config, devices: int):
    """`config` with its tokens per device, on that many devices."""
    expert = min(devices, EXPERTS)
    training = dataclasses.replace(config.training, batch_size=SEQUENCES * devices, microbatch_size=None)
    mesh = dataclasses.replace(config.mesh, data=devices // expert, fsdp=1, expert=expert)
    return dataclasses.replace(config, mesh=mesh, training=training)


def memory(config, devices: int):
    """(arguments, temporaries) in bytes, of each device."""
    import jax
    import numpy as np

    from dsjax.sharding import make_mesh
    from dsjax.training.state import abstract_state
    from dsjax.training.step import pretrain_step

    config = on(config, devices)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    tokens = jax.ShapeDtypeStruct((1, config.training.batch_size, config.data.sequence_length + 1), np.int32)
    values = {name: np.float32(0.1) for name in ("learning_rate", "bias_update_speed", "mtp_loss_weight")}
    step = pretrain_step(config, mesh).lower(abstract_state(config, mesh), tokens, np.int32(1), values)
    stats = step.compile(QUICKLY).memory_analysis()
    return stats.argument_size_in_bytes, stats.temp_size_in_bytes


def main() -> int:
    from dsjax.config import load

    paths = [word for word in sys.argv[1:] if not word.startswith("--config.")]
    overrides = [word.removeprefix("--config.") for word in sys.argv[1:] if word.startswith("--config.")]
    config = load(*(paths or [str(Path(__file__).parents[1] / "configs" / "tiny.py")]), overrides)
    print("devices  data x expert  arguments MiB  temporaries MiB  of one device's")
    first = 0
    for devices in DEVICES:
        arguments, temporaries = memory(config, devices)
        first = first or temporaries
        mesh = on(config, devices).mesh
        row = f"{devices:7}  {mesh.data:4} x {mesh.expert:<6}  {arguments / 2**20:13.2f}  {temporaries / 2**20:15.2f}"
        print(f"{row}  {temporaries / first:15.3f}", flush=True)
    return int(temporaries > first * (1 + ALLOWED_GROWTH))


if __name__ == "__main__":
    from dsjax.__main__ import SIMULATED_FLAGS

    os.environ["XLA_FLAGS"] = SIMULATED_FLAGS.format(devices=max(DEVICES))
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(main())
