"""The products of a traced program, counted where they stand: recomputation, padding and kernels included.

XLA's own count takes a loop's body once and a kernel for nothing.
"""

import math
from typing import Any

from jax.extend.core import Jaxpr

from dsjax.model.dispatch import EVERY_ROUND
from dsjax.numerics import kernels

KERNELS = ("pallas_call", "mpmd_map")
SPLASH = "splash_mha"  # JAX's attention kernels for TPUs begin so


def flops_per_device(program: Jaxpr, devices: int, while_trips: int) -> float:
    """FLOPs of all matrix products that one of `devices` does, a multiply and an add being two.

    Args:
      program: a traced function; what it computes outside shard_map is spread over all devices.
      devices: of the mesh.
      while_trips: turns of the loops with a traced count outside shard_map, which are those over microbatches. Inside
        shard_map they are the rounds of a dispatch, of which there is one when experts are equally busy, in the loop or
        before it.

    Where the program branches, the largest branch counts. What nothing reads does not: the compiler leaves it out.
    """
    return sum(_of_equation(equation, devices, while_trips) for equation in _live(program))


def _live(program: Jaxpr) -> list[Any]:
    """The equations whose results are read, and in kernels those that write to memory."""
    read, live = set(map(id, program.outvars)), []
    for equation in reversed(program.eqns):
        # That it names an axis is an effect of a collective too, which may go unread like anything else.
        writes = any(type(effect).__name__ != "NamedAxisEffect" for effect in equation.effects)
        if writes or any(id(variable) in read for variable in equation.outvars):
            live.append(equation)
            read |= set(map(id, equation.invars))
    return live


def _of_equation(equation: Any, devices: int, while_trips: int) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[dim] for dim in contracted) / devices
    if name in ("ragged_dot", "ragged_dot_general"):
        return _ragged_flops(equation) / devices
    if name in KERNELS and params["cost_estimate"] is not None:
        return params["cost_estimate"].flops / devices
    if name in KERNELS and params["name"] == kernels.NAME:  # Hopper's, which takes no estimate
        return kernels.product_flops(equation.invars[0].aval, equation.outvars[0].aval) / devices
    if name == "shard_map":
        devices, while_trips = 1, 0
    inside = [flops_per_device(inner, devices, while_trips) for inner in programs_inside(equation)]
    if not inside:
        return 0.0
    if name == "cond":
        return max(inside)
    if name == "scan":
        return params["length"] * sum(inside)
    if name == "while":
        return (while_trips or EVERY_ROUND in str(equation.source_info.name_stack)) * sum(inside)
    if name == "pallas_call":
        grid = params["grid_mapping"].grid
        # A causal mask leaves out the blocks above the diagonal; both of its sides are cut into grid[-1].
        share = (grid[-1] + 1) / (2 * grid[-1]) if (params["name"] or "").startswith(SPLASH) else 1
        return share * math.prod(n for n in grid if isinstance(n, int)) * sum(inside)
    return sum(inside)


def programs_inside(equation: Any) -> list[Any]:
    """The programs among an equation's parameters, alone or in a tuple, with constants or without."""
    values = [
        value
        for parameter in equation.params.values()
        for value in (parameter if isinstance(parameter, tuple | list) else (parameter,))
    ]
    return [getattr(value, "jaxpr", value) for value in values if hasattr(value, "eqns")]


def _ragged_flops(equation: Any) -> float:
    """Each row meets one matrix, or is contracted into one."""
    rows, other = (operand.aval for operand in equation.invars[:2])
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), _ = numbers.dot_dimension_numbers
    left_out = {*contracted, *numbers.rhs_group_dimensions}
    return 2.0 * rows.size * math.prod(other.shape[dim] for dim in range(other.ndim) if dim not in left_out)
