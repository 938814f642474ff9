"""The shipped configurations are valid, are what their docstrings say, and follow the published recipes."""

import ast
import dataclasses
import re

import pytest

from dsjax.config import ConfigError, load
from dsjax.planning.counts import parameters
from dsjax.training.schedule import Schedule

NAMES = [
    "tiny",
    "bench",
    "fp8_experiment",
    "moonlight_16b",
    "deepseek_v2_lite",
    "deepseek_v2",
    "deepseek_v3",
    "r1",
    "r1_tiny",
]
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
    assert re.search(rf"^    dsjax (train|bench|grpo) --config configs/{name}.py", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "deepseek_v2_lite"])
def test_released_form_differs_by_yarn_only(shipped, name):
    pretraining, released = shipped(f"{name}.py"), shipped(f"{name}.py:released")
    assert pretraining.model.rope_scaling is None
    assert released.model.rope_scaling.mscale == released.model.rope_scaling.mscale_all_dim
    assert released.model.max_position_embeddings == 163840
    assert parameters(released.model) == parameters(pretraining.model)
    assert released.training == pretraining.training
    with pytest.raises(ConfigError, match="valid are pretraining, "):
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


PUBLISHED = {  # what parameter counts and schedules do not show; fact by fact from reports and config.json files
    "deepseek_v3": {
        "model": dict(
            n_group=8,
            topk_group=4,
            num_experts_per_tok=8,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            rope_theta=1e4,
            rms_norm_eps=1e-6,
            initializer_range=0.006,
            aux_loss_alpha=1e-4,
        ),
        "optimizer": dict(b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0, moment_dtype="bfloat16"),
        "data": dict(sequence_length=4096, fim_rate=0.1, tokenizer="deepseek"),
    },
    "deepseek_v2": {
        "model": dict(
            n_group=8,
            topk_group=3,
            num_experts_per_tok=6,
            topk_method="group_limited_greedy",
            scoring_func="softmax",
            norm_topk_prob=False,
            routed_scaling_factor=16.0,
            rope_theta=1e4,
            rms_norm_eps=1e-6,
            initializer_range=0.006,
            aux_loss_alpha=0.003,
        ),
        "optimizer": dict(b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0),
        "data": dict(sequence_length=4096),
    },
    "deepseek_v2_lite": {
        "model": dict(
            n_group=1,
            topk_group=1,
            num_experts_per_tok=6,
            topk_method="greedy",
            scoring_func="softmax",
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
            q_lora_rank=None,
            rope_theta=1e4,
            rms_norm_eps=1e-6,
            initializer_range=0.006,
            aux_loss_alpha=0.001,
        ),
        "optimizer": dict(b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0),
        "data": dict(sequence_length=4096),
    },
    "moonlight_16b": {
        "model": dict(
            n_group=1,
            topk_group=1,
            num_experts_per_tok=6,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
            routed_scaling_factor=2.446,
            q_lora_rank=None,
            rope_theta=5e4,
            rms_norm_eps=1e-5,
            initializer_range=0.02,
            max_position_embeddings=8192,
        ),
        "training": dict(bias_update_speed=0.001),
        "data": dict(sequence_length=8192),
    },
    "bench": {
        "model": dict(
            hidden_size=256,
            num_hidden_layers=4,
            first_k_dense_replace=1,
            intermediate_size=704,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_shared_experts=1,
            moe_intermediate_size=128,
            num_attention_heads=4,
            q_lora_rank=96,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            vocab_size=8192,
            num_nextn_predict_layers=0,
        ),
        "data": dict(sequence_length=256),
        "training": dict(batch_size=8),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_are_the_published_ones(shipped, name):
    config = shipped(f"{name}.py")
    for section, fields in PUBLISHED[name].items():
        assert {field: getattr(getattr(config, section), field) for field in fields} == fields


@pytest.mark.parametrize("name, mscale", [("deepseek_v3", 1.0), ("deepseek_v2", 0.707), ("deepseek_v2_lite", 0.707)])
def test_released_yarn_is_the_published_one(shipped, name, mscale):
    yarn = shipped(f"{name}.py:released").model.rope_scaling
    assert (yarn.type, yarn.factor, yarn.original_max_position_embeddings) == ("yarn", 40, 4096)
    assert (yarn.beta_fast, yarn.beta_slow, yarn.mscale, yarn.mscale_all_dim) == (32, 1, mscale, mscale)


def test_moonlight_fits_the_largest_mesh_it_names(repository):
    load(str(repository / "configs" / "moonlight_16b.py"), ["mesh.data=32"])


@pytest.mark.parametrize("form, length, batch", [("extension_32k", 32768, 1920), ("extension_128k", 131072, 480)])
def test_v3_is_extended_as_published(shipped, form, length, batch):
    config = shipped(f"deepseek_v3.py:{form}")
    assert config.model == shipped("deepseek_v3.py:released").model
    assert (config.data.sequence_length, config.training.batch_size, config.training.total_steps) == (
        length,
        batch,
        1000,
    )
    assert length * batch == 15360 * 4096
    for done in (0, 500, 999):
        now = schedule(config).hyperparameters(done * batch)
        assert (now["learning_rate"], now["bias_update_speed"], now["mtp_loss_weight"]) == (7.3e-6, 0, 0.1)
        assert schedule(config).batch_size(done * batch) == batch


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


def test_forms_of_the_fp8_experiment_differ_in_precision_only(shipped):
    forms = {name: shipped(f"fp8_experiment.py:{name}") for name in ("fp8_deepseek", "fp8_tensorwise", "mxfp8")}
    plain = shipped("fp8_experiment.py")
    assert plain.precision == "bf16"
    for name, form in forms.items():
        assert form.precision == name and form.monitor.quantisation_every_steps
        assert dataclasses.replace(form, precision="bf16", monitor=plain.monitor) == plain
    with pytest.raises(ConfigError, match="fp8_deepseek"):
        shipped("fp8_experiment.py:fp8_deapseek")
