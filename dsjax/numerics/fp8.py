"""E4M3 with a scale for each tile, found online [V3 §3.3.2].

scale = amax / 448 of the tile, FP32; value = x / scale, FP32, rounded to the nearest E4M3 number, ties to even.
Scales of the format "ue8m0" are rounded up to a power of two. What else may happen, by the tile:

- all zeros: scale 1. FP32 numbers below 2**-126 count as zeros, as accelerators take them.
- tiny: no scale is below 2**-126. DeepSeek's inference kernels never let amax fall below 1e-4; gradients are smaller
  than that, and would be lost.
- a NaN or an infinity: the scale is NaN and with it every value, so that the loss shows it.
- cut by the edge of the tensor: as if padded with zeros.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_NORMAL = 2.0**-126  # of FP32; also the smallest scale
TILE = 128


def quantize_tiles(
    x: jax.Array, axis: int = -1, tile: int = TILE, scale_format: str = "float32"
) -> tuple[jax.Array, jax.Array]:
    """(x in E4M3, FP32 scales): one scale for each run of `tile` values along `axis`.

    The scales have x's shape with ceil(n / tile) in place of n. Along the last dimension these are the report's 1x128
    tiles of activations; along the tokens, its 128x1 tiles.
    """
    tiles = [1] * x.ndim
    tiles[axis] = tile
    return quantize(x, tiles, scale_format)


def quantize_blocks(w: jax.Array, block: int = TILE, scale_format: str = "float32") -> tuple[jax.Array, jax.Array]:
    """(w in E4M3, FP32 scales): one scale for each block x block of the last two dimensions; the others are stacked."""
    return quantize(w, [*(1 for _ in w.shape[:-2]), block, block], scale_format)


def quantize(x: jax.Array, tiles: Sequence[int | None], scale_format: str = "float32") -> tuple[jax.Array, jax.Array]:
    """(x in E4M3, FP32 scales) for tiles of any shape; None: the whole dimension."""
    values, scale = scaled(x, tiles, scale_format)
    return values.astype(E4M3), scale


def scaled(x: jax.Array, tiles: Sequence[int | None], scale_format: str = "float32") -> tuple[jax.Array, jax.Array]:
    """What `quantize` gives, the E4M3 values still held in FP32: for an emulation, which multiplies in it."""
    if scale_format not in ("float32", "ue8m0"):
        raise ValueError(f'scale_format must be "float32" or "ue8m0", but got {scale_format!r}')
    wide = x.astype(jnp.float32)
    zero = jnp.copysign(0.0, wide)
    split, inner = _split(jnp.where(jnp.abs(wide) < SMALLEST_NORMAL, zero, wide), tiles)
    # XLA:CPU's maximum passes over a NaN, but not over an infinity.
    magnitude = jnp.where(jnp.abs(split) < jnp.inf, jnp.abs(split), jnp.inf)
    scale = _scales(jnp.max(magnitude, axis=inner, keepdims=True, initial=0.0), scale_format)
    values = _joined(round_to_e4m3(_divide(split, scale)), inner, x.shape)
    return values, jnp.squeeze(scale, inner)


def dequantize(q: jax.Array, scale: jax.Array, tile: int = TILE, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """q times its scales, an FP32 product, then cast.

    A dimension in which `scale` is as long as q has a scale each; one in which it has length 1, a scale for all of it;
    any other is cut into tiles of `tile`.
    """
    tiles = [1 if s == n else None if s == 1 else tile for s, n in zip(scale.shape, q.shape, strict=True)]
    return apply_scales(q.astype(jnp.float32), scale, tiles).astype(dtype)


def apply_scales(values: jax.Array, scale: jax.Array, tiles: Sequence[int | None]) -> jax.Array:
    """FP32 values times the scale of their tile."""
    split, inner = _split(values, tiles)
    return _joined(split * jnp.expand_dims(scale, inner), inner, values.shape)


def round_to_e4m3(y: jax.Array) -> jax.Array:
    """FP32 y, at most about 448, rounded to the nearest E4M3 number, ties to even; the result is FP32."""
    # E4M3 has 3 bits after the leading one from 2**-6 up, and below it steps of 2**-9. On CPUs this takes a third of
    # the time of a cast to the 8-bit type and back.
    normal = lax.reduce_precision(y, exponent_bits=8, mantissa_bits=3)
    subnormal = lax.round(y * 2.0**9, lax.RoundingMethod.TO_NEAREST_EVEN) * 2.0**-9
    return jnp.where(jnp.abs(y) < 2.0**-6, subnormal, normal)


def _split(x: jax.Array, tiles: Sequence[int | None]) -> tuple[jax.Array, tuple[int, ...]]:
    """(x with each tiled dimension as two, tiles and values in one, padded with zeros; the second ones)."""
    shape: list[int] = []
    pads, inner = [], []
    for size, tile in zip(x.shape, tiles, strict=True):
        tile = min(size if tile is None else tile, size) or 1
        count = math.ceil(size / tile)
        pads.append((0, count * tile - size))
        shape.append(count)
        if tile > 1 or count == 0:
            inner.append(len(shape))
            shape.append(tile)
    padded = jnp.pad(x, pads) if any(pad for _, pad in pads) else x
    return padded.reshape(shape), tuple(inner)


def _joined(split: jax.Array, inner: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """The way back."""
    padded: list[int] = []
    for dim, size in enumerate(split.shape):
        padded = [*padded[:-1], padded[-1] * size] if dim in inner else [*padded, size]
    return split.reshape(padded)[tuple(slice(size) for size in shape)]


def _divide(x: jax.Array, by: jax.Array | float) -> jax.Array:
    # By a constant or a broadcast, XLA would multiply with the reciprocal, which rounds differently.
    return x / jnp.where(x < jnp.inf, by, jnp.nan)


def _scales(amax: jax.Array, scale_format: str) -> jax.Array:
    scale = jnp.maximum(_divide(amax, E4M3_MAX), SMALLEST_NORMAL)
    if scale_format == "ue8m0":
        bits = lax.bitcast_convert_type(scale, jnp.uint32)
        scale = lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    return jnp.where(amax == 0, 1.0, jnp.where(amax < jnp.inf, scale, jnp.nan))


def exponents(scale: jax.Array) -> jax.Array:
    """Powers of two from 2**-126 to 2**127, or NaN, in a byte: the exponent + 127."""
    return (lax.bitcast_convert_type(scale, jnp.uint32) >> 23).astype(jnp.uint8)


def from_exponents(exponent: jax.Array) -> jax.Array:
    """The way back; what was NaN is an infinity, and its values are NaN already."""
    return lax.bitcast_convert_type(exponent.astype(jnp.uint32) << 23, jnp.float32)
