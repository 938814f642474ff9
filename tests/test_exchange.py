"""All-to-all equals the dense oracle in loss and gradients, and sends what the closed form says it sends."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from routed import CONFIG, LENGTH, SEQUENCES, biases, check, layer, operands, oracle, statistics

from dsjax.config import ConfigError, DispatchConfig
from dsjax.model import dispatch as travel
from dsjax.model.exchange import Leg, plan_legs, take_seats
from dsjax.model.moe import Execution, routed_experts
from dsjax.numerics.recipe import recipe
from dsjax.planning.traffic import expected_destinations, journey_bytes, message

# Sizes of the mesh and ranks per node: on one level every mesh that fits 8 devices; on two levels some. Each is a
# program of its own, which takes long to compile.
QUICK = [((1, 1, 4), None), ((2, 2, 2), None), ((1, 1, 8), 2)]
ONE_LEVEL = [(1, 1, 2), (2, 1, 2), (1, 2, 2), (4, 1, 2), (1, 4, 2), (2, 1, 4), (1, 2, 4), (1, 1, 8)]
MORE = [*((sizes, None) for sizes in ONE_LEVEL), ((1, 1, 4), 2), ((1, 2, 4), 2), ((1, 1, 8), 4)]
MESHES = [*QUICK, *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in MORE)]


@pytest.fixture(scope="module")
def truth():
    run = oracle(CONFIG)
    return {name: run(bias) for name, bias in biases().items()}


def execution(sizes, node=None, **dispatch) -> Execution:
    return small.execution(small.mesh(*sizes), form="all_to_all", ranks_per_node=node, **dispatch)


@pytest.mark.parametrize(("sizes", "node"), MESHES, ids=str)
def test_loss_and_every_gradient_equal_the_dense_oracle(truth, sizes, node):
    run = layer(CONFIG, execution(sizes, node, capacity_factor=1.0))
    for name, bias in biases().items():
        result = run(bias)
        check(result, truth[name])
        assert (result[0][1].rounds > 1) or name == "by scores"


@pytest.mark.parametrize(("sizes", "node"), [((1, 1, 4), None), ((1, 1, 8), 2)], ids=str)
@pytest.mark.parametrize("capacity_factor", [0.3, 8.0])
def test_capacity_changes_rounds_and_nothing_else(truth, sizes, node, capacity_factor):
    run = layer(CONFIG, execution(sizes, node, capacity_factor=capacity_factor))
    for name, bias in biases().items():
        result = run(bias)
        check(result, truth[name])
        assert (result[0][1].rounds == 1) == (capacity_factor == 8.0)


@pytest.mark.parametrize(
    ("form", "remat"),
    [
        ("all_to_all", "full"),
        pytest.param("all_to_all", "none", marks=pytest.mark.slow),
        pytest.param("all_gather", "full", marks=pytest.mark.slow),
    ],
)
def test_chunks_change_no_number(truth, form, remat):
    run = layer(CONFIG, small.execution(small.mesh(1, 2, 4), remat, form=form, chunks=7, capacity_factor=1.0))
    for name, bias in biases().items():
        check(run(bias), truth[name])


def test_chunks_that_do_not_divide_the_tokens_are_told():
    x, router, weights, _ = operands()
    with pytest.raises(ConfigError, match=r"dispatch.chunks = 5 does not divide the 7 tokens that each device has"):
        routed_experts(x, router, None, weights, _unbiased(CONFIG), execution((1, 1, 8), chunks=5))


def _unbiased(config):
    return dataclasses.replace(config, topk_method="greedy")


@pytest.mark.parametrize(
    ("experts", "choices", "sizes", "node"),
    [
        (8, 1, (1, 1, 8), 4),
        (16, 6, (2, 1, 2), None),
        pytest.param(8, 1, (1, 1, 8), None, marks=pytest.mark.slow),
        pytest.param(16, 6, (1, 1, 4), 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_everything_to_one_expert_and_many_to_one_rank(experts, choices, sizes, node):
    config = dataclasses.replace(
        CONFIG, n_routed_experts=experts, num_experts_per_tok=choices, norm_topk_prob=choices > 1
    )
    bias = np.where(np.arange(experts) == 5, 10, 0).astype(np.float32)
    check(layer(config, execution(sizes, node, capacity_factor=1.0))(bias), oracle(config)(bias))


def test_lost_rounds_would_show_as_dropped_tokens(monkeypatch):
    def once(one_round, operands, constants, rounds, *, recompute):
        return one_round(operands, constants, jnp.int32(0))

    monkeypatch.setattr(travel, "in_rounds", once)
    stats = statistics(CONFIG, execution((1, 1, 8), 4, capacity_factor=1.0))(biases()["every token to the same"])
    assert stats.dropped > 0


def choices_of(bias) -> np.ndarray:
    """The experts of every token, [tokens, K], by the router of the oracle."""
    from oracles import route

    x, router, _, _ = operands()
    logits = x.reshape(-1, x.shape[-1]).astype(np.float64) @ router.astype(np.float64)
    return np.array([route(row, bias, CONFIG)[0] for row in logits])


@pytest.mark.parametrize(
    ("sizes", "node", "capacity_factor"),
    [(*mesh, 1.0) for mesh in QUICK + MORE] + [(*mesh, 8.0) for mesh in [*QUICK[1:], MORE[2]]],
    ids=str,
)
def test_a_token_goes_once_to_each_node_and_once_to_each_rank(sizes, node, capacity_factor):
    run = statistics(CONFIG, execution(sizes, node, capacity_factor=capacity_factor))
    ranks, devices = sizes[-1], math.prod(sizes)
    for bias in biases().values():
        stats = run(bias)
        owners = choices_of(bias) // (CONFIG.n_routed_experts // ranks)
        home = np.arange(SEQUENCES * LENGTH) // (SEQUENCES * LENGTH // devices) % ranks
        width = node or 1
        far = sum(len(set(o // width) - {h // width}) for o, h in zip(owners, home, strict=True))
        # On each node that it reaches, the copy lands at the place of its home and goes on from there.
        near = sum(len({r for r in o if r % width != h % width}) for o, h in zip(owners, home, strict=True))
        assert (stats.far, stats.near) == (far, near if node else 0)


@pytest.mark.parametrize(
    "precision", ["fp32", "bf16", "fp8_deepseek", "fp8_gradient_blocks", "fp8_tensorwise", "mxfp8"]
)
def test_arrays_on_the_wire_have_the_bytes_of_the_closed_form(precision):
    """All rows of a round travel on a CPU, empty ones too: their bytes are a copy's."""
    config = dataclasses.replace(CONFIG, hidden_size=160, moe_intermediate_size=128)
    x, router, weights, target = operands(config)
    how = Execution(small.mesh(1, 1, 4), recipe(precision), DispatchConfig("all_to_all", capacity_factor=8.0))

    def loss(x, weights):
        y, _ = routed_experts(x.astype(how.recipe.dtype), router, None, weights, _unbiased(config), how)
        return jnp.sum(y.astype(jnp.float32) * target)

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, weights)
    sent = sum(var.aval.size * var.aval.dtype.itemsize for var in _operands_of(program.jaxpr, "all_to_all"))
    rows = 4 * SEQUENCES // 4 * LENGTH
    assert sent == rows * journey_bytes(config, precision, "none")


