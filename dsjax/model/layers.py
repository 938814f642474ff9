"""The plain parts: weights, Linear, RMSNorm, SwiGLU, embedding lookup, RoPE with YaRN."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from dsjax.config import ModelConfig, RopeScaling
from dsjax.numerics.linear import linear, swiglu_linear
from dsjax.numerics.recipe import Recipe
from dsjax.sharding import BATCH


def weight(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], stddev: float) -> nnx.Param:
    """One FP32 master weight drawn from N(0, stddev); the only place where its shape and axes are stated."""
    return nnx.Param(stddev * jax.random.normal(rngs.params(), tuple(shape), jnp.float32), axes=tuple(axes))


class Linear(nnx.Module):
    """x [..., D] @ weight [D, F], and a bias [F] where asked for; DeepSeek's own models have none."""

    def __init__(
        self,
        shape: tuple[int, int],
        axes: tuple[str, str],
        stddev: float,
        recipe: Recipe,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
    ):
        self.weight = weight(rngs, shape, axes, stddev)
        self.bias = nnx.Param(jnp.zeros(shape[1:], jnp.float32), axes=("bias",)) if bias else None
        self.recipe = recipe

    def __call__(self, x: jax.Array) -> jax.Array:
        y = linear(x, self.weight.get_value(), self.recipe)
        if self.bias is None:
            return y
        return y + self.bias[...].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in FP32; the result has the input's dtype."""

    def __init__(self, size: int, eps: float):
        self.weight = nnx.Param(jnp.ones((size,), jnp.float32), axes=("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale * self.weight[...].reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int, stddev: float, recipe: Recipe, rngs: nnx.Rngs):
        self.gate_proj = Linear((hidden, width), ("embed", "mlp"), stddev, recipe, rngs)
        self.up_proj = Linear((hidden, width), ("embed", "mlp"), stddev, recipe, rngs)
        self.down_proj = Linear((width, hidden), ("mlp", "embed"), stddev, recipe, rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        down = self.down_proj
        return swiglu_linear(self.gate_proj(x_BTD), self.up_proj(x_BTD), down.weight.get_value(), down.recipe)


def embed(table_VD: jax.Array, tokens_BT: jax.Array, mesh: Mesh, recipe: Recipe) -> jax.Array:
    """Rows of the table, [B, T, D] in the compute dtype.

    Each device looks up its features of the tokens of all that share the table, and they exchange them: a few rows
    travel, not the table. Left to the partitioner, a table cut along features would replicate the result.
    """
    axes = tuple(axis for axis in ("fsdp", "expert") if mesh.shape[axis] > 1)

    def local(shard_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        # Cast after indexing, so that the gradients of a token's occurrences add up in FP32.
        if not axes:
            return shard_VD[tokens_BT].astype(recipe.dtype)
        all_NT = lax.all_gather(tokens_BT, axes, axis=0, tiled=True)
        return lax.all_to_all(shard_VD[all_NT].astype(recipe.dtype), axes, 0, 2, tiled=True)

    specs = (PartitionSpec(None, ("fsdp", "expert")), BATCH)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=BATCH, check_vma=False)(table_VD, tokens_BT)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1 * mscale * ln(factor) + 1 [V3 §4.3]."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each of the qk_rope_head_dim / 2 pairs, FP32, with YaRN where configured."""
    dim = config.qk_rope_head_dim
    frequencies = config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)

    def pair_turning(rotations: float) -> float:
        """The pair that makes so many turns within the original context."""
        turns = math.log(scaling.original_max_position_embeddings / (2 * math.pi * rotations))
        return dim * turns / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 1e-3), 0, 1)
    return (frequencies / scaling.factor * ramp + frequencies * (1 - ramp)).astype(np.float32)


def rope_amplitude(scaling: RopeScaling | None) -> float:
    """What Hugging Face multiplies cos and sin with; 1 whenever mscale equals mscale_all_dim."""
    if scaling is None:
        return 1.0
    if not (scaling.mscale and scaling.mscale_all_dim):
        return yarn_mscale(scaling.factor, 1.0)
    return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)


def softmax_scale(config: ModelConfig) -> float:
    """1 / sqrt(head size), times YaRN's squared temperature (on q and on k)."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None:
        scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def rope_table(config: ModelConfig, length: int) -> jax.Array:
    """cos and sin of every position's angles, [2, T, pairs] FP32."""
    return rope_at(config, jnp.arange(length))


def rope_at(config: ModelConfig, positions: jax.Array) -> jax.Array:
    """cos and sin of the angles at `positions` [...], [2, ..., pairs] FP32."""
    frequencies = jnp.asarray(rope_frequencies(config)).reshape((1,) * positions.ndim + (-1,))
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return rope_amplitude(config.rope_scaling) * jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x_BTNH: jax.Array, rope: jax.Array, interleaved: bool = True) -> jax.Array:
    """RoPE in FP32: the i-th pair is turned by the i-th angle; `rope` is [2, T, P], or [2, B, T, P] of each row.

    A pair is (x[2i], x[2i+1]) where `interleaved`, as in all released weights, else (x[i], x[i + H/2]).
    """
    shape, pair = ((-1, 2), -1) if interleaved else ((2, -1), -2)
    pairs = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], *shape)
    rope_2BTP = rope if rope.ndim == 4 else rope[:, None]
    cos, sin = rope_2BTP[:, :, :, None, :]
    first, second = jnp.unstack(pairs, axis=pair)
    turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=pair)
    return turned.reshape(x_BTNH.shape).astype(x_BTNH.dtype)
