"""Closed-form counts equal the published figures, to the last parameter."""

import dataclasses

import jax
import jax.numpy as jnp
import oracles
import pytest
import small

from dsjax.config import ConfigError, check, load
from dsjax.planning import hardware
from dsjax.planning.counts import dense_equivalent, flops_by_part, flops_per_token, kv_cache_bytes_per_token, parameters

TOTALS = {  # config: total with routing biases, active with embedding and head
    "deepseek_v3": (671_026_419_200, 37_552_297_472),
    "deepseek_v2": (235_741_434_880, 21_375_800_320),
    "deepseek_v2_lite": (15_706_484_224, 2_661_150_208),
    "moonlight_16b": (15_960_110_208, 2_914_776_192),
}


@pytest.fixture
def model(repository):
    return lambda name: load(str(repository / "configs" / f"{name}.py")).model


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_equal_the_published_counts(model, name):
    counts = parameters(model(name))
    assert (counts.total, counts.active) == TOTALS[name]


@pytest.mark.parametrize(
    "name, biases", [("deepseek_v3", 58 * 256), ("moonlight_16b", 26 * 64), ("deepseek_v2", 0), ("bench", 3 * 16)]
)
def test_only_noaux_tc_has_routing_biases(model, name, biases):
    counts = parameters(model(name))
    assert counts.routing_bias == biases
    assert counts.total - counts.trainable == biases


def test_v3_parts_equal_the_published_counts(model):
    counts = parameters(model("deepseek_v3"))
    assert counts.attention == 61 * 187_107_328
    assert counts.dense_feed_forward == 3 * 396_361_728
    assert counts.routed_experts == 58 * 256 * 44_040_192
    assert counts.embedding == counts.head == 926_679_040
    assert counts.mtp == 11_610_068_224
    assert counts.mtp_active == 2_541_458_688
    # The published checkpoint repeats embedding and head in its MTP module.
    assert counts.total + counts.mtp + counts.embedding + counts.head == 684_489_845_504


def test_bench_has_the_weights_it_is_compared_by(model):
    assert parameters(model("bench")).trainable == 10_214_272


def test_without_mtp_nothing_is_counted_for_it(model):
    counts = parameters(model("deepseek_v2"))
    assert counts.mtp == counts.mtp_active == 0
    assert flops_per_token(model("deepseek_v2"), 4096) == flops_per_token(model("deepseek_v2"), 4096, mtp=True)


@pytest.mark.parametrize(
    "name, options, gigaflops",
    [
        ("deepseek_v3", {}, 250.46),
        ("deepseek_v3", {"causal": False}, 281.15),
        ("deepseek_v3", {"mtp": True}, 250.46 + 10.19),
        ("deepseek_v3", {"mtp": True, "causal": False}, 281.15 + 10.70),
        ("deepseek_v2", {}, 155.31),
        ("deepseek_v2_lite", {}, 16.41),
        ("moonlight_16b", {}, 17.17),
    ],
)
def test_flops_equal_the_published_counts(model, name, options, gigaflops):
    assert flops_per_token(model(name), 4096, **options) / 1e9 == pytest.approx(gigaflops, abs=0.011)


def test_flops_by_part_of_v3_by_hand(model):
    parts = flops_by_part(model("deepseek_v3"), 4096)
    assert parts["attention core"] == 6 * 61 * 4097 / 2 * 128 * (192 + 128)
    assert parts["routed experts"] == 6 * 58 * 8 * 44_040_192
    assert parts["shared experts"] * 8 == parts["routed experts"]
    assert parts["dense feed-forward"] == 6 * 3 * 396_361_728
    assert parts["head"] == 6 * 926_679_040
    with_mtp = flops_by_part(model("deepseek_v3"), 4096, mtp=True)
    assert with_mtp["routed experts"] == 6 * 59 * 8 * 44_040_192
    assert with_mtp["head"] == 2 * parts["head"]


# Wide enough for matmuls to be nearly all of it, short enough for attention to be one block of queries.
WIDE = dataclasses.replace(
    small.MODEL,
    hidden_size=512,
    num_hidden_layers=1,
    first_k_dense_replace=1,
    intermediate_size=1024,
    vocab_size=1024,
    num_attention_heads=8,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    num_nextn_predict_layers=0,
)
SEQUENCES, LENGTH = 4, 128


