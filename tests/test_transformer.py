"""The whole network: sizes, init, causality, scan, remat, and equality with a dense oracle on every mesh."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import small
from jax import lax
from small import assert_trees_close

from dsjax.config import ConfigError, DispatchConfig, load
from dsjax.model import moe
from dsjax.model.moe import RoutingStats
from dsjax.model.transformer import network
from dsjax.planning.buffers import make_buffer
from dsjax.planning.counts import parameters
from dsjax.training.objective import language_model_loss
from dsjax.training.state import init_state

MTP_WEIGHT = {"mtp_loss_weight": jnp.float32(0.3)}
SEQUENCES, LENGTH = 8, 9


def size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "name, total, mtp",
    [
        ("deepseek_v3", 671_026_419_200, 11_610_068_224),
        ("deepseek_v2", 235_741_434_880, 0),
        ("deepseek_v2_lite", 15_706_484_224, 0),
        ("moonlight_16b", 15_960_110_208, 0),
        ("bench", 10_214_272 + 3 * 16, 0),
        ("tiny", None, None),
    ],
)
def test_tree_has_exactly_the_published_number_of_parameters(repository, name, total, mtp):
    model = load(str(repository / "configs" / f"{name}.py")).model
    net = network(model, small.execution())
    params, bias = dict(net.shapes), dict(net.bias_shapes)
    of_mtp = size(params.pop("mtp", {})) + size(bias.pop("mtp", {}))
    counts = parameters(model)
    assert (size(params) + size(bias), of_mtp) == (counts.total, counts.mtp)
    assert size(bias) == counts.routing_bias
    if total is not None:
        assert (counts.total, counts.mtp) == (total, mtp)


@pytest.fixture(scope="module")
def initial():
    """(parameters, routing biases) of a small model with two MoE layers, as NumPy arrays."""
    assert small.DEEPER.initializer_range == 0.006
    state = jax.device_get(init_state(small.config(small.DEEPER), small.mesh()))
    return state.params, state.router_bias


def test_matrices_start_normal_with_the_reports_deviation_and_norms_at_one(initial):
    params, bias = initial
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            assert np.all(leaf == 1), name
            continue
        assert abs(leaf.std() / 0.006 - 1) < 5 / math.sqrt(2 * leaf.size), name
        assert abs(leaf.mean()) < 5 * 0.006 / math.sqrt(leaf.size), name
        assert 0.006 * 2 < np.abs(leaf).max() < 0.006 * 6, name
    assert len(jax.tree.leaves(bias)) == 2
    assert all(leaf.dtype == np.float32 and np.all(leaf == 0) for leaf in jax.tree.leaves(bias))


def test_layers_of_a_stack_and_all_weights_start_different(initial):
    params, _ = initial
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["moe_layers"]):
        if "norm" not in jax.tree_util.keystr(path):
            assert not np.any(leaf[0] == leaf[1])
    firsts = [leaf.reshape(-1)[:8].tobytes() for leaf in jax.tree.leaves(params) if leaf.std() > 0]
    assert len(set(firsts)) == len(firsts)


def dense_layer(x_BTD, router_DE, bias_E, weights, config, execution, given_BTK):
    """The oracle in the place of `routed_experts`."""
    y, balance, load = oracles.dense_experts(x_BTD, router_DE, bias_E, *weights, config)
    return y, RoutingStats(load.astype(jnp.float32), balance, *(jnp.float32(n) for n in (0, 1, 0, 0)))


@pytest.fixture(scope="module")
def batch():
    """(parameters, biases, tokens) that every mesh gets."""
    net = network(small.MODEL, small.execution())
    bias = jax.tree.map(
        lambda leaf: 0.2 * np.random.default_rng(1).standard_normal(leaf.shape).astype(np.float32), net.bias_shapes
    )
    return small.weights_like(net.shapes), bias, small.tokens(SEQUENCES, LENGTH + 1)


@pytest.fixture(scope="module")
def truth(batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "routed_experts", dense_layer)
        run = small.gradients(small.config(), small.mesh())[1]
        return run(*batch, MTP_WEIGHT)


MESHES = [sizes for sizes in itertools.product((1, 2), (1, 2), (1, 2, 4, 8)) if np.prod(sizes) <= 8]
FAST_MESHES = {(1, 1, 1): "none", (2, 1, 4): "deepseek", (2, 2, 2): "full"}  # with what is remembered


@pytest.mark.parametrize(
    "sizes",
    [sizes if sizes in FAST_MESHES else pytest.param(sizes, marks=pytest.mark.slow) for sizes in MESHES],
    ids=str,
)
def test_loss_and_every_gradient_equal_the_dense_oracle(batch, truth, sizes):
    data, fsdp, expert = sizes
    remat, capacity = FAST_MESHES.get(sizes, "deepseek"), 0.5 if sizes in FAST_MESHES else 1.25
    config = small.config(data=data, fsdp=fsdp, expert=expert, remat=remat)
    config = dataclasses.replace(config, dispatch=DispatchConfig(capacity_factor=capacity))
    (loss, metrics), gradients = small.gradients(config, small.mesh(*sizes))[1](*batch, MTP_WEIGHT)
    (true_loss, true_metrics), true_gradients = truth
    assert_trees_close((loss, gradients), (true_loss, true_gradients), 2e-5)
    for name in ("loss", "mtp_loss", "balance_loss"):
        assert float(metrics[name]) == pytest.approx(float(true_metrics[name]), rel=1e-5)
        assert metrics[name] > 0
    np.testing.assert_array_equal(metrics["expert_load"], true_metrics["expert_load"])
    assert metrics["dropped_tokens"] == 0
    assert all(np.any(g != 0) for g in jax.tree.leaves(gradients))


def test_no_future_leak(batch):
    """Outputs up to a position do not change with later tokens, though those change every expert's load."""
    params, bias, tokens = batch
    net = network(small.MODEL, small.execution(small.mesh(2, 1, 4), capacity_factor=1.0))
    forward = jax.jit(lambda tokens: net.bind(params, bias)(tokens[:, :-1], tokens[:, 1:])[:2])
    changed = tokens.copy()
    changed[:, 5:] = small.tokens(SEQUENCES, LENGTH - 4, seed=7)
    (hidden, mtp), (hidden_changed, mtp_changed) = forward(tokens), forward(changed)
    np.testing.assert_allclose(hidden[:, :5], hidden_changed[:, :5], atol=1e-5)
    np.testing.assert_allclose(mtp[:, :4], mtp_changed[:, :4], atol=1e-5)
    for ours, other, first in ((hidden, hidden_changed, 5), (mtp, mtp_changed, 4)):
        assert np.all(np.max(np.abs(ours - other), axis=-1)[:, first] > 1e-3)


