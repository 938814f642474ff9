"""Samples: drawn alike at any time, laid out whole, and scored by the trainer as the engine scored them."""

import dataclasses

import jax
import numpy as np
import pytest
import small

from dsjax.config import ConfigError, DataConfig, GRPOConfig, TaskConfig
from dsjax.data import marks
from dsjax.data.tokenizer import ByteTokenizer
from dsjax.inference import Engine, Sampling
from dsjax.inference.sampling import Draws, filtered
from dsjax.model.losses import unpack_bits
from dsjax.model.transformer import network
from dsjax.posttraining.grpo import Experience
from dsjax.posttraining.rollouts import Sample, as_batch, draw_samples, lay_out, make_scorer, prompt_tokens, seed_of
from dsjax.posttraining.tasks import Problem, make_task
from dsjax.training.state import build_network

EOS = ByteTokenizer.eos_id
MODEL = dataclasses.replace(small.DEEPER, vocab_size=264, num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def config():
    config = small.config(MODEL, batch_size=8, microbatch_size=2)
    return dataclasses.replace(
        config,
        data=DataConfig(sequence_length=80),
        task=TaskConfig(steps=2),
        grpo=GRPOConfig(group_size=4, max_new_tokens=12, slots=8, top_p=0.8),
    )


@pytest.fixture(scope="module")
def weights(config):
    net = build_network(config, small.mesh())
    return small.weights_like(net.shapes, scale=0.3), small.weights_like(net.bias_shapes, seed=1, scale=0.02)


@pytest.fixture(scope="module")
def engine(config, weights):
    return Engine(config, *weights, slots=8, tokenizer=ByteTokenizer(), tells_routes=True)


@pytest.fixture(scope="module")
def problems(config):
    task = make_task(config.task, 0)
    return [(index, task.problem(index)) for index in (5, 6)]


@pytest.fixture(scope="module")
def samples(engine, config, problems):
    return draw_samples(engine, config, None, problems, 4)


def made(prompt: int, completion: int, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(256, size=n).tolist()  # noqa: E731
    return Sample(Problem("", ""), draw(prompt), draw(completion), [-1.0] * completion, "", False)


def test_groups_stand_together_and_differ_within(samples, problems):
    assert [one.problem for one in samples] == [problem for _, problem in problems for _ in range(4)]
    assert all(len({tuple(one.tokens) for one in samples[i : i + 4]}) > 1 for i in (0, 4))
    assert all(len(one.tokens) <= 12 and one.is_truncated == (one.tokens[-1] != EOS) for one in samples)


def test_samples_are_the_same_whatever_was_drawn_before(engine, config, problems, samples):
    again = draw_samples(engine, config, None, problems[1:], 4)
    assert [one.tokens for one in again] == [one.tokens for one in samples[4:]]
    assert (
        len({seed_of(0, split, p, n) for split in ("train", "validation") for p in range(9) for n in range(9)}) == 162
    )


def test_samples_of_one_prompt_share_its_prefill(engine, problems, config, monkeypatch):
    seen = []
    prefill = engine._prefill
    monkeypatch.setattr(engine, "_prefill", lambda requests: seen.append(len(requests)) or prefill(requests))
    prompts = [prompt_tokens(problem, config, ByteTokenizer(), None) for _, problem in problems]
    asked = [Sampling(6, 1.0, seed=seed) for seed in range(6)]
    results = engine.generate([prompts[i % 2] for i in range(6)], asked)
    assert seen == [2]
    assert [r.prompt_cache_hit_tokens for r in results] == [0, 0, *[len(prompts[i % 2]) for i in range(2, 6)]]
    for i, result in enumerate(results):
        [alone] = engine.generate([prompts[i % 2]], asked[i])
        assert alone.tokens == result.tokens
        np.testing.assert_allclose(alone.log_probs, result.log_probs, atol=1e-4)


def test_rows_hold_every_sample_whole_and_nothing_else():
    rng = np.random.default_rng(0)
    samples = [made(int(rng.integers(1, 9)), int(rng.integers(1, 20)), i) for i in range(40)]
    rows = lay_out(samples, 28, EOS)
    used = sum(one.length for one in samples)
    assert rows.marked_BT.shape == (len(rows.marked_BT), 29) and used / (28 * len(rows.marked_BT)) > 0.85
    found = set()
    for one, (row, positions) in zip(samples, rows.places, strict=True):
        labels = rows.marked_BT[row, 1:][positions]
        assert marks.token_of(labels).tolist() == one.tokens and marks.is_answer(labels).all()
        start = positions.start + 1 - len(one.prompt)
        whole = rows.marked_BT[row, start : start + one.length]
        assert marks.token_of(whole).tolist() == one.prompt + one.tokens
        assert np.flatnonzero(marks.begins(whole)).tolist() == [0]
        found |= {(row, place) for place in range(start, start + one.length)}
    assert len(found) == used
    rest = [(r, t) for r in range(len(rows.marked_BT)) for t in range(29) if (r, t) not in found]
    assert all(rows.marked_BT[place] == EOS | marks.BEGINS for place in rest)
    assert {t for _, t in rest} >= {28}, "the token that a row shares with none"
    spread = rows.spread(range(1, 41))
    assert all((spread[place] == i + 1).all() for i, place in enumerate(rows.places))
    assert np.count_nonzero(spread) == sum(len(one.tokens) for one in samples)


def test_scores_are_the_engines(config, weights, samples):
    rows = lay_out(samples, config.data.sequence_length, EOS)
    score = make_scorer(config, build_network(config, small.mesh()), small.mesh())
    drawn = rows.spread([one.log_probs for one in samples])
    for routes in (None, rows.routes_BTLK):
        found, kept = score(*weights, rows.marked_BT, routes)
        assert kept is None
        np.testing.assert_allclose(found, drawn, atol=2e-4)
        np.testing.assert_array_equal(found == 0, drawn == 0)


def test_routes_are_those_of_the_whole_forward_pass(config, weights, samples):
    execution = dataclasses.replace(build_network(config, small.mesh()).execution, tells_routes=True)
    net = network(MODEL, execution)
    for one in samples[::3]:
        tokens = np.array([one.prompt + one.tokens], np.int32)[:, :-1]
        stats = jax.jit(lambda tokens: net.bind(*weights)(tokens).stats_L)(tokens)
        expected = np.sort(np.moveaxis(np.asarray(stats.experts_BTK), 0, 2)[0])  # [L, B, T, K] before
        assert one.routes.shape == (one.length - 1, MODEL.num_moe_layers, MODEL.num_experts_per_tok)
        np.testing.assert_array_equal(np.sort(one.routes), expected)


def test_given_routes_are_taken(config, weights, samples):
    rows = lay_out(samples, config.data.sequence_length, EOS)
    score = make_scorer(config, build_network(config, small.mesh()), small.mesh())
    own, _ = score(*weights, rows.marked_BT)
    other, _ = score(*weights, rows.marked_BT, (rows.routes_BTLK + 1) % MODEL.n_routed_experts)
    free, _ = score(*weights, rows.marked_BT, np.full_like(rows.routes_BTLK, -1))
    assert np.max(np.abs(own - other)) > 1e-2
    np.testing.assert_allclose(own, free, atol=1e-6)


def test_the_choice_that_top_p_left_is_kept(config, weights, samples):
    """Every drawn token is in it, and log-probabilities within it are those of the rest, renormalised."""
    rows = lay_out(samples, config.data.sequence_length, EOS)
    net = build_network(config, small.mesh())
    found, kept = make_scorer(config, net, small.mesh())(*weights, rows.marked_BT, None, True)
    choice = np.asarray(unpack_bits(kept, MODEL.vocab_size))
    for one, (row, positions) in zip(samples, rows.places, strict=True):
        tokens = np.array([one.prompt + one.tokens], np.int32)[:, :-1]
        model = net.bind(*weights)
        logits = np.asarray(model.logits(model(tokens).hidden_BTD)[0, len(one.prompt) - 1 :])
        count = len(one.tokens)
        full = lambda value, dtype: np.full(count, value, dtype)  # noqa: B023, E731
        draws = Draws(full(1, np.float32), full(0, np.int32), full(0.8, np.float32), full(0, np.float32), full(0, "u4"))
        expected = np.asarray(filtered(logits, draws))
        np.testing.assert_array_equal(choice[row, positions], expected > -np.inf)
        assert choice[row, positions][np.arange(count), one.tokens].all()
        log_p = np.asarray(jax.nn.log_softmax(expected))[np.arange(count), one.tokens]
        np.testing.assert_allclose(found[row, positions], log_p, atol=1e-4)


def test_batches_have_one_shape(config):
    e = Experience(*(np.ones((3, 5), np.float32) for _ in range(4)), None, np.ones((3, 5, 2, 2), np.int32))
    batch, used = as_batch(e, config, small.mesh())
    assert used == 2 and batch.rows_BT.shape == (4, 2, 5) and batch.kept_BTW is None
    np.testing.assert_array_equal(np.asarray(batch.old_BT).reshape(8, 5).sum(1), [5, 5, 5, 0, 0, 0, 0, 0])
    # Empty rows go where the router sends them: no token has one expert twice.
    assert np.all(np.asarray(batch.routes_BTLK).reshape(8, -1)[3:] == -1)


def test_system_message_comes_first_and_long_prompts_are_told(config):
    problem = Problem("1+1=?", "2")
    with_system = dataclasses.replace(config, task=TaskConfig(system="Be brief."))
    text = ByteTokenizer().decode(prompt_tokens(problem, with_system, ByteTokenizer(), None))
    assert text == "system: Be brief.\nuser: 1+1=?\nassistant:"
    with pytest.raises(ConfigError, match=r"80; raise it"):
        prompt_tokens(Problem("x" * 70, "2"), config, ByteTokenizer(), None)


def test_routes_and_speculation_exclude_each_other(config, weights):
    with pytest.raises(ConfigError, match="choose one"):
        Engine(small.config(), *weights, speculative=True, tells_routes=True)


def test_what_is_let_go_of_comes_back_with_other_weights(config, weights, problems, samples):
    engine = Engine(config, *weights, slots=8, tokenizer=ByteTokenizer(), tells_routes=True)
    draw_samples(engine, config, None, problems[:1], 4)
    engine.release()
    assert engine.weights is None and engine._state.cache.length == 64
    engine.update(*weights)
    again = draw_samples(engine, config, None, problems, 4)
    assert [one.tokens for one in again] == [one.tokens for one in samples]
