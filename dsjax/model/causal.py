"""Softmax attention over the past, each device its own sequences.

On TPUs BF16 goes through JAX's splash attention kernel, which takes the two head sizes of MLA as they are. Everything
else works through blocks of queries and, where those would still be large, groups of heads.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from dsjax.numerics import e5m6
from dsjax.sharding import BATCH

QUERY_BLOCKS = 8  # scores exist for an eighth of the queries at a time ...
MIN_QUERY_BLOCK = 128  # ... but not for fewer than this
SCORE_BYTES = 2**29  # one block's scores of all heads may take this; else the heads take turns
SPLASH_BLOCK, SPLASH_TILE = 512, 128  # queries and keys of one step of the kernel, at most; it wants whole tiles


def attend(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    scale: float,
    mesh: Mesh,
    keeps_e5m6: bool,
    first_BT: jax.Array | None = None,
) -> jax.Array:
    """`causal_attention` of sequences that are spread over `mesh`, by what its devices have for it."""
    has_splash = mesh.devices.flat[0].platform == "tpu" and q_BTNH.dtype == jnp.bfloat16 and not keeps_e5m6
    has_splash = has_splash and q_BTNH.shape[1] % SPLASH_TILE == 0

    def local(q_BTNH, k_BTNH, v_BTNH, first_BT=None) -> jax.Array:
        if has_splash:
            return splash_attention(q_BTNH, k_BTNH, v_BTNH, first_BT, scale=scale)
        return causal_attention(q_BTNH, k_BTNH, v_BTNH, scale, keeps_e5m6, first_BT)

    each = jax.shard_map(local, mesh=mesh, in_specs=BATCH, out_specs=BATCH, check_vma=False)
    return each(q_BTNH, k_BTNH, v_BTNH) if first_BT is None else each(q_BTNH, k_BTNH, v_BTNH, first_BT)


def splash_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    first_BT: jax.Array | None = None,
    *,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """What `causal_attention` computes, by the TPU kernel; T is a multiple of 128."""
    # Pallas takes a second to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q_BTNH.shape[1:3]
    n = math.gcd(length, SPLASH_BLOCK)
    sizes = kernels.BlockSizes(block_q=n, block_kv=n, block_q_dkv=n, block_kv_dkv=n, block_q_dq=n, block_kv_dq=n)
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=sizes,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    scaled = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    heads_first = [a.swapaxes(1, 2) for a in (scaled, k_BTNH, v_BTNH)]
    if first_BT is None:
        return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)
    # Where a sample begins is a name that no other sample of its row has.
    return jax.vmap(kernel)(*heads_first, kernels.SegmentIds(first_BT, first_BT)).swapaxes(1, 2)


def attend_past(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, places_BT: jax.Array, scale: float
) -> jax.Array:
    """Attention of queries at positions `places` to all keys up to there; keys are at positions 0..S-1 of their row."""
    p_BNTS = _probabilities(scale * _product("btnh,bsnh->bnts", q_BTNH, k_BSNH), places_BT)
    return _product("bnts,bsnh->btnh", p_BNTS.astype(v_BSNH.dtype), v_BSNH).astype(v_BSNH.dtype)


def attend_latents(
    q_BTNR: jax.Array,
    q_rope_BTNH: jax.Array,
    past: tuple[jax.Array, jax.Array],
    new: tuple[jax.Array, jax.Array],
    start_B: jax.Array,
    scale: float,
) -> jax.Array:
    """Attention in the absorbed form: keys are [latent, rotary key], one for all heads, and values are the latents.

    `past` are those at positions 0..S-1 of each row, of which the first `start` are seen; `new` those of the queries
    themselves, in their order. They are not read from the cache: XLA:CPU would copy it for a read after a write.
    """
    (batch, length, heads, _), room = q_BTNR.shape, past[0].shape[1]
    # Queries of all heads are rows of one matrix for each sequence: XLA:CPU is three times as fast as with two dims.
    q_BMR, q_rope_BMH = (q.reshape(batch, length * heads, q.shape[-1]) for q in (q_BTNR, q_rope_BTNH))

    def scores(c_BSR: jax.Array, k_BSH: jax.Array) -> jax.Array:
        return scale * (_product("bmr,bsr->bms", q_BMR, c_BSR) + _product("bmh,bsh->bms", q_rope_BMH, k_BSH))

    is_before_B1S = (jnp.arange(room)[None] < start_B[:, None])[:, None]
    is_before_MT = jnp.arange(length)[None] <= jnp.repeat(jnp.arange(length), heads)[:, None]
    past_BMS = jnp.where(is_before_B1S, scores(*past), -jnp.inf)
    new_BMT = jnp.where(is_before_MT[None], scores(*new), -jnp.inf)
    top_BM1 = jnp.maximum(jnp.max(past_BMS, -1, keepdims=True), jnp.max(new_BMT, -1, keepdims=True))
    past_BMS, new_BMT = jnp.exp(past_BMS - top_BM1), jnp.exp(new_BMT - top_BM1)
    total_BM1 = jnp.sum(past_BMS, -1, keepdims=True) + jnp.sum(new_BMT, -1, keepdims=True)
    dtype = past[0].dtype
    sums_BMR = _product("bms,bsr->bmr", past_BMS.astype(dtype), past[0])
    sums_BMR = sums_BMR + _product("bmt,btr->bmr", new_BMT.astype(dtype), new[0])
    return (sums_BMR / total_BM1).astype(dtype).reshape(q_BTNR.shape)


def _probabilities(scores_BNTS: jax.Array, places_BT: jax.Array) -> jax.Array:
    visible_BTS = jnp.arange(scores_BNTS.shape[-1])[None, None] <= places_BT[..., None]
    return jax.nn.softmax(jnp.where(visible_BTS[:, None], scores_BNTS, -jnp.inf), axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def causal_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    scale: float,
    keeps_e5m6: bool = False,
    first_BT: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T * scale) v with a causal mask; softmax in FP32; sizes of q/k heads and v heads may differ.

    `first_BT` is where each token's sample begins in its row: a token sees nothing before it. None: a row is one.

    Works through blocks of queries, each against the keys it may see, and recomputes the probabilities in the backward
    pass: no array is larger than one block's scores, of as many heads as SCORE_BYTES holds, and none of them is kept.

    With `keeps_e5m6`, the result is rounded to what is kept of it for the backward pass, twelve bits a value: so what
    follows from it is computed again without attention.
    """
    return _attention_fwd(q_BTNH, k_BTNH, v_BTNH, scale, keeps_e5m6, first_BT)[0]


