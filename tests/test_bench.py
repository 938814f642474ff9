"""The benchmark: every figure is there, and they agree with each other and with the closed form."""

import dataclasses
import json
import math

import pytest
import small

from dsjax.config import ConfigError, load
from dsjax.numerics.recipe import RECIPES, recipe
from dsjax.planning import counts
from dsjax.planning.buffers import make_buffer
from dsjax.training import machine
from dsjax.training.bench import bench, what_multiplies
from dsjax.training.saved import saved_bytes

LENGTH = 16
FIGURES = {
    "tokens_per_second",
    "model_tflops_per_second",
    "mfu",
    "step_seconds",
    "compile_seconds",
    "peak_memory_bytes",
    "parameters",
    "active_parameters",
    "products",
}
SHARED = {"matmul_tflops_per_second", "steps", "precision", "devices", "mesh", "dispatch", "device_kind"}
SHARED |= {"saved_bytes_over_bf16", "saved_bytes_per_token_per_layer", "saved_bytes_per_token_per_layer_bf16"}


@pytest.fixture
def fast_matmul(monkeypatch):
    assert machine.MATMUL_SIZE == 2048
    monkeypatch.setattr(machine, "MATMUL_SIZE", 256)


def config(**training):
    """One layer, over all eight devices."""
    whole = small.config(small.ONE_LAYER, data=2, expert=4, **training)
    return dataclasses.replace(whole, data=dataclasses.replace(whole.data, sequence_length=LENGTH))


def check_figures(figures, model, batch_size, matmul_tflops):
    per_second = figures["tokens_per_second"]
    assert per_second * figures["step_seconds"] == pytest.approx(batch_size * LENGTH, rel=2e-3)
    tflops = per_second * counts.flops_per_token(model, LENGTH) / 1e12
    assert figures["model_tflops_per_second"] == pytest.approx(tflops, rel=2e-3)
    assert figures["mfu"] == pytest.approx(tflops / matmul_tflops, rel=2e-3)
    assert figures["compile_seconds"] > 0
    assert figures["parameters"] == counts.parameters(model).trainable
    # FP32 weights, moments of 2 x 2 bytes; matrices are cut over 4 devices at most.
    assert figures["peak_memory_bytes"] > 8 * figures["parameters"] / 4


def test_figures_are_complete_and_agree_with_each_other(fast_matmul):
    asked = config()
    figures = bench(asked, ("dense", "bf16"), steps=3)
    assert set(figures) == FIGURES | SHARED | {"dense", "step_time_over_dense", "bf16", "step_time_over_bf16"}
    assert set(figures["dense"]) == set(figures["bf16"]) == FIGURES
    assert json.loads(json.dumps(figures)) == figures
    rate, dense_model = figures["matmul_tflops_per_second"], counts.dense_equivalent(asked.model)
    check_figures(figures, asked.model, 8, rate)
    check_figures(figures["dense"], dense_model, 8, rate)
    check_figures(figures["bf16"], asked.model, 8, rate)
    for baseline in ("dense", "bf16"):
        ratio = figures["step_seconds"] / figures[baseline]["step_seconds"]
        assert figures[f"step_time_over_{baseline}"] == pytest.approx(ratio, rel=1e-2)
    assert [one["products"] for one in (figures, figures["dense"], figures["bf16"])] == ["fp32", "fp32", "bf16"]
    saved, bf16 = (figures[f"saved_bytes_per_token_per_layer{of}"]["total"] for of in ("", "_bf16"))
    assert figures["saved_bytes_over_bf16"] == pytest.approx(saved / bf16, rel=2e-3) and saved > 1.4 * bf16
    # The routing bias is counted among the active ones, and the dense width is rounded to a multiple of 8.
    assert figures["dense"]["active_parameters"] == pytest.approx(figures["active_parameters"], rel=0.05)
    assert figures["steps"] == 3 and figures["precision"] == "fp32"
    assert figures["devices"] == 8 and figures["mesh"] == {"data": 2, "fsdp": 1, "expert": 4}
    assert figures["dispatch"] == "all_to_all"


def test_step_of_several_microbatches_is_the_whole_batch(fast_matmul):
    asked = config(batch_size=16, microbatch_size=8)
    figures = bench(asked, steps=1)
    assert "dense" not in figures
    check_figures(figures, asked.model, 16, figures["matmul_tflops_per_second"])


