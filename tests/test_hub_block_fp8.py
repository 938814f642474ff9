"""Block FP8 of weights, against the formula written as a plain loop."""

import ml_dtypes
import numpy as np
import pytest

from dsjax.hub.block_fp8 import E4M3, dequantize_blocks, quantize_blocks, scale_shape

BF16 = np.dtype(ml_dtypes.bfloat16)
FORMATS = ["float32", "ue8m0"]
SHAPES = [(128, 128), (256, 384), (300, 200), (1, 1), (129, 127), (576, 5), (3, 700)]


def weights(shape, seed=0):
    """Random weights whose blocks differ in size by powers of ten."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-6, 3, scale_shape(shape))
    spread = np.repeat(np.repeat(sizes, 128, axis=0), 128, axis=1)[: shape[0], : shape[1]]
    return (rng.standard_normal(shape) * spread).astype(np.float32)


def blocks_of(shape, block):
    """Where each block of a matrix is, and the place of its scale."""
    for row in range(0, shape[0], block[0]):
        for col in range(0, shape[1], block[1]):
            yield (slice(row, row + block[0]), slice(col, col + block[1])), (row // block[0], col // block[1])


def plain_quantize(w, block, scale_format):
    q, scales = np.empty(w.shape, E4M3), np.empty(scale_shape(w.shape, block), np.float32)
    for where, place in blocks_of(w.shape, block):
        amax = np.abs(w[where]).astype(np.float32).max()
        scale = np.float32(1) if amax <= 2.0**-136 else max(amax / np.float32(448), np.float32(2.0**-126))
        if scale_format == "ue8m0":
            scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
        values = (w[where].astype(np.float32) / scale).astype(E4M3)
        if scale_format == "ue8m0" and amax and np.abs(values.astype(np.float32)).max() == 224 and scale > 2.0**-126:
            values, scale = (values.astype(np.float32) * 2).astype(E4M3), scale / 2
        q[where], scales[place] = values, scale
    return q, scales


def plain_dequantize(q, scales, block, dtype):
    w = np.empty(q.shape, dtype)
    for where, place in blocks_of(q.shape, block):
        w[where] = (q[where].astype(np.float32) * np.float32(scales[place])).astype(dtype)
    return w


def assert_same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    np.testing.assert_array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))


def assert_round_trip(w, scale_format, dtype=np.float32):
    q, scales = quantize_blocks(w, scale_format=scale_format)
    again = quantize_blocks(dequantize_blocks(q, scales, dtype=dtype), scale_format=scale_format)
    assert_same_bits(again[0], q)
    assert_same_bits(again[1], scales)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_equals_the_plain_loop(shape, scale_format):
    for block in ((128, 128), (32, 48)):
        expected = plain_quantize(weights(shape), block, scale_format)
        q, scales = quantize_blocks(weights(shape), block, scale_format)
        assert_same_bits(q, expected[0])
        assert_same_bits(scales, expected[1])


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_equals_the_plain_loop(shape, dtype):
    for block in ((128, 128), (32, 48)):
        scales = weights(scale_shape(shape, block)) * 1e-5
        q = np.random.default_rng(1).integers(0, 256, shape, np.uint8).view(E4M3)  # NaNs and both zeros included
        with np.errstate(over="ignore"):
            assert_same_bits(dequantize_blocks(q, scales, block, dtype), plain_dequantize(q, scales, block, dtype))


def test_every_rounding_is_to_nearest_even():
    # All upper halves of an FP32 number up to 448, and what is just below, at and above each midpoint of E4M3.
    halves = (np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0xFFFF], np.uint32)
    values = halves.view(np.float32)
    values = values[np.abs(values) <= 448]
    w = np.append(values, np.full(-len(values) % 16384, 448, np.float32)).reshape(-1, 128)
    w = np.insert(w, range(0, len(w), 127), np.float32(448), axis=0)  # so that each block's scale is exactly 1
    q, scales = quantize_blocks(w)
    assert np.all(scales == 1)
    assert_same_bits(q, w.astype(E4M3))


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_requantising_is_bit_identical(shape, scale_format):
    for seed in range(5):
        assert_round_trip(weights(shape, seed), scale_format)


def test_requantising_is_bit_identical_for_every_largest_value():
    # One value a block, over all FP32 mantissas that matter: powers of two that leave 224, scales that round both ways.
    rng = np.random.default_rng(0)
    for scale_format in FORMATS:
        amax = np.concatenate([np.linspace(223, 466, 3000), rng.uniform(1, 2, 3000)]).astype(np.float32)
        w = np.stack([amax, -amax / 3])
        q, scales = quantize_blocks(w, (2, 1), scale_format)
        again = quantize_blocks(dequantize_blocks(q, scales, (2, 1)), (2, 1), scale_format)
        assert_same_bits(again[0], q)
        assert_same_bits(again[1], scales)


def test_power_of_two_scales_requantise_through_bf16():
    assert_round_trip(weights((300, 200)), "ue8m0", BF16)


def test_bf16_weights_requantise_through_bf16():
    for seed in range(5):
        assert_round_trip(weights((300, 400), seed).astype(BF16), "float32", BF16)


def test_power_of_two_scales_are_rounded_up_and_say_the_same_numbers():
    w = weights((512, 512))
    w[:128, :128] = np.clip(w[:128, :128], -1, 1) / 4
    w[0, 0] = 225 / 256  # rounds to 224 at the scale 2**-8
    q, scales = quantize_blocks(w, scale_format="ue8m0")
    assert np.all(np.frexp(scales)[0] == 0.5)
    assert (float(q[0, 0]), scales[0, 0]) == (448, 2.0**-9)
    for where, place in blocks_of(w.shape, (128, 128)):
        scale = np.float32(2.0 ** np.ceil(np.log2(np.abs(w[where]).max() / np.float32(448))))
        np.testing.assert_array_equal(
            q[where].astype(np.float32) * scales[place], (w[where] / scale).astype(E4M3).astype(np.float32) * scale
        )


@pytest.mark.parametrize("scale_format", FORMATS)
def test_zeros_keep_their_signs_and_have_the_scale_one(scale_format):
    w = np.zeros((256, 130), np.float32)
    w[::2] = -0.0
    w[128:] += 3
    q, scales = quantize_blocks(w, scale_format=scale_format)
    np.testing.assert_array_equal(scales[0], 1)
    assert_same_bits(dequantize_blocks(q, scales)[:128], w[:128])
    assert_round_trip(w, scale_format)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("size", [1e-45, 1e-41, 2.0**-136, 1e-40, 2.0**-126, 5e-36, 1e-30, 1e30, 1.7e38])
def test_tiny_and_huge_weights_stay_finite_and_in_proportion(size, scale_format):
    w = (np.linspace(-1, 1, 128 * 128).reshape(128, 128) * np.float64(size)).astype(np.float32)
    q, scales = quantize_blocks(w, scale_format=scale_format)
    assert np.all(scales >= 2.0**-126)
    # Half a step of E4M3: 1/16 of a value, or 2**-10 of a scale for the smallest.
    error = np.abs(dequantize_blocks(q, scales).astype(np.float64) - w)
    assert np.all(error <= np.maximum(np.abs(w) / 15.9, float(scales[0, 0]) / 1000))
    assert_round_trip(w, scale_format)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, 1e300])
def test_what_is_not_finite_is_refused(bad, scale_format):
    for dtype in (np.float64, np.float32, BF16) if abs(bad) != 1e300 else (np.float64,):
        w = np.ones((300, 300), dtype)
        w[299, 128] = bad
        with pytest.raises(ValueError, match="not a finite number"):
            quantize_blocks(w, scale_format=scale_format)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, BF16])
def test_other_float_types_are_quantised_as_their_fp32_value(dtype):
    w = np.clip(weights((300, 200)), -1e4, 1e4).astype(dtype)
    for given in (w, np.asfortranarray(w), np.ascontiguousarray(w.T).T):
        q, scales = quantize_blocks(given)
        expected = quantize_blocks(w.astype(np.float32))
        assert_same_bits(q, expected[0])
        assert_same_bits(scales, expected[1])


@pytest.mark.parametrize("dtype", [BF16, ml_dtypes.float8_e8m0fnu])
def test_scales_may_be_stored_in_smaller_types(dtype):
    q, scales = quantize_blocks(weights((300, 200)), scale_format="ue8m0")
    assert_same_bits(dequantize_blocks(q, scales.astype(dtype)), dequantize_blocks(q, scales))


def test_a_result_array_is_filled_in_place_whatever_its_strides():
    q, scales = quantize_blocks(weights((300, 200)))
    stacked = np.zeros((200, 2, 300), BF16)
    assert dequantize_blocks(q, scales, dtype=BF16, out=stacked[:, 1].T).base is not None
    assert_same_bits(stacked[:, 1].T, dequantize_blocks(q, scales, dtype=BF16))
    assert not np.any(stacked[:, 0].astype(np.float32))


def test_matrices_without_values_have_no_blocks():
    for shape in ((0, 5), (5, 0)):
        q, scales = quantize_blocks(np.zeros(shape, np.float32))
        assert (q.shape, scales.shape) == (shape, scale_shape(shape))
        assert dequantize_blocks(q, scales).shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_inv": np.ones((2, 2), np.float32)}, r"scales of the shape \(3, 2\), but got \(2, 2\)"),
        ({"scale_inv": np.full((3, 2), np.nan, np.float32)}, "not a finite number"),
        ({"scale_inv": np.full((3, 2), np.nan, ml_dtypes.float8_e8m0fnu)}, "not a finite number"),
        ({"q": np.zeros((300, 200), np.uint8)}, "expected a matrix of float8_e4m3fn"),
        ({"q": np.zeros((2, 300, 200), E4M3)}, "expected a matrix"),
        ({"out": np.zeros((300, 200), BF16)}, "out must be float32"),
        ({"out": np.zeros((200, 300), np.float32)}, "out must be float32"),
    ],
)
def test_dequantize_refuses_what_does_not_fit(change, message):
    q, scales = quantize_blocks(weights((300, 200)))
    with pytest.raises(ValueError, match=message):
        dequantize_blocks(**{"q": q, "scale_inv": scales} | change)


def test_quantize_refuses_what_is_no_matrix_and_unknown_formats():
    with pytest.raises(ValueError, match="only matrices"):
        quantize_blocks(np.ones(3, np.float32))
    with pytest.raises(ValueError, match='"float32" or "ue8m0"'):
        quantize_blocks(np.ones((2, 2), np.float32), scale_format="fp32")
