"""Rows sorted by expert times one weight matrix per expert, and the gradient of those weights.

The rows of expert e are consecutive, its group begins at a multiple of the block (the dispatcher lays them out so),
and rows between a group's last and the next group's first are zero. Chosen by the platform compiled for: on a CPU
blocks of rows each times its own expert's matrix, because XLA:CPU runs `ragged_dot` as E dense products; in BF16 on
GPUs the kernels of grouped_kernels.py; elsewhere `ragged_dot`, but for the weights' gradient on TPUs, which is JAX's
megablox kernel. XLA would mask all rows once for each expert, on TPUs for that gradient and on GPUs for everything.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

MEGABLOX_TILE = 128  # rows that the kernel takes at a time are a multiple of this, up to four times


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """Where the rows of each expert are."""

    sizes_E: jax.Array  # int32 rows of each group, each a multiple of `block`; rows past their sum belong to none
    block: int = field(metadata={"static": True})


def rows_times_weights(
    x: jax.Array,
    w_EDF: jax.Array,
    groups: Groups,
    precision: lax.Precision,
    dtype: DTypeLike,
    platform: str | None = None,
    *,
    transposed: bool,
) -> jax.Array:
    """y [C, F]: the rows of group e times w[e]; with `transposed` [C, D] from rows [C, F]. Sums are FP32.

    Rows past the groups come out zero. `platform`: compiled for, where known.
    """
    if _has_kernel(platform, x, w_EDF, groups.block, *w_EDF.shape[1:]):
        owners, used = block_owners(groups, len(x) // groups.block)
        return _kernels().rows_times(x, w_EDF, owners, used, dtype, transposed=transposed)
    forms = {
        "cpu": partial(_blocks_times_weights, block=groups.block, dtype=dtype, transposed=transposed),
        "default": partial(_ragged_times_weights, precision=precision, dtype=dtype, transposed=transposed),
    }
    return lax.platform_dependent(x, w_EDF, groups.sizes_E, **forms)


def weight_gradient(
    x_CD: jax.Array, dy_CF: jax.Array, groups: Groups, precision: lax.Precision, platform: str | None = None
) -> jax.Array:
    """dw [E, D, F] in FP32: for each group, the contraction over its rows. `platform`: compiled for, where known."""
    if platform == "tpu" and x_CD.dtype == dy_CF.dtype == jnp.bfloat16 and len(x_CD) % MEGABLOX_TILE == 0:
        return megablox_weight_gradient(x_CD, dy_CF, groups.sizes_E)
    if _has_kernel(platform, x_CD, dy_CF, groups.block, x_CD.shape[1], dy_CF.shape[1]):
        return _kernels().weight_gradient(x_CD, dy_CF, groups.sizes_E, groups.block)
    forms = {
        "cpu": partial(_blocks_weight_gradient, block=groups.block),
        "default": partial(_ragged_weight_gradient, precision=precision),
    }
    return lax.platform_dependent(x_CD, dy_CF, groups.sizes_E, **forms)


def _has_kernel(platform: str | None, a: jax.Array, b: jax.Array, *sizes: int) -> bool:
    return platform == "gpu" and a.dtype == b.dtype == jnp.bfloat16 and _kernels().fits(*sizes)


def _kernels() -> Any:
    from dsjax.numerics import grouped_kernels  # Pallas takes a second to import

    return grouped_kernels


def block_owners(groups: Groups, blocks: int) -> tuple[jax.Array, jax.Array]:
    """For each block of rows the expert it belongs to, and how many blocks are in use."""
    ends_E = jnp.cumsum(groups.sizes_E) // groups.block
    owners = jnp.searchsorted(ends_E, jnp.arange(blocks, dtype=ends_E.dtype), side="right")
    return jnp.minimum(owners, groups.sizes_E.size - 1), ends_E[-1]


def _ragged_times_weights(x, w_EDF, sizes_E, *, precision, dtype: DTypeLike, transposed: bool) -> jax.Array:
    w = w_EDF.swapaxes(1, 2) if transposed else w_EDF
    return lax.ragged_dot(x, w, sizes_E, precision=precision, preferred_element_type=jnp.float32).astype(dtype)


def _ragged_weight_gradient(x_CD, dy_CF, sizes_E, *, precision) -> jax.Array:
    rows_contracted = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(
        x_CD, dy_CF, sizes_E, rows_contracted, precision=precision, preferred_element_type=jnp.float32
    )


def megablox_weight_gradient(x_CD, dy_CF, sizes_E, interpret: bool = False) -> jax.Array:
    """`weight_gradient` by the TPU kernel, which takes BF16 and whole tiles of rows."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # Pallas takes a second to import

    rows = math.gcd(len(x_CD), 4 * MEGABLOX_TILE)
    columns = [min(4 * MEGABLOX_TILE, a.shape[1]) for a in (x_CD, dy_CF)]
    return tgmm(x_CD.T, dy_CF, sizes_E, jnp.float32, (rows, *columns), interpret=interpret)


