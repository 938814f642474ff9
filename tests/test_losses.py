"""Chunked cross-entropy equals log_softmax over all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax import lax
from small import assert_trees_close

from dsjax.model.losses import cross_entropy
from dsjax.numerics.recipe import recipe

B, T, D, V = 8, 7, 16, 30


def operands():
    rng = np.random.default_rng(0)
    x, head = rng.standard_normal((B, T, D)).astype(np.float32), rng.standard_normal((D, V)).astype(np.float32)
    weights = rng.random((B, T)).astype(np.float32) / (B * T)
    weights[2:4] = 0
    return x, head, rng.integers(V, size=(B, T), dtype=np.int32), weights


def plain(x, head, labels, weights):
    log_p = jax.nn.log_softmax(jnp.matmul(x, head, precision=lax.Precision.HIGHEST))
    return -jnp.sum(weights * jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0])


# 56 tokens on one device, 7 on each of eight: chunks that divide, that do not, of one token, larger than everything.
@pytest.mark.parametrize("sizes, chunk", [((1, 1, 1), c) for c in (1, 8, 9, 100)] + [((2, 2, 2), 3)], ids=str)
def test_value_and_gradients_equal_log_softmax(sizes, chunk):
    x, head, labels, weights = operands()
    mesh = small.mesh(*sizes)
    ours = jax.jit(
        jax.value_and_grad(lambda x, h: 3 * cross_entropy(x, h, labels, weights, mesh, small.FP32, chunk), (0, 1))
    )
    expected = jax.value_and_grad(lambda x, h: 3 * plain(x, h, labels, weights), (0, 1))
    assert_trees_close(ours(x, head), expected(x, head), 2e-6)


def test_tokens_of_weight_zero_have_no_gradient():
    x, head, labels, weights = operands()
    gradient = jax.grad(lambda x: cross_entropy(x, head, labels, weights, small.mesh(), small.FP32, 9))(x)
    assert np.all(gradient[2:4] == 0) and np.all(np.any(gradient[4:] != 0, axis=-1))


def test_huge_logits_stay_finite():
    x, head, labels, weights = operands()
    value = cross_entropy(1e4 * x, head, labels, weights, small.mesh(), small.FP32, 9)
    assert np.isfinite(value) and value > 1e3


def test_bf16_differs_by_its_rounding_only_and_gives_an_fp32_head_gradient():
    x, head, labels, weights = operands()
    half = jnp.asarray(x, jnp.bfloat16)
    loss = lambda x, h: cross_entropy(x, h, labels, weights, small.mesh(), recipe("bf16"), 9)  # noqa: E731
    value, (dx, dhead) = jax.value_and_grad(loss, (0, 1))(half, head)
    assert (value.dtype, dx.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    expected = jax.value_and_grad(lambda x, h: plain(x, h, labels, weights), (0, 1))(x, head)
    assert_trees_close((value, (dx, dhead)), expected, 3e-2)


def test_logits_of_all_tokens_never_exist():
    x, head, labels, weights = operands()
    loss = lambda x, h: cross_entropy(x, h, labels, weights, small.mesh(), small.FP32, 8)  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, head))
    assert f"f32[8,{V}]" in text
    assert f"[{B * T},{V}]" not in text and f"[{B},{T},{V}]" not in text
