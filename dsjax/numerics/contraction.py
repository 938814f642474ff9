"""The products of a Linear, for operands plain or quantised, dense or grouped by expert, by whatever multiplies here.

`rows_times` is Fprop and, with the weight transposed, Dgrad; `weight_gradient` is Wgrad. Sums are FP32 throughout,
unless the recipe emulates a narrower accumulator.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from dsjax.numerics import fp8, grouped_matmul
from dsjax.numerics.accumulation import scaled_limited_product
from dsjax.numerics.grouped_matmul import Groups
from dsjax.numerics.recipe import Recipe, Scaling
from dsjax.sharding import AXES, BATCH, replicated


class Scaled(NamedTuple):
    """An operand for a product that applies scales itself: E4M3 values and their scales."""

    values: jax.Array  # E4M3, or FP32 for an emulation
    scale: jax.Array


class Working(NamedTuple):
    """A weight with a rounded copy of it: products take the copy, the master gets the gradient, in FP32."""

    master: jax.Array
    values: jax.Array  # E4M3 as bytes, uint8, made once a step; or, where nothing is quantised, the compute dtype
    scale: jax.Array | None  # of E4M3


Weight = jax.Array | Working
Operand = jax.Array | Scaled  # an array is ready to be multiplied: rounded to E4M3 where the recipe says so


def quantized(x: jax.Array, scaling: Scaling | None, contracted: int, groups: Groups | None, recipe: Recipe) -> Operand:
    """An activation or gradient [..., tokens, width] as an operand; `contracted` is -1 or -2, the tokens.

    A tile is cut where a sequence or a group of rows ends: none spans two of them.
    """
    if scaling is None:
        return x.astype(recipe.operand_dtype)
    tiles = _tiles(x.ndim, scaling, contracted)
    if scaling.free is None:  # one scale for all of the tensor
        tiles = [None] * x.ndim
    elif groups is not None and tiles[-2] is not None:
        tiles[-2] = min(tiles[-2], groups.block)
    return _operand(x, tiles, scaling.scale_format, recipe)


def quantized_weight(w: Weight, scaling: Scaling | None, contracted: int, recipe: Recipe) -> Operand:
    """A weight [..., D, F] as an operand; each expert's matrix is a tensor of its own."""
    if scaling is None:
        return w.values if isinstance(w, Working) else w.astype(recipe.operand_dtype)
    if isinstance(w, Working):
        return _working_operand(w, _tiles(w.values.ndim, scaling, contracted), recipe)
    return _operand(w, _tiles(w.ndim, scaling, contracted), scaling.scale_format, recipe)


def working_copy(w: jax.Array, recipe: Recipe) -> tuple[jax.Array, jax.Array]:
    """`values` and `scale` of a Working; the same numbers as every product would make of w for itself.

    The recipe scales weights alike along both dimensions: what Fprop multiplies, Dgrad does.
    """
    assert recipe.weight is not None and recipe.weight.free == recipe.weight.contracted
    q, scale = fp8.quantize(w, _tiles(w.ndim, recipe.weight, -1), recipe.weight.scale_format)
    return lax.bitcast_convert_type(q, jnp.uint8), scale


def _working_operand(w: Working, tiles: list[int | None], recipe: Recipe) -> Operand:
    values = w.values
    if recipe.mesh is not None and values.ndim == 2:
        # Said here, or the partitioner gathers what is made of the bytes.
        values = lax.with_sharding_constraint(values, replicated(recipe.mesh))
    assert w.scale is not None
    q = lax.bitcast_convert_type(values, fp8.E4M3)
    if recipe.native:
        return Scaled(q, w.scale)
    if recipe.accumulation != "fp32":
        return Scaled(q.astype(jnp.float32), w.scale)
    return fp8.apply_scales(q.astype(jnp.float32), w.scale, tiles).astype(recipe.operand_dtype)


