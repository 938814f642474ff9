"""Multi-head Latent Attention [V3 §2.1.1] in its expanded form, for training and prefill."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsjax.config import ModelConfig
from dsjax.model.layers import Linear, RMSNorm, rotate, softmax_scale
from dsjax.numerics import e5m6
from dsjax.numerics.recipe import Recipe

# The compressed latents are always normalised with 1e-6, whatever rms_norm_eps says (Moonlight: 1e-5).
LATENT_NORM_EPS = 1e-6
QUERY_BLOCKS = 8  # scores exist for an eighth of the queries at a time ...
MIN_QUERY_BLOCK = 128  # ... but not for fewer than this


class MLA(nnx.Module):
    """Keys and values come from one small latent per token; queries too when q_lora_rank is given."""

    def __init__(self, config: ModelConfig, recipe: Recipe, rngs: nnx.Rngs):
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
        self.config, self.keeps_e5m6 = config, recipe.is_fp8

    def __call__(self, x_BTD: jax.Array, rope_2TP: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D], causal over the T positions."""
        config = self.config
        batch, length, _ = x_BTD.shape
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim
        turn = partial(rotate, rope_2TP=rope_2TP, interleaved=config.rope_interleave)

        q_BTNH = self._queries(x_BTD).reshape(batch, length, heads, config.qk_head_dim)
        q_BTNH = jnp.concatenate([q_BTNH[..., :nope], turn(q_BTNH[..., nope:])], axis=-1)

        latent = checkpoint_name(self.kv_a_proj_with_mqa(x_BTD), "mla_latent")
        c_BTR, k_rope = jnp.split(latent, [config.kv_lora_rank], axis=-1)
        k_rope_BT1H = turn(k_rope[:, :, None, :])  # one head, shared by all
        kv_BTNH = self.kv_b_proj(self.kv_a_layernorm(c_BTR)).reshape(batch, length, heads, -1)
        k_rope_BTNH = jnp.broadcast_to(k_rope_BT1H, (batch, length, heads, config.qk_rope_head_dim))
        k_BTNH = jnp.concatenate([kv_BTNH[..., :nope], k_rope_BTNH], axis=-1)
        v_BTNH = kv_BTNH[..., nope:]

        out_BTNH = causal_attention(q_BTNH, k_BTNH, v_BTNH, softmax_scale(config), self.keeps_e5m6)
        return self.o_proj(out_BTNH.reshape(batch, length, -1))

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        if self.config.q_lora_rank is None:
            return self.q_proj(x_BTD)
        return self.q_b_proj(self.q_a_layernorm(checkpoint_name(self.q_a_proj(x_BTD), "mla_latent")))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def causal_attention(
    q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, scale: float, keeps_e5m6: bool = False
) -> jax.Array:
    """softmax(q k^T * scale) v with a causal mask; softmax in FP32; sizes of q/k heads and v heads may differ.

    Works through blocks of queries, each against the keys it may see, and recomputes the probabilities in
    the backward pass: no array is larger than one block's scores, and none of them is kept.

    With `keeps_e5m6`, the result is rounded to what is kept of it for the backward pass, twelve bits a value: so what
    follows from it is computed again without attention.
    """
    return _attention_fwd(q_BTNH, k_BTNH, v_BTNH, scale, keeps_e5m6)[0]


