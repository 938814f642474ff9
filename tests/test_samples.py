"""Samples that share a row: each is computed as if it were alone, and only answers are trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from small import assert_trees_close

from dsjax.config import DataConfig
from dsjax.data import marks
from dsjax.model.causal import causal_attention, splash_attention
from dsjax.model.losses import cross_entropy, pack_bits, token_log_probs, unpack_bits
from dsjax.training.objective import language_model_loss, read_targets
from dsjax.training.state import build_network
from dsjax.training.step import pretrain_step

LENGTHS = (5, 1, 7, 4)  # of samples that share a row, a single token among them
ANSWERS = (2, 0, 6, 3)  # tokens at their ends
ROW = sum(LENGTHS)


def marked(rng, lengths=LENGTHS, answers=ANSWERS) -> np.ndarray:
    """A row [T + 1] of samples with random tokens, and the first token of the next row."""
    row = rng.integers(small.MODEL.vocab_size, size=sum(lengths) + 1)
    end = 0
    for length, answer in zip(lengths, answers, strict=True):
        row[end] |= marks.BEGINS
        end += length
        row[end - answer : end] |= marks.ANSWER
    row[end] |= marks.BEGINS
    return row.astype(np.int32)


def test_marks_are_taken_off_again():
    row = marked(np.random.default_rng(0))
    assert marks.token_of(row).max() < small.MODEL.vocab_size
    starts = np.cumsum((0, *LENGTHS))
    np.testing.assert_array_equal(np.flatnonzero(marks.begins(row)), starts)
    assert marks.is_answer(row).sum() == sum(ANSWERS)


@pytest.mark.parametrize("length", [17, 300])
def test_attention_within_samples_equals_each_alone(length):
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((2, length, 2, size)).astype(np.float32) for size in (6, 6, 4, 4))
    starts = [np.array([0, 3, length // 2]), np.array([0, 1, length - 1])]
    first = np.stack([start[np.searchsorted(start, np.arange(length), side="right") - 1] for start in starts])

    @jax.jit
    def run(q, k, v, dout, first=None):
        out, pull = jax.vjp(lambda *qkv: causal_attention(*qkv, 0.7, False, first), q, k, v)
        return out, *pull(dout)

    rows = []
    for row, start in enumerate(starts):
        ends = [*start[1:], length]
        parts = [(slice(row, row + 1), slice(begin, end)) for begin, end in zip(start, ends, strict=True)]
        each = [run(*(a[part] for a in (q, k, v, dout))) for part in parts]
        rows.append([np.concatenate(arrays, axis=1) for arrays in zip(*each, strict=True)])
    alone = tuple(np.concatenate(arrays) for arrays in zip(*rows, strict=True))
    assert_trees_close(run(q, k, v, dout, jnp.asarray(first, jnp.int32)), alone, 1e-5)


@pytest.mark.slow
def test_splash_attention_keeps_samples_apart():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 256, 2, n)), jnp.bfloat16) for n in (24, 24, 16))
    first = jnp.asarray(np.where(np.arange(256) < 100, 0, 100)[None], jnp.int32)
    ours = splash_attention(q, k, v, first, scale=0.7, interpret=True)
    expected = causal_attention(q, k, v, 0.7, False, first)
    assert_trees_close(ours.astype(jnp.float32), expected.astype(jnp.float32), 2e-2)


def test_network_gives_each_sample_what_it_gives_it_alone():
    config, mesh = small.config(small.DEEPER), small.mesh()
    net = build_network(config, mesh)
    params, bias = small.weights_like(net.shapes), jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), net.bias_shapes)
    row = marked(np.random.default_rng(0))[None]
    read = read_targets(row, True)
    run = jax.jit(lambda inputs, first=None: net.bind(params, bias)(inputs, None, first).hidden_BTD)
    together = run(read.inputs_BT, read.first_BT)
    starts = np.cumsum((0, *LENGTHS))
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        alone = run(marks.token_of(row[:, begin:end]))
        assert_trees_close(together[:, begin:end], alone, 1e-5)


def test_loss_is_the_mean_over_answers_and_mtp_stays_within_a_sample():
    config = small.config()
    config = dataclasses.replace(config, data=DataConfig(sources=("chat:x",)))
    net = build_network(config, small.mesh())
    params, bias = small.weights_like(net.shapes), jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), net.bias_shapes)
    rng = np.random.default_rng(1)
    rows = np.stack([marked(rng), marked(rng, (10, 7), (1, 2))])
    _, metrics = jax.jit(language_model_loss(net, config))(params, bias, rows, {"mtp_loss_weight": 0.3})

    @jax.jit
    def log_probs(read):
        model = net.bind(params, bias)
        out = model(read.inputs_BT, read.labels_BT, read.first_BT)
        return [jax.nn.log_softmax(model.logits(hidden)) for hidden in (out.hidden_BTD, out.mtp_hidden_BTD)]

    log_p, mtp_log_p = map(np.asarray, log_probs(read_targets(rows, True)))
    tokens, losses, mtp_losses = marks.token_of(rows), [], []
    for b in range(2):
        sample = np.cumsum(marks.begins(rows[b]))
        for i in range(ROW):
            if marks.is_answer(rows[b, i + 1]):
                losses.append(-log_p[b, i, tokens[b, i + 1]])
            if i + 2 <= ROW and marks.is_answer(rows[b, i + 2]) and sample[i] == sample[i + 2]:
                mtp_losses.append(-mtp_log_p[b, i, tokens[b, i + 2]])
    assert metrics["weight"] == len(losses) == sum(ANSWERS) + 3
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["mtp_loss"], np.mean(mtp_losses), rtol=1e-5)


def test_microbatches_count_by_their_answers():
    """The step over unequal microbatches is that of all rows at once."""
    model = dataclasses.replace(small.ONE_LAYER, aux_loss_alpha=0.0)
    rng, mesh = np.random.default_rng(2), small.mesh()
    rows = np.stack([marked(rng, (3, 14), (1, 13)) if i < 2 else marked(rng, (8, 9), (0, 1)) for i in range(4)])
    values = {"learning_rate": np.float32(1e-2), "bias_update_speed": np.float32(0), "mtp_loss_weight": np.float32(0)}

    def step(microbatch: int):
        config = small.config(model, batch_size=4, microbatch_size=microbatch)
        config = dataclasses.replace(config, data=DataConfig(sources=("chat:x",), sequence_length=ROW))
        batch = rows.reshape(-1, microbatch, ROW + 1)
        state = small.state(config, mesh)
        state, metrics = pretrain_step(config, mesh)(state, batch, np.int32(4 // microbatch), values)
        assert metrics["weight"] == 2 * 14 + 2
        return {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"], "params": state.params}

    assert_trees_close(step(2), step(4), 1e-4)


@pytest.mark.parametrize("vocab", [5, 32, 70])
def test_bits_come_back(vocab):
    kept = np.random.default_rng(0).random((3, 4, vocab)) < 0.5
    words = pack_bits(jnp.asarray(kept))
    assert words.shape == (3, 4, -(-vocab // 32))
    np.testing.assert_array_equal(unpack_bits(words, vocab), kept)


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 4)], ids=str)
def test_log_probabilities_and_their_gradients(sizes, is_cut):
    rng = np.random.default_rng(0)
    x, head = rng.standard_normal((8, 5, 16)).astype(np.float32), rng.standard_normal((16, 37)).astype(np.float32)
    labels, d = rng.integers(37, size=(8, 5)), rng.standard_normal((8, 5)).astype(np.float32)
    kept = rng.random((8, 5, 37)) < 0.6
    words = pack_bits(jnp.asarray(kept)) if is_cut else None

    def ours(x, head):
        found = token_log_probs(x, head, labels, small.mesh(*sizes), small.FP32, 3, words)
        return jnp.sum(found.log_prob_BT * d), found

    def plain(x, head):
        logits = x @ head
        if is_cut:
            logits = jnp.where(kept | (np.arange(37) == labels[..., None]), logits, -jnp.inf)
        log_p = jax.nn.log_softmax(logits)
        entropy = -jnp.sum(jnp.where(jnp.exp(log_p) > 0, jnp.exp(log_p) * log_p, 0), -1)
        chosen = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
        return jnp.sum(chosen * d), (chosen, entropy)

    (_, found), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(x, head)
    if is_cut:  # autodiff of the plain form has NaN where minus infinity meets it
        log_p, entropy = plain(x, head)[1]
        p = jax.nn.softmax(jnp.where(kept | (np.arange(37) == labels[..., None]), x @ head, -jnp.inf))
        dlogits = d[..., None] * ((np.arange(37) == labels[..., None]) - p)
        expected = (dlogits @ head.T, jnp.einsum("btd,btv->dv", x, dlogits))
    else:
        (_, (log_p, entropy)), expected = jax.value_and_grad(plain, (0, 1), has_aux=True)(x, head)
    assert_trees_close(tuple(found), (log_p, entropy), 1e-5)
    assert_trees_close(gradients, expected, 1e-5)


def test_log_probabilities_are_what_cross_entropy_sums():
    rng = np.random.default_rng(0)
    x, head = rng.standard_normal((2, 9, 8)).astype(np.float32), rng.standard_normal((8, 21)).astype(np.float32)
    labels, weights = rng.integers(21, size=(2, 9)), rng.random((2, 9)).astype(np.float32)
    total = cross_entropy(x, head, labels, weights, small.mesh(), small.FP32, 4)
    found = token_log_probs(x, head, labels, small.mesh(), small.FP32, 4)
    np.testing.assert_allclose(-jnp.sum(found.log_prob_BT * weights), total, rtol=1e-5)
