"""The native path through linear equals the emulation, on one device and more; the kernels are interpreted."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from dsjax.numerics import kernels
from dsjax.numerics.contraction import Working, working_copy
from dsjax.numerics.grouped_matmul import Groups
from dsjax.numerics.linear import linear, swiglu_linear
from dsjax.numerics.recipe import recipe

D, F, EXPERTS = 200, 136, 3


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    for name in ("scaled_rows_times", "scaled_weight_gradient"):
        monkeypatch.setattr(kernels, name, partial(getattr(kernels, name), interpret=True))


def recipes(on, name="fp8_deepseek"):
    """(emulated, native): what a GPU other than Hopper's would run."""
    emulated = recipe(name, mesh=on)
    assert emulated.native is None
    return emulated, dataclasses.replace(emulated, native="triton")


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_same_products(function, how, *arrays):
    """Values and gradients of `function(recipe, *arrays)` agree; sums are added in another order."""
    results = []
    for one in how:

        @jax.jit
        def run(*arrays, one=one):
            y, pull = jax.vjp(partial(function, one), *arrays)
            return y, pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))

        results.append(run(*arrays))
    small.assert_trees_close(results[1], jax.tree.map(np.asarray, results[0]), 2**-7)
    weight_gradients = [result[1][-1] for result in results]
    small.assert_trees_close(*weight_gradients[::-1], 1e-5)


@pytest.mark.parametrize("devices, length, name", [(1, 150, "fp8_deepseek"), (4, 61, "fp8_deepseek_ue8m0")])
def test_dense_products_equal_the_emulation(devices, length, name):
    x, w = numbers(4, length, D).astype(jnp.bfloat16), numbers(D, F, seed=1)
    assert_same_products(lambda how, x, w: linear(x, w, how), recipes(small.mesh(devices), name), x, w)


@pytest.mark.parametrize("sizes, block", [((128, 0, 256), 128), ((16, 32, 8), 8)], ids=str)
def test_grouped_products_equal_the_emulation(sizes, block):
    rows, used = 3 * 128 if block == 128 else 64, sum(sizes)
    x = numbers(rows, D)
    x[used:] = 0
    groups = Groups(jnp.array(sizes, jnp.int32), block)
    product = lambda how, x, w: linear(x, w, how.after_dispatch, groups)  # noqa: E731
    assert_same_products(product, recipes(small.mesh()), x.astype(jnp.bfloat16), numbers(EXPERTS, D, F, seed=1))


def test_swiglu_equals_the_emulation():
    gate, up = (numbers(2, 130, D, seed=seed).astype(jnp.bfloat16) for seed in (0, 1))
    product = lambda how, gate, up, w: swiglu_linear(gate, up, w, how)  # noqa: E731
    assert_same_products(product, recipes(small.mesh(2)), gate, up, numbers(D, F, seed=2))


def test_working_copies_are_multiplied_as_they_are():
    on, x, w = small.mesh(2), numbers(2, 64, D).astype(jnp.bfloat16), numbers(D, F, seed=1)
    for how in recipes(on):
        copied = linear(x, Working(jnp.full_like(w, jnp.nan), *working_copy(jnp.asarray(w), how)), how)
        np.testing.assert_array_equal(copied, linear(x, w, how))