def _tiles(ndim: int, scaling: Scaling, contracted: int) -> list[int | None]:
    tiles: list[int | None] = [1] * ndim
    tiles[contracted], tiles[-3 - contracted] = scaling.contracted, scaling.free
    return tiles


def _operand(x: jax.Array, tiles: list[int | None], scale_format: str, recipe: Recipe) -> Operand:
    values, scale = fp8.scaled(x, tiles, scale_format)
    if recipe.native:
        return Scaled(values.astype(fp8.E4M3), scale)
    if recipe.accumulation != "fp32":
        return Scaled(values, scale)
    return fp8.apply_scales(values, scale, tiles).astype(recipe.operand_dtype)


def rows_times(x: Operand, w: Operand, groups: Groups | None, recipe: Recipe, *, transposed: bool) -> jax.Array:
    """x [..., D] times w [D, F], or of rows [C, D] each times its expert's of w [E, D, F]; in the compute dtype.

    With `transposed`, x is [..., F] and the result [..., D].
    """
    if isinstance(x, Scaled) and isinstance(w, Scaled):
        # The contracted dimension of both is wanted last.
        w = w if transposed else Scaled(w.values.swapaxes(-1, -2), w.scale.swapaxes(-1, -2))
        return _scaled_rows_times(x, w, groups, recipe)
    assert not isinstance(x, Scaled) and not isinstance(w, Scaled)
    if groups is not None:
        return grouped_matmul.rows_times_weights(
            x, w, groups, recipe.precision, recipe.dtype, recipe.platform, transposed=transposed
        )
    spec = "...f,df->...d" if transposed else "...d,df->...f"
    return _einsum(spec, x, w, recipe).astype(recipe.dtype)


def weight_gradient(x: Operand, dy: Operand, groups: Groups | None, recipe: Recipe) -> jax.Array:
    """FP32 [D, F], x [..., D] and dy [..., F] contracted over tokens; or [E, D, F], over each expert's rows."""
    if isinstance(x, Scaled) and isinstance(dy, Scaled):
        return _scaled_weight_gradient(x, dy, groups, recipe)
    assert not isinstance(x, Scaled) and not isinstance(dy, Scaled)
    if groups is not None:
        return grouped_matmul.weight_gradient(x, dy, groups, recipe.precision, recipe.platform)
    # Autodiff would write this one as a transposed product, four times slower on XLA:CPU.
    return _einsum("md,mf->df", x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), recipe)


def _einsum(spec: str, a: jax.Array, b: jax.Array, recipe: Recipe) -> jax.Array:
    return jnp.einsum(spec, a, b, precision=recipe.precision, preferred_element_type=jnp.float32)


