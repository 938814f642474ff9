import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.numerics import e5m6

FINITE = (np.arange(31 << 6, dtype=np.uint16) << 4).view(np.float16).astype(np.float64)  # the value of each code
TINY = 2.0**-126  # the smallest normal FP32 number

encode = jax.jit(e5m6.encode)
decode = jax.jit(e5m6.decode, static_argnums=(2, 3))


def stated_tile(tile):
    """Codes and exponent of up to 128 FP32 values, in FP64: the nearest of all values, the even code of two."""
    if not np.isfinite(tile).all():
        return None, 255
    values = np.where(np.abs(tile) < TINY, 0, tile).astype(np.float64)
    amax, power = np.abs(values).max(), -126
    while amax / 2.0**power > e5m6.LARGEST:
        power += 1
    if amax == 0:
        power = 0
    distances = np.abs(np.abs(values)[:, None] / 2.0**power - FINITE)
    lower = distances.argmin(axis=1)
    upper = np.minimum(lower + 1, FINITE.size - 1)
    tied = (upper > lower) & (distances[np.arange(lower.size), upper] == distances.min(axis=1)) & (lower % 2 == 1)
    return (lower + tied) | np.signbit(tile) << 11, power + 127


def stated_bytes(codes):
    """Twelve-bit codes as bytes: the upper eight bits of each, then the lower four of value i and of value h + i."""
    codes = list(codes) + [0] * (len(codes) % 2)
    half = len(codes) // 2
    low = [codes[i] % 16 + 16 * (codes[half + i] % 16) for i in range(half)]
    return np.array([code // 16 for code in codes] + low, np.uint8)


def assert_as_stated(row):
    """One row of FP32 values: the packed bytes, the exponents and the decoded values are the stated ones."""
    tiles = [stated_tile(row[i : i + 128]) for i in range(0, row.size, 128)]
    packed, exponent = encode(row)
    assert exponent.tolist() == [power for _, power in tiles]
    if 255 not in exponent:
        np.testing.assert_array_equal(packed, stated_bytes(np.concatenate([codes for codes, _ in tiles])))
    decoded = [
        np.full(min(128, row.size - 128 * i), np.nan)
        if codes is None
        else FINITE[codes & 0x7FF] * 2.0 ** (power - 127) * np.where(codes >> 11, -1, 1)
        for i, (codes, power) in enumerate(tiles)
    ]
    with np.errstate(over="ignore"):
        stated = np.concatenate(decoded).astype(np.float32)
    ours = np.asarray(decode(packed, exponent, row.size, jnp.float32))
    np.testing.assert_array_equal(ours, stated)
    finite = ~np.isnan(stated)
    np.testing.assert_array_equal(np.signbit(ours[finite]), np.signbit(stated[finite]))


def tiles_with_largest(values):
    """`values` in tiles that each begin with LARGEST, so that every scale is 1."""
    values = np.concatenate([values, np.zeros(-len(values) % 127)]).reshape(-1, 127)
    return np.insert(values, 0, e5m6.LARGEST, axis=1).reshape(-1).astype(np.float32)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 127, 128, 129, 255, 256, 300, 1024])
def test_any_size_is_encoded_as_stated(n):
    rng = np.random.default_rng(n)
    assert_as_stated((rng.standard_normal(n) * 2.0 ** rng.integers(-30, 30, n)).astype(np.float32))


def test_every_code_survives():
    values = np.concatenate([FINITE, -FINITE])
    row = tiles_with_largest(values)
    assert_as_stated(row)
    decoded = np.asarray(decode(*encode(row), row.size, jnp.float32))
    np.testing.assert_array_equal(decoded.view(np.uint32), row.view(np.uint32))


def test_ties_go_to_even_and_rounding_happens_once():
    middles = ((FINITE[1:] + FINITE[:-1]) / 2).astype(np.float32)
    near = [middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))]
    assert_as_stated(tiles_with_largest(np.concatenate(near)))
    assert_as_stated(-tiles_with_largest(np.concatenate(near)))


@pytest.mark.parametrize("power", [-126, -125, -112, -111, -110, -100, -1, 0, 15, 16, 100, 127])
@pytest.mark.parametrize("fraction", [1.0, 2 - 2.0**-6, 2 - 2.0**-6 + 2.0**-23, 2 - 2.0**-23])
def test_the_scale_is_the_smallest_that_holds_the_largest_value(power, fraction):
    amax = fraction * 2.0**power
    row = np.array([amax, -amax, amax / 3, amax * 2.0**-25, amax * 2.0**-34, 2.0**-126, 0.0, -0.0], np.float32)
    assert_as_stated(row)


