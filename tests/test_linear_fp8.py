"""The FP8 product of every Linear and expert, and its gradients: what the plain statement of the report gives."""

import dataclasses
from functools import partial
from itertools import combinations

import fp8_statement as statement
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fp8_statement import STATEMENTS
from jax.sharding import NamedSharding, PartitionSpec
from small import mesh

from dsjax.numerics.grouped_matmul import Groups
from dsjax.numerics.linear import linear, swiglu_linear
from dsjax.numerics.recipe import recipe

BF16 = np.dtype(ml_dtypes.bfloat16)
EVERY_RECIPE = pytest.mark.parametrize("name", STATEMENTS)


@partial(jax.jit, static_argnames=("how", "block"))
def products(x, w, dy, how, sizes=None, block=None):
    """(y, dx, dw)."""
    groups = None if sizes is None else Groups(sizes, block)
    y, pull = jax.vjp(lambda x, w: linear(x, w, how, groups), x, w)
    return y, *pull(dy)


def operands(x_shape, w_shape, seed=0):
    """(x, w, dy): activations and their gradients in BF16, a weight in FP32.

    Numbers differ in size from token to token and channel to channel by up to 10**4, in the two operands of a product
    inversely: so every term counts, and in a tile some are too small for E4M3.
    """
    rng = np.random.default_rng(seed)
    dy_shape = (*x_shape[:-1], w_shape[-1])
    token, channel, width = (10.0 ** rng.uniform(-2, 2, shape) for shape in (x_shape[:-1], w_shape[-2], w_shape[-1]))
    x = rng.standard_normal(x_shape) * np.expand_dims(token, -1) * channel
    w = rng.standard_normal(w_shape) / channel[:, None] * width
    dy = rng.standard_normal(dy_shape) / np.expand_dims(token, -1) / width
    return x.astype(BF16), w.astype(np.float32), dy.astype(BF16)


def assert_as_stated(ours, stated, arrays):
    """`ours` is what the function `stated` gives: y and dx rounded to BF16, dw in FP32, all as exact as FP32 sums."""
    expected, sizes = stated(*arrays), stated(*map(np.abs, arrays))  # the sums, and those of their terms' sizes
    assert [a.dtype for a in ours] == [BF16, BF16, np.float32]
    for mine, sums, size, step in zip(ours, expected, sizes, (2**-8, 2**-8, 0), strict=True):
        mine = np.asarray(mine, np.float64)
        assert np.all(np.abs(mine - sums) <= 2e-6 * size + step * np.abs(sums))
        assert step == 0 or np.mean(mine == sums.astype(BF16).astype(np.float64)) > 0.98


# --- dense ---

SHAPES = {  # of x and w
    "whole tiles": ((1, 128, 128), (128, 128)),
    "edges everywhere": ((2, 150, 200), (200, 140)),
    "sequences shorter than a tile": ((3, 40, 300), (300, 20)),
    "one token": ((2, 1, 70), (70, 33)),
    "one channel": ((2, 5, 1), (1, 1)),
}


@EVERY_RECIPE
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_values_and_both_gradients_are_as_stated(name, shapes):
    x, w, dy = operands(*shapes)
    stated = partial(statement.linear, how=STATEMENTS[name])
    assert_as_stated(products(x, w, dy, recipe(name)), stated, (x, w, dy))


def test_every_recipe_gives_numbers_of_its_own():
    # Else one could stand for another, and no other test would know.
    arrays = operands(*SHAPES["edges everywhere"])
    sizes = statement.linear(*map(np.abs, arrays), STATEMENTS["fp8_deepseek"])
    results = {name: products(*arrays, recipe(name)) for name in ("bf16", *STATEMENTS)}
    for name, other in combinations(results, 2):
        y, dx, dw = (
            np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)) / size)
            for a, b, size in zip(results[name], results[other], sizes, strict=True)
        )
        same_forward = {name, other} == {"fp8_deepseek", "fp8_gradient_blocks"}
        assert (y == 0) if same_forward else (y > 1e-3), (name, other)
        assert dx > 1e-3 and dw > 1e-3, (name, other)


def test_the_weight_gradient_is_of_the_input_that_was_multiplied():
    # Not of x as it came, which is no longer there.
    x, w, dy = operands(*SHAPES["edges everywhere"])
    dw = products(x, w, dy, recipe("fp8_deepseek"))[2]
    of_original = statement.weight_gradient(x, dy, STATEMENTS["fp8_deepseek"])
    assert np.max(np.abs(dw - of_original)) > 1e-3 * np.max(np.abs(dw))


