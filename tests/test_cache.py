"""The latent cache: what is computed over it equals the full forward pass, in both forms, however it is cut."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from dsjax.config import ConfigError, ModelConfig, RopeScaling
from dsjax.model import cache as caches
from dsjax.model.experts import ExpertWeights, few_tokens, own_experts, suits_few
from dsjax.model.moe import Execution
from dsjax.model.transformer import network, unstack
from dsjax.numerics.recipe import recipe
from dsjax.planning.buffers import make_buffer
from dsjax.planning.counts import kv_cache_bytes_per_token

MODEL = dataclasses.replace(
    small.MODEL,
    num_hidden_layers=3,
    rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=16),
)
LENGTHS = (11, 1, 7, 5)  # of the rows
ROOM = 24


def build(model=MODEL, mesh=None, *, unrolled=False, few=False, seed=0):
    net = network(model, Execution(mesh or small.mesh(), small.FP32, small.ROOMY, unrolled=unrolled, few_tokens=few))
    stacked = network(model, small.execution())
    params, bias = small.weights_like(stacked.shapes, seed, 0.3), small.weights_like(stacked.bias_shapes, seed + 1)
    return (net, *map(unstack, (params, bias))) if unrolled else (net, params, bias)


def empty(net, rows=4, storage="float32", room=ROOM):
    return caches.empty(net.config, rows, room, storage, unrolled=net.execution.unrolled, mtp=True)


def full(model=MODEL, tokens=None):
    """Logits and MTP's states of the whole sequences, by the pass that trains."""
    net, params, bias = build(model)

    @jax.jit
    def run(tokens_BT, next_BT):
        bound = net.bind(params, bias)
        out = bound(tokens_BT, next_BT)
        return bound.logits(out.hidden_BTD), out.mtp_hidden_BTD

    return run(tokens[:, :-1], tokens[:, 1:])


def runner(net, params, bias, absorbed, visible=None):
    @jax.jit
    def run(tokens_BT, next_BT, start_B, cache):
        bound = net.bind(params, bias)
        out = bound.extend(tokens_BT, start_B, cache, absorbed=absorbed, visible=visible)
        mtp_BTD, cache = bound.extend_mtp(
            next_BT, out.mtp_input_BTD, start_B, out.cache, absorbed=absorbed, visible=visible
        )
        return bound.logits(out.hidden_BTD), mtp_BTD, cache

    return run


TOKENS = small.tokens(4, 17, seed=3)


@pytest.fixture(scope="module")
def expected():
    return full(tokens=TOKENS)


@pytest.mark.parametrize("mesh, unrolled", [((1, 1, 1), True), ((1, 2, 2), False)])
def test_absorbed_decoding_equals_the_full_pass_with_rows_of_different_lengths(expected, mesh, unrolled):
    on = small.mesh(*mesh)
    net, params, bias = build(mesh=on, unrolled=unrolled, few=True)
    prefill, step = runner(net, params, bias, False), runner(net, params, bias, True)
    tokens, following = TOKENS[:, :-1], TOKENS[:, 1:]
    longest, lengths = max(LENGTHS), np.array(LENGTHS, np.int32)
    logits, mtp, cache = prefill(tokens[:, :longest], following[:, :longest], np.zeros(4, np.int32), empty(net))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[row, :length], expected[0][row, :length], atol=5e-5)
        np.testing.assert_allclose(mtp[row, :length], expected[1][row, :length], atol=5e-5)
    rows = np.arange(4)
    for _ in range(5):  # each row goes on from its own length
        ours = step(tokens[rows, lengths][:, None], following[rows, lengths][:, None], lengths, cache)
        for got, want in zip(ours[:2], expected, strict=True):
            np.testing.assert_allclose(got[:, 0], np.asarray(want)[rows, lengths], atol=5e-5)
        cache, lengths = ours[2], lengths + 1


@pytest.mark.parametrize("cuts, absorbed", [((16,), True), ((5, 11), False)])
def test_sequence_may_be_cut_anywhere(expected, cuts, absorbed):
    net, params, bias = build()
    cache, start = empty(net), 0
    for size in cuts:
        run = runner(net, params, bias, absorbed, visible=start + size)
        window = slice(start, start + size)
        inputs = TOKENS[:, :-1][:, window], TOKENS[:, 1:][:, window]
        logits, mtp, cache = run(*inputs, np.full(4, start, np.int32), cache)
        np.testing.assert_allclose(logits, expected[0][:, window], atol=5e-5)
        np.testing.assert_allclose(mtp, expected[1][:, window], atol=5e-5)
        start += size


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None, "attention_bias": True},
        {"tie_word_embeddings": True, "rope_interleave": False, "first_k_dense_replace": 3},
        {"first_k_dense_replace": 0, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False},
    ],
)
@pytest.mark.slow
def test_every_dialect_of_the_family_decodes(changes):
    model = dataclasses.replace(MODEL, **changes)
    logits, _ = full(model, TOKENS)
    net, params, bias = build(model, unrolled=True, few=True)
    run, cache = runner(net, params, bias, True), empty(net)
    for at in range(6):
        ours, _, cache = run(TOKENS[:, at, None], TOKENS[:, at + 1, None], np.full(4, at, np.int32), cache)
        np.testing.assert_allclose(ours[:, 0], logits[:, at], atol=5e-5)


