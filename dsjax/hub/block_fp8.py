"""FP8 as DeepSeek publishes weights: E4M3 values with one FP32 scale for each block of 128 x 128.

weight = value * scale_inv: the stored scale multiplies, whatever its name says [DeepSeek-V3, inference/kernel.py,
weight_dequant]. A block cut by the edge of its matrix is padded with zeros, so it has a scale of its own: scales have
the shape [ceil(rows / 128), ceil(cols / 128)].
"""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = np.float32(448)
LARGEST_WEIGHT = np.float32(2.0**127)  # beyond it, a power-of-two scale could make an infinity of a finite weight
# Smaller scales are subnormal numbers, which accelerators take for zero.
SMALLEST_SCALE = np.finfo(np.float32).tiny
LARGEST_ZERO = SMALLEST_SCALE / 1024  # half the smallest E4M3 number at that scale: it rounds to zero
WORKING_VALUES = 1 << 16  # converted at a time, so that what lies between stays in the processor's cache

# What each of the 256 bytes means, and the byte that means twice as much.
DECODED = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
with np.errstate(over="ignore"):
    DOUBLED = (2 * DECODED).astype(E4M3).view(np.uint8)
# E4M3 of an FP32 number, by its upper 16 bits with the last one set where any lower bit is: 8 significant bits rounded
# to odd decide every rounding to 4.
with np.errstate(over="ignore", invalid="ignore"):
    ENCODED = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32).astype(E4M3).view(np.uint8)


class Blocks(NamedTuple):
    """A weight kept in FP8; the arrays are NumPy's or JAX's, with equal leading dimensions where many are stacked."""

    weight: Any  # E4M3
    scale_inv: Any  # FP32


