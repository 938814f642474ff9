"""A layer of routed experts, its operands and its oracle: every expert on every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import small
from small import assert_trees_close
from weak_scaling import QUICKLY

from dsjax.model.experts import ExpertWeights
from dsjax.model.moe import routed_experts

# Sequences of odd length. With three experts a token and at most eight ranks both branches of the buffer are taken.
CONFIG = dataclasses.replace(small.MODEL, num_experts_per_tok=3, n_group=1, topk_group=1)
SEQUENCES, LENGTH = 8, 7
ASSIGNMENTS = SEQUENCES * LENGTH * CONFIG.num_experts_per_tok


def operands(config=CONFIG):
    rng = np.random.default_rng(0)
    d, e, f = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    draw = lambda *shape, scale=0.3: scale * rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    weights = ExpertWeights(draw(e, d, f), draw(e, d, f), draw(e, f, d))
    return draw(SEQUENCES, LENGTH, d, scale=1.0), draw(d, e), weights, draw(SEQUENCES, LENGTH, d, scale=1.0)


def layer(config, execution):
    """bias -> (loss and statistics, every gradient) of routed_experts."""
    x, router, weights, target = operands(config)

    def loss(operands, bias):
        x, router, weights = operands
        y, stats = routed_experts(x, router, bias, weights, config, execution)
        return jnp.sum(y * target) + stats.balance_loss, stats

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICKLY)
    return lambda bias: compiled((x, router, weights), bias)


def statistics(config, execution):
    """bias -> what routed_experts tells of a batch, without gradients."""
    x, router, weights, _ = operands(config)
    run = lambda bias: routed_experts(x, router, bias, weights, config, execution)[1]  # noqa: E731
    return jax.jit(run, compiler_options=QUICKLY)


def oracle(config):
    x, router, weights, target = operands(config)

    def loss(operands, bias):
        x, router, weights = operands
        y, balance, load = oracles.dense_experts(x, router, bias, *weights, config)
        return jnp.sum(y * target) + balance, load

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda bias: compiled((x, router, weights), bias)


def biases(config=CONFIG) -> dict[str, np.ndarray]:
    """By the routing they lead to."""
    experts = np.arange(config.n_routed_experts)
    return {
        "by scores": np.zeros(len(experts), np.float32),
        "every token to the same": np.where(experts < config.num_experts_per_tok, 10, 0).astype(np.float32),
        "every token to the last": np.where(experts == len(experts) - 1, 10, 0).astype(np.float32),
    }


def check(result, expected) -> None:
    (loss, stats), gradients = result
    (true_loss, load), true_gradients = expected
    assert_trees_close((loss, gradients), (true_loss, true_gradients), 1e-5)
    np.testing.assert_array_equal(stats.load_E, load)
    assert stats.dropped == 0
