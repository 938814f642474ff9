"""Which mesh axes cut which dimension of a weight: the rules, without JAX. sharding.py makes PartitionSpecs of them.

Weights declare logical axes (`("embed", "mlp")`); `RULES` says over which mesh axes each logical axis is cut.
A mesh axis cuts a tensor once: the first dimension that claims it has it. What cannot be cut evenly is an
error, never quietly replicated.
"""

import math
from collections.abc import Mapping, Sequence

from dsjax.sections import ConfigError

AXES = ("data", "fsdp", "expert")  # of the mesh, outer to inner

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


def cuts(
    axes: Sequence[str], shape: Sequence[int], sizes: Mapping[str, int], name: str = "tensor"
) -> tuple[tuple[str, ...], ...]:
    """For each dimension of a weight, the mesh axes that cut it.

    Args:
      axes: its logical axes, one a dimension.
      shape: its sizes.
      sizes: devices along each mesh axis.
      name: what to call it in errors.

    Raises:
      ConfigError: an unknown logical axis, or a dimension that the mesh does not divide.
    """
    found: list[tuple[str, ...]] = []
    taken: set[str] = set()
    for axis, size in zip(axes, shape, strict=True):
        if axis not in RULES:
            raise ConfigError(f"{name} has the unknown logical axis {axis!r}; known are {', '.join(RULES)}")
        cut = tuple(a for a in RULES[axis] if a not in taken and sizes[a] > 1)
        ways = math.prod(sizes[a] for a in cut)
        if size % ways:
            raise ConfigError(
                f"{name}: its {axis} dimension of {size} is not divisible by {ways} ({' x '.join(cut)}):"
                " choose smaller mesh.fsdp or mesh.expert, and grow mesh.data instead"
            )
        taken.update(cut)
        found.append(cut)
    return tuple(found)
