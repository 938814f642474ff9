"""Multi-head Latent Attention equals its published statement and never looks ahead."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import small
from flax import nnx
from small import assert_trees_close

from dsjax.config import ModelConfig, RopeScaling
from dsjax.model import causal
from dsjax.model.attention import MLA
from dsjax.model.causal import MIN_QUERY_BLOCK, causal_attention, splash_attention
from dsjax.model.layers import rope_frequencies, rope_table, softmax_scale

CONFIG = ModelConfig(
    hidden_size=24,
    num_attention_heads=3,
    q_lora_rank=10,
    kv_lora_rank=14,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=5,
    rms_norm_eps=1e-2,  # the norms of the latents do not use it
    rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=16),
    initializer_range=0.4,
)


def module(config: ModelConfig) -> MLA:
    mla = MLA(config, small.FP32, small.mesh(), nnx.Rngs(0))
    for norm in ("q_a_layernorm", "kv_a_layernorm"):
        if hasattr(mla, norm):
            weight = getattr(mla, norm).weight
            weight[...] = 1 + 0.3 * jax.random.normal(jax.random.key(1), weight.shape)
    return mla


def hidden(length: int, size: int = 24) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, length, size)).astype(np.float32)


@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize("q_lora_rank", [None, 10])
def test_mla_equals_its_statement(q_lora_rank, length):
    config = dataclasses.replace(CONFIG, q_lora_rank=q_lora_rank)
    mla, x = module(config), hidden(length)
    state = nnx.to_pure_dict(nnx.state(mla, nnx.Param))
    weights = {name: np.asarray(part["weight"], np.float64) for name, part in state.items()}
    assert ("q_proj" in weights) == (q_lora_rank is None)
    frequencies, scale = rope_frequencies(config).astype(np.float64), softmax_scale(config)
    expected = [oracles.mla(sequence.astype(np.float64), weights, config, frequencies, scale) for sequence in x]
    table = rope_table(config, length)
    np.testing.assert_allclose(jax.jit(lambda x: mla(x, table))(x), expected, atol=2e-5)


def test_no_future_leak():
    """The output at position t has no gradient from later inputs, and one from each earlier or equal one."""
    mla, x, table = module(CONFIG), hidden(9)[:1], rope_table(CONFIG, 9)
    seen = jax.jit(jax.jacrev(lambda x: jnp.sum(mla(x, table)[0], axis=-1)))(x)[:, 0]  # [outputs, inputs, D]
    strength = np.abs(seen).max(-1)
    assert np.all(strength[np.triu_indices(9, 1)] == 0)
    assert np.all(strength[np.tril_indices(9)] > 1e-6)


def naive_attention(q, k, v, scale):
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q, k)
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool))[None, None], scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)


# One block; one exactly; a block and one query; an odd number over several; more than eight minimal blocks.
@pytest.mark.parametrize(
    "length", [5, MIN_QUERY_BLOCK, MIN_QUERY_BLOCK + 1, 300, pytest.param(1031, marks=pytest.mark.slow)]
)
def test_blocks_and_their_gradient_equal_autodiff_of_the_naive_form(length):
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, length, 2, size)).astype(np.float32) for size in (6, 6, 4, 4))

    def both(attention):
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, 0.7), q, k, v)
        return out, *pull(dout)

    assert_trees_close(jax.jit(lambda: both(causal_attention))(), jax.jit(lambda: both(naive_attention))(), 1e-5)


@pytest.mark.parametrize(("fits", "at_once"), [(6, 6), (5, 3), (1, 1), (0.5, 1)])
def test_heads_take_turns_where_their_scores_are_large(monkeypatch, fits, at_once):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 130, 6, size)).astype(np.float32) for size in (6, 6, 4))
    value = lambda q, k, v: jnp.sum(jnp.sin(causal_attention(q, k, v, 0.7)))  # noqa: E731
    expected = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))(q, k, v)
    monkeypatch.setattr(causal, "SCORE_BYTES", int(fits * 4 * 2 * 128 * 130))
    grouped = jax.value_and_grad(lambda *a: value(*a), argnums=(0, 1, 2))
    assert f"f32[2,{at_once},128,128]" in str(jax.make_jaxpr(grouped)(q, k, v))
    assert_trees_close(jax.jit(grouped)(q, k, v), expected, 1e-6)


@pytest.mark.slow
def test_splash_attention_equals_the_blocks():
    """Interpreted: with the two head sizes of MLA, several blocks, BF16."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(rng.standard_normal((2, 256, 2, n)), jnp.bfloat16) for n in (24, 24, 16, 16))

    def both(attention):
        out, pull = jax.vjp(attention, q, k, v)
        return jax.tree.map(lambda a: a.astype(jnp.float32), (out, *pull(dout)))

    ours = jax.jit(lambda: both(lambda *qkv: splash_attention(*qkv, scale=0.7, interpret=True)))()
    assert_trees_close(ours, jax.jit(lambda: both(lambda *qkv: causal_attention(*qkv, 0.7)))(), 2e-2)


def test_scores_of_all_pairs_never_exist():
    length = 1024
    q = np.zeros((1, length, 2, 6), np.float32)
    text = str(jax.make_jaxpr(jax.grad(lambda q: jnp.sum(causal_attention(q, q, q, 1.0))))(q))
    assert f"f32[1,2,128,{length}]" in text and f"[1,2,{length},{length}]" not in text


def test_bf16_softmax_is_computed_in_fp32():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 40, 2, 8), jnp.bfloat16) for i in range(3))
    out = jax.jit(causal_attention, static_argnums=3)(q, k, v, 3.0)
    assert out.dtype == jnp.bfloat16
    wide = [a.astype(jnp.float32) for a in (q, k, v)]
    # Rounding of the probabilities and of the result, nothing more: scores up to 50 in BF16 would be 0.1 off.
    np.testing.assert_allclose(out.astype(jnp.float32), naive_attention(*wide, 3.0), atol=2e-2)


def test_fp32_operands_are_multiplied_in_fp32_on_every_platform():
    """CPUs always do; TPUs and GPUs only when every product says so."""
    loss = lambda q: jnp.sum(causal_attention(q, q, q, 1.0))  # noqa: E731
    for dtype, said in ((jnp.float32, True), (jnp.bfloat16, False)):
        text = str(jax.make_jaxpr(jax.grad(loss))(jnp.zeros((1, 5, 2, 4), dtype)))
        # In BF16 one product is left that asks for it: the sum over out * dout, both widened first.
        expected = text.count("dot_general[") if said else 1
        assert text.count("HIGHEST") == 2 * expected > 0
