"""What training carries from step to step on the devices, made sharded from the start."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsjax.config import Config
from dsjax.model.moe import Execution
from dsjax.model.transformer import Network, network
from dsjax.numerics.recipe import recipe
from dsjax.sharding import replicated
from dsjax.training import optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """FP32 master weights, routing biases, optimizer state, and the number of steps taken."""

    params: Any
    router_bias: Any
    opt_state: Any
    step: Any  # int32 scalar; tokens and sequences are counted on the host, where integers are exact


def build_network(config: Config, mesh: Mesh) -> Network:
    """The network that this configuration trains, on this mesh; nothing is allocated."""
    how = recipe(config.precision, config.fp8.accumulation, mesh)
    return network(config.model, Execution(mesh, how, config.dispatch, config.training.remat))


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    """The sharding of every part of the state: weights and moments over (fsdp, expert), the rest replicated."""
    net = build_network(config, mesh)
    params = net.param_shardings()
    moments = optimizer.state_shardings(optimizer.adamw(config.optimizer), net.shapes, params, mesh)
    everywhere = replicated(mesh)
    return TrainState(params, jax.tree.map(lambda _: everywhere, net.bias_shapes), moments, everywhere)


def _initial(config: Config, net: Network, key: jax.Array) -> TrainState:
    params, bias = net.init(key)
    return TrainState(params, bias, optimizer.adamw(config.optimizer).init(params), jnp.zeros((), jnp.int32))


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """A fresh state, drawn from config.training.seed; every device makes only its own part.

    Equal on every mesh: each array's random bits depend on its key and shape alone.
    """
    net = build_network(config, mesh)
    init = jax.jit(lambda key: _initial(config, net, key), out_shardings=state_shardings(config, mesh))
    return init(jax.random.key(config.training.seed))


def state_from(config: Config, mesh: Mesh, params: Any, router_bias: Any) -> TrainState:
    """A state that begins with these arrays, which are sharded over `mesh`; nothing has been optimised yet."""
    shardings = state_shardings(config, mesh)
    begin = jax.jit(optimizer.adamw(config.optimizer).init, out_shardings=shardings.opt_state)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(params, router_bias, begin(params), step)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """The state as jax.ShapeDtypeStruct with shardings: what a checkpoint is restored into."""
    net = build_network(config, mesh)
    shapes = jax.eval_shape(lambda key: _initial(config, net, key), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(config, mesh),
    )
