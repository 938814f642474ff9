"""AdamW as an optax transform: FP32 master weights, BF16 moments, decay of matrices only.

The learning rate is not in here: it is a function of the tokens seen, kept as an exact integer on the host
(`schedule.py`), and reaches the step as an argument.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dsjax.config import OptimizerConfig
from dsjax.sharding import replicated


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam and decoupled weight decay [V3 §4.2]; a step is `-learning_rate` times its updates."""
    return optax.chain(
        _in_dtype(optax.scale_by_adam(config.b1, config.b2, config.eps), jnp.dtype(config.moment_dtype)),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def _in_dtype(adam: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """Adam whose m and v are kept in `dtype` between steps; each update is computed in FP32."""

    def cast(state: Any, to: DTypeLike) -> Any:
        return state._replace(
            **{name: jax.tree.map(lambda a: a.astype(to), getattr(state, name)) for name in ("mu", "nu")}
        )

    def init(params: Any) -> Any:
        return cast(adam.init(params), dtype)

    def update(gradients: Any, state: Any, params: Any = None) -> Any:
        updates, state = adam.update(gradients, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def decayed(params: Any) -> Any:
    """Which parameters weight decay acts on: matrices, not the scales of norms nor biases."""

    def is_matrix(path: Any, leaf: Any) -> bool:
        names = [str(key.key) for key in path]
        return names[-1] != "bias" and not any("norm" in name for name in names[-2:])

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def clip(gradients: Any, limit: float | None) -> tuple[Any, jax.Array]:
    """(gradients scaled so that their global norm is at most `limit`, the norm before)."""
    # sum(a * a), not vdot: under the partitioner vdot gathers whole experts first.
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
    if limit is None:
        return gradients, norm
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * scale, gradients), norm


def state_shardings(transform: optax.GradientTransformation, params: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """Where the optimizer's state lives: moments like their parameters, counters everywhere."""
    abstract = jax.eval_shape(transform.init, params)
    return optax.tree.map_params(
        transform,
        lambda _, sharding: sharding,
        abstract,
        param_shardings,
        transform_non_params=lambda _: replicated(mesh),
    )
