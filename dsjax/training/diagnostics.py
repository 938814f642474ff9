"""What FP8 costs in accuracy, measured on the run itself: error, overflow and underflow of every class of operand.

One more forward and backward pass over the step's first microbatch, of a network whose recipe measures: its weights
receive the statistics of their products' operands in place of gradients. The train step stays as it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsjax.config import Config
from dsjax.model.transformer import is_quantised, network
from dsjax.numerics.linear import CLASSES, STATISTICS
from dsjax.training.objective import language_model_loss
from dsjax.training.state import TrainState, build_network

Quantisation = dict[str, dict[str, jax.Array]]


def measure_quantisation(config: Config, mesh: Mesh) -> Callable[[TrainState, jax.Array, Any], Quantisation]:
    """f(state, batch [microbatches, sequences, T + 1], hyperparameters) -> for each class of operand its rates.

    Over all Linears and experts: `error`, the RMS of what rounding changes over the RMS of the numbers; `overflow`, the
    share of numbers that became no finite number, empty rows of experts' buffers among them; `underflow`, the share of
    numbers other than 0 that became 0. The classes are numerics.linear.CLASSES.
    """
    execution = build_network(config, mesh).execution
    recipe = dataclasses.replace(execution.recipe, measures=True, native=None, accumulation="fp32")
    net = network(config.model, dataclasses.replace(execution, recipe=recipe))
    loss_fn = language_model_loss(net, config)

    @jax.jit
    def measure(params, router_bias, batch, hyperparameters):
        measured, _ = jax.grad(loss_fn, has_aux=True)(params, router_bias, batch[0], hyperparameters)
        sums = jnp.sum(jnp.stack([_statistics(leaf) for leaf in _quantised(measured)]), axis=0)
        return {name: _rates(*sums[place]) for place, name in enumerate(CLASSES)}

    def wait_for(state: TrainState, batch: jax.Array, hyperparameters: Any) -> Quantisation:
        # On CPU, two programs in flight would wait for each other's processes.
        return jax.block_until_ready(measure(state.params, state.router_bias, batch, hyperparameters))

    return wait_for


def _rates(count, nonzero, square, error, overflow, underflow) -> dict[str, jax.Array]:
    return {
        "error": jnp.sqrt(error / square),
        "overflow": overflow / count,
        "underflow": underflow / nonzero,
    }


def _quantised(measured: Any) -> list[jax.Array]:
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(measured) if is_quantised(path)]


def _statistics(leaf: jax.Array) -> jax.Array:
    """[classes, statistics] of one stack of matrices."""
    size = len(CLASSES) * STATISTICS
    matrices = leaf.reshape(-1, leaf.shape[-2] * leaf.shape[-1])
    return jnp.sum(matrices[:, :size], axis=0).reshape(len(CLASSES), STATISTICS)
