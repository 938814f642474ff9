"""The benchmark: every figure is there, and they agree with each other and with the closed form."""

import dataclasses
import json

import pytest
import small

from dsjax.config import ConfigError, load
from dsjax.planning import counts
from dsjax.training import machine
from dsjax.training.bench import bench

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
}
SHARED = {"matmul_tflops_per_second", "steps", "precision", "devices", "mesh", "device_kind"}


@pytest.fixture
def fast_matmul(monkeypatch):
    assert machine.MATMUL_SIZE == 2048
    monkeypatch.setattr(machine, "MATMUL_SIZE", 256)


def config(**training):
    """A small model without MTP, over all eight devices."""
    model = dataclasses.replace(small.MODEL, num_nextn_predict_layers=0)
    whole = small.config(model, data=2, expert=4, **training)
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
    figures = bench(asked, "dense", steps=3)
    assert set(figures) == FIGURES | SHARED | {"dense", "step_time_over_dense"}
    assert set(figures["dense"]) == FIGURES
    assert json.loads(json.dumps(figures)) == figures
    rate, dense_model = figures["matmul_tflops_per_second"], counts.dense_equivalent(asked.model)
    check_figures(figures, asked.model, 8, rate)
    check_figures(figures["dense"], dense_model, 8, rate)
    ratio = figures["step_seconds"] / figures["dense"]["step_seconds"]
    assert figures["step_time_over_dense"] == pytest.approx(ratio, rel=1e-2)
    # The routing bias is counted among the active ones, and the dense width is rounded to a multiple of 8.
    assert figures["dense"]["active_parameters"] == pytest.approx(figures["active_parameters"], rel=0.05)
    assert figures["steps"] == 3 and figures["precision"] == "fp32"
    assert figures["devices"] == 8 and figures["mesh"] == {"data": 2, "fsdp": 1, "expert": 4}


def test_step_of_several_microbatches_is_the_whole_batch(fast_matmul):
    asked = config(batch_size=16, microbatch_size=8)
    figures = bench(asked, steps=1)
    assert "dense" not in figures
    check_figures(figures, asked.model, 16, figures["matmul_tflops_per_second"])


def test_batch_that_does_not_spread_over_the_devices_is_told():
    uneven = dataclasses.replace(config(batch_size=12), mesh=small.config(data=-1).mesh)
    with pytest.raises(ConfigError, match="12 sequences cannot be spread evenly over 8 devices"):
        bench(uneven, steps=1)


def test_yardstick_has_the_size_that_its_figures_are_published_for(repository):
    model = load(str(repository / "configs" / "bench.py")).model
    assert counts.parameters(model).trainable == 10_214_272
