"""Weights rounded to FP8 once a step: the same step bit for bit, with bytes on the wire."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import small

from dsjax.config import FP8Config
from dsjax.training.step import place_batch, pretrain_step

SETTINGS = {"learning_rate": 1e-3, "bias_update_speed": 1e-3, "mtp_loss_weight": 0.3}
LENGTH = 17
# One routed layer: every kind of quantised weight, and little to compile.
MODEL = dataclasses.replace(
    small.MODEL, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, q_lora_rank=None
)


def one_step(working_copy, precision="fp8_deepseek", **axes):
    """(state, metrics, the compiled program) after a step of 8 sequences."""
    config = small.config(MODEL, remat="deepseek", **axes)
    config = dataclasses.replace(config, precision=precision, fp8=FP8Config(working_copy=working_copy))
    on = small.mesh(**axes)
    rows = small.tokens(8, LENGTH)
    batch = place_batch(lambda indices: rows[list(indices)], (1, 8, LENGTH), on)
    arguments = (batch, np.int32(1), {name: np.float32(value) for name, value in SETTINGS.items()})
    state = small.state(config, on)
    compiled = pretrain_step(config, on).lower(state, *arguments).compile()
    return *jax.device_get(compiled(state, *arguments)), compiled.as_text()


def gathered_bytes(program, dtype):
    """What the all-gathers of a program give, in bytes of this type."""
    width = {"u8": 1, "f32": 4}[dtype]
    shapes = re.findall(rf"= {dtype}\[([\d,]+)\]\S* all-gather\(", program)
    return width * sum(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"fsdp": 2, "expert": 2}], ids=str)
def test_a_step_is_the_same_to_the_bit_and_gathers_bytes(axes):
    (state, metrics, plain), (with_copy, its_metrics, copied) = (one_step(copy, **axes) for copy in (False, True))
    for ours, expected in zip(
        jax.tree.leaves((with_copy, its_metrics)), jax.tree.leaves((state, metrics)), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)
    more_bytes = gathered_bytes(copied, "u8") - gathered_bytes(plain, "u8")
    fewer_bytes = gathered_bytes(plain, "f32") - gathered_bytes(copied, "f32")
    assert more_bytes > 0 and fewer_bytes > 3 * more_bytes


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp8_deepseek_ue8m0", "fp8_tensorwise", "fp8_gradient_blocks"])
def test_a_step_is_the_same_under_every_recipe_that_allows_it(precision):
    (state, metrics, _), (with_copy, its_metrics, _) = (one_step(copy, precision) for copy in (False, True))
    for ours, expected in zip(
        jax.tree.leaves((with_copy, its_metrics)), jax.tree.leaves((state, metrics)), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)
