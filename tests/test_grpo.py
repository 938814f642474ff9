"""The objective of GRPO equals plain statements of its formulas, sample by sample, and so do its gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from small import assert_trees_close

from dsjax.config import Config, GRPOConfig
from dsjax.data import marks
from dsjax.model.losses import pack_bits
from dsjax.posttraining.grpo import Experience, advantages, grpo_loss, objective
from dsjax.training.objective import read_targets
from dsjax.training.state import build_network
from dsjax.training.step import make_train_step

# (prompt, completion) lengths of the samples in each row, the rest of the row is padding
ROWS = [[(2, 3), (1, 1), (3, 5)], [(4, 7)], [(1, 2), (2, 2), (1, 6)]]
LENGTH = 16


def experience(seed: int = 0, kept: bool = False) -> tuple[Experience, list[tuple[int, slice]]]:
    """Rows of random samples; ratios far from 1, so that clipping and masks have something to do."""
    rng = np.random.default_rng(seed)
    shape = (len(ROWS), LENGTH)
    rows = np.full((len(ROWS), LENGTH + 1), marks.BEGINS, np.int32)
    advantage, places = np.zeros(shape, np.float32), []
    for b, samples in enumerate(ROWS):
        start = 0
        for prompt, completion in samples:
            tokens = rng.integers(1, small.MODEL.vocab_size, size=prompt + completion).tolist()
            rows[b, start : start + len(tokens)] = marks.marked(tokens[:prompt], tokens[prompt:])
            places.append((b, slice(start + prompt - 1, start + prompt - 1 + completion)))
            advantage[places[-1]] = rng.standard_normal()
            start += len(tokens)
    near = lambda: (-3 + 0.5 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    words = pack_bits(jnp.asarray(rng.random((*shape, small.MODEL.vocab_size)) < 0.5)) if kept else None
    return Experience(rows, advantage, near(), near(), words), places


def statement(log_prob: np.ndarray, e: Experience, places, config: GRPOConfig) -> tuple[float, np.ndarray, float]:
    """(loss, its gradient by every log-probability, KL): V3 eq. 26-28 with V3.2's corrections, in loops."""
    loss, kl_sum, gradient = 0.0, 0.0, np.zeros(log_prob.shape)
    for place in places:
        new, old, ref = (np.asarray(a[place], np.float64) for a in (log_prob, e.old_BT, e.reference_BT))
        advantage, tokens = float(np.asarray(e.advantages_BT[place])[0]), len(new)
        off = config.off_policy_threshold is not None and advantage < 0
        off = off and np.mean(old - new) > config.off_policy_threshold
        whole = config.ratio == "sequence"
        units = [slice(0, tokens)] if whole else [slice(t, t + 1) for t in range(tokens)]
        for unit in units:
            ratio = np.exp(np.sum(new[unit] - old[unit]))
            clipped = min(max(ratio, 1 - config.clip_epsilon), 1 + config.clip_epsilon)
            surrogate = min(ratio * advantage, clipped * advantage)
            slope = ratio * advantage if ratio * advantage <= clipped * advantage else 0.0
            if off:
                surrogate = slope = 0.0
            difference = np.sum(ref[unit] - new[unit])
            kl, kl_slope = np.exp(difference) - difference - 1, 1 - np.exp(difference)
            if config.unbiased_kl:
                kl, kl_slope = ratio * kl, ratio * kl + ratio * kl_slope
            share = 1 / (len(units) * len(places))
            loss -= share * (surrogate - config.kl_coefficient * kl)
            kl_sum += share * kl
            part = np.arange(place[1].start, place[1].stop)[unit]
            gradient[place[0], part] -= share * (slope - config.kl_coefficient * kl_slope)
    return loss, gradient, kl_sum


CASES = {
    "V3": {},
    "sequences": {"ratio": "sequence"},
    "clipped": {"clip_epsilon": 0.2},
    "clipped sequences": {"clip_epsilon": 0.2, "ratio": "sequence"},
    "no KL": {"kl_coefficient": 0.0},
    "unbiased KL": {"unbiased_kl": True},
    "unbiased KL of sequences": {"unbiased_kl": True, "ratio": "sequence"},
    "off-policy mask": {"off_policy_threshold": 0.05, "clip_epsilon": 0.2},
    "V3.2": {"off_policy_threshold": 0.05, "unbiased_kl": True, "clip_epsilon": 0.2},
}