def deep(layers: int, remat: str = "deepseek"):
    """(loss of the parameters, their shapes) of a model with so many MoE layers."""
    config = small.config(dataclasses.replace(small.MODEL, num_hidden_layers=1 + layers), remat=remat)
    net = network(config.model, small.execution(remat=remat))
    bias = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), net.bias_shapes)
    loss_fn = language_model_loss(net, config)
    return (lambda params: loss_fn(params, bias, small.tokens(SEQUENCES, LENGTH + 1), MTP_WEIGHT)[0]), net.shapes


def equations(jaxpr) -> int:
    """How many operations a program has, those of its inner programs included."""
    inner = [p for eqn in jaxpr.eqns for p in jax.tree.leaves(eqn.params, is_leaf=is_program) if is_program(p)]
    return len(jaxpr.eqns) + sum(equations(getattr(p, "jaxpr", p)) for p in inner)


def is_program(value) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def test_program_does_not_grow_with_depth():
    counts = []
    for layers in (2, 4):
        loss, shapes = deep(layers)
        counts.append(equations(jax.make_jaxpr(jax.grad(loss))(shapes).jaxpr))
    assert counts[0] == counts[1] > 500


def kept_of_a_layer(remat: str) -> int:
    """Bytes that one of three MoE layers keeps for its backward pass, weights not counted."""
    loss, shapes = deep(3, remat)
    kept = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], shapes))
    weights = {leaf.shape for leaf in jax.tree.leaves(shapes["moe_layers"])}
    of_layers = [leaf for leaf in kept if leaf.shape[:1] == (3,) and leaf.shape not in weights]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in of_layers) // 3


def test_remat_keeps_what_its_policy_names_and_nothing_else():
    tokens, model = SEQUENCES * LENGTH, small.MODEL
    bias = model.n_routed_experts
    inputs = tokens * model.hidden_size
    full = bias + inputs
    latents = tokens * (model.q_lora_rank + model.kv_lora_rank + model.qk_rope_head_dim)
    attention = tokens * model.num_attention_heads * (model.v_head_dim + 1)  # and the sum of exponentials
    residual, router = inputs, tokens * model.n_routed_experts
    rows = make_buffer(tokens, model.num_experts_per_tok, model.n_routed_experts, 1, 1.25).rows
    gate_up = 2 * (rows + tokens) * model.moe_intermediate_size  # of routed experts and the shared one
    assert kept_of_a_layer("full") == 4 * full
    assert kept_of_a_layer("deepseek") == 4 * (full + latents + attention + residual + router + gate_up)
    assert kept_of_a_layer("none") > 2 * kept_of_a_layer("deepseek")


@pytest.mark.parametrize("dense", [0, 2])
def test_stacks_of_no_layers_are_allowed(dense):
    model = dataclasses.replace(small.MODEL, first_k_dense_replace=dense, num_nextn_predict_layers=0)
    net = network(model, small.execution())
    tokens = jax.ShapeDtypeStruct((8, 5), jnp.int32)
    out = jax.eval_shape(lambda p, b, t: net.bind(p, b)(t), net.shapes, net.bias_shapes, tokens)
    assert out.hidden_BTD.shape == (8, 5, 32) and out.mtp_hidden_BTD is None
    assert (out.stats_L is None) == (dense == 2)
    assert ("dense_layers" in net.shapes, "moe_layers" in net.shapes) == (dense == 2, dense == 0)


def test_logits_are_the_heads_product(batch):
    params, bias, _ = batch
    net = network(small.MODEL, small.execution())
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    expected = jnp.matmul(x, params["lm_head"], precision=lax.Precision.HIGHEST)
    np.testing.assert_allclose(jax.jit(lambda p, b: net.bind(p, b).logits(x))(params, bias), expected, atol=1e-5)


def test_unknown_remat_names_the_known_ones():
    with pytest.raises(ConfigError, match="unknown training.remat 'some'; known are none, deepseek, full"):
        network(small.MODEL, small.execution(remat="some"))
