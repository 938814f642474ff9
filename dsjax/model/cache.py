"""The latent cache: what MLA keeps of a token, kv_lora_rank + qk_rope_head_dim values a layer [V2 §2.1.2].

An explicit value, in and out of every call. Rows are sequences and are spread over the mesh like a batch; a row's
entries beyond its length are rubbish, and no position sees them before they are written again.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.config import ConfigError, ModelConfig
from dsjax.numerics import fp8
from dsjax.sharding import AXES

STORAGE = ("float32", "bfloat16", "float8_e4m3fn")
ROWS = PartitionSpec(None, AXES)  # layers, then sequences


class Latents(NamedTuple):
    """A stack of layers. With E4M3 values, one FP32 scale for 128 of them: 656 bytes a token at V3's sizes."""

    values_LBSR: jax.Array  # normalised latents
    scales_LBSG: jax.Array | None
    rope_LBSH: jax.Array  # the rotary key that all heads share; BF16 beside E4M3


class LatentCache(NamedTuple):
    """Of a whole model, stacked as its layers are: one stack a scan, or one a layer where they are unrolled."""

    dense: tuple[Latents, ...]
    moe: tuple[Latents, ...]
    mtp: tuple[Latents, ...]

    @property
    def length(self) -> int:
        """Positions that there is room for."""
        return jax.tree.leaves(self)[0].shape[2]


def empty(config: ModelConfig, rows: int, length: int, storage: str, *, unrolled: bool, mtp: bool) -> LatentCache:
    """A cache of zeros for `rows` sequences of up to `length` tokens.

    storage: "float32", "bfloat16" or "float8_e4m3fn".
    unrolled: one stack a layer.
    mtp: with the layer of the MTP module.

    Raises ConfigError for another storage.
    """
    if storage not in STORAGE:
        raise ConfigError(f"unknown cache storage {storage!r}; known are {', '.join(STORAGE)}")
    is_fp8, rank = storage == "float8_e4m3fn", config.kv_lora_rank

    def stack(layers: int) -> Latents:
        shape = (layers, rows, length)
        scales = jnp.zeros((*shape, math.ceil(rank / fp8.TILE)), jnp.float32) if is_fp8 else None
        rope = jnp.zeros((*shape, config.qk_rope_head_dim), jnp.bfloat16 if is_fp8 else storage)
        return Latents(jnp.zeros((*shape, rank), storage), scales, rope)

    def stacks(layers: int) -> tuple[Latents, ...]:
        return tuple(stack(1) for _ in range(layers)) if unrolled else tuple(stack(n) for n in [layers] if n)

    moe = config.num_hidden_layers - config.first_k_dense_replace
    mtp_layers = config.num_nextn_predict_layers if mtp else 0
    return LatentCache(stacks(config.first_k_dense_replace), stacks(moe), stacks(mtp_layers))


def cache_shardings(cache: Any, mesh: jax.sharding.Mesh) -> Any:
    """Sequences over the whole mesh."""
    return jax.tree.map(lambda _: NamedSharding(mesh, ROWS), cache)


def bytes_per_token(cache: Any) -> int:
    """What one position of one sequence takes in all layers."""
    return sum(a.dtype.itemsize * math.prod(a.shape) // (a.shape[1] * a.shape[2]) for a in jax.tree.leaves(cache))


def write(latents: Latents, layer: Any, c_BTR: jax.Array, k_BTH: jax.Array, start_B: jax.Array) -> Latents:
    """With new tokens of one layer at positions start, start + 1, ... of each row; what lies beyond the end is lost."""
    # Every index is made one that exists, and what must not be written is what stands there already: a scatter that
    # drops would have XLA:CPU copy the whole cache.
    length, room = c_BTR.shape[1], latents.rope_LBSH.shape[2]
    rows_B1 = jnp.arange(start_B.shape[0])[:, None]
    last_B1 = jnp.maximum(room - 1 - start_B, 0)[:, None]  # the last token that has a place
    tokens_BT = jnp.minimum(jnp.arange(length)[None], last_B1)
    places_BT = jnp.minimum(start_B[:, None] + tokens_BT, room - 1)
    is_inside_B11 = (start_B < room)[:, None, None]

    def put(whole: jax.Array, new_BTX: jax.Array) -> jax.Array:
        if length > 1:
            new_BTX = jnp.take_along_axis(new_BTX, tokens_BT[..., None], axis=1)
        old_BTX = whole.at[layer, rows_B1, places_BT].get(mode="promise_in_bounds")
        chosen_BTX = jnp.where(is_inside_B11, new_BTX.astype(whole.dtype), old_BTX)
        return whole.at[layer, rows_B1, places_BT].set(chosen_BTX, mode="promise_in_bounds")

    if latents.scales_LBSG is None:
        return Latents(put(latents.values_LBSR, c_BTR), None, put(latents.rope_LBSH, k_BTH))
    values, scales = fp8.quantize_tiles(c_BTR)
    return Latents(put(latents.values_LBSR, values), put(latents.scales_LBSG, scales), put(latents.rope_LBSH, k_BTH))


def as_stored(latents: Latents, c_BTR: jax.Array, k_BTH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """New tokens' values as they will be read, in the dtype that they have."""
    dtype = c_BTR.dtype
    if latents.scales_LBSG is not None:
        c_BTR = fp8.dequantize(*fp8.quantize_tiles(c_BTR), dtype=dtype)
    stored = c_BTR.astype(latents.values_LBSR.dtype) if latents.scales_LBSG is None else c_BTR
    return stored.astype(dtype), k_BTH.astype(latents.rope_LBSH.dtype).astype(dtype)


def read(latents: Latents, layer: Any, visible: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(latents [B, S, R], rotary keys [B, S, H]) of one layer's first `visible` positions."""
    part = lambda a: lax.dynamic_index_in_dim(a, layer, 0, False)[:, :visible]  # noqa: E731
    values = part(latents.values_LBSR)
    if latents.scales_LBSG is not None:
        values = fp8.dequantize(values, part(latents.scales_LBSG), dtype=dtype)
    return values.astype(dtype), part(latents.rope_LBSH).astype(dtype)
