"""FP8 products on matrix units, with the scales of DeepSeek-V3 (report, section 3.3.2).

Along the contraction every tile of 128 has its own scales, so the sum of a tile leaves the matrix unit before it is
scaled and added up in FP32: acc += dot(a_tile, b_tile) * scale_a * scale_b. XLA has no such product.

Both operands are K-major (the contraction comes last), because that is all that Hopper's FP8 tensor cores read.
Call these inside `shard_map`: XLA cannot partition a kernel.

`scaled_rows_times` and `scaled_weight_gradient` reduce to one product, whose output is cut into tiles of 128 rows and
whose table says for each tile which rows meet which matrix over which part of the contraction. Each form is that
product for one kind of matrix unit. All three are interpreted on the CPU in the tests and compiled ahead of time for
their chips (H100; L40 and B200; TPU7x); none has run on hardware yet.
"""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu
from jax.experimental.pallas import tpu, triton
from jax.typing import DTypeLike

from dsjax.planning import hardware

TILE = 128  # values along the contraction that share a scale; edge of a weight's block; rows of a kernel's tile
NAME = "scaled_product"  # of every form, where programs are looked through
_ROWS_TOGETHER = 8  # row tiles that GPU programs running at the same time share, for fewer misses of L2
# What the rows of b, the columns of the output, must be a multiple of. Hopper's copy engine wants rows of 16 bytes.
_STEP = {"hopper": 16, "triton": 1, "mosaic": TILE}


def native_form(device: jax.Device) -> str | None:
    """The form of these products that `device` can run on FP8 matrix units, or None if it has none.

    "hopper" for NVIDIA's compute capability 9, "triton" for 8.9 (Ada) and from 10 on (Blackwell), "mosaic" for TPUs
    whose row in `planning.hardware` has an FP8 peak. Also right for the devices of an ahead-of-time topology.
    """
    if device.platform == "tpu":
        row = hardware.find(device.device_kind)
        return "mosaic" if row is not None and row.peak_flops_fp8 is not None else None
    # An AMD GPU says "gfx942" here, a CPU nothing.
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    if capability is None or (version := tuple(map(int, capability.groups()))) < (8, 9):
        return None
    return "hopper" if version[0] == 9 else "triton"


class _Tiles(NamedTuple):
    """What each tile of 128 output rows sums up; int32, one entry a tile."""

    a_row: jax.Array  # where its rows begin in a
    b_row: jax.Array  # where the matrix they are multiplied with begins in b
    first: jax.Array  # the first tile of the contraction
    last: jax.Array  # the end of the contraction; the same as `first` gives zeros


def scaled_rows_times(
    a_MK: jax.Array,
    scale_a: jax.Array,
    b_ENK: jax.Array,
    scale_b: jax.Array,
    owners: jax.Array,
    used: jax.Array | int,
    form: str,
    out_dtype: DTypeLike,
    interpret: bool = False,
) -> jax.Array:
    """[M, N]: the i-th block of rows of a times b[owners[i]] transposed; a plain product is E = 1 and owners of zero.

    Args:
      a_MK: E4M3 rows, in len(owners) blocks of the same size. Blocks of 128 rows are the fast ones; smaller ones
        are computed as 128.
      scale_a: FP32 [M, ceil(K / 128)].
      b_ENK: E4M3 weights; N and K need not be multiples of 128, but padding them then costs a copy.
      scale_b: FP32 [E, ceil(N / 128), ceil(K / 128)].
      owners: int32, for each block of rows the matrix it belongs to.
      used: how many blocks are in use; the rows past them come out zero and cost nothing.
      form: as `native_form` says.
      out_dtype: sums are FP32 and rounded to this once.
      interpret: run on the CPU, for tests (for "hopper" this needs jax newer than 0.10).

    Raises ValueError if the rows do not divide into len(owners) blocks.
    """
    (M, K), (E, N, _) = a_MK.shape, b_ENK.shape
    if M % owners.size:
        raise ValueError(f"{M} rows do not divide into {owners.size} blocks of the same size")
    block = M // owners.size
    a = _widen(_widen(a_MK, 1, K, TILE), 0, block, TILE)
    b = _widen(_widen(b_ENK, 2, K, TILE), 1, N, _STEP[form])
    columns = b.shape[1]
    # A scale for every row of b, so that both operands look alike: N * K / 32 bytes more.
    scale_rows = jnp.repeat(scale_b, TILE, axis=1)[:, :columns].reshape(E * columns, -1)
    i = jnp.arange(owners.size, dtype=jnp.int32)
    tiles = _Tiles(i * TILE, owners * columns, jnp.zeros_like(i), (i < used).astype(jnp.int32) * scale_a.shape[1])
    operands = a, _widen(scale_a, 0, block, TILE), b.reshape(E * columns, -1), scale_rows
    out = _product(*operands, tiles, columns, form, out_dtype, interpret)
    return out.reshape(-1, TILE, columns)[:, :block, :N].reshape(M, N)


