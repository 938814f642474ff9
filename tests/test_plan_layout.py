"""What a configuration leaves open is filled in by bytes that a hand can count."""

import dataclasses
import math
from itertools import combinations

import pytest
import small

from dsjax.config import Config, ConfigError, DispatchConfig, MeshConfig, from_dict, load
from dsjax.planning.collectives import flows, group
from dsjax.planning.layout import (
    check_batch,
    dispatch_form,
    explain,
    moved_bytes,
    resolve,
    with_fitting_chunks,
)
from dsjax.planning.traffic import copies, expected_destinations, journey_bytes, message


def free(experts: int, choices: int):
    """A model without groups."""
    return dataclasses.replace(
        small.MODEL, n_group=1, topk_group=1, n_routed_experts=experts, num_experts_per_tok=choices
    )


def away_by_hand(experts: int, choices: int, ranks: int, node: int) -> tuple[float, float]:
    """Copies that leave (the node, the rank) of a token at rank 0: the mean over every choice of experts."""
    slow, away, ways = 0, 0, math.comb(experts, choices)
    for chosen in combinations(range(experts), choices):
        owners = {expert * ranks // experts for expert in chosen}
        slow += len({owner for owner in owners if owner >= node})
        away += len(owners - {0})
    return slow / ways, away / ways


@pytest.mark.parametrize(("experts", "choices", "ranks"), [(8, 2, 2), (8, 2, 4), (8, 2, 8), (12, 3, 3), (6, 6, 3)])
def test_copies_equal_a_count_over_every_choice(experts, choices, ranks):
    model = free(experts, choices)
    for node in (n for n in range(1, ranks + 1) if ranks % n == 0):
        sent = copies(model, "all_to_all", ranks, node, two_level=False)
        assert (sent.slow, sent.total) == pytest.approx(away_by_hand(experts, choices, ranks, node))
        gathered = copies(model, "all_gather", ranks, node, two_level=False)
        assert (gathered.slow, gathered.total) == (ranks // node - 1, ranks - 1)


@pytest.mark.parametrize(
    ("experts", "groups", "kept", "choices", "ranks"),
    [(12, 3, 2, 2, 4), (12, 2, 1, 3, 3), (12, 4, 2, 3, 2), (12, 6, 3, 4, 4), (12, 1, 1, 3, 6), (12, 4, 3, 2, 12)],
)
def test_ranks_reached_are_those_of_every_choice_in_every_kept_set(experts, groups, kept, choices, ranks):
    """Also where a rank has parts of groups."""
    model = dataclasses.replace(free(experts, choices), n_group=groups, topk_group=kept)
    size, reached = experts // groups, []
    for best in combinations(range(groups), kept):
        allowed = [expert for group in best for expert in range(group * size, (group + 1) * size)]
        for chosen in combinations(allowed, choices):
            reached.append(len({expert // (experts // ranks) for expert in chosen}))
    assert expected_destinations(model, ranks) == pytest.approx(sum(reached) / len(reached))


@pytest.mark.parametrize(
    ("experts", "choices", "ranks", "form"),
    [
        (8, 2, 1, "local"),  # nothing moves
        (8, 8, 8, "all_gather"),  # a tie: every token goes everywhere, 7 copies each
        (8, 7, 2, "all_gather"),  # each rank has 4 experts, of 7 chosen both have some: 1 copy each
        (8, 2, 8, "all_to_all"),  # 2 x 7/8 = 1.75 copies against 7
        (16, 8, 2, "all_gather"),  # 1 - C(8,8)/C(16,8) = 0.99992 copies against 1
        (64, 4, 2, "all_gather"),  # 1 - C(32,4)/C(64,4) = 0.943 against 1: saves 6%, under a tenth
        (64, 3, 2, "all_to_all"),  # 1 - C(32,3)/C(64,3) = 0.881 against 1: saves 12%
    ],
)
def test_auto_takes_the_form_that_sends_a_tenth_less(experts, choices, ranks, form):
    model = free(experts, choices)
    assert dispatch_form(model, DispatchConfig(), ranks) == form
    assert dispatch_form(model, DispatchConfig(form="all_gather"), ranks) == "all_gather"
    assert small.execution(small.mesh(expert=min(ranks, 8))).dispatch_form(model) == form


def test_over_nodes_what_leaves_the_node_decides(repository):
    model = load(str(repository / "configs" / "deepseek_v3.py")).model
    across = copies(model, "all_to_all", 64, 8, two_level=True)
    # Not more than topk_group = 4 of 8 nodes, of which one in eight is the token's own.
    assert across.slow < 4 * 7 / 8
    assert copies(model, "all_gather", 64, 8, two_level=True).slow == 7
    assert dispatch_form(model, DispatchConfig(ranks_per_node=8), 64) == "all_to_all"
    # Both nodes have an expert of every token: once each, whatever the form.
    assert dispatch_form(free(16, 12), DispatchConfig(ranks_per_node=8), 16) == "all_gather"


def test_v3_sends_between_nodes_what_the_report_counts_on(repository):
    """Independent draws reach 64 (1 - (63/64)^8) = 7.57 of 64 ranks, node-limited routing at most 4 of 8 nodes."""
    model = load(str(repository / "configs" / "deepseek_v3.py")).model
    tokens, other_nodes = 15360 * 4096 / 2048 * 58, 7 / 8
    bf16 = journey_bytes(model, "bf16", "full")
    assert tokens * bf16 * 64 * (1 - (63 / 64) ** 8) * other_nodes == pytest.approx(850e9, rel=0.005)
    assert tokens * bf16 * 4 * other_nodes == pytest.approx(449e9, rel=0.005)
    fp8_out = bf16 + 2 * (message(model, "fp8_deepseek").out - message(model, "bf16").out)
    assert tokens * fp8_out * 4 * other_nodes == pytest.approx(359e9, rel=0.005)
    # Here the gradient travels to the experts in E4M3 too.
    assert journey_bytes(model, "fp8_deepseek", "full") < fp8_out


@pytest.mark.parametrize(
    ("axes", "node", "expected"),
    [
        (("expert",), None, (4, 4)),
        (("expert",), 2, (4, 2)),
        (("expert",), 8, (4, 4)),
        (("fsdp",), 8, (2, 2)),
        (("fsdp",), 4, (2, 1)),
        (("data",), 8, (3, 1)),
        (("fsdp", "expert"), 4, (8, 4)),
        (("data", "fsdp", "expert"), 8, (24, 8)),
    ],
)
def test_groups_know_who_is_near(axes, node, expected):
    assert group(axes, {"data": 3, "fsdp": 2, "expert": 4}, node) == expected_group(expected)


def expected_group(pair):
    from dsjax.planning.collectives import Group

    return Group(*pair)


def test_a_gather_crosses_the_slow_link_once_a_node():
    slow, fast = group(("expert",), {"data": 1, "fsdp": 1, "expert": 4}, 2).gather(400)
    # Two devices hold 200 of 400 bytes and lack 200: each fetches 100, and gets 100 + 100 from its neighbour.
    assert (slow, fast) == (100, 200)


def test_weights_and_gradients_of_a_step_by_hand():
    """fsdp 2 x expert 2 of a model without MTP: each matrix once a microbatch and pass, three quarters from others."""
    model = dataclasses.replace(small.MODEL, num_nextn_predict_layers=0)
    config = dataclasses.replace(small.config(model, fsdp=2, expert=2, microbatch_size=4, remat="full"))
    found = {one.cause: one.total for one in flows(config, {"data": 1, "fsdp": 2, "expert": 2}, "all_to_all")}
    attention = 32 * 16 + 16 * 2 * 16 + 32 * 24 + 16 * 2 * 16 + 2 * 8 * 32
    dense = 2 * attention + 3 * 32 * 48 + 32 * 8 + 3 * 32 * 16  # a dense layer, the gate and the shared expert
    experts = 4 * 3 * 32 * 16
    gathered = 4 * (dense * 3 / 4 + experts / 2)
    assert found["weights, forward"] == found["weights, backward"] == 2 * gathered
    assert found["gradients, over fsdp and expert"] == 2 * gathered
    assert found["head"] == found["gradient of the head"] == 2 * 4 * 32 * 50 * 3 / 4
    assert found["embedding, forward"] == 8 * 256 / 4 * 4 * 32 * 3 / 4
    assert "gradients, over data" not in found or found["gradients, over data"] < gathered / 10  # norms only


def test_an_open_expert_axis_is_the_size_that_moves_least():
    config = dataclasses.replace(small.config(expert=-1, fsdp=2, dispatch=DispatchConfig()), mesh=MeshConfig(-1, 2, -1))
    chosen = resolve(config, 8)
    sizes = {}
    for expert in (1, 2, 4):
        form = dispatch_form(config.model, config.dispatch, expert)
        sizes[expert] = moved_bytes(config, {"data": 4 // expert, "fsdp": 2, "expert": expert}, form)
    assert chosen.mesh == MeshConfig(4 // chosen.mesh.expert, 2, chosen.mesh.expert)
    assert sizes[chosen.mesh.expert] == min(sizes.values())
    assert f"mesh.expert = {chosen.mesh.expert} moves the fewest bytes" in explain(config, chosen)
    assert resolve(chosen, 8) == chosen and explain(chosen, chosen) == ""


def test_chunks_fit_batches_other_than_a_microbatch():
    config = small.config(dispatch=DispatchConfig(chunks=6))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=16))
    assert [with_fitting_chunks(config, n, 4).dispatch.chunks for n in (4, 12, 24)] == [2, 6, 6]


def test_experts_are_not_spread_where_tokens_stay_at_home():
    config = small.config(expert=-1, data=-1, dispatch=DispatchConfig(form="local"))
    assert resolve(config, 8).mesh == MeshConfig(8, 1, 1)
    with pytest.raises(ConfigError, match='"local" moves no tokens, but mesh.expert = 2 spreads the experts'):
        dispatch_form(config.model, config.dispatch, 2)


def test_open_axes_divide_what_they_must(repository):
    v3 = load(str(repository / "configs" / "deepseek_v3.py"))
    # kv_lora_rank = q_lora_rank / 3 = 512: fsdp x expert ends there, and data takes the rest.
    assert resolve(v3, 1024).mesh == MeshConfig(2, 8, 64)
    wide = dataclasses.replace(v3, mesh=MeshConfig(-1, -1, 64))
    assert resolve(wide, 1024).mesh == MeshConfig(2, 8, 64)
    assert resolve(dataclasses.replace(v3, mesh=MeshConfig(4, -1, 64)), 1024).mesh == MeshConfig(4, 4, 64)
    chosen = resolve(dataclasses.replace(v3, mesh=MeshConfig(-1, -1, -1)), 1024).mesh
    assert 256 % chosen.expert == 0 and 512 % (chosen.fsdp * chosen.expert) == 0


def test_dense_models_have_no_expert_axis():
    dense = dataclasses.replace(small.MODEL, first_k_dense_replace=2, num_nextn_predict_layers=0)
    config = dataclasses.replace(small.config(dense), mesh=MeshConfig(-1, 1, -1))
    chosen = resolve(config, 6)
    assert chosen.mesh == MeshConfig(6, 1, 1) and chosen.dispatch.form == "local"
    assert "dispatch" not in explain(config, chosen)


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        (MeshConfig(3, 1, 1), 8, r"the mesh \(data 3 x fsdp 1 x expert 1\) does not fit 8 device"),
        (MeshConfig(3, -1, -1), 8, r"the mesh \(data 3 x fsdp -1 x expert -1\) cannot be completed for 8 device"),
        (MeshConfig(1, -1, 1), 64, "cannot be completed for 64"),  # latents of 16
    ],
)
def test_what_does_not_come_out_even_is_told(mesh, devices, message):
    with pytest.raises(ConfigError, match=message):
        resolve(dataclasses.replace(small.config(), mesh=mesh), devices)


def test_a_batch_that_does_not_divide_names_those_that_do():
    check_batch("training.batch_size", 14336, 2048)
    with pytest.raises(ConfigError, match="15360 sequences cannot be .* over 2048 devices; make it 14336 or 16384"):
        check_batch("training.batch_size", 15360, 2048)
    with pytest.raises(ConfigError, match="make it 8, or fewer devices"):
        check_batch("training.batch_size", 5, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mesh": {"fsdp": 0}}, "mesh.fsdp is 0, but must be above 0, or -1 for"),
        ({"mesh": {"expert": -2}}, "mesh.expert is -2, but must be above 0, or -1 for"),
        (
            {"mesh": {"expert": 4}, "dispatch": {"ranks_per_node": 3}},
            "mesh.expert = 4 is not a multiple of dispatch.ranks_per_node = 3",
        ),
        ({"mesh": {"fsdp": -1, "expert": 3}}, "cannot be divided over mesh.expert = 3"),
    ],
)
def test_impossible_meshes_are_told(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(values)


def test_an_open_mesh_passes_the_checks():
    assert from_dict({"mesh": {"data": -1, "fsdp": -1, "expert": -1}}).mesh == MeshConfig(-1, -1, -1)
    assert isinstance(resolve(Config(mesh=MeshConfig(-1, -1, -1)), 8), Config)