@pytest.mark.parametrize("name", ["fp8_deepseek", "fp8_gradient_blocks"])
def test_leading_dimensions_are_sequences(name):
    x, w, dy = operands((6, 20, 130), (130, 24))
    flat = products(x, w, dy, recipe(name))
    deep = products(x.reshape(2, 3, 20, 130), w, dy.reshape(2, 3, 20, 24), recipe(name))
    for a, b in zip(flat, deep, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32).reshape(a.shape))


# --- exact ---


def small_integers(shape, seed):
    """Up to 7, times powers of two that change every 32 rows and columns. Every tile's largest number is 7 times one.

    So whatever shares a scale, the scale is a power of two and every number one of E4M3.
    """
    rng = np.random.default_rng(seed)
    x = rng.integers(-7, 8, shape).astype(np.float64)
    x[..., ::16] = rng.choice([-7, 7], x[..., ::16].shape)
    x[..., ::16, :] = rng.choice([-7, 7], x[..., ::16, :].shape)
    for dim in (-1, -2):
        powers = 2.0 ** rng.integers(-1, 2, -(-shape[dim] // 32))
        x *= np.expand_dims(np.repeat(powers, 32)[: shape[dim]], -2 if dim == -1 else -1)
    return x


@EVERY_RECIPE
def test_products_are_exact_where_quantising_is(name):
    x, w, dy = (small_integers(shape, seed) for seed, shape in enumerate([(2, 150, 200), (200, 140), (2, 150, 140)]))
    y, dx, dw = products(x.astype(BF16), w.astype(np.float32), dy.astype(BF16), recipe(name))
    np.testing.assert_array_equal(np.asarray(y), (x @ w).astype(BF16))
    np.testing.assert_array_equal(np.asarray(dx), (dy @ w.T).astype(BF16))
    np.testing.assert_array_equal(dw, np.einsum("btd,btf->df", x, dy).astype(np.float32))


@EVERY_RECIPE
def test_grouped_products_are_exact_where_quantising_is(name):
    sizes = [32, 0, 96]
    x, w, dy = (small_integers(shape, seed) for seed, shape in enumerate([(128, 200), (3, 200, 40), (128, 40)]))
    arrays = x.astype(BF16), w.astype(np.float32), dy.astype(BF16)
    y, dx, dw = products(*arrays, recipe(name), jnp.array(sizes), 32)
    owner = np.repeat(np.arange(3), sizes)
    np.testing.assert_array_equal(np.asarray(y), np.einsum("cd,cdf->cf", x, w[owner]).astype(BF16))
    np.testing.assert_array_equal(np.asarray(dx), np.einsum("cf,cdf->cd", dy, w[owner]).astype(BF16))
    for e in range(3):
        np.testing.assert_array_equal(dw[e], x[owner == e].T @ dy[owner == e])


# --- grouped ---

LAYOUTS = {  # (rows of each group, block, rows of the buffer)
    "small blocks": ([24, 0, 64, 40], 8, 144),
    "blocks of half a tile": ([64, 128, 0, 192], 64, 384),
    "whole tiles": ([128, 256, 0, 128], 128, 512),
    "nothing at all": ([0, 0, 0, 0], 8, 16),
}


@EVERY_RECIPE
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_grouped_values_and_gradients_are_as_stated(name, layout):
    sizes, block, rows = layout
    x, w, dy = operands((rows, 140), (4, 140, 36))
    stated = partial(statement.grouped_linear, sizes_E=sizes, block=block, how=STATEMENTS[name])
    ours = products(x, w, dy, recipe(name), jnp.array(sizes, jnp.int32), block)
    assert_as_stated(ours, stated, (x, w, dy))
    assert all(np.all(np.asarray(a, np.float32)[sum(sizes) :] == 0) for a in ours[:2])


# --- what travels ---


@pytest.mark.parametrize("grouped", [False, True], ids=["dense", "grouped"])
def test_what_travels_has_powers_of_two_for_scales(grouped):
    tiles = statement.Tile(1, 128, "ue8m0")
    for how, tiled in (
        (recipe("fp8_deepseek").after_dispatch, STATEMENTS["fp8_deepseek"]._replace(activation=tiles)),
        (recipe("fp8_deepseek").before_combine, STATEMENTS["fp8_deepseek"]._replace(gradient=tiles)),
    ):
        if grouped:
            x, w, dy = operands((64, 140), (2, 140, 36))
            ours = products(x, w, dy, how, jnp.array([24, 40], jnp.int32), 8)
            stated = partial(statement.grouped_linear, sizes_E=[24, 40], block=8, how=tiled)
        else:
            x, w, dy = operands((2, 150, 140), (140, 36))
            ours, stated = products(x, w, dy, how), partial(statement.linear, how=tiled)
        assert_as_stated(ours, stated, (x, w, dy))


# --- the input of a down projection ---


def swiglu(gate, up):
    return jax.nn.silu(gate) * up


@EVERY_RECIPE
def test_swiglu_is_computed_again_from_its_inputs_in_e4m3(name):
    gate, w, dy = (a.astype(np.float32) for a in operands((2, 150, 140), (140, 36)))
    up = operands((2, 150, 140), (1, 1), seed=1)[0].astype(np.float32)
    how, stated = dataclasses.replace(recipe(name), compute_dtype="float32"), STATEMENTS[name]

    @jax.jit
    def ours(gate, up, w, dy):
        y, pull = jax.vjp(lambda gate, up, w: swiglu_linear(gate, up, w, how), gate, up, w)
        return y, *pull(dy)

    # Forward: the product of the originals. Backward: everything from what was kept of them.
    y, dhidden, _ = statement.linear(np.asarray(swiglu(gate, up)), w, dy, stated)
    kept = [statement.rounded(a, stated.activation, contracted=2) for a in (gate, up)]
    hidden, pull = jax.vjp(swiglu, *map(jnp.asarray, kept))
    dw = statement.weight_gradient(np.asarray(hidden), dy, stated)
    expected = (y, *pull(jnp.asarray(dhidden, jnp.float32)), dw)
    for mine, theirs in zip(ours(gate, up, w, dy), expected, strict=True):
        # Two programs may give exp another last bit, and E4M3 another number: rarely.
        assert relative_error(mine, theirs) < 1e-4
    of_originals = statement.weight_gradient(np.asarray(swiglu(gate, up)), dy, stated)
    assert relative_error(of_originals, dw) > 1e-2


def relative_error(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


# --- the rest of the contract ---


@EVERY_RECIPE
@pytest.mark.parametrize("operand", [0, 1, 2], ids=["x", "w", "dy"])
def test_numbers_that_are_not_finite_reach_the_results(name, operand):
    arrays = operands((2, 150, 200), (200, 140))
    where = (3, 5) if operand == 1 else (0, 3, 5)
    arrays[operand][where] = np.inf
    y, dx, dw = (np.asarray(a, np.float32) for a in products(*arrays, recipe(name)))
    spoiled = {0: (y[0, 3], dw[5]), 1: (y[0, :, 5], dx[0, :, 3]), 2: (dx[0, 3], dw[:, 5])}[operand]
    assert all(np.all(np.isnan(a)) for a in spoiled)
    if name != "fp8_tensorwise":  # tiles away, nothing is spoiled
        untouched = {0: (y[1], dx, dw[128:]), 1: (y[..., 128:], dx[..., 128:], dw), 2: (y, dx[1], dw[:, 128:])}[operand]
        assert all(np.all(np.isfinite(a)) for a in untouched)


@pytest.mark.parametrize(
    "name, on, w_spec",
    [("fp8_deepseek", "data", PartitionSpec()), ("fp8_deepseek", "fsdp", PartitionSpec(None, "fsdp"))]
    + [(name, "fsdp", PartitionSpec("fsdp")) for name in STATEMENTS],
    ids=str,
)
def test_eight_devices_give_what_one_gives(name, on, w_spec):
    # Blocks of the weight and one scale for all cross from device to device.
    x, w, dy = operands((8, 40, 200), (200, 144))
    devices = mesh(**{on: 8})
    specs = (PartitionSpec(on), w_spec, PartitionSpec(on))
    spread = (jax.device_put(a, NamedSharding(devices, spec)) for a, spec in zip((x, w, dy), specs, strict=True))
    assert_as_stated(products(*spread, recipe(name)), partial(statement.linear, how=STATEMENTS[name]), (x, w, dy))


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_without_fp8_nothing_is_quantised(name):
    def program(name):
        how = recipe(name)
        x, w, dy = (np.zeros(shape, how.dtype) for shape in ((2, 40, 64), (64, 32), (2, 40, 32)))
        return str(jax.make_jaxpr(lambda *arrays: products(*arrays, how))(x, w, dy))

    traces = ("f8_e4m3", "reduce_max", "reduce_precision", "div", "abs")
    assert program(name).count("dot_general") == 3
    assert not any(trace in program(name) for trace in traces)
    assert all(trace in program("fp8_deepseek") for trace in traces)


@EVERY_RECIPE
def test_the_input_is_kept_in_one_byte_a_number(name):
    x, w, _ = operands((2, 150, 200), (200, 140))
    for how, dtype in ((recipe(name), jnp.float8_e4m3fn), (recipe(name).input_as_is, jnp.bfloat16)):
        kept = jax.tree.leaves(jax.eval_shape(lambda x, how=how: jax.vjp(lambda x: linear(x, w, how), x)[1], x))
        assert [a.dtype for a in kept if a.shape == x.shape] == [dtype]
