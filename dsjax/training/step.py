"""The train step: one donated jit over plain trees, shared by every kind of training.

`make_train_step` is given a loss; `pretrain_step` gives it next-token prediction with MTP and balance loss.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.config import Config
from dsjax.model.routing import update_bias
from dsjax.model.transformer import with_copies, working_copies
from dsjax.numerics.recipe import recipe
from dsjax.sharding import AXES, BATCH, replicated
from dsjax.training import optimizer
from dsjax.training.objective import TOTALS, LossFn, Metrics, counted, language_model_loss
from dsjax.training.state import TrainState, build_network, state_shardings


def make_gradients(loss_fn: LossFn, config: Config, mesh: Mesh) -> Callable[..., tuple[Any, Metrics]]:
    """f(state, batch, num_microbatches, hyperparameters) -> (mean gradients, metrics); arguments as of the train step.

    Gradients, their sums over microbatches included, are cut like the weights: no device ever holds a whole one.
    """
    shardings = state_shardings(config, mesh).params
    how = recipe(config.precision, config.fp8.accumulation, mesh) if config.fp8.working_copy else None

    def one_microbatch(state, copies, batch, index, hyperparameters):
        def loss_of(params):
            return counted(loss_fn(with_copies(params, copies), state.router_bias, microbatch, hyperparameters))

        microbatch = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), batch)
        (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        # Said here, or the partitioner replicates most of them.
        return lax.with_sharding_constraint(gradients, shardings), metrics

    def make_copies(params):
        """Once a step, cut like their masters: all microbatches multiply the same bytes."""
        if how is None:
            return jax.tree.map(lambda _: None, params)
        copies = working_copies(params, how)
        return jax.tree.map(
            lambda sharding, copy: copy and (lax.with_sharding_constraint(copy[0], sharding), copy[1]),
            shardings,
            copies,
        )

    def gradients_of(state, batch, num_microbatches, hyperparameters):
        def accumulate(index, sums):
            return jax.tree.map(jnp.add, sums, one_microbatch(state, copies, batch, index, hyperparameters))

        copies = make_copies(state.params)
        if jax.tree.leaves(batch)[0].shape[0] == 1:
            sums = one_microbatch(state, copies, batch, 0, hyperparameters)
        else:
            shapes = jax.eval_shape(one_microbatch, state, copies, batch, 0, hyperparameters)
            nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            sums = lax.fori_loop(0, num_microbatches, accumulate, nothing)
        weight = sums[1].get("weight")
        count = num_microbatches if weight is None else jnp.maximum(weight, 1)
        mean = lambda a: a / count  # noqa: E731
        metrics = {name: value if name in TOTALS else mean(value) for name, value in sums[1].items()}
        return jax.tree.map(mean, sums[0]), metrics

    return gradients_of


def make_train_step(loss_fn: LossFn, config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """The compiled step: accumulate gradients over microbatches, clip, AdamW, move the routing bias.

    Returns:
      train_step(state, batch, num_microbatches, hyperparameters) -> (state, metrics). `state` is donated. Leaves
      of `batch` have a leading microbatch dimension, of which the first `num_microbatches` are used; that number
      is traced, so that a ramping batch compiles once. `hyperparameters`: learning_rate, what the loss asks for, such
      as mtp_loss_weight, and bias_update_speed, without which the routing biases stay as they are. With
      `config.divergence.skip_nonfinite` a step whose loss or gradient is not finite changes nothing but `state.step`,
      and `update_skipped` in its metrics is true. It is a jitted function: `.lower` shows what it compiles to.
    """
    adamw = optimizer.adamw(config.optimizer)
    shardings = state_shardings(config, mesh)
    gradients_of = make_gradients(loss_fn, config, mesh)

    def train_step(state, batch, num_microbatches, hyperparameters):
        gradients, metrics = gradients_of(state, batch, num_microbatches, hyperparameters)
        with jax.named_scope("optimizer"):
            gradients, metrics["grad_norm"] = optimizer.clip(gradients, config.optimizer.clip_norm)
            updates, opt_state = adamw.update(gradients, state.opt_state, state.params)
            rate = hyperparameters["learning_rate"]
            params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        bias, speed = state.router_bias, hyperparameters.get("bias_update_speed")
        if speed is not None:
            bias = move_biases(bias, metrics.get("expert_load"), speed)
        after = dataclasses.replace(state, params=params, router_bias=bias, opt_state=opt_state)
        if config.divergence.skip_nonfinite:
            is_finite = jnp.isfinite(metrics["grad_norm"]) & jnp.isfinite(metrics.get("loss", 0.0))
            after = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), after, state)
            metrics["update_skipped"] = ~is_finite
        return dataclasses.replace(after, step=state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def move_biases(router_bias: Any, load_LE: jax.Array | None, speed: jax.Array) -> Any:
    """Every layer's routing bias after a step; the rows of `load_LE` are the MoE layers in order, MTP's last."""
    leaves, tree = jax.tree.flatten(router_bias)  # in order of names: moe_layers [L, E], then mtp [E]
    moved, row = [], 0
    for bias in leaves:
        rows = 1 if bias.ndim == 1 else bias.shape[0]
        assert load_LE is not None  # a model with routing biases has routers that count
        load = load_LE[row : row + rows].reshape(bias.shape)
        moved.append(update_bias(bias, load, speed))
        row += rows
    return jax.tree.unflatten(tree, moved)


def pretrain_step(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """`make_train_step` for language modelling; batch: int32 tokens [microbatches, sequences, T + 1]."""
    return make_train_step(language_model_loss(build_network(config, mesh), config), config, mesh)


def evaluate_step(config: Config, mesh: Mesh) -> Callable[[TrainState, jax.Array], Metrics]:
    """f(state, rows [sequences, T + 1]) -> {"loss", "mtp_loss"}: means in nats per token, without gradients.

    Where rows hold samples, "weight" too: how many tokens of answers they are the mean of.
    """
    loss_fn = language_model_loss(build_network(config, mesh), config)

    @jax.jit
    def evaluate(params, router_bias, tokens):
        _, metrics = loss_fn(params, router_bias, tokens, {"mtp_loss_weight": jnp.float32(0)})
        return {name: metrics[name] for name in ("loss", "mtp_loss", "weight") if name in metrics}

    return lambda state, tokens: evaluate(state.params, state.router_bias, tokens)


def place_batch(rows: Callable[[range], np.ndarray], shape: Sequence[int], mesh: Mesh) -> jax.Array:
    """A global int32 batch of which each process loads only its own rows.

    Args:
      rows: a range of indices -> rows [n, T + 1]; index i stands for the i-th sequence of the batch.
      shape: [sequences, T + 1] or [microbatches, sequences, T + 1]; sequences are spread over the mesh.
      mesh: the mesh.
    """
    *lead, sequences, _ = shape
    spec = BATCH if not lead else PartitionSpec(None, AXES)

    def load(index: Any) -> np.ndarray:  # a slice for each dimension
        first, last, _ = index[len(lead)].indices(sequences)
        if not lead:
            return rows(range(first, last))
        return np.stack([rows(range(m * sequences + first, m * sequences + last)) for m in range(lead[0])])

    return jax.make_array_from_callback(tuple(shape), NamedSharding(mesh, spec), load)
