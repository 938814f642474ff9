"""Rows sorted by expert times one weight per expert: both forms equal a loop over the groups."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import FP32, assert_trees_close

from dsjax.numerics import grouped_kernels
from dsjax.numerics import grouped_matmul as forms
from dsjax.numerics.grouped_matmul import Groups
from dsjax.numerics.linear import linear
from dsjax.numerics.recipe import recipe
from dsjax.planning.buffers import ROW_BLOCK, row_block

BLOCK, ROWS, GROUPS, D, F = 8, 64, 4, 12, 20
SIZES = {
    "even": [16, 16, 16, 16],
    "empty groups": [0, 40, 0, 24],
    "first and last empty": [0, 16, 16, 0],
    "one group with everything": [0, 0, 64, 0],
    "fewer rows than the buffer": [8, 0, 16, 8],
    "nothing at all": [0, 0, 0, 0],
}


def operands():
    rng = np.random.default_rng(0)
    x, w, dy = (rng.standard_normal(s).astype(np.float32) for s in ((ROWS, D), (GROUPS, D, F), (ROWS, F)))
    return x, w, dy


def by_loop(x, w, dy, sizes):
    """(y, dx, dw), group by group in FP64."""
    y, dx, dw = np.zeros((ROWS, F)), np.zeros((ROWS, D)), np.zeros((GROUPS, D, F))
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
        start += size
    return y, dx, dw


@jax.jit
def platform_form(x, w, dy, sizes):
    y, pull = jax.vjp(lambda x, w: linear(x, w, FP32, Groups(sizes, BLOCK)), x, w)
    return y, *pull(dy)


@jax.jit
def ragged_form(x, w, dy, sizes):
    times = partial(forms._ragged_times_weights, precision=FP32.precision, dtype=jnp.float32)
    y, dx = times(x, w, sizes, transposed=False), times(dy, w, sizes, transposed=True)
    return y, dx, forms._ragged_weight_gradient(x, dy, sizes, precision=FP32.precision)


@pytest.mark.parametrize("form", [platform_form, ragged_form], ids=["cpu", "ragged"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_both_gradients_equal_a_loop(form, sizes):
    x, w, dy = operands()
    expected = by_loop(x, w, dy, sizes)
    assert_trees_close(form(x, w, dy, jnp.array(sizes, jnp.int32)), expected, 2e-6)


@pytest.mark.parametrize("sizes", [[256, 0, 128, 128], [0, 640, 0, 0], [128, 128, 0, 0]], ids=str)
def test_the_kernel_of_tpus_gives_the_weight_gradient(sizes):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((640, n)), jnp.bfloat16) for n in (200, 130))
    groups = Groups(jnp.array(sizes, jnp.int32), 128)
    x = jnp.where(jnp.arange(640)[:, None] < sum(sizes), x, 0)
    expected = forms.weight_gradient(x, dy, groups, recipe("bf16").precision)
    assert_trees_close(forms.megablox_weight_gradient(x, dy, groups.sizes_E, interpret=True), expected, 1e-5)


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("blocks", [[1, 0, 3, 2], [0, 7, 0, 0], [2, 2, 0, 1], [0, 0, 0, 0]], ids=str)
def test_the_kernels_of_gpus_equal_the_form_of_cpus(blocks, block):
    rng = np.random.default_rng(0)
    rows, width, columns = 7 * block, 48, 144
    x, dy, w = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((rows, width), (rows, columns), (4, width, columns))
    )
    groups = Groups(jnp.array(blocks, jnp.int32) * block, block)
    owners, used = forms.block_owners(groups, 7)
    times = partial(forms.rows_times_weights, groups=groups, precision=recipe("bf16").precision, dtype=jnp.float32)
    for rows_of, transposed in ((x, False), (dy, True)):
        ours = grouped_kernels.rows_times(rows_of, w, owners, used, jnp.float32, transposed=transposed, interpret=True)
        assert_trees_close(ours, times(rows_of, w, transposed=transposed), 1e-5)
    expected = forms.weight_gradient(x, dy, groups, recipe("bf16").precision)
    assert_trees_close(grouped_kernels.weight_gradient(x, dy, groups.sizes_E, block, interpret=True), expected, 1e-5)


@pytest.mark.parametrize("width, kernels", [(64, 3), (40, 0)], ids=["whole tiles", "no whole tiles"])
def test_gpus_multiply_bf16_by_kernels(width, kernels):
    x, dy, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((256, width), (256, 32), (4, width, 32)))

    def run(x, dy, w, sizes):
        groups, precision = Groups(sizes, 32), recipe("bf16").precision
        times = partial(
            forms.rows_times_weights, groups=groups, precision=precision, dtype=jnp.bfloat16, platform="gpu"
        )
        gradient = forms.weight_gradient(x, dy, groups, precision, "gpu")
        return times(x, w, transposed=False), times(dy, w, transposed=True), gradient

    traced = jax.jit(run).trace(x, dy, w, jax.ShapeDtypeStruct((4,), jnp.int32))
    assert str(traced.jaxpr).count("pallas_call[") == kernels


def test_rows_past_the_groups_are_zero():
    x, w, dy = operands()
    y, dx, _ = platform_form(x, w, dy, jnp.array([8, 0, 16, 8], jnp.int32))
    assert np.all(y[32:] == 0) and np.all(dx[32:] == 0)
    assert np.all(np.any(y[:32] != 0, axis=1))


def test_bf16_gives_bf16_rows_and_fp32_weight_gradients():
    x, w, dy = operands()
    how, sizes = recipe("bf16"), jnp.array([16, 16, 16, 16], jnp.int32)
    half = jnp.asarray(x, jnp.bfloat16)
    y, pull = jax.vjp(lambda x, w: linear(x, w, how, Groups(sizes, BLOCK)), half, jnp.asarray(w))
    dx, dw = pull(jnp.asarray(dy, jnp.bfloat16))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    rounded = [np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, w, dy)]
    for ours, expected, tolerance in zip((y, dx, dw), by_loop(*rounded, sizes), (2**-8, 2**-8, 1e-6), strict=True):
        assert_trees_close(ours, expected, tolerance)


@pytest.mark.parametrize("rows", [1, 100, 1_000, 10_000, 1_000_000])
@pytest.mark.parametrize("groups", [1, 4, 64, 256])
def test_row_block_is_a_power_of_two_that_wastes_little(rows, groups):
    block = row_block(rows, groups)
    assert block in (8, 16, 32, 64, 128) and block <= ROW_BLOCK
    assert block == 8 or block * groups < 2 * rows
    assert block == ROW_BLOCK or block * groups >= rows
