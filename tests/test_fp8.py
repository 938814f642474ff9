"""E4M3 with a scale for each tile, bit for bit what the plain statement of the report gives."""

from functools import partial

import fp8_statement as statement
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small import mesh

from dsjax.hub import block_fp8
from dsjax.numerics.fp8 import apply_scales, dequantize, quantize, quantize_blocks, quantize_tiles, scaled

FORMATS = ["float32", "ue8m0"]
FP32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
TINY, HUGE = 2.0**-126, np.finfo(np.float32).max
tiles_compiled = jax.jit(quantize_tiles, static_argnames=("axis", "tile", "scale_format"))

# The finite numbers of E4M3 from 0 to 448, and what lies halfway between each and the next.
LADDER = np.arange(127, dtype=np.uint8).view(statement.E4M3).astype(np.float32)
TIES = (LADDER[:-1] + LADDER[1:]) / 2


def assert_same_bits(ours, expected):
    """Equal to the last bit, the sign of a zero included; a NaN has no sign."""
    ours = np.asarray(ours)
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
    is_nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(ours.astype(np.float32)), is_nan)
    bits = np.dtype(f"u{expected.dtype.itemsize}")
    np.testing.assert_array_equal(ours.view(bits)[~is_nan], expected.view(bits)[~is_nan])


def assert_as_stated(ours, x, tile, scale_format):
    """`ours`, (values, scales), are the statement's of x."""
    for mine, expected in zip(ours, statement.quantize(x, tile, scale_format), strict=True):
        assert_same_bits(mine, expected)


