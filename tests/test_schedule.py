"""Schedules, against a step-by-step count and against the published recipe."""

import dataclasses
import math

import pytest

from dsjax.config import OptimizerConfig, TrainingConfig
from dsjax.training.schedule import Schedule

T = 16
RAMP = TrainingConfig(
    total_steps=40, batch_size=24, microbatch_size=4, initial_batch_size=8, batch_ramp_tokens=3_000, seed=0
)
V3_TRAINING = TrainingConfig(
    total_steps=238_000,
    batch_size=15_360,
    microbatch_size=1_024,
    initial_batch_size=3_072,
    batch_ramp_tokens=469_000_000_000,
    mtp_loss_weight=0.3,
    mtp_loss_weight_final=0.1,
    mtp_switch_tokens=10_000_000_000_000,
    bias_update_speed=0.001,
    bias_update_tokens=14_300_000_000_000,
)
V3_OPTIMIZER = OptimizerConfig(
    learning_rate=2.2e-4,
    warmup_tokens=2_000 * 3_072 * 4_096,
    constant_tokens=10_000_000_000_000 - 2_000 * 3_072 * 4_096,
    decay_tokens=4_300_000_000_000,
    decay_learning_rate=2.2e-5,
    hold_tokens=333_000_000_000,
    final_learning_rate=7.3e-6,
)


def v3() -> Schedule:
    return Schedule(V3_TRAINING, V3_OPTIMIZER, 4_096)


def walk(schedule: Schedule, steps: int) -> list[int]:
    """Sequences seen before each of `steps` steps and after the last, counted one step at a time."""
    seen = [0]
    for _ in range(steps):
        seen.append(seen[-1] + schedule.batch_size(seen[-1]))
    return seen


@pytest.mark.parametrize("microbatch", [1, 2, 4, 8])
@pytest.mark.parametrize("ramp_tokens", [1, 250, 3_000, 50_001])
def test_total_sequences_equals_the_count_of_every_step(microbatch, ramp_tokens):
    training = dataclasses.replace(RAMP, microbatch_size=microbatch, batch_ramp_tokens=ramp_tokens)
    schedule = Schedule(training, OptimizerConfig(), T)
    assert [schedule.total_sequences(n) for n in range(301)] == walk(schedule, 300)


def test_batch_grows_linearly_in_whole_microbatches_and_stays():
    schedule = Schedule(RAMP, OptimizerConfig(), T)
    seen = walk(schedule, 40)
    sizes = [schedule.batch_size(s) for s in seen]
    assert sizes[0] == 8 and sizes[-1] == 24
    assert sizes == sorted(sizes)
    assert set(sizes) == {8, 12, 16, 20, 24}
    for sequences, size in zip(seen, sizes, strict=True):
        linear = 8 + 16 * min(1.0, sequences * T / 3_000)
        assert linear - 4 < size <= linear


def test_without_a_ramp_every_batch_is_the_same():
    schedule = Schedule(TrainingConfig(batch_size=6, total_steps=5), OptimizerConfig(), T)
    assert walk(schedule, 5) == [0, 6, 12, 18, 24, 30]
    assert schedule.total_sequences(10**9) == 6 * 10**9


def test_remaining_tokens_reach_zero_at_the_last_step():
    schedule = Schedule(RAMP, OptimizerConfig(), T)
    seen = walk(schedule, 41)
    assert schedule.remaining(0) == seen[40] * T
    assert schedule.remaining(seen[39]) == (seen[40] - seen[39]) * T
    assert schedule.remaining(seen[40]) == schedule.remaining(seen[41]) == 0


def test_first_step_of_a_warmup_already_learns():
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_tokens=10 * 4 * T, decay_tokens=0, decay_learning_rate=1.0)
    schedule = Schedule(TrainingConfig(batch_size=4), optimizer, T)
    rates = [schedule.hyperparameters(4 * n)["learning_rate"] for n in range(12)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0])


def test_learning_rate_phases_meet_where_they_should():
    step = 2 * T
    optimizer = OptimizerConfig(
        learning_rate=1.0,
        warmup_tokens=2 * step,
        constant_tokens=3 * step,
        decay_tokens=4 * step,
        decay_learning_rate=0.1,
        hold_tokens=2 * step,
        final_learning_rate=0.01,
    )
    schedule = Schedule(TrainingConfig(batch_size=2, total_steps=14), optimizer, T)
    rates = [schedule.hyperparameters(2 * n)["learning_rate"] for n in range(14)]
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * n / 4)) for n in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, *cosine, 0.1, 0.1, 0.01, 0.01, 0.01])


def test_cosine_stretches_to_the_end_of_the_run():
    optimizer = OptimizerConfig(learning_rate=1.0, decay_tokens=None, decay_learning_rate=0.1)
    for steps in (3, 50):
        schedule = Schedule(dataclasses.replace(RAMP, total_steps=steps), optimizer, T)
        last = schedule.total_sequences(steps - 1)
        assert schedule.hyperparameters(last)["learning_rate"] == pytest.approx(0.1)
        middle = schedule.hyperparameters(schedule.total_sequences(steps // 2))["learning_rate"]
        assert 0.1 < middle < 1.0


def test_published_v3_recipe():
    schedule = v3()
    at = lambda tokens: schedule.hyperparameters(tokens // 4_096)  # noqa: E731
    assert schedule.batch_size(0) == 3_072
    assert schedule.batch_size(469_000_000_000 // 4_096) == 15_360 - 1_024
    assert schedule.batch_size(469_000_000_000 // 4_096 + 1) == 15_360
    assert at(0)["learning_rate"] == pytest.approx(2.2e-4 / 2_000)
    assert at(5 * 10**12)["learning_rate"] == 2.2e-4
    assert at(14_400 * 10**9)["learning_rate"] == 2.2e-5
    assert at(14_700 * 10**9)["learning_rate"] == 7.3e-6
    assert at(9_999 * 10**9)["mtp_loss_weight"] == 0.3 and at(10_001 * 10**9)["mtp_loss_weight"] == 0.1
    assert at(14_299 * 10**9)["bias_update_speed"] == 0.001 and at(14_301 * 10**9)["bias_update_speed"] == 0.0


def test_v3_takes_the_published_number_of_steps():
    schedule = v3()
    target = 14_800 * 10**9 // 4_096
    ramp_end = 469 * 10**9 // 4_096
    steps = next(n for n in range(230_000, 250_000) if schedule.total_sequences(n) >= target)
    ramp_steps = next(n for n in range(10_000, 20_000) if schedule.total_sequences(n) >= ramp_end)
    assert steps - ramp_steps == pytest.approx(227_800, abs=50)
