"""The FP8 tensor core's limited accumulator, emulated (DeepSeek-V3 report, section 3.3.2).

Hopper adds FP8 products in groups of 32 along K. The products of a group are aligned to the largest exponent among
them; 13 fraction bits below it are kept and the rest is cut off, towards zero. The sum of the group is added to a
register of one sign, eight exponent and 13 mantissa bits (FP22; "Insights into DeepSeek-V3", ISCA 2025), which is cut
off towards zero too. Promotion takes the register out every 128 products, into a sum in FP32, and clears it.

Where the sources are silent this takes: the exponent of a product is that of its value (a normalised significand);
the register has no part in the alignment; register and group are added in FP32 before the result is cut.

Letters here: a product of [M, K] and [K, N]; R runs along K of L products each; S groups in a run of G products each.
"""

from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax

GROUP = 32
TILE = 128
FRACTION_BITS = 13

_SMALL = 2.0**-30  # below every product of E4M3 numbers: a group of zeros is aligned to this
_CHUNK = 1 << 16  # results computed at a time


def limited_product(a_MK: jax.Array, b_KN: jax.Array, promote_every: int | None) -> jax.Array:
    """a times b, FP32 [M, N], as the tensor core adds: for FP32 arrays that hold E4M3 values.

    promote_every: products between promotions, a multiple of 32 (DeepSeek takes 128); None for none.
    """
    if promote_every is not None and (promote_every <= 0 or promote_every % GROUP):
        raise ValueError(f"promote_every is {promote_every}; the tensor core adds {GROUP} products at a time")
    rows, k = a_MK.shape
    length = promote_every or max(k, 1)
    runs = -(-k // length)
    ones_MR, ones_RN = jnp.ones((rows, runs), jnp.float32), jnp.ones((runs, b_KN.shape[1]), jnp.float32)
    return _product(a_MK, ones_MR, b_KN, ones_RN, length, promote=True)


def scaled_limited_product(
    a_MK: jax.Array, scale_a_MR: jax.Array, b_KN: jax.Array, scale_b_RN: jax.Array, promote: bool
) -> jax.Array:
    """The product of two quantised matrices, FP32 [M, N]; run r is the products 128r to 128r + 127 along K.

    With promotion the register of a run, times the run's two scales, is added to the sum in FP32; compilers may fuse
    that into one rounding, as DeepSeek's kernel does. A register that is never taken out cannot be scaled: without
    promotion the sums of 32 products are scaled as they enter it, which hardware would have to be built for.

    Args:
      a_MK, b_KN: FP32 arrays that hold E4M3 values.
      scale_a_MR, scale_b_RN: FP32 scales, with R = ceil(K / 128).
      promote: whether the register is promoted after each run.
    """
    return _product(a_MK, scale_a_MR, b_KN, scale_b_RN, TILE, promote)


def _product(a_MK, scale_a_MR, b_KN, scale_b_RN, length: int, promote: bool) -> jax.Array:
    """R runs of `length` products each; the last may be shorter."""
    runs, columns = scale_b_RN.shape
    fill = runs * length - a_MK.shape[1]
    b_RLN = jnp.pad(b_KN, ((0, fill), (0, 0))).reshape(runs, length, columns)

    def one_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        a_K, scale_a_R = row
        a_RL = jnp.pad(a_K, (0, fill)).reshape(runs, length)

        def one_run(total_N, run):
            a_L, scale_a, b_LN, scale_b_N = run
            scale_N = scale_a * scale_b_N
            if not promote:
                return _accumulated(total_N, a_L, b_LN, scale_N), None
            register_N = _accumulated(jnp.zeros_like(total_N), a_L, b_LN, jnp.ones_like(scale_N))
            return total_N + register_N * scale_N, None

        return lax.scan(one_run, jnp.zeros(columns, jnp.float32), (a_RL, scale_a_R, b_RLN, scale_b_RN))[0]

    return lax.map(one_row, (a_MK, scale_a_MR), batch_size=max(1, _CHUNK // max(columns, 1)))


def _accumulated(register_N: jax.Array, a_L: jax.Array, b_LN: jax.Array, scale_N: jax.Array) -> jax.Array:
    """The register after L more products, added group by group."""
    fill = -a_L.size % GROUP
    a_SG = jnp.pad(a_L, (0, fill)).reshape(-1, GROUP)
    b_SGN = jnp.pad(b_LN, ((0, fill), (0, 0))).reshape(-1, GROUP, b_LN.shape[1])

    def add(register_N, group):
        return _cut(register_N + _group_sum(*group) * scale_N), None

    return lax.scan(add, register_N, (a_SG, b_SGN))[0]


def _group_sum(a_G: jax.Array, b_GN: jax.Array) -> jax.Array:
    """The exact sum of products that were each cut to a multiple of 2**-13 of the largest one's power of two.

    Written product by product, which XLA fuses into one loop over N that holds them in registers.
    """
    products = [a_G[i] * b_GN[i] for i in range(GROUP)]
    largest_N = jnp.maximum(reduce(jnp.maximum, map(jnp.abs, products)), _SMALL)
    power_N = lax.bitcast_convert_type(lax.bitcast_convert_type(largest_N, jnp.int32) & 0x7F800000, jnp.float32)
    steps_N = 2.0**FRACTION_BITS / power_N
    return sum(jnp.trunc(product * steps_N) for product in products) * (power_N * 2.0**-FRACTION_BITS)


def _cut(x: jax.Array) -> jax.Array:
    """FP32 to FP22, towards zero."""
    kept = ~((1 << 23 - FRACTION_BITS) - 1)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & kept, jnp.float32)
