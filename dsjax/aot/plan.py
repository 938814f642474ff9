"""dsjax plan --compile: a plan's step by the compiler of its chips."""

from collections.abc import Callable, Sequence

from dsjax.aot import topology
from dsjax.aot.compile import CompiledStep, compile_step
from dsjax.planning.plan import Plan
from dsjax.sharding import check_nodes, make_mesh


def compile_plan(
    plan: Plan, torus: Sequence[int] | None = None, tell: Callable[[str], None] = lambda _: None
) -> CompiledStep:
    """Compiles the train step of a plan for its chips, none of which is needed.

    Call `topology.set_environment` before JAX is imported. Arguments and errors are those of `topology.devices` and
    `compile_step`, and of `make_mesh` where the mesh does not lie in the torus.
    """
    mesh = make_mesh(plan.config.mesh, topology.devices(plan.chip.name, plan.chips, torus))
    check_nodes(plan.config.dispatch.ranks_per_node, mesh)
    is_gpu = plan.chip.name in topology.GPUS
    return compile_step(plan.config, mesh, topology.GPUS_PER_NODE if is_gpu else None, tell)