@pytest.mark.parametrize("case", CASES)
def test_objective_and_gradient_equal_the_statement(case):
    config = GRPOConfig(**{"kl_coefficient": 0.3} | CASES[case])
    e, places = experience()
    log_prob = (-3 + 0.5 * np.random.default_rng(9).standard_normal((len(ROWS), LENGTH))).astype(np.float32)
    read = read_targets(jnp.asarray(e.rows_BT), True)
    run = jax.jit(jax.value_and_grad(lambda p: objective(p, e, read, config), has_aux=True))
    (loss, metrics), gradient = run(log_prob)
    expected, expected_gradient, kl = statement(log_prob, e, places, config)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5, atol=1e-6)
    assert_trees_close(gradient, expected_gradient, 1e-5)
    assert metrics["weight"] == len(places)
    assert (metrics["clip_fraction"] > 0) == (config.clip_epsilon == 0.2)
    assert (metrics["off_policy_fraction"] > 0) == (config.off_policy_threshold is not None)


def test_gradient_of_the_first_step_is_the_policy_gradient():
    """Where old and new are the same, the ratio is 1 and its gradient that of the log-probability."""
    e, places = experience()
    read = read_targets(jnp.asarray(e.rows_BT), True)
    config = GRPOConfig(kl_coefficient=0.0)
    gradient = jax.grad(lambda p: objective(p, e, read, config)[0])(jnp.asarray(e.old_BT))
    for place in places:
        share = 1 / (len(places) * (place[1].stop - place[1].start))
        np.testing.assert_allclose(gradient[place], -share * e.advantages_BT[place], rtol=1e-5)
    assert np.count_nonzero(gradient) == sum(place[1].stop - place[1].start for place in places)


@pytest.mark.parametrize("kept", [False, True])
def test_loss_of_the_network_has_the_gradients_of_the_statement(kept):
    config = dataclasses.replace(small.config(), grpo=GRPOConfig(kl_coefficient=0.3, clip_epsilon=0.2))
    net = build_network(config, small.mesh())
    params, bias = small.weights_like(net.shapes), jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), net.bias_shapes)
    e, places = experience(kept=kept)
    read = read_targets(jnp.asarray(e.rows_BT), True)

    @jax.jit
    def log_probs(params):
        model = net.bind(params, bias)
        logits = model.logits(model(read.inputs_BT, None, read.first_BT).hidden_BTD)
        if kept:
            bits = (np.asarray(e.kept_BTW)[..., None] >> np.arange(32)) & 1
            there = bits.reshape(*logits.shape[:2], -1)[..., : logits.shape[-1]].astype(bool)
            there |= np.asarray(read.labels_BT)[..., None] == np.arange(logits.shape[-1])
            logits = jnp.where(there, logits, -1e9)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), read.labels_BT[..., None], -1)[..., 0]

    found, pull = jax.vjp(log_probs, params)
    expected, by_log_prob, _ = statement(np.asarray(found), e, places, config.grpo)
    run = jax.jit(jax.value_and_grad(grpo_loss(net, config), has_aux=True))
    (loss, metrics), gradients = run(params, bias, e, {})
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    assert_trees_close(gradients, pull(by_log_prob.astype(np.float32))[0], 2e-5)
    assert all(not np.any(a) for a in jax.tree.leaves(gradients["mtp"])), "MTP takes no part"


def test_rewards_become_advantages():
    of_group, differs = advantages([1.0, 0.0, 0.0, 1.0, 1.0])
    assert differs
    np.testing.assert_allclose(of_group, (np.array([1, 0, 0, 1, 1]) - 0.6) / np.std([1, 0, 0, 1, 1]), rtol=1e-6)
    assert of_group.dtype == np.float32


@pytest.mark.parametrize("rewards", [[0.0] * 4, [0.1] * 16, [2.0, 2.0], [1e-9] * 3, [1e6 + 0.1] * 7])
def test_equal_rewards_prefer_nothing(rewards):
    of_group, differs = advantages(rewards)
    assert not differs and not np.any(of_group)


def test_a_step_without_any_preference_changes_no_weight():
    """All groups equal, no KL term: a gradient of exact zeros."""
    config = dataclasses.replace(
        small.config(batch_size=4), grpo=GRPOConfig(kl_coefficient=0.0), optimizer=Config().optimizer
    )
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, weight_decay=0.0))
    mesh = small.mesh()
    net = build_network(config, mesh)
    e, _ = experience()
    e = Experience(*(a if a is None else np.pad(a, [(0, 1)] + [(0, 0)] * (a.ndim - 1))[None] for a in e))
    e = e._replace(advantages_BT=np.zeros_like(e.advantages_BT))
    state = small.state(config, mesh)
    before = jax.device_get((state.params, state.router_bias))
    step = make_train_step(grpo_loss(net, config), config, mesh)
    after, metrics = step(state, e, np.int32(1), {"learning_rate": np.float32(1)})
    assert metrics["grad_norm"] == 0 and metrics["loss"] == 0 and not metrics["update_skipped"]
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves((after.params, after.router_bias)), strict=True):
        np.testing.assert_array_equal(a, b)
