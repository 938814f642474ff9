"""Cross-entropy and log-probabilities over the vocabulary without ever holding all logits."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from dsjax.numerics.linear import product
from dsjax.numerics.recipe import Recipe
from dsjax.sharding import BATCH, gather

HEAD_AXES = ("fsdp", "expert")  # which cut the head along D


def cross_entropy(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    mesh: Mesh,
    recipe: Recipe,
    chunk: int,
) -> jax.Array:
    """The weighted sum over tokens of -log softmax(x @ head)[label], in nats, FP32.

    Args:
      x_BTD: normalised hidden states.
      head_DV: FP32 output head.
      labels_BT: int32.
      weights_BT: FP32 weight of each token's loss.
      mesh: each device takes its own sequences; inside shard_map, so that the head's gradient is reduced once.
      recipe: how to multiply.
      chunk: tokens whose logits exist at once, on each device.
    """

    def local(x_BTD, shard_DV, labels_BT, weights_BT):
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        total = _chunked(x_MD, shard_DV, labels_BT.reshape(-1), weights_BT.reshape(-1), mesh, recipe, chunk)
        return total[None]

    specs = (BATCH, PartitionSpec(HEAD_AXES), BATCH, BATCH)
    sums = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=BATCH, check_vma=False)
    return jnp.sum(sums(x_BTD, head_DV, labels_BT, weights_BT))


def _chunks(tokens: int, chunk: int) -> tuple[int, int]:
    """(number of chunks, their size): equal chunks of at most `chunk` tokens, the last padded."""
    count = -(-tokens // chunk)
    return count, -(-tokens // count)


def _padded(a: jax.Array, count: int, size: int) -> jax.Array:
    a = jnp.pad(a, [(0, count * size - len(a))] + [(0, 0)] * (a.ndim - 1))
    return a.reshape(count, size, *a.shape[1:])


def _whole(shard_DV: jax.Array, mesh: Mesh, recipe: Recipe) -> jax.Array:
    return gather(shard_DV.astype(recipe.dtype), HEAD_AXES, 0, mesh)


def _own_part(dhead_DV: jax.Array, mesh: Mesh) -> jax.Array:
    axes = tuple(axis for axis in HEAD_AXES if mesh.shape[axis] > 1)
    return lax.psum_scatter(dhead_DV, axes, scatter_dimension=0, tiled=True) if axes else dhead_DV


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _chunked(x_MD, shard_DV, labels_M, weights_M, mesh: Mesh, recipe: Recipe, chunk: int) -> jax.Array:
    head_DV = _whole(shard_DV, mesh, recipe)
    count, size = _chunks(len(x_MD), chunk)
    chunks = tuple(_padded(a, count, size) for a in (x_MD, labels_M, weights_M))

    def add(total, part):
        x_CD, labels_C, weights_C = part
        return total + _chunk_loss(head_DV, x_CD, labels_C, weights_C, recipe)[0], None

    return lax.scan(add, jnp.float32(0), chunks)[0]


def _chunk_loss(head_DV, x_CD, labels_C, weights_C, recipe: Recipe):
    """(weighted loss, exponentials [C, V], their sums [C, 1])."""
    logits_CV = product("cd,dv->cv", x_CD, head_DV, recipe, jnp.float32)
    top_C1 = jnp.max(logits_CV, axis=-1, keepdims=True)
    exp_CV = jnp.exp(logits_CV - top_C1)
    sum_C1 = jnp.sum(exp_CV, axis=-1, keepdims=True)
    label_C1 = jnp.take_along_axis(logits_CV, labels_C[:, None], axis=-1)
    loss_C1 = top_C1 + jnp.log(sum_C1) - label_C1
    return jnp.sum(loss_C1[:, 0] * weights_C), exp_CV, sum_C1


def _chunked_fwd(x_MD, shard_DV, labels_M, weights_M, mesh: Mesh, recipe: Recipe, chunk: int):
    # The gradients are taken here, while the logits exist: three products instead of four.
    head_DV = _whole(shard_DV, mesh, recipe)
    count, size = _chunks(len(x_MD), chunk)
    chunks = tuple(_padded(a, count, size) for a in (x_MD, labels_M, weights_M))

    def add(carry, part):
        total, dhead_DV = carry
        x_CD, labels_C, weights_C = part
        loss, exp_CV, sum_C1 = _chunk_loss(head_DV, x_CD, labels_C, weights_C, recipe)
        hit_CV = labels_C[:, None] == jnp.arange(head_DV.shape[1])[None]
        dlogits_CV = (exp_CV / sum_C1 - hit_CV) * weights_C[:, None]
        dx_CD = product("cv,dv->cd", dlogits_CV, head_DV, recipe, x_MD.dtype)
        dhead_DV += product("cd,cv->dv", x_CD, dlogits_CV, recipe, jnp.float32)
        return (total + loss, dhead_DV), dx_CD

    start = (jnp.float32(0), jnp.zeros(head_DV.shape, jnp.float32))
    (total, dhead_DV), dx = lax.scan(add, start, chunks)
    return total, (dx.reshape(-1, x_MD.shape[1])[: len(x_MD)], _own_part(dhead_DV, mesh))


def _chunked_bwd(mesh: Mesh, recipe: Recipe, chunk: int, kept, dtotal: jax.Array):
    dx_MD, dshard_DV = kept
    return (dx_MD * dtotal).astype(dx_MD.dtype), dshard_DV * dtotal, None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


class TokenLogProbs(NamedTuple):
    """What a model says of given tokens, FP32."""

    log_prob_BT: jax.Array  # log softmax(logits)[label], in nats
    entropy_BT: jax.Array  # of the distribution that the label is one draw from, in nats; it has no gradient


def token_log_probs(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    labels_BT: jax.Array,
    mesh: Mesh,
    recipe: Recipe,
    chunk: int,
    kept_BTW: jax.Array | None = None,
) -> TokenLogProbs:
    """The log-probability of each label; arguments as of `cross_entropy`.

    kept_BTW: what of the vocabulary there was to choose from, as `pack_bits` gives it; None: all of it.
    """

    def local(x_BTD, shard_DV, labels_BT, kept_BTW=None):
        flat = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731
        kept_MW = None if kept_BTW is None else flat(kept_BTW)
        found = _log_probs(flat(x_BTD), shard_DV, flat(labels_BT), kept_MW, mesh, recipe, chunk)
        return jax.tree.map(lambda a: a.reshape(labels_BT.shape), TokenLogProbs(*found))

    operands = (x_BTD, head_DV, labels_BT) + (() if kept_BTW is None else (kept_BTW,))
    specs = (BATCH, PartitionSpec(HEAD_AXES), BATCH, BATCH)[: len(operands)]
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=BATCH, check_vma=False)(*operands)


def pack_bits(kept_XV: jax.Array) -> jax.Array:
    """Booleans [..., V] as uint32 words [..., ceil(V / 32)], the first in the lowest bit."""
    vocab = kept_XV.shape[-1]
    padded = jnp.pad(kept_XV, [(0, 0)] * (kept_XV.ndim - 1) + [(0, -vocab % 32)])
    bits = padded.reshape(*kept_XV.shape[:-1], -1, 32).astype(jnp.uint32)
    return jnp.sum(bits << _places_of_bits(bits.ndim), axis=-1, dtype=jnp.uint32)


def unpack_bits(words_XW: jax.Array, vocab: int) -> jax.Array:
    """The booleans [..., V] that `pack_bits` was given."""
    bits = (words_XW[..., None] >> _places_of_bits(words_XW.ndim + 1)) & 1
    return bits.astype(bool).reshape(*words_XW.shape[:-1], -1)[..., :vocab]


def _places_of_bits(dims: int) -> jax.Array:
    return jnp.arange(32, dtype=jnp.uint32).reshape((1,) * (dims - 1) + (32,))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _log_probs(x_MD, shard_DV, labels_M, kept_MW, mesh: Mesh, recipe: Recipe, chunk: int):
    head_DV = _whole(shard_DV, mesh, recipe)
    count, size = _chunks(len(x_MD), chunk)

    def one(_: None, part: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
        x_CD, labels_C, kept_CW = part
        log_p_CV = _log_softmax(head_DV, x_CD, labels_C, kept_CW, recipe)
        p_CV = jnp.exp(log_p_CV)
        entropy_C = -jnp.sum(jnp.where(p_CV > 0, p_CV * log_p_CV, 0.0), axis=-1)
        return None, (jnp.take_along_axis(log_p_CV, labels_C[:, None], axis=-1)[:, 0], entropy_C)

    chunks = jax.tree.map(lambda a: _padded(a, count, size), (x_MD, labels_M, kept_MW))
    _, found = lax.scan(one, None, chunks)
    return jax.tree.map(lambda a: a.reshape(-1)[: len(x_MD)], found)


def _log_softmax(head_DV, x_CD, labels_C, kept_CW, recipe: Recipe) -> jax.Array:
    logits_CV = product("cd,dv->cv", x_CD, head_DV, recipe, jnp.float32)
    if kept_CW is not None:
        # The label was chosen, so it was there to choose from, whatever rounding says.
        is_label_CV = labels_C[:, None] == jnp.arange(logits_CV.shape[1])[None]
        logits_CV = jnp.where(unpack_bits(kept_CW, logits_CV.shape[1]) | is_label_CV, logits_CV, -jnp.inf)
    return jax.nn.log_softmax(logits_CV, axis=-1)


def _log_probs_fwd(x_MD, shard_DV, labels_M, kept_MW, mesh: Mesh, recipe: Recipe, chunk: int):
    return _log_probs(x_MD, shard_DV, labels_M, kept_MW, mesh, recipe, chunk), (x_MD, shard_DV, labels_M, kept_MW)


def _log_probs_bwd(mesh: Mesh, recipe: Recipe, chunk: int, kept, cotangents):
    # What becomes of a log-probability is known only later, so the logits are computed again.
    x_MD, shard_DV, labels_M, kept_MW = kept
    head_DV = _whole(shard_DV, mesh, recipe)
    count, size = _chunks(len(x_MD), chunk)
    chunks = jax.tree.map(lambda a: _padded(a, count, size), (x_MD, labels_M, kept_MW, cotangents[0]))

    def add(dhead_DV: jax.Array, part: Any) -> tuple[jax.Array, jax.Array]:
        x_CD, labels_C, kept_CW, d_C = part
        p_CV = jnp.exp(_log_softmax(head_DV, x_CD, labels_C, kept_CW, recipe))
        hit_CV = labels_C[:, None] == jnp.arange(head_DV.shape[1])[None]
        dlogits_CV = d_C[:, None] * (hit_CV - p_CV)
        dx_CD = product("cv,dv->cd", dlogits_CV, head_DV, recipe, x_MD.dtype)
        return dhead_DV + product("cd,cv->dv", x_CD, dlogits_CV, recipe, jnp.float32), dx_CD

    dhead_DV, dx = lax.scan(add, jnp.zeros(head_DV.shape, jnp.float32), chunks)
    return dx.reshape(-1, x_MD.shape[1])[: len(x_MD)], _own_part(dhead_DV, mesh), None, None


_log_probs.defvjp(_log_probs_fwd, _log_probs_bwd)
