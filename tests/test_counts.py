"""Closed-form counts equal the published figures, to the last parameter."""

import pytest

from dsjax.config import check, load
from dsjax.planning import hardware
from dsjax.planning.counts import dense_equivalent, flops_per_token, kv_cache_bytes_per_token, parameters

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
    import dataclasses

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


def test_v3_cost_follows_from_the_table(model):
    # 2,664K H800 hours at 39.1% of the BF16 peak, counted causally and without MTP.
    h800 = hardware.HARDWARE["H800"]
    hours = 14.8e12 * flops_per_token(model("deepseek_v3"), 4096) / (0.391 * h800.peak_flops_bf16) / 3600
    assert hours == pytest.approx(2.664e6, rel=2e-3)
    assert hours * h800.price_per_chip_hour == pytest.approx(5.328e6, rel=2e-3)