def _blocks_times_weights(x, w_EDF, sizes_E, *, block: int, dtype: DTypeLike, transposed: bool) -> jax.Array:
    spec, width = ("cf,df->cd", w_EDF.shape[1]) if transposed else ("cd,df->cf", w_EDF.shape[2])
    multiply = partial(jnp.einsum, spec, preferred_element_type=jnp.float32)
    return each_block_times_weights(multiply, x, w_EDF, Groups(sizes_E, block), width, dtype)


def _blocks_weight_gradient(x_CD, dy_CF, sizes_E, *, block: int) -> jax.Array:
    multiply = partial(jnp.einsum, "cd,cf->df", preferred_element_type=jnp.float32)
    return each_block_weight_gradient(multiply, x_CD, dy_CF, Groups(sizes_E, block), (x_CD.shape[1], dy_CF.shape[1]))


def each_block_times_weights(
    multiply: Callable[..., jax.Array], x: Any, w: Any, groups: Groups, width: int, dtype: DTypeLike
) -> jax.Array:
    """[C, width]: `multiply(a block of x's rows, w of its expert)`, over the blocks in use.

    x and w may be trees of arrays with leading dimensions C and E (a block's share of C is taken from each).
    """
    rows = jax.tree.leaves(x)[0].shape[0]
    owners, used = block_owners(groups, rows // groups.block)

    def one_block(i, out):
        y = multiply(_block_of(x, i, rows // groups.block), jax.tree.map(lambda a: a[owners[i]], w))
        return lax.dynamic_update_slice_in_dim(out, y.astype(dtype), i * groups.block, 0)

    return lax.fori_loop(0, used, one_block, jnp.zeros((rows, width), dtype))


def each_block_weight_gradient(
    multiply: Callable[..., jax.Array], x: Any, dy: Any, groups: Groups, shape: tuple[int, int]
) -> jax.Array:
    """[E, *shape] FP32: for each expert the sum of `multiply(a block of x, that of dy)` over its blocks."""
    blocks = jax.tree.leaves(x)[0].shape[0] // groups.block
    owners, used = block_owners(groups, blocks)

    def one_block(i, dw):
        more = dw[owners[i]] + multiply(_block_of(x, i, blocks), _block_of(dy, i, blocks))
        return lax.dynamic_update_slice_in_dim(dw, more[None], owners[i], 0)

    return lax.fori_loop(0, used, one_block, jnp.zeros((groups.sizes_E.size, *shape), jnp.float32))


def _block_of(tree: Any, index: jax.Array, blocks: int) -> Any:
    """The index-th of `blocks` equal parts of every array, along its first dimension."""

    def part(a: jax.Array) -> jax.Array:
        size = a.shape[0] // blocks
        return lax.dynamic_slice_in_dim(a, index * size, size)

    return jax.tree.map(part, tree)