def test_row_that_starts_at_the_end_writes_nothing_and_rubbish_is_never_seen(expected):
    net, params, bias = build()
    run, cache = runner(net, params, bias, False), empty(net)
    tokens, following = TOKENS[:, :8], TOKENS[:, 1:9]
    _, _, cache = run(tokens, following, np.array([0, ROOM, 0, 0], np.int32), cache)
    assert all(not np.any(a[:, 1]) for a in jax.tree.leaves(cache)) and np.any(cache.moe[0].values_LBSR[:, 2])
    # Row 0 takes back its last three tokens, and goes on from the fifth with other rubbish behind.
    poisoned = jax.tree.map(lambda a: a.at[:, :, 5:].set(1e3), cache)
    logits, _, _ = run(tokens[:, 5:], following[:, 5:], np.full(4, 5, np.int32), poisoned)
    np.testing.assert_allclose(logits[0], expected[0][0, 5:8], atol=5e-5)


def test_fp8_records_round_as_e4m3_with_a_scale_for_128_values():
    model = dataclasses.replace(MODEL, kv_lora_rank=160)  # a tile of 128 and one of 32
    cache = caches.empty(model, 1, 4, "float8_e4m3fn", unrolled=False, mtp=False)
    c = np.random.default_rng(0).standard_normal((1, 3, 160)).astype(np.float32)
    k = np.random.default_rng(1).standard_normal((1, 3, 8)).astype(np.float32)
    latents = caches.write(cache.moe[0], 1, jnp.asarray(c), jnp.asarray(k), jnp.array([1]))
    read, rope = caches.read(latents, 1, 4, jnp.float32)
    assert not np.any(caches.read(latents, 0, 4, jnp.float32)[0]) and not np.any(read[:, 0])
    for tile in (slice(0, 128), slice(128, 160)):
        amax = np.abs(c[..., tile]).max(-1, keepdims=True)
        error = np.abs(np.asarray(read)[:, 1:, tile] - c[..., tile])
        assert np.all(error <= np.maximum(np.abs(c[..., tile]) / 16, amax / 448 * 2**-10) * 1.001)
        assert np.any(error > 0)
    np.testing.assert_array_equal(rope[:, 1:], jnp.asarray(k).astype(jnp.bfloat16).astype(jnp.float32))


def test_decoding_over_fp8_records_stays_near(expected):
    net, params, bias = build()
    cache, run = empty(net, storage="float8_e4m3fn"), runner(net, params, bias, True)
    for at in range(6):
        logits, _, cache = run(TOKENS[:, at, None], TOKENS[:, at + 1, None], np.full(4, at, np.int32), cache)
    exact = np.asarray(expected[0][:, 5])
    worst_B = np.abs(np.asarray(logits[:, 0]) - exact).max(-1) / np.std(exact)
    assert 1e-4 < np.median(worst_B) < 0.3  # in one row or another an expert that was close is not chosen


def test_bytes_of_a_token_are_the_closed_form():
    v3 = ModelConfig(num_hidden_layers=61, first_k_dense_replace=3, kv_lora_rank=512, qk_rope_head_dim=64)
    sizes = {}
    for storage in caches.STORAGE:
        shapes = jax.eval_shape(partial(caches.empty, v3, 2, 128, storage, unrolled=False, mtp=False))
        sizes[storage] = caches.bytes_per_token(shapes)
    assert sizes == {"float32": 140_544, "bfloat16": 70_272, "float8_e4m3fn": 61 * 656}
    assert sizes["bfloat16"] == kv_cache_bytes_per_token(v3)
    with_mtp = jax.eval_shape(partial(caches.empty, v3, 2, 128, "bfloat16", unrolled=True, mtp=True))
    assert caches.bytes_per_token(with_mtp) == 62 * 576 * 2 and len(with_mtp.moe) == 58 and with_mtp.length == 128
    with pytest.raises(ConfigError, match="unknown cache storage 'int8'; known are float32, bfloat16, float8_e4m3fn"):
        caches.empty(v3, 1, 1, "int8", unrolled=False, mtp=False)


@pytest.mark.parametrize("name", ["fp32", "fp8_deepseek"])
@pytest.mark.parametrize("tokens, experts, ranks", [(1, 8, 1), (7, 8, 2), (5, 16, 1)])
def test_few_tokens_have_the_same_experts_outputs(tokens, experts, ranks, name):
    rng, chosen, width = np.random.default_rng(0), 3, 16
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    x, own = draw(tokens, 32), experts // ranks
    weights = ExpertWeights(draw(own, 32, width), draw(own, 32, width), draw(own, width, 32))
    experts_MK = jnp.asarray(np.stack([rng.permutation(experts)[:chosen] for _ in range(tokens)]), jnp.int32)
    weights_MK, how, rank = jnp.abs(draw(tokens, chosen)), recipe(name), ranks - 1
    buffer = make_buffer(tokens, chosen, experts // ranks, ranks, 1.25)
    assignments = x, experts_MK, weights_MK, weights
    expected, told = jax.jit(lambda *a: own_experts(*a, buffer, rank, how))(*assignments)
    ours, tally = jax.jit(lambda *a: few_tokens(*a, rank * own, how))(*assignments)
    np.testing.assert_allclose(ours, expected, atol=(3e-6 if name == "fp32" else 0.05) * np.abs(expected).max())
    assert tally.computed == told.computed


def test_few_means_few():
    assert suits_few(1, 8, 256, small.FP32) and suits_few(8, 4, 16, small.FP32)
    assert not suits_few(8, 8, 256, small.FP32) and not suits_few(64, 4, 16, small.FP32)
    assert not suits_few(1, 8, 256, recipe("fp8_deepseek", "fp22"))


def test_unrolled_layers_train_the_same_numbers(expected):
    net, params, bias = build(unrolled=True)

    @jax.jit
    def logits(tokens_BT):
        bound = net.bind(params, bias)
        return bound.logits(bound(tokens_BT).hidden_BTD)

    np.testing.assert_allclose(logits(TOKENS[:, :-1]), expected[0], atol=5e-5)