def numbers(shape, dtype=FP32, seed=0):
    """Random numbers of very different sizes."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-5, 3, shape)).astype(dtype)


def one_tile(values, tile=128):
    """[1, tile]: the values, then zeros."""
    return np.pad(np.asarray(values, np.float32), (0, tile - len(values)))[None]


# --- shapes ---

TILED = [  # (shape, axis, tile)
    ((4, 256), -1, 128),
    ((256, 4), -2, 128),
    ((3, 200), -1, 128),
    ((200, 3), -2, 128),
    ((2, 130, 5), 1, 128),
    ((129, 2, 3), 0, 128),
    ((5, 127), 1, 128),
    ((1, 1), -1, 128),
    ((300, 1), -1, 128),
    ((1, 300), -2, 128),
    ((7,), 0, 128),
    ((3, 96), -1, 32),
    ((100, 3), -2, 32),
    ((0, 128), -1, 128),
    ((3, 0), -1, 128),
    ((3, 0), -2, 128),
    ((2, 0, 4), -1, 32),
]


def in_both_formats(quantize, dequantize):
    """What a compiled function of an array makes of it: {format: (values, scales, the numbers they stand for)}."""

    @jax.jit
    def there_and_back(x):
        made = {scale_format: quantize(x, scale_format=scale_format) for scale_format in FORMATS}
        return {scale_format: (q, scale, dequantize(q, scale)) for scale_format, (q, scale) in made.items()}

    return there_and_back


def assert_all_as_stated(there_and_back, x, tile):
    for scale_format, (q, scale, back) in there_and_back(x).items():
        assert_as_stated((q, scale), x, tile, scale_format)
        assert_same_bits(back, statement.dequantize(np.asarray(q), np.asarray(scale), tile))


def extents(shape, axis, tile):
    return tuple(tile if dim == axis % len(shape) else 1 for dim in range(len(shape)))


@pytest.mark.parametrize("shape, axis, tile", TILED)
def test_tiles_along_any_axis_are_as_stated(shape, axis, tile):
    form = in_both_formats(partial(quantize_tiles, axis=axis, tile=tile), partial(dequantize, tile=tile))
    assert_all_as_stated(form, numbers(shape), extents(shape, axis, tile))


BLOCKED = [
    *((256, 128), (128, 384), (300, 200), (1, 1), (129, 1), (5, 700), (0, 5), (5, 0)),
    *((3, 130, 40), (2, 2, 10, 129), (2, 0, 5)),
]


@pytest.mark.parametrize("shape", BLOCKED)
def test_blocks_of_stacked_matrices_are_as_stated(shape):
    tile = (*[1] * (len(shape) - 2), 128, 128)
    assert_all_as_stated(in_both_formats(quantize_blocks, dequantize), numbers(shape), tile)


@pytest.mark.parametrize("shape", [(4, 256), (2, 130, 200), (2, 0, 5)])
def test_bf16_numbers_are_as_stated(shape):
    x, lead = numbers(shape, BF16), [1] * (len(shape) - 2)
    for form, tile in ((quantize_tiles, (1, 128)), (partial(quantize_tiles, axis=-2), (128, 1))):
        assert_all_as_stated(in_both_formats(form, dequantize), x, (*lead, *tile))
    assert_all_as_stated(in_both_formats(quantize_blocks, dequantize), x, (*lead, 128, 128))


@pytest.mark.parametrize("shape", [(3, 130, 40), (1, 200, 1)])
@pytest.mark.parametrize("tile", [(None, None, None), (1, None, 16), (None, 1, 128), (2, 100, None)], ids=str)
def test_tiles_of_any_extent_are_as_stated(tile, shape):
    form = in_both_formats(
        partial(quantize, tiles=tile), lambda q, scale: apply_scales(q.astype(jnp.float32), scale, tile)
    )
    assert_all_as_stated(form, numbers(shape), tile)


@pytest.mark.parametrize("shape, axis, tile", [((3, 200), -1, 128), ((2, 130, 5), -2, 128), ((5, 48), -1, 32)])
def test_nothing_depends_on_being_compiled(shape, axis, tile):
    x, extent = numbers(shape), extents(shape, axis, tile)
    for scale_format in FORMATS:
        q, scale = quantize_tiles(x, axis, tile, scale_format)
        assert_as_stated((q, scale), x, extent, scale_format)
        assert_same_bits(dequantize(q, scale, tile), statement.dequantize(np.asarray(q), np.asarray(scale), extent))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_an_emulation_multiplies_the_numbers_that_are_stored(compiled):
    # In FP32: a cast to E4M3 would hide what was not rounded before.
    x = numbers((8, 256))
    form = partial(scaled, tiles=(1, 128))
    values, scale = (jax.jit(form) if compiled else form)(x)
    q, expected_scale = statement.quantize(x, (1, 128))
    assert_same_bits(values, q.astype(np.float32))
    assert_same_bits(scale, expected_scale)


def test_one_scale_for_a_whole_tensor_comes_back_without_a_tile_size():
    x = numbers((3, 130, 40))
    q, scale = quantize(x, (None, None, None))
    assert scale.shape == (1, 1, 1)
    np.testing.assert_array_equal(dequantize(q, scale), np.asarray(q, np.float32) * np.asarray(scale))


def test_unknown_scale_formats_are_refused():
    with pytest.raises(ValueError, match="scale_format must be .* but got 'ue8m1'"):
        quantize_tiles(numbers((2, 128)), scale_format="ue8m1")


# --- rounding ---


@pytest.mark.parametrize(
    "form",
    [quantize_tiles, tiles_compiled, jax.jit(partial(scaled, tiles=(1, 128)))],
    ids=["eager", "jit", "jit, left in FP32"],
)
def test_values_are_rounded_to_the_nearest_and_ties_to_even(form):
    for values, expected in (
        (TIES, np.where(np.arange(126) % 2, LADDER[1:], LADDER[:-1])),
        (np.nextafter(TIES, np.float32(0)), LADDER[:-1]),
        (np.nextafter(TIES, np.float32(448)), LADDER[1:]),
        (LADDER[:-1], LADDER[:-1]),
    ):
        for sign in (1, -1):
            q, scale = form(one_tile([*(sign * values), 448]))
            assert scale == 1  # 448 is in the tile
            np.testing.assert_array_equal(np.asarray(q, np.float32)[0, :126], sign * expected)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_every_scale_and_value_is_a_correctly_rounded_quotient(scale_format):
    # Small tiles: many quotients. A reciprocal in place of a division would differ in about one scale of ten.
    x = numbers((4000, 12), seed=1)
    ours = tiles_compiled(x, tile=3, scale_format=scale_format)
    assert_as_stated(ours, x, (1, 3), scale_format)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_quotients_that_lie_on_ties_are_as_stated(scale_format):
    # Scales of all sizes and fractions, and in each tile what divides to a tie or to a neighbour of one.
    amax = np.abs(numbers((200, 1), seed=2)) + np.float32(1e-6)
    _, scale = statement.quantize(amax, (1, 1), scale_format)
    at_ties = np.concatenate(
        [np.nextafter(TIES * scale, np.float32(way)) for way in (0, HUGE)] + [TIES * scale], axis=1
    )
    x = np.concatenate([np.minimum(at_ties, amax), amax], axis=1)
    ours = tiles_compiled(x, tile=x.shape[1], scale_format=scale_format)
    assert_as_stated(ours, x, (1, x.shape[1]), scale_format)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_no_finite_number_becomes_more_than_448_times_its_scale(scale_format):
    # Numbers whose quotient by 448 was rounded down: divided by it, they exceed 448.
    amax = np.random.default_rng(3).uniform(1, 2, (4000, 1)).astype(np.float32)
    if scale_format == "float32":
        assert np.any(amax / (amax / np.float32(448)) > 448)
    q, scale = tiles_compiled(amax, scale_format=scale_format)
    assert np.max(np.asarray(q, np.float32)) == 448
    np.testing.assert_allclose(dequantize(q, scale), amax, rtol=2**-4)


# --- sizes ---

SIZES = {
    "zeros": [0.0, -0.0],
    "negative zero beside a number": [1.0, -0.0, 0.0],
    "negative numbers that round to zero": [448.0, -(2.0**-10), -(2.0**-11), 2.0**-10],
    "subnormal": [2.0**-127, -(2.0**-140), 1e-45],
    "the smallest normal number": [TINY, -TINY],
    "subnormal beside a normal number": [TINY, 2.0**-127, 2.0**-130, 1.5 * 2.0**-126],
    "a subnormal quotient by 448": [2.0**-120, 2.0**-125, -(2.0**-122)],
    "the largest of them": [448 * TINY, 447 * TINY, TINY],
    "the smallest scale that is found": [449 * TINY, 448 * TINY, TINY],
    "tiny": [1e-30, -1e-33],
    "huge": [3e38, -1e38, 1.0],
    "the largest number": [HUGE, -HUGE, 1e30],
    "a power of two times 448": [448.0 * 2**20, 1e8, -1e5],
    "just above it": [np.nextafter(np.float32(448.0 * 2**20), np.float32(HUGE)), 1e8, -1e5],
    "just below it": [np.nextafter(np.float32(448.0 * 2**20), np.float32(0)), 1e8, -1e5],
}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("values", SIZES.values(), ids=SIZES)
def test_numbers_of_any_size_are_as_stated(values, scale_format, dtype):
    largest = ml_dtypes.finfo(dtype).max
    x = one_tile(values)
    x = np.clip(x, -np.float32(largest), np.float32(largest)).astype(dtype)
    assert_as_stated(tiles_compiled(x, scale_format=scale_format), x, (1, 128), scale_format)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_scales_are_normal_numbers(scale_format):
    x = np.concatenate([one_tile(values) for values in SIZES.values()])
    _, scale = tiles_compiled(x, scale_format=scale_format)
    assert np.min(scale) == TINY
    assert scale[0, 0] == 1
    if scale_format == "ue8m0":
        assert np.all(np.frexp(np.asarray(scale))[0] == 0.5)
        assert np.max(scale) == 2.0**120


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_spoils_its_tile_and_no_other(bad, dtype, scale_format):
    x = numbers((2, 300), dtype)
    clean = [np.asarray(a) for a in tiles_compiled(x, scale_format=scale_format)]
    x[1, 140] = bad
    q, scale = tiles_compiled(x, scale_format=scale_format)
    assert_as_stated((q, scale), x, (1, 128), scale_format)
    spoiled = np.zeros(x.shape, bool)
    spoiled[1, 128:256] = True
    np.testing.assert_array_equal(np.isnan(np.asarray(q, np.float32)), spoiled)
    np.testing.assert_array_equal(np.isnan(scale), [[False, False, False], [False, True, False]])
    np.testing.assert_array_equal(np.asarray(q)[~spoiled], clean[0][~spoiled])
    assert np.all(np.isnan(np.asarray(dequantize(q, scale))[spoiled]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(bad):
    # A maximum that works on several numbers at a time could lose a NaN in some places.
    x = np.ones((128, 128, 128), np.float32)
    x[np.arange(128), np.arange(128), np.arange(128) * 37 % 128] = bad
    for tile in ((1, 128, 128), (1, None, None), (128, 1, 128), (128, 128, 1)):
        values, scale = jax.jit(partial(quantize, tiles=tile))(x)
        assert np.all(np.isnan(scale)) and np.all(np.isnan(np.asarray(values, np.float32)))


# --- many devices ---


@pytest.mark.parametrize("spec", [("fsdp", None), (None, "fsdp"), ("data", "fsdp")], ids=str)
@pytest.mark.parametrize(
    "form, tile",
    [
        (quantize_tiles, (1, 128)),
        (partial(quantize_tiles, axis=-2), (128, 1)),
        (partial(quantize_tiles, tile=32), (1, 32)),
        (quantize_blocks, (128, 128)),
        (partial(quantize, tiles=(None, None)), (None, None)),
    ],
    ids=["rows", "columns", "tiles of 32", "blocks", "tensor"],
)
def test_eight_devices_give_what_one_gives(form, tile, spec):
    # 40 rows or columns a device, or 160 by 80: tiles and blocks cross from one to the next.
    x = numbers((320, 320))
    on = mesh(data=2, fsdp=4) if "data" in spec else mesh(fsdp=8)
    spread = jax.device_put(x, NamedSharding(on, PartitionSpec(*spec)))
    assert len(spread.sharding.device_set) == 8
    assert_all_as_stated(in_both_formats(form, partial(dequantize, tile=max(t or 128 for t in tile))), spread, tile)


# --- there and back ---


@pytest.mark.parametrize("scale_format", FORMATS)
def test_the_way_there_and_back_errs_by_half_a_step_at_most(scale_format):
    x = numbers((50, 300), seed=4)
    q, scale = tiles_compiled(x, scale_format=scale_format)
    scale = np.repeat(np.asarray(scale, np.float64), 128, axis=1)[:, :300]
    # The distance to the next number: 2**-9 up to 2**-6, from there 1/8 of the power of two below.
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.abs(x) / scale)), -6) - 3) * scale
    error = np.abs(np.asarray(q, np.float64) * scale - x)
    assert np.all(error <= step / 2 * (1 + 1e-6))
    assert np.max(error / step) > 0.49


@pytest.mark.parametrize("finer", [(1, 32), (1, 128), (1, 1)], ids=str)
def test_powers_of_two_make_requantising_exact(finer):
    # Not into larger tiles: theirs is a larger scale, under which small numbers of E4M3 are not numbers of E4M3.
    x = numbers((8, 256), seed=5)
    once = dequantize(*tiles_compiled(x, scale_format="ue8m0"))
    q, scale = quantize(once, finer, "ue8m0")
    assert_same_bits(dequantize(q, scale, tile=finer[1]), np.asarray(once))
    # FP32 scales do change numbers when tiles are cut anew.
    once = dequantize(*tiles_compiled(x))
    assert np.any(dequantize(*tiles_compiled(once, tile=32), tile=32) != once)


def test_powers_of_two_make_tiling_along_tokens_exact_for_numbers_of_like_size():
    # The report's reason for them: 1x128 tiles become 128x1 tiles, and nothing is lost.
    signs, sizes = np.random.default_rng(6).choice([-1, 1], (256, 256)), np.abs(numbers((256, 256), seed=6)) % 1 + 1
    x = (signs * sizes).astype(np.float32)
    for scale_format, exact in (("ue8m0", True), ("float32", False)):
        once = np.asarray(dequantize(*tiles_compiled(x, scale_format=scale_format)))
        again = np.asarray(dequantize(*tiles_compiled(once, axis=-2, scale_format=scale_format)))
        assert np.array_equal(once, again) is exact


def test_bf16_holds_whatever_has_a_power_of_two_for_a_scale():
    q, scale = tiles_compiled(numbers((50, 300), seed=7), scale_format="ue8m0")
    narrow, wide = dequantize(q, scale, dtype=jnp.bfloat16), dequantize(q, scale)
    assert (narrow.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(np.asarray(narrow, np.float32), wide)


def test_dequantising_rounds_the_fp32_product_once():
    q, scale = tiles_compiled(numbers((50, 300), seed=8))
    narrow, wide = dequantize(q, scale, dtype=jnp.bfloat16), dequantize(q, scale)
    assert_same_bits(narrow, np.asarray(wide).astype(BF16))
    assert np.any(np.asarray(narrow, np.float32) != np.asarray(wide))


# --- the published format ---


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", [(256, 384), (300, 200), (1, 1), (129, 127)])
def test_weights_become_the_numbers_that_are_published(shape, scale_format):
    # Published power-of-two scales may be half of ours with values twice as large: the same numbers.
    w = numbers(shape, seed=9)
    published_q, published_scale = block_fp8.quantize_blocks(w, scale_format=scale_format)
    q, scale = quantize_blocks(w, scale_format=scale_format)
    if scale_format == "float32":
        assert_same_bits(q, published_q)
        assert_same_bits(scale, published_scale)
    np.testing.assert_array_equal(dequantize(q, scale), block_fp8.dequantize_blocks(published_q, published_scale))
    assert_same_bits(
        dequantize(published_q, published_scale), block_fp8.dequantize_blocks(published_q, published_scale)
    )
