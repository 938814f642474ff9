"""The device mesh, and where every weight lives on it.

Weights declare logical axes (`("embed", "mlp")`); `RULES` says over which mesh axes each logical axis is cut.
A mesh axis cuts a tensor once: the first dimension that claims it has it. What cannot be cut evenly is an
error, never quietly replicated.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsjax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "expert")
BATCH = PartitionSpec(AXES)  # sequences are spread over the whole mesh
REPLICATED = PartitionSpec()

RULES: Mapping[str, tuple[str, ...]] = {
    "layers": (),
    "vocab": (),
    "embed": ("fsdp", "expert"),
    "latent": ("fsdp", "expert"),  # q_b and kv_b have no hidden dimension, and are large
    "heads": (),
    "mlp": (),
    "norm": (),
    "bias": (),
    "concat": (),  # the two halves that enter MTP's eh_proj
    "router": (),
    "expert": ("expert",),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices (or `devices`), axes outer to inner as in `AXES`.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    filled = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(filled.values()) != len(devices):
        asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ConfigError(
            f"the mesh ({asked}) does not fit {len(devices)} device(s): make config.mesh multiply to that number,"
            " or simulate more devices on the CPU with --devices N"
        )
    return jax.make_mesh(tuple(filled.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_batch(name: str, sequences: int, mesh: Mesh) -> None:
    """Raises ConfigError unless `sequences` spread evenly over the mesh."""
    if sequences % mesh.size:
        raise ConfigError(
            f"{name} = {sequences} sequences cannot be spread evenly over {mesh.size} devices:"
            f" make it a multiple of {mesh.size}"
        )


def partition(axes: Sequence[str], shape: Sequence[int], mesh: Mesh, name: str = "tensor") -> PartitionSpec:
    """The PartitionSpec of one weight.

    Args:
      axes: its logical axes, one a dimension.
      shape: its sizes.
      mesh: the mesh.
      name: what to call it in errors.

    Raises:
      ConfigError: an unknown logical axis, or a dimension that the mesh does not divide.
    """
    spec: list[tuple[str, ...] | None] = []
    taken: set[str] = set()
    for axis, size in zip(axes, shape, strict=True):
        if axis not in RULES:
            raise ConfigError(f"{name} has the unknown logical axis {axis!r}; known are {', '.join(RULES)}")
        cut = tuple(a for a in RULES[axis] if a not in taken and mesh.shape[a] > 1)
        ways = math.prod(mesh.shape[a] for a in cut)
        if size % ways:
            raise ConfigError(
                f"{name}: its {axis} dimension of {size} is not divisible by {ways} ({' x '.join(cut)}):"
                " choose smaller mesh.fsdp or mesh.expert, and grow mesh.data instead"
            )
        taken.update(cut)
        spec.append(cut or None)
    return PartitionSpec(*spec)


def shardings(axes_tree: Any, shapes_tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of weights.

    Args:
      axes_tree: tree whose leaves are tuples of logical axes.
      shapes_tree: the same tree with leaves that have a `.shape`.
      mesh: the mesh.
    """

    def one(path: Any, leaf: Any, axes: tuple[str, ...]) -> NamedSharding:
        return NamedSharding(
            mesh, partition(axes, leaf.shape, mesh, jax.tree_util.keystr(path, simple=True, separator="."))
        )

    return jax.tree_util.tree_map_with_path(one, shapes_tree, axes_tree)


def gather(shard: jax.Array, axes: Sequence[str], dim: int, mesh: Mesh) -> jax.Array:
    """Inside shard_map, the whole of a tensor that is cut over `axes` along `dim`.

    Its backward pass is a reduce-scatter. Axes of one device are left out: XLA would copy the tensor for them.
    """
    axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    return jax.lax.all_gather(shard, axes, axis=dim, tiled=True) if axes else shard


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, REPLICATED)