def test_batch_that_does_not_spread_over_the_devices_is_told():
    uneven = dataclasses.replace(config(batch_size=12), mesh=small.config(data=-1).mesh)
    with pytest.raises(ConfigError, match="12 sequences cannot be divided over 8 devices; make it 8 or 16"):
        bench(uneven, steps=1)


def test_yardstick_has_the_size_that_its_figures_are_published_for(repository):
    model = load(str(repository / "configs" / "bench.py")).model
    assert counts.parameters(model).trainable == 10_214_272


def test_what_multiplies_is_told_of_the_recipe_that_runs():
    told = {name: what_multiplies(recipe(name)) for name in RECIPES}
    assert told["fp32"] == "fp32" and told["bf16"] == "bf16"
    assert told["fp8_deepseek"] == told["fp8_tensorwise"] == "emulated: FP32 products of dequantised operands"
    assert told["mxfp8"] == told["fp8_deepseek_ue8m0"] == "emulated: BF16 products of dequantised operands"
    assert "summed as fp22_promote128" in what_multiplies(recipe("fp8_deepseek", "fp22_promote128"))
    native = dataclasses.replace(recipe("fp8_deepseek"), native="hopper")
    assert what_multiplies(native) == "native: Pallas kernels (hopper)"


def kept(config, on=None, **changes):
    """saved_bytes of a configuration with another precision or another remat."""
    remat = changes.pop("remat", "deepseek")
    training = dataclasses.replace(config.training, remat=remat)
    return saved_bytes(dataclasses.replace(config, training=training, **changes), on or small.mesh())


def parts_of_a_layer(config):
    """By precision, for "deepseek" on one device, counted by hand."""
    model, tokens = config.model, config.training.sequences_per_microbatch * config.data.sequence_length
    rows = make_buffer(tokens, model.num_experts_per_tok, model.n_routed_experts, 1, 1.25).rows / tokens
    width, head_outputs = model.moe_intermediate_size, model.num_attention_heads * model.v_head_dim
    logsum, activations = 4 * model.num_attention_heads, 2 * (rows + 1) * width  # gate and up, with the shared expert's
    parts = {
        "layer_input": 2 * model.hidden_size,
        "mla_latent": 2 * (model.q_lora_rank + model.kv_lora_rank + model.qk_rope_head_dim),
        "router": 4 * model.n_routed_experts,
    }
    in_bf16 = {"attention": 2 * head_outputs + logsum, "residual": 2 * model.hidden_size, "gate_up": 2 * activations}
    scales = 2 * (rows + 1) * math.ceil(width / 128)
    in_fp8 = {
        "attention": 1.5 * head_outputs + math.ceil(head_outputs / 128) + logsum,
        "gate_up": activations + 4 * scales,
    }
    return {"bf16": parts | in_bf16, "fp8_deepseek": parts | in_fp8}


@pytest.mark.parametrize("name", ["bench", "deepseek_v3"])
def test_fp8_keeps_at_most_six_tenths_of_what_bf16_keeps(name, repository):
    config = load(str(repository / "configs" / f"{name}.py"))
    totals = {}
    for precision, parts in parts_of_a_layer(config).items():
        measured = kept(config, precision=precision)
        totals[precision] = measured.pop("total")
        assert measured == pytest.approx(parts)
        assert totals[precision] == pytest.approx(sum(parts.values()))
    assert totals["fp8_deepseek"] <= 0.6 * totals["bf16"]


def test_what_is_kept_follows_remat_and_counts_every_device():
    asked = dataclasses.replace(config(), precision="bf16")
    layer_input = 2.0 * small.MODEL.hidden_size
    assert kept(asked, remat="full") == {"total": layer_input, "layer_input": layer_input}
    named, everything = kept(asked), kept(asked, remat="none")
    assert "other" not in named and everything["total"] > 2 * named["total"]
    assert everything["total"] == pytest.approx(sum(everything.values()) / 2)
    spread = kept(asked, small.mesh(data=2, expert=4))
    assert spread.keys() == named.keys() and spread["gate_up"] >= named["gate_up"]
    assert all(spread[kind] == named[kind] for kind in named.keys() - {"total", "gate_up"})


def test_layers_of_a_dense_model_are_measured_where_there_are_no_others():
    model = dataclasses.replace(small.MODEL, first_k_dense_replace=2)
    asked = dataclasses.replace(small.config(model), precision="bf16")
    assert kept(asked)["gate_up"] == 2 * 2 * model.intermediate_size