def _operands_of(jaxpr, name):
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation.invars[0]
        # A program inside another is a parameter, alone or in a tuple, with its constants (`.jaxpr`) or without.
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(inner, "eqns"):
                yield from _operands_of(getattr(inner, "jaxpr", inner), name)


def test_journey_sends_tokens_twice_where_layers_are_computed_again():
    once, twice = (journey_bytes(CONFIG, "bf16", remat) for remat in ("none", "full"))
    assert twice - once == message(CONFIG, "bf16").out


def draw(config, tokens: int, rng) -> np.ndarray:
    """Uniform routing: a random set of kept groups, a random choice of the experts in them."""
    per_group = config.n_routed_experts // config.n_group
    picked = []
    for _ in range(tokens):
        groups = rng.choice(config.n_group, config.topk_group, replace=False)
        kept = (groups[:, None] * per_group + np.arange(per_group)).ravel()
        picked.append(rng.choice(kept, config.num_experts_per_tok, replace=False))
    return np.array(picked)


@pytest.mark.parametrize("groups", [(1, 1), (8, 4), (8, 3)], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 64])
def test_expected_destinations_are_what_uniform_routing_reaches(groups, ranks):
    config = dataclasses.replace(
        CONFIG, n_routed_experts=64, num_experts_per_tok=6, n_group=groups[0], topk_group=groups[1]
    )
    owners = draw(config, 4000, np.random.default_rng(0)) // (64 // ranks)
    seen = np.mean([len(set(row)) for row in owners])
    assert expected_destinations(config, ranks) == pytest.approx(seen, rel=0.02)


