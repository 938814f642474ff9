"""Rows sorted by expert times one weight matrix per expert.

The rows of expert e are consecutive, its group begins at a multiple of `ROW_BLOCK` (the dispatcher lays them
out so), and rows between a group's last and the next group's first are zero. Two forms, chosen by the platform
compiled for: on CPU, blocks of rows each times its own expert's matrix, because XLA:CPU runs `ragged_dot` as E
dense products; elsewhere `ragged_dot`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.numerics.linear import Recipe

ROW_BLOCK = 128  # tile edge of TPU and GPU kernels and of FP8 scales; on CPU large enough to run near dense speed


def row_block(rows: int, groups: int) -> int:
    """The alignment of groups for about `rows` rows: a power of two, at most ROW_BLOCK, that wastes little."""
    block = 8
    while block < ROW_BLOCK and block * groups < rows:
        block *= 2
    return block


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(x_CD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, block: int, recipe: Recipe) -> jax.Array:
    """y [C, F]: the rows of group e times w[e].

    Args:
      x_CD: rows, sorted by group; C is a multiple of `block`.
      w_EDF: FP32 master weights.
      sizes_E: int32 rows in each group, each a multiple of `block`; rows past their sum come out zero.
      block: alignment of the groups.
      recipe: how to multiply.
    """
    return _rows_times_weights(x_CD, w_EDF, sizes_E, block, recipe, transposed=False)


def _grouped_fwd(x_CD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, block: int, recipe: Recipe):
    return grouped_matmul(x_CD, w_EDF, sizes_E, block, recipe), (x_CD, w_EDF, sizes_E)


def _grouped_bwd(block: int, recipe: Recipe, kept, dy_CF: jax.Array):
    x_CD, w_EDF, sizes_E = kept
    dx_CD = _rows_times_weights(dy_CF, w_EDF, sizes_E, block, recipe, transposed=True).astype(x_CD.dtype)
    return dx_CD, _weight_gradient(x_CD, dy_CF, sizes_E, block, recipe), None


grouped_matmul.defvjp(_grouped_fwd, _grouped_bwd)


def _rows_times_weights(x, w_EDF, sizes_E, block: int, recipe: Recipe, *, transposed: bool) -> jax.Array:
    forms = {
        "cpu": partial(_blocks_times_weights, block=block, recipe=recipe, transposed=transposed),
        "default": partial(_ragged_times_weights, recipe=recipe, transposed=transposed),
    }
    return lax.platform_dependent(x.astype(recipe.dtype), w_EDF.astype(recipe.dtype), sizes_E, **forms)


def _weight_gradient(x_CD, dy_CF, sizes_E, block: int, recipe: Recipe) -> jax.Array:
    forms = {
        "cpu": partial(_blocks_weight_gradient, block=block, recipe=recipe),
        "default": partial(_ragged_weight_gradient, recipe=recipe),
    }
    return lax.platform_dependent(x_CD.astype(recipe.dtype), dy_CF.astype(recipe.dtype), sizes_E, **forms)


def _ragged_times_weights(x, w_EDF, sizes_E, *, recipe: Recipe, transposed: bool) -> jax.Array:
    w = w_EDF.swapaxes(1, 2) if transposed else w_EDF
    out = lax.ragged_dot(x, w, sizes_E, precision=recipe.precision, preferred_element_type=jnp.float32)
    return out.astype(recipe.dtype)


def _ragged_weight_gradient(x_CD, dy_CF, sizes_E, *, recipe: Recipe) -> jax.Array:
    rows_contracted = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(
        x_CD, dy_CF, sizes_E, rows_contracted, precision=recipe.precision, preferred_element_type=jnp.float32
    )


def _block_owners(sizes_E: jax.Array, block: int, blocks: int) -> tuple[jax.Array, jax.Array]:
    """For each block of rows the expert it belongs to, and how many blocks are in use."""
    ends_E = jnp.cumsum(sizes_E) // block
    owners = jnp.searchsorted(ends_E, jnp.arange(blocks, dtype=ends_E.dtype), side="right")
    return jnp.minimum(owners, sizes_E.size - 1), ends_E[-1]


def _blocks_times_weights(x, w_EDF, sizes_E, *, block: int, recipe: Recipe, transposed: bool) -> jax.Array:
    owners, used = _block_owners(sizes_E, block, x.shape[0] // block)
    spec, width = ("cf,df->cd", w_EDF.shape[1]) if transposed else ("cd,df->cf", w_EDF.shape[2])

    def one_block(i, out):
        rows = lax.dynamic_slice_in_dim(x, i * block, block)
        y = jnp.einsum(spec, rows, w_EDF[owners[i]], preferred_element_type=jnp.float32)
        return lax.dynamic_update_slice_in_dim(out, y.astype(recipe.dtype), i * block, 0)

    return lax.fori_loop(0, used, one_block, jnp.zeros((x.shape[0], width), recipe.dtype))


def _blocks_weight_gradient(x_CD, dy_CF, sizes_E, *, block: int, recipe: Recipe) -> jax.Array:
    del recipe  # operands arrive in the compute dtype; sums are FP32
    owners, used = _block_owners(sizes_E, block, x_CD.shape[0] // block)

    def one_block(i, dw_EDF):
        x = lax.dynamic_slice_in_dim(x_CD, i * block, block)
        dy = lax.dynamic_slice_in_dim(dy_CF, i * block, block)
        dw = dw_EDF[owners[i]] + jnp.einsum("cd,cf->df", x, dy, preferred_element_type=jnp.float32)
        return lax.dynamic_update_slice_in_dim(dw_EDF, dw[None], owners[i], 0)

    shape = (sizes_E.size, x_CD.shape[1], dy_CF.shape[1])
    return lax.fori_loop(0, used, one_block, jnp.zeros(shape, jnp.float32))
