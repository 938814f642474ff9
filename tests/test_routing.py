"""Routing equals a plain statement of the reports, token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dsjax.config import ModelConfig
from dsjax.model.routing import route, sequence_balance_loss, update_bias

V3 = ModelConfig(
    n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5
)
V2 = dataclasses.replace(
    V3, topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False, routed_scaling_factor=16.0
)
LITE = dataclasses.replace(V2, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0)
MOONLIGHT = dataclasses.replace(V3, n_group=1, topk_group=1)
CONFIGS = {"V3": V3, "V2": V2, "V2-Lite": LITE, "Moonlight": MOONLIGHT}


def logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((3, 50, 16)).astype(np.float32)


def assert_routes_like_the_reports(config, logits_BTE, bias_E):
    choice = route(logits_BTE, bias_E, config)
    for b, t in np.ndindex(logits_BTE.shape[:2]):
        experts, weights = oracles.route(logits_BTE[b, t].astype(np.float64), bias_E, config)
        assert list(choice.experts_BTK[b, t]) == experts
        np.testing.assert_allclose(choice.weights_BTK[b, t], weights, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_choice_and_weights_equal_the_reports(name):
    config = CONFIGS[name]
    bias = None
    if config.topk_method == "noaux_tc":
        bias = 0.3 * np.random.default_rng(1).standard_normal(16).astype(np.float32)
    assert_routes_like_the_reports(config, logits(), bias)


def test_negative_biases_never_let_a_dropped_group_in():
    """With scores of dropped groups set to 0 instead of minus infinity, they would win here."""
    assert_routes_like_the_reports(V3, logits(), np.linspace(-3, -2, 16, dtype=np.float32))


def test_groups_are_ranked_by_their_two_best_in_v3_and_by_their_best_in_v2():
    scores = np.full(16, 0.1)
    scores[[0, 4, 5, 8, 9]] = [0.9, 0.7, 0.7, 0.6, 0.6]  # sums of two: 1.0, 1.4, 1.2, 0.2; best: 0.9, 0.7, 0.6, 0.1
    logit = np.log(scores / (1 - scores)).astype(np.float32)[None, None]
    by_two = route(logit, np.zeros(16, np.float32), V3).experts_BTK[0, 0]
    assert {int(e) // 4 for e in by_two} == {1, 2}
    by_one = route(logit, None, dataclasses.replace(V2, scoring_func="sigmoid")).experts_BTK[0, 0]
    assert {int(e) // 4 for e in by_one} == {0, 1}


def test_bias_only_chooses():
    bias = np.zeros(16, np.float32)
    bias[7] = 10
    plain, pushed = (route(logits(), b, MOONLIGHT) for b in (np.zeros(16, np.float32), bias))
    assert np.all(np.any(pushed.experts_BTK == 7, axis=-1)) and not np.all(np.any(plain.experts_BTK == 7, axis=-1))
    np.testing.assert_array_equal(pushed.scores_BTE, plain.scores_BTE)
    chosen = np.take_along_axis(np.asarray(plain.scores_BTE), np.asarray(pushed.experts_BTK), -1)
    np.testing.assert_allclose(pushed.weights_BTK, 2.5 * chosen / chosen.sum(-1, keepdims=True), rtol=1e-6)


def test_bias_has_no_gradient_and_logits_have_one():
    weigh = np.arange(4, dtype=np.float32)[None, None]
    loss = lambda z, b: jnp.sum(weigh * route(z, b, V3).weights_BTK)  # noqa: E731
    of_logits, of_bias = jax.grad(loss, (0, 1))(logits(), 0.1 * np.arange(16, dtype=np.float32))
    assert np.all(of_bias == 0) and np.any(of_logits != 0)


def test_ties_go_to_the_lowest_index():
    choice = route(np.zeros((1, 1, 16), np.float32), np.zeros(16, np.float32), V3)
    assert list(choice.experts_BTK[0, 0]) == [0, 1, 2, 3]
    np.testing.assert_allclose(choice.weights_BTK, 2.5 / 4)


@pytest.mark.parametrize("logit", [-40, -60, -200])
def test_weights_and_gradients_of_vanishing_scores_stay_finite(logit):
    low = logit + np.linspace(0, 1, 16, dtype=np.float32)[None, None]

    def both(low):
        choice = route(low, None, V3)
        return jnp.sum(choice.weights_BTK[..., 0]) + jnp.sum(sequence_balance_loss(choice, V3))

    weights = route(low, None, V3).weights_BTK
    assert np.all(np.isfinite(weights)) and np.all(weights <= 2.5)
    value, gradient = jax.value_and_grad(both)(low)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", CONFIGS)
def test_balance_loss_equals_the_reports_formula(name):
    config = dataclasses.replace(CONFIGS[name], aux_loss_alpha=0.37)
    z = logits()
    sigmoid = config.scoring_func == "sigmoid"
    scores = 1 / (1 + np.exp(-z)) if sigmoid else np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    expected = [oracles.balance_loss(scores[b], config) for b in range(3)]
    np.testing.assert_allclose(sequence_balance_loss(route(z, None, config), config), expected, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_balance_loss_is_alpha_at_perfect_balance_and_more_elsewhere(name):
    config = dataclasses.replace(CONFIGS[name], aux_loss_alpha=1e-4)
    # Token t prefers experts t .. t + 3 (mod 16): over 16 tokens every expert is chosen 4 times, with equal scores.
    turning = np.stack([np.roll(np.r_[np.full(4, 2.0), np.full(12, -1.0)], t) for t in range(16)])[None]
    loss = lambda z: sequence_balance_loss(route(z, None, config), config)[0]  # noqa: E731
    assert float(loss(turning.astype(np.float32))) == pytest.approx(1e-4, rel=1e-5)
    same = np.repeat(turning[:, :1], 16, axis=1).astype(np.float32)
    value, gradient = jax.value_and_grad(loss)(same)
    assert float(value) > 1.5e-4
    # Descending it takes tokens from the experts that have them all.
    assert np.all(gradient[..., :4] > 0) and np.all(gradient[..., 4:] < 0)


def test_bias_moves_by_its_speed_towards_balance():
    load = np.array([[0, 10, 5, 5], [1, 1, 1, 1]], np.float32)
    start = np.full((2, 4), 0.5, np.float32)
    moved = update_bias(start, load, jnp.float32(0.001))
    np.testing.assert_allclose(moved - start, [[0.001, -0.001, 0, 0], [0, 0, 0, 0]], atol=1e-7)
    np.testing.assert_array_equal(update_bias(start, load, jnp.float32(0)), start)