@pytest.mark.parametrize(("ranks", "node"), [(8, None), (8, 4), (64, 8)])
def test_legs_have_room_for_the_expected_copies_and_slack(ranks, node):
    config = dataclasses.replace(CONFIG, n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4)
    tokens = 4096
    legs = plan_legs(config, DispatchConfig("all_to_all", 1.25, node), ranks, tokens, is_ragged=False)
    for leg in legs:
        expected = tokens * expected_destinations(config, ranks // leg.stride)
        assert leg.rows <= 1.25 * expected + leg.ranks or leg.capacity == tokens
        assert leg.rows >= expected
    assert math.prod(leg.ranks for leg in legs) == ranks


def test_groups_of_the_legs_are_places_across_nodes_then_nodes():
    across, within = Leg(2, 4, 8, 1, False), Leg(4, 1, 8, 1, False)
    assert across.groups == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert within.groups == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert Leg(8, 1, 8, 1, False).groups is None


@pytest.mark.parametrize("capacity", [1, 3, 12])
def test_every_copy_has_exactly_one_seat_in_one_round(capacity):
    rng = np.random.default_rng(capacity)
    tokens, choices, leg = 12, 4, Leg(3, 1, 3, capacity, False)
    place_MK = rng.integers(0, 4, (tokens, choices))  # 3: nobody of this leg's
    by_place = travel.sort_assignments(jnp.asarray(place_MK), 0, leg.ranks)
    seated: list[tuple[int, int]] = []
    for r in range(-(-tokens * choices // capacity)):
        trip = jax.tree.map(np.asarray, take_seats(by_place, leg, r))
        for row, token in enumerate(trip.token_S):
            if token < tokens:
                (k,) = np.flatnonzero(trip.row_MK[token] == row)
                assert place_MK[token, k] == row // capacity
                seated.append((token, k))
        filled = (trip.token_S < tokens).reshape(leg.ranks, capacity)
        np.testing.assert_array_equal(filled.sum(1), trip.send_R)
        assert (trip.row_MK < leg.rows).sum() == filled.sum()
    assert sorted(seated) == [tuple(pair) for pair in np.argwhere(place_MK < 3)]


def test_fp8_rounds_a_token_once_on_every_form():
    """What arrives in E4M3 is multiplied as it is: the results are those of one rank, but for the sums of BF16."""
    config = dataclasses.replace(CONFIG, hidden_size=160, moe_intermediate_size=128)
    x, router, weights, _ = operands(config)
    x = x.astype(jnp.bfloat16)
    forms = [((1, 1, 1), "local", None), ((1, 1, 4), "all_gather", None), ((1, 1, 4), "all_to_all", None)]
    found = []
    for sizes, form, node in [*forms, ((1, 1, 8), "all_to_all", 4)]:
        how = Execution(small.mesh(*sizes), recipe("fp8_deepseek"), DispatchConfig(form, 8.0, ranks_per_node=node))
        y, _ = jax.jit(lambda x, w, how=how: routed_experts(x, router, None, w, _unbiased(config), how))(x, weights)
        found.append(np.asarray(y, np.float32))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=0.02 * np.abs(found[0]).max())
        assert np.mean(other == found[0]) > 0.5


def test_expert_weights_are_gathered_in_the_dtype_they_are_multiplied_in():
    """And their gradients are reduced in FP32."""
    x, router, weights, target = operands()
    how = Execution(small.mesh(1, 4, 2), recipe("bf16"), DispatchConfig("all_to_all"))

    def loss(weights, how):
        y, _ = routed_experts(x.astype(jnp.bfloat16), router, None, weights, _unbiased(CONFIG), how)
        return jnp.sum(y.astype(jnp.float32) * target)

    program = jax.make_jaxpr(jax.grad(loss), static_argnums=1)(weights, how)
    gathered = [var.aval for var in _operands_of(program.jaxpr, "all_gather")]
    assert [(aval.ndim, aval.dtype) for aval in gathered] == [(3, jnp.bfloat16)] * 3
    reduced = [var.aval.dtype for var in _operands_of(program.jaxpr, "reduce_scatter")]
    assert reduced == [jnp.float32] * 3
    alone = Execution(small.mesh(), recipe("bf16"))
    ours, expected = (jax.jit(jax.grad(loss), static_argnums=1)(weights, on) for on in (how, alone))
    small.assert_trees_close(ours, expected, 0.01)