def quantize_blocks(
    w: np.ndarray, block: tuple[int, int] = (128, 128), scale_format: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """w [rows, cols], any float type, as E4M3 [rows, cols] and FP32 scale_inv [ceil(rows/block), ceil(cols/block)].

    scale = amax / 448 of each block; values are w / scale in FP32, rounded to nearest even. `scale_format="ue8m0"`
    rounds scales up to a power of two. A block of zeros has the scale 1; no other scale is below 2**-126.

    A power-of-two scale may leave 224 as the block's largest value. Such a block is stored as twice the values with
    half the scale: the same numbers, in the one form that quantising those numbers gives again. So for both formats
    quantize_blocks(dequantize_blocks(q, s)) is (q, s), bit for bit, of whatever this function made.

    Raises ValueError for weights that are not finite or above 2**127, and for anything but a matrix.
    """
    if w.ndim != 2:
        raise ValueError(f"only matrices have blocks, but the weight has the shape {w.shape}")
    if scale_format not in ("float32", "ue8m0"):
        raise ValueError(f'scale_format must be "float32" or "ue8m0", but got {scale_format!r}')
    q = np.empty(w.shape, np.uint8)
    scale_inv = np.empty(scale_shape(w.shape, block), np.float32)
    for number, row in enumerate(range(0, len(w), block[0])):
        band = slice(row, row + block[0])
        scale_inv[number] = _quantize_band(w[band], q[band], block[1], scale_format == "ue8m0")
    return q.view(E4M3), scale_inv


def dequantize_blocks(
    q: np.ndarray,
    scale_inv: np.ndarray,
    block: tuple[int, int] = (128, 128),
    dtype: DTypeLike = np.float32,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """E4M3 q [rows, cols] times its block's scale: an FP32 product, rounded once more where `dtype` is narrower.

    scale_inv: [ceil(rows/block), ceil(cols/block)] in FP32, BF16 or F8_E8M0. out: an array of q's shape and of
    `dtype`, which is filled and returned. A NaN in q stays one. Several threads may work at once.
    Raises ValueError for another shape or type, and for scales that are not finite.
    """
    if q.ndim != 2 or q.dtype != E4M3:
        raise ValueError(f"expected a matrix of {E4M3}, but got {q.dtype} of the shape {q.shape}")
    if scale_inv.shape != scale_shape(q.shape, block):
        raise ValueError(
            f"a weight of the shape {q.shape} in blocks of {block} has scales of the shape "
            f"{scale_shape(q.shape, block)}, but got {scale_inv.shape}"
        )
    dtype = np.dtype(dtype)
    if out is None:
        out = np.empty(q.shape, dtype)
    if out.shape != q.shape or out.dtype != dtype:
        raise ValueError(f"out must be {dtype} of the shape {q.shape}, but is {out.dtype} of {out.shape}")
    scale_inv = scale_inv.astype(np.float32)
    if not np.isfinite(scale_inv).all():
        raise ValueError("a scale is not a finite number")
    for number, row in enumerate(range(0, len(q), block[0])):
        band = slice(row, row + block[0])
        _dequantize_band(q[band].view(np.uint8), scale_inv[number], block[1], out[band])
    return out


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = (128, 128)) -> tuple[int, int]:
    """The shape of the scales of a matrix."""
    rows, cols = shape
    return -(-rows // block[0]), -(-cols // block[1])


def _quantize_band(w: np.ndarray, q: np.ndarray, width: int, power_of_two: bool) -> np.ndarray:
    """Fills q, as bytes, with one row of blocks, each `width` wide; returns its scales."""
    cols = w.shape[1]
    amax = np.zeros(cols, np.float32)
    for rows in _parts(w):
        np.maximum(amax, np.abs(_float32(w[rows])).max(axis=0), out=amax)
    amax = np.maximum.reduceat(amax, np.arange(0, cols, width)) if cols else amax
    scale = _scales(amax, power_of_two)
    divisor = np.repeat(scale, width)[:cols]
    for rows in _parts(w):
        ENCODED.take(_upper_bits(_float32(w[rows]) / divisor), out=q[rows], mode="clip")
    if power_of_two:
        for number in np.flatnonzero((amax > LARGEST_ZERO) & (amax <= 232 * scale) & (scale > SMALLEST_SCALE)):
            columns = slice(number * width, (number + 1) * width)
            q[:, columns] = DOUBLED[q[:, columns]]
            scale[number] /= 2
    return scale


def _scales(amax: np.ndarray, power_of_two: bool) -> np.ndarray:
    """The scale of each block, from the largest absolute value in it."""
    if not (amax <= LARGEST_WEIGHT).all():  # a NaN is not
        raise ValueError("a weight is not a finite number of at most 2**127")
    scale = np.where(amax <= LARGEST_ZERO, np.float32(1), np.maximum(amax / E4M3_MAX, SMALLEST_SCALE))
    if power_of_two:
        fraction, exponent = np.frexp(scale)  # scale = fraction * 2**exponent, 0.5 <= fraction < 1
        scale = np.ldexp(np.float32(1), exponent - (fraction == 0.5))
    return scale


def _float32(w: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # an FP64 number out of range becomes an infinity, which is refused
        return w.astype(np.float32, copy=False)


def _upper_bits(x: np.ndarray) -> np.ndarray:
    """The index of x, FP32, in ENCODED. Overwrites x."""
    bits = x.view(np.uint32)
    sticky = (bits & np.uint32(0xFFFF)) + np.uint32(0xFFFF)  # reaches bit 16 unless the lower bits are all zero
    np.bitwise_or(bits, sticky, out=bits)
    return np.right_shift(bits, 16, out=bits)


def _dequantize_band(q: np.ndarray, scale_inv: np.ndarray, width: int, out: np.ndarray) -> None:
    """Fills `out` with one row of blocks, each `width` wide; q is given as bytes."""
    # A table of 256 results for each block, then one look-up a value: 1.2 GB/s of FP8, to BF16 and to FP32 alike, on a
    # core where ml_dtypes' cast to FP32 alone makes 0.17; and two threads do twice that, as take() releases the GIL.
    bits = np.dtype(f"u{out.itemsize}")
    table = (DECODED * scale_inv[:, None]).astype(out.dtype).view(bits).reshape(-1)
    column = np.repeat(np.arange(len(scale_inv)) * 256, width)[: q.shape[1]]
    for rows in _parts(q):
        out[rows].view(bits)[...] = table.take(q[rows] + column, mode="clip")


def _parts(band: np.ndarray) -> list[slice]:
    """Rows of `band`, WORKING_VALUES values or one row at a time."""
    step = max(1, WORKING_VALUES // max(1, band.shape[1]))
    return [slice(row, row + step) for row in range(0, len(band), step)]