@pytest.mark.parametrize("q_lora_rank", [192, None])
def test_flops_are_within_one_percent_of_the_compilers_count(q_lora_rank):
    """One layer, all pairs: XLA counts a loop's body once, and masked products like any other."""
    model = dataclasses.replace(WIDE, q_lora_rank=q_lora_rank)
    net, gradients = small.gradients(small.config(model, loss_chunk_size=SEQUENCES * LENGTH), small.mesh())
    tokens = jax.ShapeDtypeStruct((SEQUENCES, LENGTH + 1), jnp.int32)
    weight = {"mtp_loss_weight": jax.ShapeDtypeStruct((), jnp.float32)}
    counted = gradients.lower(net.shapes, net.bias_shapes, tokens, weight).compile().cost_analysis()["flops"]
    expected = SEQUENCES * LENGTH * flops_per_token(model, LENGTH, causal=False)
    assert counted == pytest.approx(expected, rel=0.01)


def test_flops_of_experts_are_within_one_percent_of_the_compilers_count():
    """Of the dense oracle, which computes all experts: a router that chooses all of them."""
    routed = dataclasses.replace(
        WIDE,
        first_k_dense_replace=0,
        moe_intermediate_size=384,
        n_routed_experts=6,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        n_shared_experts=0,
    )
    nothing = dataclasses.replace(routed, first_k_dense_replace=1, intermediate_size=0)
    d, e, f = routed.hidden_size, routed.n_routed_experts, routed.moe_intermediate_size
    shapes = [(SEQUENCES, LENGTH, d), (d, e), (e, d, f), (e, d, f), (e, f, d)]

    def loss(x_BTD, router_DE, *experts):
        y_BTD = oracles.dense_experts(x_BTD, router_DE, None, *experts, routed)[0]
        return jnp.sum(y_BTD**2)  # a plain sum would make a reduction of a product

    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    counted = jax.jit(jax.grad(loss, range(5))).lower(*operands).compile().cost_analysis()["flops"]
    expected = flops_per_token(routed, LENGTH) - flops_per_token(nothing, LENGTH)
    assert counted == pytest.approx(SEQUENCES * LENGTH * expected, rel=0.01)


@pytest.mark.parametrize("name, size", [("deepseek_v3", 70_272), ("deepseek_v2", 69_120), ("moonlight_16b", 31_104)])
def test_cache_bytes_equal_the_published_counts(model, name, size):
    assert kv_cache_bytes_per_token(model(name)) == size


@pytest.mark.parametrize("name", [*TOTALS, "bench", "tiny"])
def test_dense_equivalent_has_the_same_active_parameters(model, name):
    routed, dense = model(name), dense_equivalent(model(name))
    counts = parameters(dense)
    assert dense.num_moe_layers == counts.routed_experts == counts.mtp == 0
    assert counts.active == counts.total
    rounding = 4 * 3 * routed.hidden_size * routed.num_hidden_layers + parameters(routed).routing_bias
    assert abs(counts.active - parameters(routed).active) <= rounding


@pytest.mark.parametrize("name", ["bench", "tiny"])
def test_dense_equivalent_can_be_trained(repository, name):
    config = load(str(repository / "configs" / f"{name}.py"))
    check(dataclasses.replace(config, model=dense_equivalent(config.model)))


@pytest.mark.parametrize(
    "kind, name",
    [
        ("h800", "H800"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("cpu", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_hardware_is_found_by_device_kind(kind, name):
    row = hardware.find(kind)
    assert (row.name if row else None) == name


def test_every_figure_of_the_hardware_table_is_stated_or_marked():
    assert {"H100", "H800", "H200", "B200", "v4", "v5e", "v5p", "v6e", "tpu7x"} <= set(hardware.HARDWARE)
    for row in hardware.HARDWARE.values():
        assert row.source and row.price_source and row.watts_are
        assert set(row.estimated) <= {field.name for field in dataclasses.fields(row)}
        assert row.slow_bytes_per_s < row.fast_bytes_per_s < row.hbm_bytes_per_s < row.peak_flops_bf16
        assert row.peak_flops_fp8 is None or row.peak_flops_fp8 == pytest.approx(2 * row.peak_flops_bf16, rel=1e-3)
        assert (row.watts is None) == (row.watts_are == "not published")
        assert hardware.get(row.name.upper()) is row


def test_unknown_hardware_is_told():
    with pytest.raises(ConfigError, match='unknown hardware "h1000"; did you mean H100?'):
        hardware.get("h1000")
    with pytest.raises(ConfigError, match='unknown hardware "abacus"; valid are H800, H100'):
        hardware.get("abacus")


def test_v3_cost_follows_from_the_table(model):
    # 2,664K H800 hours at 39.1% of the BF16 peak, counted causally and without MTP.
    h800 = hardware.HARDWARE["H800"]
    hours = 14.8e12 * flops_per_token(model("deepseek_v3"), 4096) / (0.391 * h800.peak_flops_bf16) / 3600
    assert hours == pytest.approx(2.664e6, rel=2e-3)
    assert hours * h800.price_per_chip_hour == pytest.approx(5.328e6, rel=2e-3)
