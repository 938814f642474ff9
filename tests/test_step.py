"""The train step: accumulation, bias update, counted loads, one compile, the same numbers as its parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import small
from jax.sharding import PartitionSpec
from small import assert_trees_close

from dsjax.sharding import AXES, BATCH
from dsjax.training.objective import language_model_loss
from dsjax.training.state import TrainState, abstract_state, build_network, init_state, state_shardings
from dsjax.training.step import evaluate_step, move_biases, place_batch, pretrain_step

SEQUENCES, LENGTH, MICROBATCHES = 8, 9, 3
CONFIG = small.config(data=2, expert=4, remat="deepseek")
RATES = {"learning_rate": 0.01, "bias_update_speed": 0.125, "mtp_loss_weight": 0.3}
TOKENS = small.tokens(MICROBATCHES, SEQUENCES, LENGTH + 1)
LAYERS = 2  # one MoE layer and MTP's
ASSIGNMENTS = SEQUENCES * LENGTH * CONFIG.model.num_experts_per_tok


@pytest.fixture(scope="module")
def mesh():
    return small.mesh(2, 1, 4)


@pytest.fixture(scope="module")
def start(mesh):
    """() -> a state on the mesh with weights that matter; each call a new one, because the step donates it."""
    abstract, shardings = abstract_state(CONFIG, mesh), state_shardings(CONFIG, mesh)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    host = dataclasses.replace(zeros, params=small.weights_like(abstract.params))
    return lambda: jax.device_put(host, shardings)


@pytest.fixture(scope="module")
def step(mesh, start):
    """num_microbatches -> (state, metrics) after one step; other arguments can be replaced."""
    compiled = pretrain_step(CONFIG, mesh)

    def run(count: int, tokens=TOKENS, **rates: float) -> tuple[TrainState, dict]:
        return compiled(start(), jnp.asarray(tokens), count, RATES | rates)

    run.compiled = compiled
    return run


@pytest.fixture(scope="module")
def by_count(step):
    return {count: step(count) for count in (1, 2, 3)}


def test_one_compile_serves_every_number_of_microbatches(step, by_count):
    assert step.compiled._cache_size() == 1
    losses = [float(metrics["loss"]) for _, metrics in by_count.values()]
    assert len(set(losses)) == 3 and np.all(np.isfinite(losses))


@pytest.mark.slow
def test_accumulated_microbatches_equal_one_large_batch(mesh, start, by_count):
    whole = TOKENS.reshape(1, MICROBATCHES * SEQUENCES, LENGTH + 1)
    state, metrics = pretrain_step(CONFIG, mesh)(start(), jnp.asarray(whole), 1, RATES)
    accumulated, of_parts = by_count[3]
    assert_trees_close(accumulated, state, 1e-5)
    for name in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
        assert float(of_parts[name]) == pytest.approx(float(metrics[name]), rel=1e-5)
    np.testing.assert_array_equal(of_parts["expert_load"], metrics["expert_load"])


def test_microbatches_beyond_the_count_are_not_used(step, by_count):
    other = TOKENS.copy()
    other[2] = small.tokens(SEQUENCES, LENGTH + 1, seed=9)
    assert_trees_close(step(2, other), by_count[2], 0)


@pytest.mark.parametrize("count", [1, 3])
def test_step_equals_mean_gradient_clip_and_adamw(mesh, start, by_count, count):
    gradient, before, rule = small.gradients(CONFIG, mesh)[1], jax.device_get(start()), CONFIG.optimizer
    weight = {"mtp_loss_weight": jnp.float32(0.3)}
    parts = [gradient(before.params, before.router_bias, tokens, weight) for tokens in TOKENS[:count]]
    gradients = jax.tree.map(lambda *g: np.mean(np.asarray(g, np.float64), axis=0), *[part[1] for part in parts])
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradients)))
    assert norm > rule.clip_norm

    def updated(path, p, g):
        decay = 0 if "norm" in jax.tree_util.keystr(path) else rule.weight_decay
        g = g * rule.clip_norm / norm
        return oracles.adamw(p, [g], rate=0.01, b1=rule.b1, b2=rule.b2, eps=rule.eps, decay=decay)

    state, metrics = by_count[count]
    expected = jax.tree_util.tree_map_with_path(updated, before.params, gradients)
    assert_trees_close(state.params, expected, 1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    for name in ("loss", "mtp_loss", "balance_loss"):
        mean = np.mean([float(part[0][1][name]) for part in parts])
        assert float(metrics[name]) == pytest.approx(mean, rel=1e-5)
    assert int(state.step) == 1


def test_loads_of_the_step_count_every_assignment(by_count):
    for count, (_, metrics) in by_count.items():
        assert metrics["expert_load"].shape == (LAYERS, CONFIG.model.n_routed_experts)
        np.testing.assert_array_equal(metrics["expert_load"].sum(-1), np.full(LAYERS, count * ASSIGNMENTS))
        assert metrics["dropped_tokens"] == 0 and metrics["dispatch_rounds"] >= 1


def test_bias_moves_on_the_first_step_by_its_speed_towards_balance(step, by_count):
    for count in (1, 3):
        state, metrics = by_count[count]
        expected = 0.125 * np.sign(count * ASSIGNMENTS / 8 - np.asarray(metrics["expert_load"]))
        assert np.any(expected > 0) and np.any(expected < 0)
        np.testing.assert_array_equal(leaf(state.router_bias["moe_layers"])[0], expected[0])
        np.testing.assert_array_equal(leaf(state.router_bias["mtp"]), expected[1])
    still, _ = step(1, bias_update_speed=0.0)
    assert all(np.all(bias == 0) for bias in jax.tree.leaves(still.router_bias))
    # The bias acts from the next step on only, and no gradient ever reaches it.
    assert_trees_close(still.params, by_count[1][0].params, 0)


def leaf(tree):
    (only,) = jax.tree.leaves(tree)
    return np.asarray(only)


def test_rows_of_the_load_belong_to_the_layers_in_order():
    bias = {"moe_layers": {"b": jnp.zeros((2, 3))}, "mtp": {"b": jnp.zeros(3)}}
    load = jnp.array([[0, 3, 6], [6, 3, 0], [3, 0, 6]], jnp.float32)
    moved = move_biases(bias, load, jnp.float32(1))
    np.testing.assert_array_equal(moved["moe_layers"]["b"], [[1, 0, -1], [-1, 0, 1]])
    np.testing.assert_array_equal(moved["mtp"]["b"], [0, 1, -1])
    assert move_biases({}, None, jnp.float32(1)) == {}


def test_mtp_loss_is_there_and_its_weight_acts(step, by_count):
    _, metrics = by_count[1]
    assert 0.5 * np.log(50) < float(metrics["mtp_loss"]) < 3 * np.log(50)
    without, metrics_without = step(1, mtp_loss_weight=0.0)
    assert metrics_without["mtp_loss"] == metrics["mtp_loss"]
    before = np.asarray(small.weights_like(abstract_state(CONFIG, small.mesh(2, 1, 4)).params)["mtp"]["norm"]["weight"])
    np.testing.assert_array_equal(without.params["mtp"]["norm"]["weight"], before)
    assert np.all(by_count[1][0].params["mtp"]["norm"]["weight"] != before)


def test_learning_rate_zero_changes_no_weight(step, start):
    state, metrics = step(1, learning_rate=0.0)
    assert_trees_close(state.params, start().params, 0)
    assert metrics["grad_norm"] > 0 and np.any(np.asarray(jax.tree.leaves(state.opt_state[0].mu)[0]) != 0)


def test_state_stays_where_it_was_declared(mesh, by_count):
    state, metrics = by_count[1]
    for array, declared in zip(jax.tree.leaves(state), jax.tree.leaves(state_shardings(CONFIG, mesh)), strict=True):
        assert array.sharding.is_equivalent_to(declared, array.ndim)
    assert all(metric.is_fully_replicated for metric in metrics.values())
    experts = state.params["moe_layers"]["mlp"]["experts"]["gate_proj"]
    assert experts.addressable_shards[0].data.size * 4 == experts.size


def test_evaluation_equals_the_training_loss(mesh, start, by_count):
    losses = evaluate_step(CONFIG, mesh)(start(), jnp.asarray(TOKENS[0]))
    assert set(losses) == {"loss", "mtp_loss"}
    for name, value in losses.items():
        assert float(value) == pytest.approx(float(by_count[1][1][name]), rel=1e-5)


@pytest.mark.slow
def test_bf16_loss_is_near_the_fp32_one(mesh, start, by_count):
    config = dataclasses.replace(CONFIG, precision="bf16")
    loss = evaluate_step(config, mesh)(start(), jnp.asarray(TOKENS[0]))["loss"]
    assert loss != by_count[1][1]["loss"]
    assert float(loss) == pytest.approx(float(by_count[1][1]["loss"]), rel=1e-2)


def test_bf16_gradients_are_fp32(mesh):
    config = dataclasses.replace(CONFIG, precision="bf16")
    net = build_network(config, mesh)
    gradient = jax.grad(language_model_loss(net, config), has_aux=True)
    arguments = net.shapes, net.bias_shapes, TOKENS[0], {"mtp_loss_weight": 0.3}
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(gradient, *arguments)[0])} == {jnp.dtype("float32")}


def test_initial_state_is_drawn_from_the_seed_alone_and_is_as_abstract(mesh):
    config = small.config(small.DEEPER)
    one, many = init_state(config, small.mesh()), init_state(config, mesh)
    assert_trees_close(many.params, one.params, 0)
    other = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=1))
    for name in ("embed_tokens", "lm_head"):
        assert np.all(np.asarray(init_state(other, small.mesh()).params[name]) != np.asarray(one.params[name]))
    for ours, abstract in zip(jax.tree.leaves(many), jax.tree.leaves(abstract_state(config, mesh)), strict=True):
        assert (ours.shape, ours.dtype) == (abstract.shape, abstract.dtype)
        assert ours.sharding.is_equivalent_to(abstract.sharding, ours.ndim)
    assert many.step == 0


@pytest.mark.parametrize("lead", [(), (3,)], ids=["sequences", "microbatches"])
def test_every_device_gets_its_own_rows_of_the_batch(mesh, lead):
    asked: list[list[int]] = []

    def rows(indices):
        asked.append(list(indices))
        return np.stack([np.arange(5, dtype=np.int32) + 100 * i for i in indices])

    batch = place_batch(rows, (*lead, 16, 5), mesh)
    count = 16 * (lead[0] if lead else 1)
    np.testing.assert_array_equal(np.asarray(batch).reshape(count, 5)[:, 0], 100 * np.arange(count))
    assert batch.dtype == jnp.int32
    assert batch.sharding.spec == (PartitionSpec(None, AXES) if lead else BATCH)
    assert all(len(indices) == 2 for indices in asked)
    assert sorted(sum(asked, [])) == list(range(count))


@pytest.mark.parametrize(("platform", "form"), [("cpu", "blocks"), ("cuda", "ragged_dot"), ("tpu", "ragged_dot")])
def test_step_lowers_for_every_platform_with_its_own_grouped_matmul(mesh, platform, form):
    arguments = (abstract_state(CONFIG, mesh), TOKENS, np.int32(1), RATES)
    program = pretrain_step(CONFIG, mesh).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert ("ragged_dot" in program) == (form == "ragged_dot")