def _query_blocks(length: int) -> list[tuple[int, int]]:
    size = max(MIN_QUERY_BLOCK, -(-length // QUERY_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum with FP32 sums; FP32 operands are multiplied in FP32, where TPUs and GPUs would take BF16 or TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _scores(q_BTNH: jax.Array, k_BSNH: jax.Array, start: int, scale: float, first_BT: jax.Array | None) -> jax.Array:
    """Masked FP32 scores [B, N, T, S] of queries start.. against keys 0..S-1."""
    scores = scale * _product("btnh,bsnh->bnts", q_BTNH, k_BSNH)
    positions_T, positions_S = start + jnp.arange(q_BTNH.shape[1]), jnp.arange(k_BSNH.shape[1])
    visible_BNTS = (positions_T[:, None] >= positions_S[None, :])[None, None]
    if first_BT is not None:
        first_BT = lax.slice_in_dim(first_BT, start, start + q_BTNH.shape[1], axis=1)
        visible_BNTS &= (positions_S[None, None] >= first_BT[..., None])[:, None]
    return jnp.where(visible_BNTS, scores, -jnp.inf)


def _by_heads(run: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`run(*arrays)`, by groups of heads (dim 2 of all that comes and goes) whose scores fit SCORE_BYTES."""
    batch, length, heads = arrays[0].shape[:3]
    block = _query_blocks(length)[0][1]
    fits = max(1, SCORE_BYTES // (4 * batch * block * length))
    size = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fits)
    if size == heads:
        return run(*arrays)

    def part(group: jax.Array | int) -> Any:
        return run(*(lax.dynamic_slice_in_dim(a, group * size, size, axis=2) for a in arrays))

    def put(group: jax.Array, wholes: Any) -> Any:
        place = lambda whole, a: lax.dynamic_update_slice_in_dim(whole, a, group * size, axis=2)  # noqa: E731
        return jax.tree.map(place, wholes, part(group))

    whole = lambda a: jnp.zeros((*a.shape[:2], heads, *a.shape[3:]), a.dtype)  # noqa: E731
    return lax.fori_loop(0, heads // size, put, jax.tree.map(whole, jax.eval_shape(part, 0)))


def _attention_fwd(q_BTNH, k_BTNH, v_BTNH, scale: float, keeps_e5m6: bool, first_BT):
    out_BTNH, logsum_BTN1 = _by_heads(partial(_forward, scale, first_BT), q_BTNH, k_BTNH, v_BTNH)
    out_BTNH = _keep(out_BTNH, keeps_e5m6)
    return out_BTNH, ((q_BTNH, k_BTNH, v_BTNH, out_BTNH, checkpoint_name(logsum_BTN1, "attention")), first_BT)


def _forward(scale: float, first_BT, q_BTNH, k_BTNH, v_BTNH) -> tuple[jax.Array, jax.Array]:
    """The result, and the logarithm of each query's sum of exponentials [B, T, N, 1]."""
    outs, logsums = [], []
    for start, end in _query_blocks(q_BTNH.shape[1]):
        scores_BNTS = _scores(q_BTNH[:, start:end], k_BTNH[:, :end], start, scale, first_BT)
        top_BNT1 = jnp.max(scores_BNTS, axis=-1, keepdims=True)
        weights_BNTS = jnp.exp(scores_BNTS - top_BNT1)
        total_BNT1 = jnp.sum(weights_BNTS, axis=-1, keepdims=True)
        out = _product("bnts,bsnh->btnh", (weights_BNTS / total_BNT1).astype(v_BTNH.dtype), v_BTNH[:, :end])
        outs.append(out.astype(v_BTNH.dtype))
        logsums.append((top_BNT1 + jnp.log(total_BNT1)).swapaxes(1, 2))
    return jnp.concatenate(outs, axis=1), jnp.concatenate(logsums, axis=1)


def _keep(out_BTNH: jax.Array, keeps_e5m6: bool) -> jax.Array:
    """What the backward pass finds saved."""
    if not keeps_e5m6:
        return checkpoint_name(out_BTNH, "attention")
    width = out_BTNH.shape[2] * out_BTNH.shape[3]
    encoded = e5m6.encode(out_BTNH.reshape(*out_BTNH.shape[:2], width))
    packed, exponent = (checkpoint_name(a, "attention") for a in encoded)
    return e5m6.decode(packed, exponent, width, out_BTNH.dtype).reshape(out_BTNH.shape)


def _attention_bwd(scale: float, keeps_e5m6: bool, kept, dout_BTNH):
    arrays, first_BT = kept
    return *_by_heads(partial(_backward, scale, first_BT), *arrays, dout_BTNH), None


def _backward(scale: float, first_BT, q_BTNH, k_BTNH, v_BTNH, out_BTNH, logsum_BTN1, dout_BTNH):
    f32 = jnp.float32
    dq_blocks = []
    dk_BTNH, dv_BTNH = jnp.zeros(k_BTNH.shape, f32), jnp.zeros(v_BTNH.shape, f32)
    for start, end in _query_blocks(q_BTNH.shape[1]):
        q, k, v, dout = q_BTNH[:, start:end], k_BTNH[:, :end], v_BTNH[:, :end], dout_BTNH[:, start:end]
        p_BNTS = jnp.exp(_scores(q, k, start, scale, first_BT) - logsum_BTN1[:, start:end].swapaxes(1, 2))
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
