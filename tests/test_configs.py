"""The shipped configurations are valid, are what their docstrings say, and follow the published recipes."""

import ast
import re

import pytest

from dsjax.config import ConfigError, load
from dsjax.planning.counts import parameters
from dsjax.training.schedule import Schedule

NAMES = ["tiny", "bench", "moonlight_16b", "deepseek_v2_lite", "deepseek_v2", "deepseek_v3"]
BILLION = 10**9


@pytest.fixture
def shipped(repository):
    return lambda name: load(str(repository / "configs" / name))


def schedule(config) -> Schedule:
    return Schedule(config.training, config.optimizer, config.data.sequence_length)


def test_every_config_file_is_tested(repository):
    assert {path.stem for path in (repository / "configs").glob("*.py")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_states_parameters_and_command(repository, shipped, name):
    text = ast.get_docstring(ast.parse((repository / "configs" / f"{name}.py").read_text()))
    counts = parameters(shipped(f"{name}.py").model)
    assert f"{counts.total:,}" in text or f"{counts.trainable:,}" in text
    if counts.mtp:
        assert f"{counts.mtp:,}" in text
    assert re.search(rf"^    dsjax (train|bench) --config configs/{name}.py", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "deepseek_v2_lite"])
def test_released_form_differs_by_yarn_only(shipped, name):
    pretraining, released = shipped(f"{name}.py"), shipped(f"{name}.py:released")
    assert pretraining.model.rope_scaling is None
    assert released.model.rope_scaling.mscale == released.model.rope_scaling.mscale_all_dim
    assert released.model.max_position_embeddings == 163840
    assert parameters(released.model) == parameters(pretraining.model)
    assert released.training == pretraining.training
    with pytest.raises(ConfigError, match="valid are pretraining, released"):
        shipped(f"{name}.py:chat")


@pytest.mark.parametrize(
    "name, tokens",
    [("deepseek_v3", 14_800), ("deepseek_v2", 8_100), ("deepseek_v2_lite", 5_700), ("moonlight_16b", 5_700)],
)
def test_total_steps_see_the_published_tokens(shipped, name, tokens):
    config = shipped(f"{name}.py")
    seen = schedule(config).total_sequences(config.training.total_steps) * config.data.sequence_length
    a_step = config.training.batch_size * config.data.sequence_length
    assert 0 <= seen - tokens * BILLION < a_step


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "moonlight_16b"])
def test_warmup_takes_two_thousand_steps(shipped, name):
    config = shipped(f"{name}.py")
    plan = schedule(config)
    before, after = plan.total_sequences(1998), plan.total_sequences(1999)
    assert plan.hyperparameters(before)["learning_rate"] < config.optimizer.learning_rate
    assert plan.hyperparameters(after)["learning_rate"] == config.optimizer.learning_rate


V3 = [  # billions of tokens, learning rate, bias speed, MTP weight [V3 section 4.2]
    (100, 2.2e-4, 0.001, 0.3),
    (9_999, 2.2e-4, 0.001, 0.3),
    (12_150, (2.2e-4 + 2.2e-5) / 2, 0.001, 0.1),
    (14_299, 2.2e-5, 0.001, 0.1),
    (14_301, 2.2e-5, 0.0, 0.1),
    (14_632, 2.2e-5, 0.0, 0.1),
    (14_634, 7.3e-6, 0.0, 0.1),
    (14_799, 7.3e-6, 0.0, 0.1),
]


@pytest.mark.parametrize("billions, rate, speed, weight", V3)
def test_v3_follows_the_published_schedules(shipped, billions, rate, speed, weight):
    now = schedule(shipped("deepseek_v3.py")).hyperparameters(billions * BILLION // 4096)
    assert now["learning_rate"] == pytest.approx(rate, rel=1e-4)
    assert (now["bias_update_speed"], now["mtp_loss_weight"]) == (speed, weight)


@pytest.mark.parametrize("billions, batch", [(0, 3072), (234.5, 9216), (468.9, 14336), (469, 15360), (9_000, 15360)])
def test_v3_follows_the_published_batch_ramp(shipped, billions, batch):
    assert schedule(shipped("deepseek_v3.py")).batch_size(int(billions * BILLION) // 4096 + 1) == batch


@pytest.mark.parametrize(
    "name, phases",
    [
        ("deepseek_v2", [(4_859, 2.4e-4), (4_861, 7.584e-5), (7_289, 7.584e-5), (7_291, 2.3965e-5)]),
        ("deepseek_v2_lite", [(4_559, 4.2e-4), (4_561, 1.3272e-4), (5_129, 1.3272e-4), (5_131, 4.194e-5)]),
        ("moonlight_16b", [(5_199, 4.2e-5), (5_699, 4.2e-5)]),
    ],
)
def test_rates_follow_the_published_steps(shipped, name, phases):
    config = shipped(f"{name}.py")
    for billions, rate in phases:
        now = schedule(config).hyperparameters(billions * BILLION // config.data.sequence_length)
        assert now["learning_rate"] == pytest.approx(rate, rel=1e-3)


def test_moonlight_batch_doubles_at_once(shipped):
    plan = schedule(shipped("moonlight_16b.py"))
    assert [plan.batch_size(billions * BILLION // 8192 + 1) for billions in (0, 199, 200)] == [2048, 2048, 4096]
