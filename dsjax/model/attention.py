"""Multi-head Latent Attention [V3 §2.1.1]: expanded for training and prefill, absorbed for decoding.

Absorbed, the up-projections of keys and values go to the query's and the output's side [V2 §2.1.2]: every head then
attends the latents as they are cached. More multiplications a pair (2 R + H against 2 nope + H), but none to make keys
and values of all that came before. Both forms give the same numbers to rounding.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from dsjax.config import ModelConfig
from dsjax.model import cache
from dsjax.model.cache import ROWS, Latents
from dsjax.model.causal import attend, attend_latents, attend_past
from dsjax.model.layers import Linear, RMSNorm, rotate, softmax_scale
from dsjax.numerics.linear import product
from dsjax.numerics.recipe import Recipe
from dsjax.sharding import BATCH

# The compressed latents are always normalised with 1e-6, whatever rms_norm_eps says (Moonlight: 1e-5).
LATENT_NORM_EPS = 1e-6


class MLA(nnx.Module):
    """Keys and values come from one small latent per token; queries too when q_lora_rank is given."""

    def __init__(self, config: ModelConfig, recipe: Recipe, mesh: Mesh, rngs: nnx.Rngs):
        heads, std = config.num_attention_heads, config.initializer_range
        hidden, kv_rank, q_rank = config.hidden_size, config.kv_lora_rank, config.q_lora_rank
        q_width, bias = heads * config.qk_head_dim, config.attention_bias
        if q_rank is None:
            self.q_proj = Linear((hidden, q_width), ("embed", "heads"), std, recipe, rngs)
        else:
            self.q_a_proj = Linear((hidden, q_rank), ("embed", "latent"), std, recipe, rngs, bias=bias)
            self.q_a_layernorm = RMSNorm(q_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear((q_rank, q_width), ("latent", "heads"), std, recipe, rngs)
        kv_a = (hidden, kv_rank + config.qk_rope_head_dim)
        kv_b = (kv_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.kv_a_proj_with_mqa = Linear(kv_a, ("embed", "latent"), std, recipe, rngs, bias=bias)
        self.kv_a_layernorm = RMSNorm(kv_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(kv_b, ("latent", "heads"), std, recipe, rngs)
        out = (heads * config.v_head_dim, hidden)
        # Its input is kept in E5M6, and tiled for Wgrad from that [V3 §3.3.3].
        self.o_proj = Linear(out, ("heads", "embed"), std, recipe.input_as_is, rngs, bias=bias)
        self.config, self.mesh, self.recipe, self.keeps_e5m6 = config, mesh, recipe, recipe.is_fp8

    def __call__(self, x_BTD: jax.Array, rope: jax.Array, first_BT: jax.Array | None = None) -> jax.Array:
        """[B, T, D] -> [B, T, D], causal over the T positions, or from `first_BT` on, where samples share a row."""
        q_BTNH, c_BTR, k_rope_BTH = self._projections(x_BTD, rope)
        k_BTNH, v_BTNH = self._expand(c_BTR, k_rope_BTH)
        scale = softmax_scale(self.config)
        out_BTNH = attend(q_BTNH, k_BTNH, v_BTNH, scale, self.mesh, self.keeps_e5m6, first_BT)
        return self.o_proj(out_BTNH.reshape(*x_BTD.shape[:2], -1))

    def cached(
        self,
        x_BTD: jax.Array,
        rope_2BTP: jax.Array,
        latents: Latents,
        layer: Any,
        start_B: jax.Array,
        *,
        absorbed: bool,
        visible: int,
    ) -> tuple[jax.Array, Latents]:
        """[B, T, D] -> [B, T, D] and the cache with these T tokens written into it.

        Args:
          x_BTD: new tokens, of row b at positions start[b], start[b] + 1, ...
          rope_2BTP: the angles at these positions.
          latents: the cache of this layer's stack; a token sees its row's entries up to its own position.
          layer: place in the stack.
          start_B: int32.
          absorbed: the form.
          visible: positions of the cache that are read; at least the highest position + 1.
        """
        q_BTNH, c_BTR, k_rope_BTH = self._projections(x_BTD, rope_2BTP)
        nope, scale, dtype = self.config.qk_nope_head_dim, softmax_scale(self.config), x_BTD.dtype
        rows = partial(jax.shard_map, mesh=self.mesh, check_vma=False)
        if absorbed:
            uk_RNH, uv_RNH = self._up_projections()
            q_BTNR = product("btnh,rnh->btnr", q_BTNH[..., :nope], uk_RNH, self.recipe, dtype)

            def local(q_BTNR, q_rope_BTNH, c_BTR, k_BTH, latents, layer, start_B):
                past, new = cache.read(latents, layer, visible, dtype), cache.as_stored(latents, c_BTR, k_BTH)
                out_BTNR = attend_latents(q_BTNR, q_rope_BTNH, past, new, start_B, scale)
                # What is written depends on what was read, for a NaN at least: XLA:CPU sees then that the cache can be
                # updated in place, and makes no copy of it for every token.
                read_BT1 = out_BTNR[:, :, 0, :1]
                c_BTR, k_BTH = (jnp.where(jnp.isnan(read_BT1), read_BT1, a) for a in (c_BTR, k_BTH))
                return out_BTNR, cache.write(latents, layer, c_BTR, k_BTH, start_B)

            in_specs = (BATCH, BATCH, BATCH, BATCH, ROWS, PartitionSpec(), BATCH)
            attended_BTNR, latents = rows(local, in_specs=in_specs, out_specs=(BATCH, ROWS))(
                q_BTNR, q_BTNH[..., nope:], c_BTR, k_rope_BTH, latents, layer, start_B
            )
            out_BTNH = product("btnr,rnh->btnh", attended_BTNR, uv_RNH, self.recipe, dtype)
        else:

            def update(c_BTR, k_BTH, latents, layer, start_B):
                latents = cache.write(latents, layer, c_BTR, k_BTH, start_B)
                return *cache.read(latents, layer, visible, dtype), latents

            c_BSR, k_BSH, latents = rows(
                update, in_specs=(BATCH, BATCH, ROWS, PartitionSpec(), BATCH), out_specs=(BATCH, BATCH, ROWS)
            )(c_BTR, k_rope_BTH, latents, layer, start_B)
            places_BT = start_B[:, None] + jnp.arange(x_BTD.shape[1])[None]
            past = partial(attend_past, scale=scale)
            out_BTNH = rows(past, in_specs=BATCH, out_specs=BATCH)(q_BTNH, *self._expand(c_BSR, k_BSH), places_BT)
        return self.o_proj(out_BTNH.reshape(*x_BTD.shape[:2], -1)), latents

    def _projections(self, x_BTD: jax.Array, rope: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(queries [B, T, N, nope + H]; what is cached: normalised latents [B, T, R], rotary keys [B, T, H])."""
        config = self.config
        batch, length, _ = x_BTD.shape
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim
        turn = partial(rotate, rope=rope, interleaved=config.rope_interleave)

        q_BTNH = self._queries(x_BTD).reshape(batch, length, heads, config.qk_head_dim)
        q_BTNH = jnp.concatenate([q_BTNH[..., :nope], turn(q_BTNH[..., nope:])], axis=-1)

        latent = checkpoint_name(self.kv_a_proj_with_mqa(x_BTD), "mla_latent")
        c_BTR, k_rope = jnp.split(latent, [config.kv_lora_rank], axis=-1)
        return q_BTNH, self.kv_a_layernorm(c_BTR), turn(k_rope[:, :, None, :])[:, :, 0]

    def _expand(self, c_BSR: jax.Array, k_rope_BSH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of every head; the rotary part of the keys is one head's, shared by all."""
        heads, nope = self.config.num_attention_heads, self.config.qk_nope_head_dim
        kv_BSNH = self.kv_b_proj(c_BSR).reshape(*c_BSR.shape[:2], heads, -1)
        k_rope_BSNH = jnp.broadcast_to(k_rope_BSH[:, :, None], (*c_BSR.shape[:2], heads, k_rope_BSH.shape[-1]))
        return jnp.concatenate([kv_BSNH[..., :nope], k_rope_BSNH], axis=-1), kv_BSNH[..., nope:]

    def _up_projections(self) -> tuple[jax.Array, jax.Array]:
        """kv_b_proj as what makes keys [R, N, nope] and what makes values [R, N, v]; absorbed, never quantised."""
        config = self.config
        kv_RNH = self.kv_b_proj.weight[...].reshape(config.kv_lora_rank, config.num_attention_heads, -1)
        return kv_RNH[..., : config.qk_nope_head_dim], kv_RNH[..., config.qk_nope_head_dim :]

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        if self.config.q_lora_rank is None:
            return self.q_proj(x_BTD)
        return self.q_b_proj(self.q_a_layernorm(checkpoint_name(self.q_a_proj(x_BTD), "mla_latent")))
