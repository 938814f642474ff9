"""What may change between two starts of a run, what only when it is said, and what never."""

import dataclasses

import pytest
from test_checkpoint import meta

from dsjax.config import Config, ConfigError
from dsjax.sections import paths
from dsjax.training.changes import FIXED, FREE, check_allowed, check_same_run


def changed(section: str, **values) -> Config:
    config = Config()
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def test_only_harmless_changes_let_a_run_go_on():
    config = Config()
    longer = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, total_steps=999),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=None),
    )
    assert check_same_run(meta(1), config, "abc") == []
    assert check_same_run(meta(1), longer, "abc") == [
        "training.total_steps: 300 -> 999",
        "checkpoint.every_steps: 100 -> None",
    ]


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "n_routed_experts", 32),
        ("model", "q_lora_rank", None),
        ("data", "sequence_length", 128),
        ("data", "sources", ("text_files:other",)),
        ("task", "largest", 5),
        ("training", "seed", 1),
        ("optimizer", "moment_dtype", "float32"),
    ],
)
def test_a_run_of_another_model_data_or_seed_is_refused(section, field, value):
    config = Config()
    changed = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{field: value})})
    with pytest.raises(ConfigError, match=f"{section}.{field}: "):
        check_same_run(meta(1), changed, "abc")


def test_a_tokenizer_may_move_but_not_change():
    config = Config()
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="elsewhere/tokenizer.json"))
    told = "data.tokenizer: 'bytes' -> 'elsewhere/tokenizer.json'"
    assert check_same_run(meta(1), moved, "abc") == [told]
    with pytest.raises(ConfigError, match=f"fingerprint abc -> xyz; {told}"):
        check_same_run(meta(1), moved, "xyz")


def test_changed_data_is_refused_even_under_the_same_config():
    with pytest.raises(ConfigError, match="fingerprint abc -> xyz"):
        check_same_run(meta(1), Config(), "xyz")


def test_what_changes_the_course_of_a_run_must_be_said():
    faster = changed("optimizer", learning_rate=1e-3, b1=0.8)
    with pytest.raises(ConfigError) as told:
        check_same_run(meta(1), faster, "abc")
    for text in (
        "optimizer.learning_rate: 0.00022 -> 0.001",
        "optimizer.b1: 0.9 -> 0.8",
        "or say --allow-change optimizer.learning_rate --allow-change optimizer.b1",
    ):
        assert text in str(told.value)
    allowed = ["optimizer.b1", "optimizer.learning_rate"]
    check_allowed(allowed)
    assert check_same_run(meta(1), faster, "abc", allowed) == [
        "optimizer.learning_rate: 0.00022 -> 0.001",
        "optimizer.b1: 0.9 -> 0.8",
    ]
    with pytest.raises(ConfigError, match=r"optimizer.b1: 0.9 -> 0.8\); put it back as it was, or say"):
        check_same_run(meta(1), faster, "abc", allowed[1:])


def test_no_word_lets_a_run_go_on_with_another_architecture():
    wider = changed("model", hidden_size=256)
    with pytest.raises(ConfigError, match="hidden_size: 128 -> 256") as told:
        check_same_run(meta(1), wider, "abc")
    assert "--allow-change" not in str(told.value)
    with pytest.raises(ConfigError, match="cannot change within a run"):
        check_allowed(["model.hidden_size"])


def test_where_it_is_computed_may_change():
    moved = dataclasses.replace(changed("mesh", data=4, expert=2), init_from="elsewhere")
    told = check_same_run(meta(1), moved, "abc")
    assert "mesh.expert: 1 -> 2" in told and any("without effect" in one for one in told)


def test_every_rule_names_something():
    known = paths(Config)
    for name in (*FIXED, *FREE):
        assert name.removesuffix(".") in known, name
