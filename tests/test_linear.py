"""The product that every Linear is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import FP32, assert_trees_close

from dsjax.config import ConfigError
from dsjax.numerics.linear import linear
from dsjax.numerics.recipe import recipe

BF16 = recipe("bf16")


def operands(dtype=np.float32):
    rng = np.random.default_rng(0)
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 5, 24), (24, 16), (2, 5, 16)))
    return jnp.asarray(x, dtype), jnp.asarray(w), jnp.asarray(dy, dtype)


@pytest.mark.parametrize("lead", [(2, 5), (10,), (1, 2, 5)])
def test_values_and_gradients_equal_a_plain_product(lead):
    x, w, dy = operands()
    x, dy = x.reshape(*lead, -1), dy.reshape(*lead, -1)
    y, pull = jax.vjp(lambda x, w: linear(x, w, FP32), x, w)
    plain, plain_pull = jax.vjp(jnp.matmul, x, w)
    assert_trees_close((y, pull(dy)), (plain, plain_pull(dy)), 1e-6)


def test_bf16_computes_in_bf16_and_gives_fp32_weight_gradients():
    x, w, dy = operands(jnp.bfloat16)
    y, pull = jax.vjp(lambda x, w: linear(x, w, BF16), x, w)
    dx, dw = pull(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    wide_x, rounded_w, wide_dy = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, w, dy))
    expected_dw = np.einsum("btd,btf->df", wide_x, wide_dy)
    # The operands are rounded to BF16, the sums are not.
    assert_trees_close(dw, expected_dw, 1e-6)
    assert np.any(np.asarray(dw) != np.asarray(dw.astype(jnp.bfloat16), np.float32))
    assert_trees_close(y, np.asarray(jnp.asarray(wide_x @ rounded_w, jnp.bfloat16), np.float64), 2**-8)


def test_operands_are_multiplied_in_the_compute_dtype():
    x, w, _ = operands()
    for how, name in ((FP32, "f32"), (BF16, "bf16")):
        text = str(jax.make_jaxpr(lambda x, w, how=how: linear(x, w, how))(x, w))
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert len(products) == 1
        assert f"{name}[24,16]" in text


def test_unknown_precision_names_the_known_ones():
    with pytest.raises(ConfigError, match="unknown precision 'fp16'; known are fp32, bf16, fp8_deepseek"):
        recipe("fp16")
