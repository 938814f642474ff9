"""AdamW with BF16 moments, decay of matrices only, global clip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import small
from small import assert_trees_close

from dsjax.config import OptimizerConfig
from dsjax.model.transformer import network
from dsjax.training import optimizer

CONFIG = OptimizerConfig(moment_dtype="float32", b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3)


def tree(seed: int):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {"mlp": {"up_proj": draw(3, 4, 5)}, "norm": {"weight": draw(4)}}


def after(config: OptimizerConfig, gradients: list, rate: float = 0.1):
    """(parameters, optimizer state) after one step for each gradient."""
    transform, params = optimizer.adamw(config), tree(0)
    state = transform.init(params)
    for gradient in gradients:
        updates, state = transform.update(gradient, state, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return params, state


def expected(config: OptimizerConfig, gradients: list, rate: float = 0.1):
    def one(path, p, *of_steps):
        decay = 0.0 if "norm" in jax.tree_util.keystr(path) else config.weight_decay
        return oracles.adamw(p, of_steps, rate=rate, b1=config.b1, b2=config.b2, eps=config.eps, decay=decay)

    return jax.tree_util.tree_map_with_path(one, tree(0), *gradients)


def test_steps_equal_plain_adamw():
    gradients = [tree(seed) for seed in range(1, 6)]
    assert_trees_close(after(CONFIG, gradients)[0], expected(CONFIG, gradients), 1e-5)


def test_moments_are_kept_in_bf16_and_stay_near_fp32_ones():
    gradients = [tree(seed) for seed in range(1, 6)]
    config = dataclasses.replace(CONFIG, moment_dtype="bfloat16")
    params, state = after(config, gradients)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.bfloat16)} and len(moments) == 4
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert_trees_close(params, expected(CONFIG, gradients), 1e-2)


def test_first_update_is_computed_in_fp32():
    gradient = tree(1)
    config = dataclasses.replace(CONFIG, moment_dtype="bfloat16")
    assert_trees_close(after(config, [gradient])[0], expected(CONFIG, [gradient]), 1e-5)


def test_decay_acts_on_every_matrix_and_on_no_norm():
    shapes = network(small.MODEL, small.execution()).shapes
    decayed = jax.tree_util.tree_leaves_with_path(optimizer.decayed(shapes))
    names = {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in decayed}
    assert {name for name, value in names.items() if not value} == {name for name in names if "norm" in name}
    for name in (
        "embed_tokens",
        "lm_head",
        "moe_layers.mlp.experts.down_proj",
        "moe_layers.mlp.gate.weight",
        "dense_layers.self_attn.kv_b_proj.weight",
        "mtp.eh_proj.weight",
    ):
        assert names[name]
    for name in ("norm.weight", "moe_layers.self_attn.kv_a_layernorm.weight", "mtp.enorm.weight"):
        assert not names[name]


def test_clip_scales_to_the_limit_and_tells_the_norm_before():
    gradients = tree(1)
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in jax.tree.leaves(gradients)))
    for limit in (0.5, norm + 1, None):
        clipped, told = optimizer.clip(gradients, limit)
        factor = limit / norm if limit == 0.5 else 1
        assert float(told) == pytest.approx(norm, rel=1e-5)
        assert_trees_close(clipped, jax.tree.map(lambda g, factor=factor: g * factor, gradients), 1e-6)


def test_clip_of_nothing_is_nothing():
    zeros = jax.tree.map(np.zeros_like, tree(1))
    clipped, norm = optimizer.clip(zeros, 1.0)
    assert norm == 0 and all(np.all(g == 0) for g in jax.tree.leaves(clipped))
