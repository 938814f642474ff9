"""RMSNorm, SwiGLU, embedding, RoPE and YaRN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import small
from flax import nnx

from dsjax.config import ModelConfig, RopeScaling
from dsjax.model.layers import (
    RMSNorm,
    SwiGLU,
    embed,
    rope_amplitude,
    rope_frequencies,
    rope_table,
    rotate,
    softmax_scale,
)
from dsjax.numerics.recipe import recipe

V3 = ModelConfig(qk_nope_head_dim=128, qk_rope_head_dim=64, rope_scaling=RopeScaling())


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_rms_norm_equals_its_formula_and_keeps_the_dtype():
    norm, x = RMSNorm(16, 1e-2), 0.1 * normal(2, 3, 16)
    norm.weight[...] = jnp.asarray(1 + normal(16, seed=1))
    expected = oracles.rms_norm(x.astype(np.float64), np.asarray(norm.weight[...]), 1e-2)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5)
    half = norm(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), expected, rtol=2e-2)


def test_swiglu_equals_its_formula():
    layer, x = SwiGLU(8, 12, 0.5, small.FP32, nnx.Rngs(0)), normal(2, 3, 8)
    gate, up, down = (np.asarray(p.weight[...]) for p in (layer.gate_proj, layer.up_proj, layer.down_proj))
    a = x @ gate
    np.testing.assert_allclose(layer(x), (a / (1 + np.exp(-a)) * (x @ up)) @ down, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_embedding_takes_rows_and_adds_gradients_up(sizes):
    mesh, table, tokens = small.mesh(*sizes), normal(10, 16), small.tokens(8, 5, vocab_size=10)
    x, pull = jax.jit(lambda t: jax.vjp(lambda t: embed(t, tokens, mesh, small.FP32), t))(table)
    dx = normal(8, 5, 16, seed=1)
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, dx)
    np.testing.assert_array_equal(x, table[tokens])
    np.testing.assert_allclose(pull(dx)[0], expected, rtol=1e-5, atol=1e-5)


def test_embedding_gradient_of_a_frequent_token_is_summed_in_fp32():
    """In BF16 a sum of ones would stop at 256."""
    table, tokens = normal(10, 16), jnp.zeros((8, 100), jnp.int32)
    _, pull = jax.vjp(lambda t: embed(t, tokens, small.mesh(2, 2, 2), recipe("bf16")), table)
    ones = jnp.ones((8, 100, 16), jnp.bfloat16)
    gradient = pull(ones)[0]
    assert gradient.dtype == jnp.float32
    # XLA:CPU sums in FP32 whatever it is told; other platforms do as they are told.
    sums = [line for line in str(jax.make_jaxpr(pull)(ones)).splitlines() if "scatter-add" in line]
    assert sums and not any("bf16" in line.partition("=")[0] for line in sums)
    np.testing.assert_array_equal(gradient[0], np.full(16, 800))


def test_rope_equals_a_complex_product_on_neighbours():
    config = dataclasses.replace(V3, qk_rope_head_dim=12, rope_scaling=None)
    x = normal(2, 7, 3, 12)
    frequencies = config.rope_theta ** (-2.0 * np.arange(6) / 12)
    expected = np.zeros_like(x)
    for b, t, n in np.ndindex(2, 7, 3):
        expected[b, t, n] = oracles.complex_rope(x[b, t, n].astype(np.float64), t, frequencies)
    np.testing.assert_allclose(rotate(x, rope_table(config, 7)), expected, atol=1e-5)


def test_rope_scores_depend_on_distance_only():
    config = dataclasses.replace(V3, rope_scaling=None)
    q, k = normal(64), normal(64, seed=1)
    repeat = lambda v: np.broadcast_to(v, (1, 40, 1, 64))  # noqa: E731
    table = rope_table(config, 40)
    scores = np.einsum("tn,sn->ts", rotate(repeat(q), table)[0, :, 0], rotate(repeat(k), table)[0, :, 0])
    for distance in (0, 3, 17):
        diagonal = np.diagonal(scores, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert abs(scores[20, 3] - scores[3, 20]) > 1e-2


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    """V3: pairs up to 10 are untouched, those from 23 on are 40 times slower, linear between."""
    plain = rope_frequencies(dataclasses.replace(V3, rope_scaling=None))
    ratio = rope_frequencies(V3) / plain
    np.testing.assert_allclose(plain, 10000.0 ** (-np.arange(32) / 32), rtol=1e-6)
    np.testing.assert_allclose(ratio[:11], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=1e-6)
    ramp = (np.arange(11, 23) - 10) / 13
    np.testing.assert_allclose(ratio[11:23], ramp / 40 + 1 - ramp, rtol=1e-5)


def test_yarn_with_equal_betas_is_a_step():
    """Kimi-K2: beta_fast = beta_slow = 1, theta 50,000; the step lies between the pairs 19 and 20."""
    scaling = RopeScaling(factor=32.0, beta_fast=1.0, beta_slow=1.0)
    config = dataclasses.replace(V3, rope_theta=50000.0, rope_scaling=scaling)
    ratio = rope_frequencies(config) / rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    np.testing.assert_allclose(ratio[:20], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[20:], 1 / 32, rtol=1e-6)


@pytest.mark.parametrize(
    "scaling, scale",
    [
        (None, 0.0721688),
        (RopeScaling(), 0.135234),
        (RopeScaling(mscale=0.707, mscale_all_dim=0.707), 0.0721688 * 1.58963),
        (RopeScaling(factor=32.0), 0.0721688 * 1.81326),
    ],
    ids=["plain", "V3", "V2", "K2"],
)
def test_softmax_scale_has_the_squared_temperature(scaling, scale):
    assert softmax_scale(dataclasses.replace(V3, rope_scaling=scaling)) == pytest.approx(scale, rel=1e-5)


def test_rope_amplitude_is_one_unless_the_mscales_differ():
    assert rope_amplitude(None) == rope_amplitude(RopeScaling(mscale=0.707, mscale_all_dim=0.707)) == 1
    unequal = RopeScaling(mscale=1.0, mscale_all_dim=0.707)
    assert rope_amplitude(unequal) == pytest.approx(1.36889 / 1.26080, rel=1e-5)
    config = dataclasses.replace(V3, rope_scaling=unequal)
    np.testing.assert_allclose(rope_table(config, 1)[0, 0], rope_amplitude(unequal), rtol=1e-6)
