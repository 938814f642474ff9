"""configs/r1.py says what the report of DeepSeek-R1 says, stage by stage, on V3's architecture."""

import dataclasses

import pytest

from dsjax.__main__ import main
from dsjax.config import ConfigError, load
from dsjax.training.schedule import Schedule

RL, SFT = ("r1_zero", "r1_rl", "r1_rl_final"), ("r1_cold_start", "r1_sft")


@pytest.fixture
def stage(repository):
    return lambda form, *changes: load(str(repository / "configs" / f"r1.py:{form}"), changes)


def rates(config, *steps) -> list[float]:
    plan = Schedule(config.training, config.optimizer, config.data.sequence_length)
    return [plan.hyperparameters(step * config.training.batch_size)["learning_rate"] for step in steps]


@pytest.mark.parametrize("form", RL + SFT)
def test_every_stage_has_v3s_architecture_and_rows_of_32k(repository, stage, form):
    config = stage(form)
    assert config.model == load(str(repository / "configs" / "deepseek_v3.py:released")).model
    assert config.data.sequence_length == 32768 and config.data.tokenizer == "deepseek"
    assert config.training.bias_update_speed == 0 and config.training.initial_batch_size is None


@pytest.mark.parametrize("form", RL)
def test_reinforcement_is_as_published(stage, form):
    config = stage(form)
    grpo, training = config.grpo, config.training
    assert (grpo.group_size, training.batch_size, grpo.minibatches) == (16, 512, 16)  # 32 questions, 8,192 samples
    assert (grpo.kl_coefficient, grpo.reference_every_steps, grpo.max_new_tokens) == (0.001, 400, 32768)
    assert rates(config, 0, 800, training.total_steps - 1) == [3e-6] * 3
    assert grpo.clip_epsilon == 10 and grpo.top_p == 1 and not grpo.unbiased_kl
    for size in (training.total_steps, config.checkpoint.every_steps, config.evaluation.every_steps, 400):
        assert size % grpo.minibatches == 0
    assert not config.data.is_chat and config.task.name.startswith("jsonl:")


@pytest.mark.parametrize("form", SFT)
def test_fine_tuning_is_as_published(stage, form):
    config = stage(form)
    assert config.data.is_chat and config.training.batch_size == 128
    steps = config.training.total_steps  # a step has the rate of its end
    first, middle, last = rates(config, 0, steps / 2 - 1, steps - 1)
    assert (first, middle, last) == pytest.approx((5e-5, (5e-5 + 5e-6) / 2, 5e-6), rel=0.01)


def test_two_epochs_of_the_samples(stage):
    tokens = 2 * 804_745 * 5355
    assert 0 <= stage("r1_sft").training.total_steps * 128 * 32768 - tokens < 128 * 32768


def test_stages_differ_as_published(stage):
    zero, first, final = (stage(form) for form in RL)
    assert (zero.training.total_steps, final.training.total_steps) == (10_400, 1_696)
    assert (zero.grpo.temperature, first.grpo.temperature, final.grpo.temperature) == (1.0, 1.0, 0.7)
    assert zero.task.rewards == ("accuracy", "format")
    assert first.task.rewards == final.task.rewards == ("accuracy", "format", "language_consistency")
    assert dataclasses.replace(first.grpo, temperature=0.7) == final.grpo and first.optimizer == final.optimizer


def test_each_stage_begins_with_what_another_leaves(stage):
    begun = {form: stage(form).init_from for form in RL + SFT}
    assert begun == {
        "r1_zero": "DeepSeek-V3-Base",
        "r1_cold_start": "DeepSeek-V3-Base",
        "r1_rl": "runs/r1/cold_start",
        "r1_sft": "DeepSeek-V3-Base",
        "r1_rl_final": "runs/r1/sft",
    }


def test_the_second_half_of_r1_zero_is_a_run_of_its_own(stage):
    longer = [
        "init_from=runs/r1/zero",
        "data.sequence_length=65536",
        "grpo.max_new_tokens=65536",
        "training.total_steps=2208",
        "training.seed=1",
    ]
    halves = stage("r1_zero", "training.total_steps=8192"), stage("r1_zero", *longer)
    assert sum(one.training.total_steps for one in halves) == 10_400
    assert all(one.training.total_steps % one.grpo.minibatches == 0 for one in halves)


def test_an_unknown_form_names_the_known_ones(stage):
    with pytest.raises(ConfigError, match='unknown form "r1" of r1; valid are r1_zero, r1_cold_start, r1_rl, r1_sft, '):
        stage("r1")


@pytest.mark.parametrize("form", SFT)
def test_fine_tuning_fits_128_b200(repository, form, capsys):
    words = ["plan", "--config", str(repository / "configs" / f"r1.py:{form}"), "--hardware", "b200", "--chips", "128"]
    assert main(words) == 0
    assert "fits: " in capsys.readouterr().out
