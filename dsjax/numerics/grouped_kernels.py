"""BF16 rows times one matrix per expert on GPUs, and the gradient of those matrices, by Pallas's Triton form.

XLA has no such product on GPUs: it copies the rows once for each expert, masked, and multiplies all of them. Here each
program computes one tile of the output with the one matrix that its rows belong to. The kernels are interpreted on a
CPU in the tests and compiled for H100 ahead of time; they have not run on hardware yet.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from dsjax.numerics.kernels import tile_of_program

TILE = 128  # edge of an output tile; rows of a tile are fewer where the groups' block is
DEPTH = 64  # of the contraction in one step; three steps of both operands are 96 KiB of shared memory
LEAST = 16  # what each dimension of a product must be a multiple of, for tensor cores
_PARAMETERS = triton.CompilerParams(num_warps=8, num_stages=3)


def fits(*sizes: int) -> bool:
    """Whether arrays of these sizes can be cut into whole tiles."""
    return all(size % LEAST == 0 for size in sizes)


def rows_times(
    x: jax.Array, w_EDF: jax.Array, owners: jax.Array, used: jax.Array, dtype: DTypeLike, *, transposed: bool,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """[C, F]: the i-th of len(owners) equal blocks of rows times w[owners[i]]; past the `used` blocks zeros.

    With `transposed`, [C, D] from rows [C, F]. Sums are FP32 and rounded to `dtype` once.
    """
    rows, block = len(x), len(x) // owners.size
    contracted, columns = w_EDF.shape[1:][:: -1 if transposed else 1]
    height, width, depth = math.gcd(block, TILE), math.gcd(columns, TILE), math.gcd(contracted, DEPTH)
    grid = rows // height, columns // width

    def kernel(owners_ref, used_ref, x_ref, w_ref, out_ref):
        i, j = tile_of_program(pl.program_id(0), grid)
        block_index = lax.div(i * height, block)
        owner, place, across = owners_ref[block_index], pl.ds(i * height, height), pl.ds(j * width, width)

        def step(t, total):
            along = pl.ds(t * depth, depth)
            if transposed:
                return total + _dot(x_ref[place, along], w_ref[owner, across, along], 1, 1)
            return total + _dot(x_ref[place, along], w_ref[owner, along, across], 1, 0)

        steps = jnp.where(block_index < used_ref[0], jnp.int32(contracted // depth), jnp.int32(0))
        total = lax.fori_loop(jnp.int32(0), steps, step, jnp.zeros((height, width), jnp.float32))
        out_ref[...] = total.astype(dtype)

    call = pl.pallas_call(
        kernel,
        grid=(grid[0] * grid[1],),
        out_specs=pl.BlockSpec((height, width), lambda p: tile_of_program(p, grid)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        compiler_params=_PARAMETERS,
        cost_estimate=_cost(2 * rows * contracted * columns, x, w_EDF),
        interpret=interpret,
        name="grouped_rows",
    )
    return call(owners, used.reshape(1), x, w_EDF)


def weight_gradient(
    x_CD: jax.Array, dy_CF: jax.Array, sizes_E: jax.Array, block: int, interpret: bool = False
) -> jax.Array:
    """FP32 [E, D, F]: x transposed times dy over the rows of each expert, whose numbers are multiples of `block`."""
    (rows, D), F, E = x_CD.shape, dy_CF.shape[1], sizes_E.size
    depth, height, width = math.gcd(block, DEPTH), math.gcd(D, TILE), math.gcd(F, TILE)
    grid = D // height, F // width
    ends_E = jnp.cumsum(sizes_E, dtype=jnp.int32)

    def kernel(starts_ref, ends_ref, x_ref, dy_ref, out_ref):
        expert = pl.program_id(0)
        i, j = tile_of_program(pl.program_id(1), grid)

        def step(t, total):
            along = pl.ds(t * depth, depth)
            return total + _dot(x_ref[along, pl.ds(i * height, height)], dy_ref[along, pl.ds(j * width, width)], 0, 0)

        first, last = lax.div(starts_ref[expert], depth), lax.div(ends_ref[expert], depth)
        out_ref[...] = lax.fori_loop(first, last, step, jnp.zeros((height, width), jnp.float32))

    call = pl.pallas_call(
        kernel,
        grid=(E, grid[0] * grid[1]),
        out_specs=pl.BlockSpec((None, height, width), lambda e, p: (e, *tile_of_program(p, grid))),
        out_shape=jax.ShapeDtypeStruct((E, D, F), jnp.float32),
        compiler_params=_PARAMETERS,
        cost_estimate=_cost(2 * rows * D * F, x_CD, dy_CF),
        interpret=interpret,
        name="grouped_weight_gradient",
    )
    return call((ends_E - sizes_E).astype(jnp.int32), ends_E, x_CD, dy_CF)


def _dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    return lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)


def _cost(flops: int, *operands: jax.Array) -> pl.CostEstimate:
    return pl.CostEstimate(flops=flops, bytes_accessed=sum(a.nbytes for a in operands), transcendentals=0)