def _query_blocks(length: int) -> list[tuple[int, int]]:
    size = max(MIN_QUERY_BLOCK, -(-length // QUERY_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum with FP32 sums; FP32 operands are multiplied in FP32, where TPUs and GPUs would take BF16 or TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _scores(q_BTNH: jax.Array, k_BSNH: jax.Array, start: int, scale: float) -> jax.Array:
    """Masked FP32 scores [B, N, T, S] of queries start.. against keys 0..S-1."""
    scores = scale * _product("btnh,bsnh->bnts", q_BTNH, k_BSNH)
    positions_T, positions_S = start + jnp.arange(q_BTNH.shape[1]), jnp.arange(k_BSNH.shape[1])
    visible_TS = positions_T[:, None] >= positions_S[None, :]
    return jnp.where(visible_TS[None, None], scores, -jnp.inf)


def _attention_fwd(q_BTNH, k_BTNH, v_BTNH, scale: float, keeps_e5m6: bool):
    outs, logsums = [], []
    for start, end in _query_blocks(q_BTNH.shape[1]):
        scores_BNTS = _scores(q_BTNH[:, start:end], k_BTNH[:, :end], start, scale)
        top_BNT1 = jnp.max(scores_BNTS, axis=-1, keepdims=True)
        weights_BNTS = jnp.exp(scores_BNTS - top_BNT1)
        total_BNT1 = jnp.sum(weights_BNTS, axis=-1, keepdims=True)
        out = _product("bnts,bsnh->btnh", (weights_BNTS / total_BNT1).astype(v_BTNH.dtype), v_BTNH[:, :end])
        outs.append(out.astype(v_BTNH.dtype))
        logsums.append(top_BNT1 + jnp.log(total_BNT1))
    out_BTNH = _keep(jnp.concatenate(outs, axis=1), keeps_e5m6)
    logsum_BNT1 = checkpoint_name(jnp.concatenate(logsums, axis=2), "attention")
    return out_BTNH, (q_BTNH, k_BTNH, v_BTNH, out_BTNH, logsum_BNT1)


def _keep(out_BTNH: jax.Array, keeps_e5m6: bool) -> jax.Array:
    """What the backward pass finds saved."""
    if not keeps_e5m6:
        return checkpoint_name(out_BTNH, "attention")
    width = out_BTNH.shape[2] * out_BTNH.shape[3]
    encoded = e5m6.encode(out_BTNH.reshape(*out_BTNH.shape[:2], width))
    packed, exponent = (checkpoint_name(a, "attention") for a in encoded)
    return e5m6.decode(packed, exponent, width, out_BTNH.dtype).reshape(out_BTNH.shape)


def _attention_bwd(scale: float, keeps_e5m6: bool, kept, dout_BTNH):
    q_BTNH, k_BTNH, v_BTNH, out_BTNH, logsum_BNT1 = kept
    f32 = jnp.float32
    dq_blocks = []
    dk_BTNH, dv_BTNH = jnp.zeros(k_BTNH.shape, f32), jnp.zeros(v_BTNH.shape, f32)
    for start, end in _query_blocks(q_BTNH.shape[1]):
        q, k, v, dout = q_BTNH[:, start:end], k_BTNH[:, :end], v_BTNH[:, :end], dout_BTNH[:, start:end]
        p_BNTS = jnp.exp(_scores(q, k, start, scale) - logsum_BNT1[:, :, start:end])
        dp_BNTS = _product("btnh,bsnh->bnts", dout, v)
        inner_BNT = _product("btnh,btnh->bnt", dout.astype(f32), out_BTNH[:, start:end].astype(f32))
        ds_BNTS = (scale * p_BNTS * (dp_BNTS - inner_BNT[..., None])).astype(q.dtype)
        dq_blocks.append(_product("bnts,bsnh->btnh", ds_BNTS, k))
        dk = _product("bnts,btnh->bsnh", ds_BNTS, q)
        dv = _product("bnts,btnh->bsnh", p_BNTS.astype(v.dtype), dout)
        dk_BTNH = dk_BTNH.at[:, :end].add(dk)
        dv_BTNH = dv_BTNH.at[:, :end].add(dv)
    dq_BTNH = jnp.concatenate(dq_blocks, axis=1)
    return dq_BTNH.astype(q_BTNH.dtype), dk_BTNH.astype(k_BTNH.dtype), dv_BTNH.astype(v_BTNH.dtype)


causal_attention.defvjp(_attention_fwd, _attention_bwd)
