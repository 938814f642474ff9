"""Activations kept for the backward pass in twelve bits (DeepSeek-V3 report, section 3.3.3).

E5M6 has a sign, five exponent bits (bias 15) and six mantissa bits: the upper twelve bits of an IEEE half. Each run
of 128 values along the last dimension shares a power-of-two scale, so that cutting the kept values into tiles along
another dimension later meets no rounding but the first one.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

TILE = 128
LARGEST = 65024.0  # (2 - 2**-6) * 2**15
ZERO_TILE, NAN_TILE = 127, 255  # exponents: the scale 1, and "no number"

_SMALLEST_NORMAL = 2.0**-14  # below it the spacing is 2**-20
_LEAST = 1  # the exponent of the scale 2**-126
_FRACTION = 23 - 6  # FP32 mantissa bits below the ones that are kept
_REBIAS = (127 - 15) << 6  # between the exponent of FP32 and that of E5M6, in units of a code
_EIGHT = 0x41000000  # the bits of 8.0, whose FP32 neighbours are 2**-20 away


def encode(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., n], any float dtype, in twelve bits a value and eight bits a tile.

    The scale of a tile is the smallest power of two with amax / scale <= LARGEST, but at least 2**-126. Values are
    rounded once, to nearest even, from FP32 to six mantissa bits; below 2**-14 of the scale to multiples of 2**-20 of
    it. FP32-subnormal values may count as zero. A tile of zeros has scale 1. A tile that holds NaN or an infinity
    decodes to NaN throughout; its codes mean nothing. What rounds to 2**128 decodes to infinity.

    Returns:
      packed: uint8 [..., 3h] with h = ceil(n / 2). Values i and h + i share three bytes: byte i and byte h + i are the
        upper eight bits of their codes, byte 2h + i is the lower four bits of both, the second's above the first's.
        An odd n is filled up by one zero value.
      exponent: uint8 [..., ceil(n / 128)]; the scale is 2**(exponent - 127), NaN if it is NAN_TILE.
    """
    n, x = x.shape[-1], _tiled(x.astype(jnp.float32))
    # NaN counts as infinite: the maximum of XLA:CPU passes over it.
    exponent = _tile_exponent(jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)).max(axis=-1, keepdims=True))
    # The division is one for each tile: its result is a power of two, so the product is exact.
    y = x * (1 / _scale(exponent))
    sign = lax.bitcast_convert_type(x, jnp.uint32) >> 31 << 11
    codes = (_nearest(jnp.abs(y)) | sign).reshape(*x.shape[:-2], x.shape[-2] * TILE)
    return _packed(codes, n), exponent.squeeze(-1).astype(jnp.uint8)


def decode(packed: jax.Array, exponent: jax.Array, n: int, dtype: DTypeLike) -> jax.Array:
    """x [..., n] as `encode` rounded it: exact in BF16 and FP32, save that FP32-subnormal results may be zero."""
    magnitude, negative = _unpacked(packed, n)
    normal = lax.bitcast_convert_type((magnitude + _REBIAS) << _FRACTION, jnp.float32)
    small = magnitude.astype(jnp.int32).astype(jnp.float32) * 2.0**-20
    values = jnp.where(magnitude < 1 << 6, small, normal)
    values = _tiled(jnp.where(negative, -values, values)) * _scale(exponent.astype(jnp.uint32))[..., None]
    return values.reshape(*packed.shape[:-1], exponent.shape[-1] * TILE)[..., :n].astype(dtype)


def _filled(x: jax.Array, length: int) -> jax.Array:
    """x with zeros appended to its last dimension."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])


def _tiled(x: jax.Array) -> jax.Array:
    tiles = -(-x.shape[-1] // TILE)
    return _filled(x, tiles * TILE).reshape(*x.shape[:-1], tiles, TILE)


def _tile_exponent(amax: jax.Array) -> jax.Array:
    """uint32. Adding all ones below the six bits kept carries into the exponent just above LARGEST times a scale."""
    bits = lax.bitcast_convert_type(amax, jnp.uint32)
    above = (bits + ((1 << _FRACTION) - 1)) >> 23
    exponent = jnp.maximum(above, _LEAST + 15) - 15
    exponent = jnp.where(bits < 1 << 23, ZERO_TILE, exponent)
    return jnp.where(bits < 255 << 23, exponent, NAN_TILE)


def _scale(exponent: jax.Array) -> jax.Array:
    scale = lax.bitcast_convert_type(exponent << 23, jnp.float32)
    return jnp.where(exponent == NAN_TILE, jnp.nan, scale)


def _nearest(y: jax.Array) -> jax.Array:
    """The code, without its sign, of y in [0, LARGEST]; uint32."""
    normal = (lax.bitcast_convert_type(lax.reduce_precision(y, 8, 6), jnp.uint32) >> _FRACTION) - _REBIAS
    small = lax.bitcast_convert_type(y + 8.0, jnp.uint32) - _EIGHT
    return jnp.where(y < _SMALLEST_NORMAL, small, normal)


def _packed(codes: jax.Array, n: int) -> jax.Array:
    half = -(-n // 2)
    codes = _filled(codes[..., :n], 2 * half)
    low = (codes & 15).reshape(*codes.shape[:-1], 2, half)
    # Joined by a sum, not by slices: XLA:CPU computes slices of a long fused expression one value at a time.
    low = (low << 4 * lax.broadcasted_iota(jnp.uint32, low.shape, low.ndim - 2)).sum(axis=-2, dtype=jnp.uint32)
    return jnp.concatenate([(codes >> 4).astype(jnp.uint8), low.astype(jnp.uint8)], axis=-1)


def _unpacked(packed: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Of n codes the magnitude, eleven bits as uint32, and whether the sign is set."""
    half = packed.shape[-1] // 3
    low = packed[..., 2 * half :]
    low = jnp.concatenate([low & 15, low >> 4], axis=-1)
    codes = (packed[..., : 2 * half].astype(jnp.uint32) << 4 | low)[..., :n]
    return codes & 0x7FF, codes > 0x7FF