def _scaled_rows_times(x: Scaled, w: Scaled, groups: Groups | None, recipe: Recipe) -> jax.Array:
    if recipe.native is None:
        return _limited_rows_times(x, w, groups, recipe)
    if groups is None:
        return _native_rows_times(x, w, recipe)
    owners, used = grouped_matmul.block_owners(groups, len(x.values) // groups.block)
    return _kernels().scaled_rows_times(*x, *w, owners, used, recipe.native or "", recipe.dtype)


def _scaled_weight_gradient(x: Scaled, dy: Scaled, groups: Groups | None, recipe: Recipe) -> jax.Array:
    if recipe.native is None:
        return _limited_weight_gradient(x, dy, groups, recipe)
    if groups is None:
        return _native_weight_gradient(x, dy, recipe)
    return _kernel_weight_gradient(x, dy, groups.sizes_E, groups.block, recipe)


def _kernels() -> Any:
    # Not needed, and not always to be had, where nothing native runs.
    from dsjax.numerics import kernels

    return kernels


def _native_rows_times(x: Scaled, w: Scaled, recipe: Recipe) -> jax.Array:
    """Every device its own sequences; the partitioner knows nothing of kernels, but gathers the weight in FP8."""

    def local(values, scale, w_values, w_scale):
        lead, rows = values.shape[:-1], values.size // values.shape[-1]
        count = -(-rows // fp8.TILE)
        pad = ((0, count * fp8.TILE - rows), (0, 0))
        a, scale_a = (jnp.pad(v.reshape(rows, -1), pad) for v in (values, scale))
        owners, used = jnp.zeros((count,), jnp.int32), jnp.int32(count)
        y = _kernels().scaled_rows_times(
            a, scale_a, w_values[None], w_scale[None], owners, used, recipe.native or "", recipe.dtype
        )
        return y[:rows].reshape(*lead, -1)

    specs = (BATCH, BATCH, PartitionSpec(), PartitionSpec())
    return jax.shard_map(local, mesh=recipe.mesh, in_specs=specs, out_specs=BATCH, check_vma=False)(*x, *w)


def _native_weight_gradient(x: Scaled, dy: Scaled, recipe: Recipe) -> jax.Array:
    def local(*arrays):
        x, dy = (_whole_tiles(Scaled(*pair)) for pair in (arrays[:2], arrays[2:]))
        return _kernel_weight_gradient(x, dy, jnp.array([len(x.values)], jnp.int32), fp8.TILE, recipe)

    # One sum a device; their sum over the devices, under the partitioner, is a reduce-scatter.
    parts = jax.shard_map(local, mesh=recipe.mesh, in_specs=BATCH, out_specs=PartitionSpec(AXES), check_vma=False)
    return jnp.sum(parts(*x, *dy), axis=0)


def _kernel_weight_gradient(x: Scaled, dy: Scaled, sizes_E: jax.Array, tile: int, recipe: Recipe) -> jax.Array:
    ends_E = jnp.cumsum(sizes_E)
    starts_E = ends_E - sizes_E
    x_DC, dy_FC = Scaled(*(a.T for a in x)), Scaled(*(a.T for a in dy))
    return _kernels().scaled_weight_gradient(*x_DC, *dy_FC, starts_E, ends_E, recipe.native or "", tile)


def _whole_tiles(x: Scaled) -> Scaled:
    """x [..., tokens, width] as [rows, width], each sequence padded to whole tiles, for which it has scales already."""
    pads = [(0, 0)] * (x.values.ndim - 2) + [(0, -x.values.shape[-2] % fp8.TILE), (0, 0)]
    return Scaled(*(a.reshape(-1, a.shape[-1]) for a in (jnp.pad(x.values, pads), x.scale)))


def _limited_rows_times(x: Scaled, w: Scaled, groups: Groups | None, recipe: Recipe) -> jax.Array:
    def multiply(x: Scaled, w: Scaled) -> jax.Array:
        scale_w = fp8.apply_scales(jnp.ones((w.scale.shape[1], len(w.values))), w.scale.T, (1, fp8.TILE))
        return scaled_limited_product(x.values, x.scale, w.values.T, scale_w, recipe.accumulation != "fp22")

    if groups is not None:
        width = w.values.shape[-2]
        return grouped_matmul.each_block_times_weights(multiply, x, w, groups, width, recipe.dtype)
    flat = Scaled(*(a.reshape(-1, a.shape[-1]) for a in x))
    return multiply(flat, w).astype(recipe.dtype).reshape(*x.values.shape[:-1], -1)


def _limited_weight_gradient(x: Scaled, dy: Scaled, groups: Groups | None, recipe: Recipe) -> jax.Array:
    def multiply(x: Scaled, dy: Scaled) -> jax.Array:
        return scaled_limited_product(x.values.T, x.scale.T, dy.values, dy.scale, recipe.accumulation != "fp22")

    if groups is not None:
        shape = (x.values.shape[-1], dy.values.shape[-1])
        return grouped_matmul.each_block_weight_gradient(multiply, x, dy, groups, shape)
    return multiply(_whole_tiles(x), _whole_tiles(dy))