def scaled_weight_gradient(
    x_DC: jax.Array,
    scale_x: jax.Array,
    dy_FC: jax.Array,
    scale_dy: jax.Array,
    starts_E: jax.Array,
    ends_E: jax.Array,
    form: str,
    tile: int = TILE,
    interpret: bool = False,
) -> jax.Array:
    """FP32 [E, D, F]: x times dy transposed over the tokens starts_E[e] .. ends_E[e], zeros where there are none.

    Args:
      x_DC: E4M3, tokens last. D a multiple of 128 saves a copy.
      scale_x: FP32 [D, C / tile].
      dy_FC: E4M3, tokens last.
      scale_dy: FP32 [F, C / tile].
      starts_E, ends_E: int32 multiples of `tile`.
      form: as `native_form` says.
      tile: tokens that share a scale, a divisor of C; 128 is the fast one, smaller ones are computed as 128.
      interpret: run on the CPU, for tests (for "hopper" this needs jax newer than 0.10).

    Raises ValueError if C is not a multiple of `tile`.
    """
    (D, C), F, E = x_DC.shape, dy_FC.shape[0], starts_E.size
    if C % tile:
        raise ValueError(f"{C} tokens are not a multiple of the tile of {tile}")
    x = _widen(_widen(x_DC, 1, tile, TILE), 0, D, TILE)
    dy = _widen(_widen(dy_FC, 1, tile, TILE), 0, F, _STEP[form])
    columns = dy.shape[0]
    rows = jnp.arange(x.shape[0] // TILE, dtype=jnp.int32) * TILE
    a_row, first = (each.reshape(-1) for each in jnp.broadcast_arrays(rows[None, :], starts_E[:, None] // tile))
    tiles = _Tiles(a_row, jnp.zeros_like(a_row), first, jnp.repeat(ends_E // tile, rows.size))
    operands = x, _widen(scale_x, 0, D, TILE), dy, _widen(scale_dy, 0, F, _STEP[form])
    out = _product(*operands, tiles, columns, form, jnp.float32, interpret)
    return out.reshape(E, -1, columns)[:, :D, :F]


def product_flops(a: Any, out: Any) -> int:
    """What one product multiplies: each value of a once with every column of the output."""
    return 2 * a.size * out.shape[1]


def _product(a, scale_a, b, scale_b, tiles: _Tiles, columns: int, form: str, out_dtype, interpret: bool) -> jax.Array:
    """out [tiles * 128, columns]: tile i of rows, a[a_row:][:128] times the `columns` rows of b from b_row, transposed.

    a [., K], b [., K] E4M3 with K a multiple of 128; their scales [., K / 128].
    """
    scales = scale_a.T, scale_b.T  # the scales of neighbouring rows, needed together, now lie together
    out = jax.ShapeDtypeStruct((tiles.first.size * TILE, columns), out_dtype)
    grid = tiles.first.size, pl.cdiv(columns, TILE)
    return _FORMS[form](a, scales[0], b, scales[1], tiles, out=out, grid=grid, interpret=interpret)


# Hopper. Two warpgroups multiply, 64 x 128 sums each, held twice (the tile's and the total): 153 to 167 registers a
# thread by the compiler's report for H100, none spilled. While one scales its sums the other has the tensor cores. A
# third fetches with the copy engine. Four stages of 33 KiB and the output's 64 KiB at most fit into the 227 KiB of
# shared memory. Triton is no choice here: Pallas cannot tell it to accept the FP8 tensor core's own sums, and so it
# converts the operands to FP16 and multiplies with the instructions of the generation before.
# Not tried: two programs sharing what they fetch (tiles of 128 x 128 read 8 TB/s from L2 at 1,000 TFLOP/s).
_STAGES, _WARPGROUPS = 4, 2
_HALF = TILE // _WARPGROUPS  # rows of one warpgroup


def _hopper_product(a, scale_a, b, scale_b, tiles: _Tiles, *, out, grid, interpret):
    untyped: Any = mgpu  # jax 0.12 declares these classes abstract
    fp8 = (untyped.TilingTransform((8, 128)), untyped.SwizzleTransform(128))
    wide = (untyped.TilingTransform((8, 128 // out.dtype.itemsize)), untyped.SwizzleTransform(128))
    product = mgpu.kernel(
        partial(_hopper_kernel, grid=grid),
        out_type=out,
        grid=(grid[0] * grid[1],),
        grid_names=("tile",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=NAME,
        scratch_types=[
            mgpu.SMEM((_STAGES, TILE, TILE), a.dtype, transforms=fp8),
            mgpu.SMEM((_STAGES, TILE, TILE), b.dtype, transforms=fp8),
            mgpu.SMEM((_STAGES, TILE), jnp.float32),
            mgpu.SMEM((_STAGES, TILE), jnp.float32),
            mgpu.SMEM((_WARPGROUPS, _HALF, TILE), out.dtype, transforms=wide),
            mgpu.Barrier(num_arrivals=4, num_barriers=_STAGES),
            mgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STAGES),
        ],
        compiler_params=mgpu.CompilerParams(lowering_semantics=mgpu.LoweringSemantics.Warpgroup),
        interpret=mgpu.InterpretGPUParams(detect_races=True) if interpret else None,  # type: ignore[attr-defined]
    )
    return product(a, scale_a, b, scale_b, *tiles)


def _hopper_kernel(
    a_ref, scale_a_ref, b_ref, scale_b_ref, a_row_ref, b_row_ref, first_ref, last_ref, out_ref,
    a_stages, b_stages, scale_a_stages, scale_b_stages, out_tile, filled, emptied, *, grid
):  # fmt: skip
    i, j = tile_of_program(lax.axis_index("tile"), grid)
    group = lax.axis_index("warpgroup")
    first, last = first_ref[i], last_ref[i]

    @pl.when(group == _WARPGROUPS)
    def _fetch():
        a_rows = pl.ds(pl.multiple_of(a_row_ref[i], TILE), TILE)
        b_rows = pl.ds(pl.multiple_of(b_row_ref[i] + j * TILE, 16), TILE)

        def fetch(t, _):
            stage = lax.rem(t - first, _STAGES)

            @pl.when(t - first >= _STAGES)
            def _reuse():
                mgpu.barrier_wait(emptied.at[stage])

            k = pl.ds(t * TILE, TILE)
            mgpu.copy_gmem_to_smem(a_ref.at[a_rows, k], a_stages.at[stage], filled.at[stage])
            mgpu.copy_gmem_to_smem(b_ref.at[b_rows, k], b_stages.at[stage], filled.at[stage])
            mgpu.copy_gmem_to_smem(scale_a_ref.at[t, a_rows], scale_a_stages.at[stage], filled.at[stage])
            mgpu.copy_gmem_to_smem(scale_b_ref.at[t, b_rows], scale_b_stages.at[stage], filled.at[stage])

        lax.fori_loop(first, last, fetch, None)

    @pl.when(group < _WARPGROUPS)
    def _multiply():
        rows = pl.ds(group * _HALF, _HALF)

        def multiply(t, total):
            stage = lax.rem(t - first, _STAGES)
            mgpu.barrier_wait(filled.at[stage])

            def tile_sum(sum_ref):
                mgpu.wgmma(sum_ref, a_stages.at[stage, rows], b_stages.at[stage].transpose((1, 0)))
                return sum_ref[...]

            part = pl.run_scoped(tile_sum, mgpu.ACC((_HALF, TILE), jnp.float32))
            of_row, of_column = scale_a_stages[stage, rows], scale_b_stages[stage]
            # The copy engine may overwrite the scales only after they were read; the interpreter finds a race without.
            mgpu.commit_smem()
            mgpu.barrier_arrive(emptied.at[stage])
            scale = lax.broadcast_in_dim(of_row, part.shape, [0]) * lax.broadcast_in_dim(of_column, part.shape, [1])
            return total + part * scale

        total = lax.fori_loop(first, last, multiply, jnp.zeros((_HALF, TILE), jnp.float32))
        out_tile[group] = total.astype(out_tile.dtype)
        mgpu.commit_smem()
        place = pl.ds(i * TILE + group * _HALF, _HALF), pl.ds(j * TILE, TILE)
        mgpu.copy_smem_to_gmem(out_tile.at[group], out_ref.at[place])
        mgpu.wait_smem_to_gmem(0)


# Ada and Blackwell. One program computes 128 x 128 outputs with eight warps, so that the sums of a tile and the total
# take half of a thread's registers; a stage is 32 KiB of shared memory, and three fit into the 99 KiB of Ada. Compiled,
# it multiplies with mma.m16n8k32 on Ada and tcgen05.mma on Blackwell, both E4M3. From jax 0.12 Pallas calls its Triton
# back end deprecated.
_TRITON = triton.CompilerParams(num_warps=8, num_stages=3)


def _triton_product(a, scale_a, b, scale_b, tiles: _Tiles, *, out, grid, interpret):
    return pl.pallas_call(
        partial(_triton_kernel, grid=grid),
        grid=(grid[0] * grid[1],),
        out_specs=pl.BlockSpec((TILE, TILE), lambda p: tile_of_program(p, grid)),
        out_shape=out,
        compiler_params=_TRITON,
        cost_estimate=_cost(a, b, out),
        interpret=interpret,
        name=NAME,
    )(a, scale_a, b, scale_b, *tiles)


def _triton_kernel(a_ref, scale_a_ref, b_ref, scale_b_ref, a_row_ref, b_row_ref, first_ref, last_ref, out_ref, *, grid):
    i, j = tile_of_program(pl.program_id(0), grid)
    a_rows = pl.ds(a_row_ref[i], TILE)
    # Past the end the last row is read again; what it gives lies outside the output.
    b_rows = jnp.minimum(b_row_ref[i] + j * TILE + jnp.arange(TILE), b_ref.shape[0] - 1)

    def multiply(t, total):
        k = pl.ds(t * TILE, TILE)
        part = _dot(a_ref[a_rows, k], b_ref[b_rows, k])
        return total + part * (scale_a_ref[t, a_rows][:, None] * scale_b_ref[t, b_rows][None, :])

    total = lax.fori_loop(first_ref[i], last_ref[i], multiply, jnp.zeros((TILE, TILE), jnp.float32))
    out_ref[...] = total.astype(out_ref.dtype)


# TPU. A grid step takes up to 64 tiles of the contraction at once, so that its fixed cost (about a third of a
# microsecond) is small against its work; the steps past a group's end do nothing and fetch nothing. Scaling needs
# about three vector operations for every 128 multiplications, so the vector unit, not the matrix unit, sets the pace.
_CHUNK = 64


def _tpu_product(a, scale_a, b, scale_b, tiles: _Tiles, *, out, grid, interpret):
    chunks = pl.cdiv(scale_a.shape[0], _CHUNK)
    depth = scale_a.shape[0] if chunks == 1 else pl.cdiv(pl.cdiv(scale_a.shape[0], chunks), 8) * 8
    a, b = (jnp.pad(each, ((0, 0), (0, chunks * depth * TILE - each.shape[1]))) for each in (a, b))
    scale_a, scale_b = (jnp.pad(each, ((0, chunks * depth - each.shape[0]), (0, 0))) for each in (scale_a, scale_b))
    width = next(width for width in (512, 256, TILE) if out.shape[1] % width == 0)

    def chunk(c, i, first, last):
        return jnp.clip(c, lax.div(first[i], depth), lax.div(jnp.maximum(last[i] - 1, first[i]), depth))

    def place_a(j, i, c, a_row, b_row, first, last):
        return lax.div(a_row[i], TILE), chunk(c, i, first, last)

    def place_b(j, i, c, a_row, b_row, first, last):
        return lax.div(b_row[i], width) + j, chunk(c, i, first, last)

    specs = [
        pl.BlockSpec((TILE, depth * TILE), place_a),
        pl.BlockSpec((depth, TILE), lambda *args: place_a(*args)[::-1]),
        pl.BlockSpec((width, depth * TILE), place_b),
        pl.BlockSpec((depth, width), lambda *args: place_b(*args)[::-1]),
    ]
    return pl.pallas_call(
        _tpu_kernel,
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tiles),
            grid=(out.shape[1] // width, grid[0], chunks),
            in_specs=specs,
            out_specs=pl.BlockSpec((TILE, width), lambda j, i, c, *_: (i, j)),
            scratch_shapes=[tpu.VMEM((TILE, width), jnp.float32)],
        ),
        out_shape=out,
        cost_estimate=_cost(a, b, out),
        interpret=interpret,
        name=NAME,
    )(*tiles, a, scale_a, b, scale_b)


def _tpu_kernel(a_row_ref, b_row_ref, first_ref, last_ref, a_ref, scale_a_ref, b_ref, scale_b_ref, out_ref, total_ref):
    del a_row_ref, b_row_ref  # read by the index maps
    i, c = pl.program_id(1), pl.program_id(2)
    depth = scale_a_ref.shape[0]

    @pl.when(c == 0)
    def _start():
        total_ref[...] = jnp.zeros_like(total_ref)

    def multiply(t, _):
        k, row = pl.ds(pl.multiple_of(t * TILE, TILE), TILE), pl.ds(t, 1)
        scale = scale_a_ref[row, :].T * scale_b_ref[row, :]
        total_ref[...] += _dot(a_ref[:, k], b_ref[:, k]) * scale

    first, last = jnp.maximum(first_ref[i] - c * depth, 0), jnp.minimum(last_ref[i] - c * depth, depth)
    lax.fori_loop(first, last, multiply, None)

    @pl.when(c == pl.num_programs(2) - 1)
    def _store():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


_FORMS = {"hopper": _hopper_product, "triton": _triton_product, "mosaic": _tpu_product}


def _cost(a: jax.Array, b: jax.Array, out: Any) -> pl.CostEstimate:
    moved = a.nbytes + b.nbytes + out.size * out.dtype.itemsize
    return pl.CostEstimate(flops=product_flops(a, out), bytes_accessed=moved, transcendentals=0)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def tile_of_program(p, grid: tuple[int, int]):
    """Row and column tile of the p-th program: column by column within each group of _ROWS_TOGETHER row tiles."""
    rows, columns = grid
    first = lax.div(p, _ROWS_TOGETHER * columns) * _ROWS_TOGETHER
    height = jnp.minimum(rows - first, _ROWS_TOGETHER)
    within = p - first * columns
    return first + lax.rem(within, height), lax.div(within, height)


def _widen(x: jax.Array, dim: int, run: int, width: int) -> jax.Array:
    """Each run of `run` values along `dim` followed by zeros, up to a multiple of `width`."""
    gap = -run % width
    if gap == 0:
        return x
    runs = x.reshape(*x.shape[:dim], -1, run, *x.shape[dim + 1 :])
    padded = jnp.pad(runs, [(0, gap if d == dim + 1 else 0) for d in range(runs.ndim)])
    return padded.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])
