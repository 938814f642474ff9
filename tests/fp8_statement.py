"""FP8 training once more, tile by tile in NumPy, sharing nothing with the package [DeepSeek-V3 report, section 3.3]."""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = np.float32(448)
SMALLEST_NORMAL = np.float32(2.0**-126)

# --- numbers ---


def quantize(x: np.ndarray, tile: tuple[int | None, ...], scale_format: str = "float32"):
    """(E4M3 of x's shape, FP32 scales): one scale for each tile; None in `tile` is the whole of that dimension."""
    x = x.astype(np.float32)
    x = np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)
    places = [1 if edge is None else math.ceil(n / edge) for n, edge in zip(x.shape, tile, strict=True)]
    q, scales = np.empty(x.shape, E4M3), np.empty(places, np.float32)
    for place, where in tiles_of(scales, tile):
        scales[place] = scale_of(x[where], scale_format)
        q[where] = to_e4m3(x[where] / scales[place])
    return q, scales


def scale_of(tile: np.ndarray, scale_format: str) -> np.float32:
    """What brings the largest value of a tile to 448, E4M3's largest."""
    amax = np.max(np.abs(tile), initial=np.float32(0))
    if not np.isfinite(amax):
        return np.float32(np.nan)
    if amax == 0:
        return np.float32(1)
    scale = max(amax / E4M3_MAX, SMALLEST_NORMAL)
    return round_up_to_power_of_two(scale) if scale_format == "ue8m0" else scale


def round_up_to_power_of_two(x: np.float32) -> np.float32:
    fraction, exponent = math.frexp(x)  # x = fraction * 2**exponent, 0.5 <= fraction < 1
    return np.float32(math.ldexp(1, exponent - 1 if fraction == 0.5 else exponent))


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; numbers out of range become the largest. NaN stays NaN."""
    return np.clip(x, -E4M3_MAX, E4M3_MAX).astype(E4M3)


def dequantize(q: np.ndarray, scales: np.ndarray, tile: tuple[int | None, ...]) -> np.ndarray:
    """FP32: each value times the scale of its tile."""
    x = np.empty(q.shape, np.float32)
    for place, where in tiles_of(scales, tile):
        x[where] = q[where].astype(np.float32) * scales[place]
    return x


def tiles_of(scales: np.ndarray, tile: tuple[int | None, ...]):
    """The index of each scale, and where its tile is."""
    for place in np.ndindex(*scales.shape):
        edges = zip(place, tile, strict=True)
        yield place, tuple(slice(None) if edge is None else slice(i * edge, (i + 1) * edge) for i, edge in edges)


# --- a Linear and its gradients [figure 6] ---


class Tile(NamedTuple):
    """The values that share a scale, counted along the free and the contracted dimension of a product."""

    free: int | None
    contracted: int | None
    scale_format: str = "float32"


class Statement(NamedTuple):
    """How the operands of all three products are scaled."""

    activation: Tile = Tile(1, 128)
    weight: Tile = Tile(128, 128)
    gradient: Tile = Tile(1, 128)


WHOLE = Tile(None, None)
STATEMENTS = {
    "fp8_deepseek": Statement(),
    "fp8_deepseek_ue8m0": Statement(Tile(1, 128, "ue8m0"), Tile(128, 128, "ue8m0"), Tile(1, 128, "ue8m0")),
    "fp8_tensorwise": Statement(WHOLE, WHOLE, WHOLE),
    "fp8_gradient_blocks": Statement(gradient=Tile(128, 128)),
    "mxfp8": Statement(Tile(1, 32, "ue8m0"), Tile(1, 32, "ue8m0"), Tile(1, 32, "ue8m0")),
}


def linear(x_BTD: np.ndarray, w_DF: np.ndarray, dy_BTF: np.ndarray, how: Statement):
    """(y, dx, dw) of x times w in FP64: each operand rounded to E4M3 for each product, the products exact."""
    x = rounded(x_BTD, how.activation, contracted=2)
    y = wide(x) @ wide(rounded(w_DF, how.weight, contracted=0))
    dx = wide(rounded(dy_BTF, how.gradient, contracted=2)) @ wide(rounded(w_DF, how.weight, contracted=1)).T
    # All that is left of x is what Fprop multiplied: it is rounded a second time.
    return y, dx, weight_gradient(x, dy_BTF, how)


def weight_gradient(x_BTD: np.ndarray, dy_BTF: np.ndarray, how: Statement) -> np.ndarray:
    """[D, F]: the tiles lie along the tokens, each sequence has its own."""
    x, dy = rounded(x_BTD, how.activation, contracted=1), rounded(dy_BTF, how.gradient, contracted=1)
    return sum(wide(x_TD).T @ wide(dy_TF) for x_TD, dy_TF in zip(x, dy, strict=True))


def grouped_linear(
    x_CD: np.ndarray, w_EDF: np.ndarray, dy_CF: np.ndarray, sizes_E: list[int], block: int, how: Statement
):
    """(y, dx, dw) of rows sorted by expert; groups begin at multiples of `block`, and no tile lies in two."""
    x = rounded(x_CD, how.activation, contracted=1, rows_at_most=block)
    dy = rounded(dy_CF, how.gradient, contracted=1, rows_at_most=block)
    x_along_rows = rounded(x, how.activation, contracted=0, rows_at_most=block)
    dy_along_rows = rounded(dy_CF, how.gradient, contracted=0, rows_at_most=block)
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w_EDF.shape)
    start = 0
    for e, size in enumerate(sizes_E):
        rows = slice(start, start + size)
        y[rows] = wide(x[rows]) @ wide(rounded(w_EDF[e], how.weight, contracted=0))
        dx[rows] = wide(dy[rows]) @ wide(rounded(w_EDF[e], how.weight, contracted=1)).T
        dw[e] = wide(x_along_rows[rows]).T @ wide(dy_along_rows[rows])
        start += size
    return y, dx, dw


def rounded(x: np.ndarray, tile: Tile, contracted: int, rows_at_most: int | None = None) -> np.ndarray:
    """FP32: x after a stay in E4M3, as an operand of a product over the dimension `contracted`, one of its last two."""
    if tile == WHOLE:
        return dequantize(*quantize(x, (None,) * x.ndim), (None,) * x.ndim)
    edges = [1] * x.ndim
    edges[-2] = edges[-1] = tile.free
    edges[contracted] = tile.contracted
    if rows_at_most is not None:
        edges[-2] = min(edges[-2], rows_at_most)
    edges = tuple(edges)
    return dequantize(*quantize(x, edges, tile.scale_format), edges)


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)