def test_zero_tiny_and_huge_tiles_stand_side_by_side():
    row = np.zeros(5 * 128, np.float32)
    row[128:256] = 1e-40  # FP32-subnormal
    row[256:384] = np.linspace(1, 2, 128) * TINY
    row[384:512] = np.linspace(-3.4e38, 3.4e38, 128)
    row[512:] = np.finfo(np.float32).max
    assert_as_stated(row)
    assert encode(row)[1][:2].tolist() == [e5m6.ZERO_TILE] * 2


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_tile_with_no_number_decodes_to_nan_and_its_neighbours_do_not(bad):
    rows = np.tile(np.linspace(-5, 7, 300, dtype=np.float32), (300, 1))
    rows[np.arange(300), np.arange(300)] = bad
    decoded = np.asarray(decode(*encode(rows), 300, jnp.float32))
    tile = np.arange(300) // 128
    np.testing.assert_array_equal(np.isnan(decoded), tile[:, None] == tile)
    assert_as_stated(rows[150])


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_rows_are_independent_of_the_dimensions_before_them(lead):
    x = np.random.default_rng(0).standard_normal((*lead, 201)).astype(np.float32)
    packed, exponent = encode(x)
    assert packed.shape == (*lead, 303) and exponent.shape == (*lead, 2)
    assert packed.dtype == exponent.dtype == jnp.uint8
    decoded = decode(packed, exponent, 201, jnp.float32)
    assert decoded.shape == x.shape
    for index in np.ndindex(lead):
        np.testing.assert_array_equal(decoded[index], decode(*encode(x[index]), 201, jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_float_types_are_taken_at_their_value(dtype):
    x = jax.random.normal(jax.random.key(0), (4, 256)).astype(dtype)
    for ours, stated in zip(encode(x), encode(x.astype(jnp.float32)), strict=True):
        np.testing.assert_array_equal(ours, stated)


def test_decoded_values_are_exact_in_bfloat16_and_encode_to_themselves():
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((16, 384)) * 2.0 ** rng.integers(-100, 100, (16, 1))).astype(np.float32)
    x[0, :128] = 32512 + 100  # rounds to 32512, which a smaller scale holds
    once = decode(*encode(x), 384, jnp.bfloat16)
    np.testing.assert_array_equal(once.astype(jnp.float32), decode(*encode(x), 384, jnp.float32))
    np.testing.assert_array_equal(decode(*encode(once), 384, jnp.bfloat16), once)


def tiles_along_tokens(x):
    """E4M3 of each 128 x 1 tile and its FP32 scale."""
    scale = np.abs(x).max(axis=0) / np.float32(448)
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32), scale


def test_tiles_along_the_other_dimension_see_one_rounding_only():
    """As if the values had been rounded to six bits with no scale; other scales, here amax / LARGEST, do differ."""
    rng = np.random.default_rng(2)
    x = (rng.uniform(0.1, 1, (128, 256)) * rng.uniform(0.001, 100, (128, 1))).astype(np.float32)
    kept = np.asarray(decode(*encode(x), 256, jnp.float32))
    plain = np.asarray(jax.lax.reduce_precision(x, 8, 6))
    for ours, stated in zip(tiles_along_tokens(kept), tiles_along_tokens(plain), strict=True):
        np.testing.assert_array_equal(ours, stated)
    odd = np.repeat(np.abs(x.reshape(128, 2, 128)).max(axis=-1) / np.float32(e5m6.LARGEST), 128, axis=1)
    other = np.asarray(jax.lax.reduce_precision(x / odd, 8, 6)) * odd
    assert (tiles_along_tokens(other)[0] != tiles_along_tokens(plain)[0]).mean() > 0.01


def test_rows_stay_on_their_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.ones((8, 4, 200)), NamedSharding(mesh, P("data")))
    packed, exponent = encode(x)
    both = jax.jit(lambda x: e5m6.decode(*e5m6.encode(x), 200, jnp.float32))
    for array in (packed, exponent, both(x)):
        assert array.sharding.shard_shape(array.shape)[0] == 1
    program = both.lower(x).compile().as_text()
    assert not any(word in program for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
