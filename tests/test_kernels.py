"""The native FP8 products: interpreted here against plain float64, and lowered for the chips they are written for."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import AbstractDevice, AbstractMesh

from dsjax.numerics.kernels import native_form, scaled_rows_times, scaled_weight_gradient

E4M3 = jnp.float8_e4m3fn
interpreter_of_hopper = pytest.mark.skipif(
    not hasattr(mosaic_gpu, "InterpretGPUParams"), reason="jax 0.10 cannot interpret this kernel"
)
FORMS = ["triton", "mosaic", pytest.param("hopper", marks=interpreter_of_hopper)]


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "form"),
    [
        ("gpu", "NVIDIA H200", "9.0", "hopper"),
        ("gpu", "NVIDIA L40S", "8.9", "triton"),
        ("gpu", "NVIDIA B200", "10.0", "triton"),
        ("gpu", "NVIDIA GB10", "12.1", "triton"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "8.0", None),
        ("gpu", "AMD Instinct MI300X", "gfx942", None),
        ("gpu", "NVIDIA H100 80GB HBM3", None, None),
        ("tpu", "TPU7x", None, "mosaic"),
        ("tpu", "TPU v6 lite", None, None),
        ("tpu", "TPU v5p", None, None),
        ("cpu", "cpu", None, None),
    ],
)
def test_form_follows_the_capability(platform, kind, capability, form):
    device = SimpleNamespace(platform=platform, device_kind=kind)
    if capability is not None:
        device.compute_capability = capability
    assert native_form(device) == form


def test_this_cpu_has_no_native_form():
    assert native_form(jax.devices()[0]) is None


def _quantised(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape) * 60, E4M3)


def _scales(rng, *shape):
    return jnp.asarray(np.exp2(rng.uniform(-9, 3, shape)), jnp.float32)


def _spread(scale, dim, tile, size):
    """The scale of every value along `dim`, in float64."""
    return np.take(np.repeat(np.asarray(scale, np.float64), tile, axis=dim), range(size), axis=dim)


def _relative_error(out, expected):
    assert out.shape == expected.shape
    return np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("block", "owners", "used", "N", "K"),
    [
        (128, [0, 0, 0], 3, 200, 300),  # dense, no size a multiple of 128
        (128, [0, 1, 1, 3, 3], 4, 128, 1280),  # more tiles than the pipeline has stages; a matrix without rows
        (128, list(range(10)), 10, 270, 128),  # more row tiles than run together
        (16, [0, 0, 2], 2, 72, 130),
        (8, [0, 1], 2, 40, 8),
    ],
)
def test_rows_times_equals_the_dequantised_product(form, block, owners, used, N, K):
    rng = np.random.default_rng(0)
    M, E = block * len(owners), max(owners) + 1
    a, b = _quantised(rng, M, K), _quantised(rng, E, N, K)
    scale_a, scale_b = _scales(rng, M, -(-K // 128)), _scales(rng, E, -(-N // 128), -(-K // 128))
    product = jax.jit(partial(scaled_rows_times, form=form, out_dtype=jnp.float32, interpret=True))
    out = product(a, scale_a, b, scale_b, jnp.asarray(owners, jnp.int32), jnp.int32(used))

    rows = np.asarray(a, np.float64) * _spread(scale_a, 1, 128, K)
    weights = np.asarray(b, np.float64) * _spread(_spread(scale_b, 1, 128, N), 2, 128, K)
    expected = np.concatenate([rows[i * block :][:block] @ weights[e].T for i, e in enumerate(owners)])
    expected[used * block :] = 0
    assert _relative_error(out, expected) < 1e-6
    assert not np.asarray(out)[used * block :].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("tile", "ends", "tokens", "D", "F"),
    [
        (128, [256], 256, 130, 200),  # dense
        (128, [0, 128, 128, 896], 1024, 128, 136),  # empty groups, tokens in no group, a group across the stages
        (16, [16, 16, 64], 80, 130, 40),
        (8, [8, 24], 24, 8, 24),
    ],
)
def test_weight_gradient_equals_the_dequantised_product(form, tile, ends, tokens, D, F):
    rng = np.random.default_rng(1)
    x, dy = _quantised(rng, D, tokens), _quantised(rng, F, tokens)
    scale_x, scale_dy = _scales(rng, D, tokens // tile), _scales(rng, F, tokens // tile)
    starts = [0, *ends[:-1]]
    gradient = jax.jit(partial(scaled_weight_gradient, form=form, tile=tile, interpret=True))
    out = gradient(x, scale_x, dy, scale_dy, jnp.asarray(starts, jnp.int32), jnp.asarray(ends, jnp.int32))

    x, dy = (np.asarray(q, np.float64) * _spread(scale, 1, tile, tokens) for q, scale in ((x, scale_x), (dy, scale_dy)))
    expected = np.stack([x[:, s:e] @ dy[:, s:e].T for s, e in zip(starts, ends, strict=True)])
    assert _relative_error(out, expected) < 1e-6
    assert [not dw.any() for dw in np.asarray(out)] == [s == e for s, e in zip(starts, ends, strict=True)]


def test_a_contraction_longer_than_one_chunk_of_a_tpu_is_whole():
    rng = np.random.default_rng(2)
    K, starts, ends = 70 * 128, [0, 63 * 128, 65 * 128], [63 * 128, 65 * 128, 70 * 128]
    x, dy = _quantised(rng, 8, K), _quantised(rng, 16, K)
    scale_x, scale_dy = _scales(rng, 8, 70), _scales(rng, 16, 70)
    bounds = jnp.asarray(starts, jnp.int32), jnp.asarray(ends, jnp.int32)
    out = scaled_weight_gradient(x, scale_x, dy, scale_dy, *bounds, "mosaic", interpret=True)
    x, dy = (np.asarray(q, np.float64) * _spread(scale, 1, 128, K) for q, scale in ((x, scale_x), (dy, scale_dy)))
    expected = np.stack([x[:, s:e] @ dy[:, s:e].T for s, e in zip(starts, ends, strict=True)])
    assert _relative_error(out, expected) < 1e-6


def test_sums_are_rounded_once_to_the_output_dtype():
    rng = np.random.default_rng(3)
    operands = (
        _quantised(rng, 16, 512), _scales(rng, 16, 4), _quantised(rng, 1, 24, 512), _scales(rng, 1, 1, 4),
        jnp.zeros(1, jnp.int32), 1,
    )  # fmt: skip
    product = partial(scaled_rows_times, *operands, "triton", interpret=True)
    assert (product(jnp.bfloat16) == product(jnp.float32).astype(jnp.bfloat16)).all()


def test_a_nan_scale_is_seen_in_its_row_only():
    rng = np.random.default_rng(4)
    scale_a = _scales(rng, 16, 2).at[3, 1].set(jnp.nan)
    a, b, scale_b = _quantised(rng, 16, 256), _quantised(rng, 1, 24, 256), _scales(rng, 1, 1, 2)
    out = scaled_rows_times(a, scale_a, b, scale_b, jnp.zeros(1, jnp.int32), 1, "triton", jnp.float32, interpret=True)
    assert np.isnan(out).any(axis=1).tolist() == [row == 3 for row in range(16)]


def test_sizes_that_do_not_divide_are_refused():
    q, scale, none = jnp.zeros((20, 128), E4M3), jnp.ones((20, 1)), jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match="20 rows do not divide into 3 blocks"):
        scaled_rows_times(q, scale, q[None], scale[None], none, 3, "triton", jnp.float32)
    with pytest.raises(ValueError, match="128 tokens are not a multiple of the tile of 48"):
        scaled_weight_gradient(q, scale, q, scale, none, none, "triton", tile=48)


CHIPS = {
    "hopper": ("cuda", AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"), r"custom_call @mosaic_gpu"),
    "triton": ("cuda", AbstractDevice("NVIDIA B200", 148, "gpu"), r"custom_call @__gpu\$xla\.gpu\.triton"),
    "mosaic": ("tpu", AbstractDevice("TPU7x", 1, "tpu"), r"custom_call @tpu_custom_call"),
}


def _kernels_lowered(form, function, *shapes):
    """How many kernels are in the program for `form`'s chip, which need not be here."""
    platform, device, call = CHIPS[form]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(partial(function, form=form)).trace(*arrays)
        return len(re.findall(call, traced.lower(lowering_platforms=(platform,)).as_text()))


@pytest.mark.parametrize("form", CHIPS)
@pytest.mark.parametrize(("N", "K"), [(2112, 7168), (7168, 18432), (576, 576)])
def test_rows_times_lowers_for_its_chip(form, N, K):
    f32, i32 = jnp.float32, jnp.int32
    scales = ((1024, -(-K // 128)), f32), ((4, -(-N // 128), -(-K // 128)), f32)
    shapes = ((1024, K), E4M3), scales[0], ((4, N, K), E4M3), scales[1], ((8,), i32), ((), i32)
    assert _kernels_lowered(form, partial(scaled_rows_times, out_dtype=jnp.bfloat16), *shapes) == 1


@pytest.mark.parametrize("form", CHIPS)
def test_weight_gradient_lowers_for_its_chip(form):
    f32, i32 = jnp.float32, jnp.int32
    shapes = ((1536, 1024), E4M3), ((1536, 8), f32), ((576, 1024), E4M3), ((576, 8), f32), ((4,), i32), ((4,), i32)
    assert _kernels_lowered(form, scaled_weight_gradient, *shapes) == 1
