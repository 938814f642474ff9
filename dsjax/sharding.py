"""The device mesh, and where every weight lives on it.

Weights declare logical axes (`("embed", "mlp")`); planning/placement.py says over which mesh axes each is cut.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsjax.config import ConfigError, MeshConfig
from dsjax.planning import layout
from dsjax.planning.placement import AXES, cuts

BATCH = PartitionSpec(AXES)  # sequences are spread over the whole mesh
REPLICATED = PartitionSpec()


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices (or `devices`), axes outer to inner as in `AXES`.

    Neighbours on the inner axes are neighbours in the machine: on a TPU torus and its hosts, on the GPUs of a node.
    Several TPU slices divide `data`, whose gradients alone then cross the data-centre network.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, do not divide over slices or processes, or others
        than data are open.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = layout.fill(config, None, len(devices))
    check_processes(sizes, devices)
    return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_processes(sizes: Mapping[str, int], devices: Sequence[Any]) -> None:
    """Raises ConfigError unless the processes have equal numbers of devices, over which the expert axis divides."""
    local = Counter(device.process_index for device in devices)
    if len(local) == 1:
        return
    (most, most_of), *_, (least, least_of) = [(one, of) for of, one in local.most_common()]
    if most != least:
        raise ConfigError(
            f"process {least_of} has {least} device(s) and process {most_of} has {most}, but all need equally many:"
            " give every process the same number"
        )
    expert = sizes["expert"]
    if expert % most and most % expert:
        raise ConfigError(
            f"mesh.expert = {expert} does not divide over {len(local)} processes of {most} devices each: ranks that"
            f" exchange tokens would share their links unevenly; make it a divisor or a multiple of {most}"
        )


def arrange(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array over `AXES`, ordered by where they are.

    Raises:
      ConfigError: `data` does not divide over TPU slices, or the axes do not lie in the torus.
    """
    shape = tuple(sizes[axis] for axis in AXES)
    is_tpu = devices[0].platform == "tpu"
    # Elsewhere slices are nodes, whose order is that of the devices' ids; their number need not divide `data`.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if is_tpu else 1
    if sizes["data"] % slices:
        raise ConfigError(
            f"mesh.data = {sizes['data']} does not divide over {slices} TPU slices, between which only gradients should"
            f" travel: make it a multiple of {slices}"
        )
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        inner = (sizes["data"] // slices, *shape[1:])
        return mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError) as error:
        asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"the mesh ({asked}) does not lie in the torus of {len(devices)} TPUs ({reason}); choose sizes that"
            " multiply from the topology's"
        ) from error


def check_nodes(ranks_per_node: int | None, mesh: Mesh) -> None:
    """Raises ConfigError where the expert ranks that dispatch takes for a node cannot be one.

    What is known of nodes: the devices of one process share one; on GPUs, those of one `slice_index` share NVLink.
    """
    if ranks_per_node is None or mesh.shape["expert"] <= ranks_per_node:
        return
    devices = list(mesh.devices.flat)
    local = max(Counter(device.process_index for device in devices).values())
    if mesh.size > local and ranks_per_node % local and local % ranks_per_node:
        raise ConfigError(
            f"dispatch.ranks_per_node = {ranks_per_node} does not fit processes of {local} devices each: a node would"
            f" begin or end inside one; make it the number of devices of a node, a multiple of {local}"
        )
    nodes = Counter(getattr(device, "slice_index", 0) for device in devices if device.platform == "gpu")
    if nodes and max(nodes.values()) % ranks_per_node:
        raise ConfigError(
            f"dispatch.ranks_per_node = {ranks_per_node}, but {max(nodes.values())} GPUs share NVLink here: make it"
            " that number, or a divisor"
        )


def check_batch(name: str, sequences: int, mesh: Mesh) -> None:
    """Raises ConfigError unless `sequences` spread evenly over the mesh."""
    layout.check_batch(name, sequences, mesh.size)


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
    return PartitionSpec(*(cut or None for cut in cuts(axes, shape, mesh.shape, name)))


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
