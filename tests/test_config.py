"""Loading and checking configurations: every mistake is one sentence that names the field, before JAX is imported."""

import dataclasses
import json

import pytest

from dsjax.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    RopeScaling,
    TrainingConfig,
    base_config,
    check,
    from_dict,
    load,
    to_dict,
)

EMPTY = """
from dsjax.config import base_config

def get_config():
    config = base_config()
    {}
    return config
"""


@pytest.fixture
def write(tmp_path):
    """Writes a config file and returns its path; `write("x = 1", EMPTY)` puts the line into get_config."""

    def write(text: str, template: str = "{}") -> str:
        path = tmp_path / "example.py"
        path.write_text(template.format(text))
        return str(path)

    return write


def refusal(function, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_valid_and_survive_a_file(write):
    assert load(write("", EMPTY.replace("{}", "pass"))) == Config()
    check(Config())


def test_json_round_trip_is_exact():
    config = Config(
        model=ModelConfig(rope_scaling=RopeScaling(factor=1.0), q_lora_rank=None),
        data=DataConfig(sources=("python_stdlib", "tfds:x"), weights=(1.0, 0.5)),
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_missing_fields_keep_their_defaults():
    assert from_dict({"training": {"seed": 3}}) == Config(training=TrainingConfig(seed=3))


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.seed = 1  # type: ignore[misc]


def test_base_config_is_locked():
    with pytest.raises(AttributeError):
        base_config().model.hidden_sise = 3


OVERRIDES = [
    ("training.total_steps=7", "training.total_steps", 7),
    ("training.total_steps=1_000", "training.total_steps", 1000),
    ("training.total_steps=2e3", "training.total_steps", 2000),
    ("optimizer.constant_tokens=4.3e12", "optimizer.constant_tokens", 4_300_000_000_000),
    ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
    ("optimizer.clip_norm=None", "optimizer.clip_norm", None),
    ("model.q_lora_rank=none", "model.q_lora_rank", None),
    ("model.norm_topk_prob=false", "model.norm_topk_prob", False),
    ("model.norm_topk_prob=True", "model.norm_topk_prob", True),
    ("mesh.data=-1", "mesh.data", -1),
    ("data.sources=python_stdlib,tfds:x", "data.sources", ("python_stdlib", "tfds:x")),
    ("data.sources=text_files:a=b", "data.sources", ("text_files:a=b",)),
    ("data.weights=3", "data.weights", (3.0,)),
    ("data.directory=/x", "data.directory", "/x"),
    ("precision=fp32", "precision", "fp32"),
    ("model.rope_scaling.factor=40", "model.rope_scaling", RopeScaling(factor=40.0)),
]


@pytest.mark.parametrize("override, path, value", OVERRIDES)
def test_override_is_read_as_the_field_asks(write, override, path, value):
    found = load(write("pass", EMPTY), [override])
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_later_override_wins(write):
    assert load(write("pass", EMPTY), ["training.seed=1", "training.seed=2"]).training.seed == 2


def test_override_changes_one_field_of_a_nested_section(write):
    file = write("config.model.rope_scaling = {'factor': 2.0, 'mscale': 0.707}", EMPTY)
    scaling = load(file, ["model.rope_scaling.factor=4"]).model.rope_scaling
    assert scaling == RopeScaling(factor=4.0, mscale=0.707)
    assert load(file, ["model.rope_scaling=None"]).model.rope_scaling is None


UNKNOWN = [
    ("model.hidden_sise", "unknown field model.hidden_sise; did you mean model.hidden_size?"),
    ("modle.hidden_size", "unknown section modle; did you mean model?"),
    ("precison", "unknown section precison; did you mean precision?"),
    ("training.learning_rate", "unknown field training.learning_rate; did you mean optimizer.learning_rate?"),
    (
        "model.rope_scaling.facter",
        "unknown field model.rope_scaling.facter; did you mean model.rope_scaling.factor?",
    ),
    ("model.hidden_size.x", "unknown field model.hidden_size.x; model.hidden_size is a field, not a section"),
    ("mesh.zebra", "unknown field mesh.zebra; valid are mesh.data, mesh.fsdp, mesh.expert"),
]


@pytest.mark.parametrize("path, sentence", UNKNOWN)
def test_unknown_name_in_an_override_names_the_nearest(write, path, sentence):
    assert refusal(load, write("pass", EMPTY), [f"{path}=3"]) == sentence


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("config.model.hidden_sise = 3", UNKNOWN[0][1]),
        ("config.model.update(hidden_sise=3)", UNKNOWN[0][1]),
        ("config['model']['hidden_sise'] = 3", "did you mean model.hidden_size?"),
        ("config.modle.hidden_size = 3", UNKNOWN[1][1]),
        ("config.training.learning_rate = 3", UNKNOWN[3][1]),
        ("config.model.rope_scaling = {'facter': 2.0}", "did you mean factor?"),
    ],
)
def test_unknown_name_in_a_file_names_the_nearest(write, line, sentence):
    message = refusal(load, write(line, EMPTY))
    assert message.endswith(sentence)
    assert "example.py, line 6: " in message or "rope_scaling" in message


WRONG_TYPES = [
    ("model.hidden_size=big", "model.hidden_size must be a whole number, but got 'big'"),
    ("model.hidden_size=1.5", "model.hidden_size must be a whole number, but got 1.5"),
    ("model.hidden_size=None", "model.hidden_size must be a whole number, but got 'None'"),
    ("model.q_lora_rank=x", "model.q_lora_rank must be a whole number or None, but got 'x'"),
    ("optimizer.learning_rate=nan", "optimizer.learning_rate must be a finite number, but got nan"),
    ("model.norm_topk_prob=1", "model.norm_topk_prob must be true or false, but got '1'"),
    ("data.weights=1,x", "data.weights must be a finite number, but got 'x'"),
    ("model=3", "model must be a section of fields, but got '3'"),
    ("model.rope_scaling=40", "model.rope_scaling must be a section of fields, but got '40'"),
]


@pytest.mark.parametrize("override, sentence", WRONG_TYPES)
def test_wrong_type_says_got_and_expected(write, override, sentence):
    assert refusal(load, write("pass", EMPTY), [override]) == sentence


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("config.model.hidden_size = '128'", "model.hidden_size must be a whole number, but got '128'"),
        ("config.model.hidden_size = True", "model.hidden_size must be a whole number, but got True"),
        (
            "config.data.sources = 'python_stdlib'",
            "data.sources must be a tuple (a text each), but got 'python_stdlib'",
        ),
        ("config.model = 3", "model must be a section of fields, but got 3"),
        ("config.precision = None", "precision must be a text, but got None"),
    ],
)
def test_wrong_type_in_a_file_says_got_and_expected(write, line, sentence):
    assert refusal(load, write(line, EMPTY)) == sentence


def test_a_section_spoiled_by_the_file_is_not_hidden_by_an_override(write):
    message = refusal(load, write("config.model = 3", EMPTY), ["model.hidden_size=256"])
    assert message == "model must be a section of fields, but got 3"


@pytest.mark.parametrize(
    "text, part",
    [
        ("def get_config(:", "line 1, is not Python"),
        ("x = 1", "has no function get_config()"),
        ("def get_config(): return 3", "must return base_config() with changes, but returned 3"),
        ("def get_config(): return None", "but returned None"),
        ("def get_config():\n    return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("import no_such_module", "line 1: ModuleNotFoundError"),
        ("import sys\nsys.exit(0)", "line 2: SystemExit: 0"),
        ("x = '\\0'.join(\0)", "not Python"),
    ],
)
def test_broken_file_is_told_in_one_sentence(write, text, part):
    message = refusal(load, write(text))
    assert "example.py" in message and part in message


def test_missing_file_is_told(tmp_path):
    assert refusal(load, str(tmp_path / "no.py")).endswith("no.py: No such file or directory")
    assert "Is a directory" in refusal(load, str(tmp_path))


def test_binary_file_is_told(tmp_path):
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    assert "is not" in refusal(load, str(tmp_path / "binary.py"))


def test_argument_after_the_file_reaches_get_config(write):
    text = "from dsjax.config import base_config\ndef get_config(seed='1'):\n"
    file = write(text + "    config = base_config()\n    config.training.seed = int(seed)\n    return config")
    assert load(file).training.seed == 1
    assert load(f"{file}:7").training.seed == 7
    assert "takes 0 positional arguments" in refusal(load, write("pass", EMPTY) + ":7")


def replaced(**sections) -> Config:
    """The defaults with some fields of some sections changed."""
    config = Config()
    changed = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **changed)


IMPOSSIBLE = [
    (dict(model=dict(hidden_size=0)), "model.hidden_size is 0, but must be above 0"),
    (dict(model=dict(rope_scaling=RopeScaling(beta_slow=0.0))), "rope_scaling.beta_slow is 0.0"),
    (dict(training=dict(seed=-1)), "training.seed is -1"),
    (dict(training=dict(seed=2**32)), "training.seed is 4294967296"),
    (dict(model=dict(topk_method="noaux")), 'unknown model.topk_method "noaux"; did you mean noaux_tc?'),
    (dict(training=dict(remat="all")), 'unknown training.remat "all"; valid are none, deepseek, full'),
    (dict(model=dict(rope_scaling=RopeScaling(type="linear"))), 'unknown model.rope_scaling.type "linear"'),
    (dict(model=dict(num_nextn_predict_layers=2)), "must be 0 or 1"),
    (dict(data=dict(fim_rate=1.1)), "data.fim_rate is 1.1"),
    (dict(data=dict(validation_fraction=0.0)), "data.validation_fraction is 0, but a run measures"),
    (dict(data=dict(directory="")), "data.directory is an empty text"),
    (dict(data=dict(validation_fraction=1.0)), "data.validation_fraction is 1.0"),
    (dict(data=dict(sequence_length=0)), "data.sequence_length is 0"),
    (dict(model=dict(mtp_hidden_state="post")), 'unknown model.mtp_hidden_state "post"; did you mean post_norm?'),
    (dict(mesh=dict(data=0)), "mesh.data is 0"),
    (dict(mesh=dict(fsdp=-2)), "mesh.fsdp is -2, but must be above 0, or -1 for as far as devices and weights divide"),
    (dict(model=dict(num_experts_per_tok=17)), "only 16 experts to choose from"),
    (dict(model=dict(n_group=3)), "model.n_routed_experts = 16 does not divide into model.n_group = 3"),
    (dict(model=dict(n_group=2, topk_group=3)), "only 2 groups"),
    (dict(model=dict(n_group=8, topk_group=1)), "kept groups hold only 2 experts"),
    (dict(model=dict(n_group=16, topk_group=4)), "leave one each"),
    (dict(model=dict(n_group=2, topk_group=2, topk_method="greedy")), '"greedy" knows no groups'),
    (dict(model=dict(first_k_dense_replace=5)), "only 4 layers"),
    (dict(model=dict(qk_rope_head_dim=15)), "make it even"),
    (dict(data=dict(sequence_length=4097)), "model.max_position_embeddings = 4096"),
    (dict(model=dict(rope_scaling=RopeScaling(factor=0.5))), "at least 1"),
    (dict(model=dict(rope_scaling=RopeScaling(beta_fast=0.5))), "beta_fast = 0.5 is below"),
    (
        dict(
            model=dict(rope_scaling=RopeScaling(factor=2.0), max_position_embeddings=9000),
            data=dict(sequence_length=8193),
        ),
        "reaches only 2 x 4096",
    ),
    (dict(mesh=dict(expert=3)), "model.n_routed_experts = 16 cannot be divided over mesh.expert = 3"),
    (dict(mesh=dict(fsdp=3)), "model.hidden_size = 128 cannot be divided over mesh.fsdp x mesh.expert = 3"),
    (dict(mesh=dict(fsdp=8, expert=4)), "model.q_lora_rank = 48"),
    (dict(mesh=dict(fsdp=8, expert=8), model=dict(q_lora_rank=None)), "model.kv_lora_rank = 32"),
    (dict(mesh=dict(expert=4), dispatch=dict(form="local")), 'dispatch.form "local" moves no tokens'),
    (dict(mesh=dict(data=3), training=dict(batch_size=63)), "evaluation.sequences = 64"),
    (dict(mesh=dict(expert=4), training=dict(batch_size=66)), "training.batch_size = 66 sequences cannot"),
    (dict(mesh=dict(expert=4), training=dict(microbatch_size=2)), "training.microbatch_size = 2 sequences cannot"),
    (dict(training=dict(microbatch_size=24)), "not a multiple of training.microbatch_size = 24"),
    (dict(training=dict(initial_batch_size=32)), "needs both"),
    (dict(training=dict(batch_ramp_tokens=9)), "needs both"),
    (dict(training=dict(initial_batch_size=128, batch_ramp_tokens=9)), "is above training.batch_size = 64"),
    (dict(training=dict(initial_batch_size=32, batch_ramp_tokens=9)), "set a smaller microbatch"),
    (dict(training=dict(mtp_loss_weight_final=0.1)), "second MTP weight needs both"),
    (dict(training=dict(mtp_switch_tokens=3)), "second MTP weight needs both"),
    (dict(data=dict(sources=())), "data.sources is empty"),
    (dict(data=dict(sources=("python_stdlb",))), "did you mean python_stdlib?"),
    (dict(data=dict(sources=("text_files:",))), 'unknown source "text_files:"'),
    (dict(data=dict(weights=(1.0, 2.0))), "2 numbers for 1 data.sources"),
    (dict(data=dict(weights=(0.0,))), "must be above 0"),
    (dict(data=dict(tokenizer="byte")), 'unknown data.tokenizer "byte"'),
    (dict(optimizer=dict(b1=1.0)), "optimizer.b1 is 1.0"),
    (dict(optimizer=dict(b2=0.999)), "less than BF16 can hold"),
    (dict(optimizer=dict(hold_tokens=5)), "set optimizer.decay_tokens too"),
    (dict(optimizer=dict(final_learning_rate=1e-5)), "set optimizer.hold_tokens too"),
    (dict(task=dict(name="arithmetics")), 'unknown task.name "arithmetics"; did you mean arithmetic?'),
    (dict(task=dict(name="jsonl:")), 'unknown task.name "jsonl:"; did you mean jsonl:FILE?'),
    (dict(task=dict(steps_min=4)), "task.steps_min is 4, but chains have at most task.steps = 3"),
    (dict(task=dict(largest=10**12 + 1)), "task.largest is 1000000000001, but must be at most 1000000000000"),
    (dict(task=dict(limit=0)), "task.limit is 0, but must be above 0"),
    (dict(task=dict(numbers=1)), "task.numbers is 1, but must be from 2 to 32"),
    (dict(task=dict(validation_fraction=1.0)), "task.validation_fraction is 1.0"),
    (dict(task=dict(rewards=())), "task.rewards is empty; name at least one of accuracy, format"),
    (dict(task=dict(rewards=("acuracy",))), 'unknown reward "acuracy" in task.rewards; did you mean accuracy?'),
    (dict(task=dict(rewards=("mine.py",))), 'unknown reward "mine.py" in task.rewards'),
    (dict(task=dict(rewards=("format", "format"))), 'task.rewards names "format" twice'),
    (dict(task=dict(weights=(1.0,))), "task.weights has 1 numbers for 2 task.rewards; give one each"),
    (dict(task=dict(weights=(1.0, float("nan")))), "task.weights holds nan"),
    (dict(task=dict(language="fr")), 'unknown task.language "fr"; valid are en, zh'),
    (dict(task=dict(system="")), "task.system is an empty text"),
    (dict(task=dict(timeout_seconds=0.0)), "task.timeout_seconds is 0.0, but must be above 0"),
]


@pytest.mark.parametrize("sections, part", IMPOSSIBLE, ids=[part[:50] for _, part in IMPOSSIBLE])
def test_impossible_value_is_refused(sections, part):
    assert part in refusal(check, replaced(**sections))


@pytest.mark.parametrize(
    "sections",
    [
        dict(model=dict(n_group=4, topk_group=2)),
        dict(model=dict(first_k_dense_replace=4, num_nextn_predict_layers=0), mesh=dict(expert=4)),
        dict(model=dict(first_k_dense_replace=4, num_nextn_predict_layers=0, n_routed_experts=6), mesh=dict(expert=4)),
        dict(optimizer=dict(b2=0.999, moment_dtype="float32")),
        dict(optimizer=dict(b2=0.99)),
        dict(optimizer=dict(decay_tokens=0, hold_tokens=5, final_learning_rate=0.0)),
        dict(training=dict(initial_batch_size=32, batch_ramp_tokens=9, microbatch_size=16)),
        dict(mesh=dict(data=2, fsdp=2, expert=2)),
        dict(mesh=dict(data=2, fsdp=-1, expert=4)),
        dict(mesh=dict(data=-1, fsdp=-1, expert=-1)),
        dict(data=dict(tokenizer="some/tokenizer.json")),
        dict(model=dict(rope_scaling=RopeScaling(beta_fast=1.0), max_position_embeddings=163840)),
        dict(task=dict(name="jsonl:a.jsonl", rewards=("accuracy", "folder/mine.py:reward"), weights=(1.0, -0.5))),
    ],
)
def test_unusual_but_possible_value_is_accepted(sections):
    check(replaced(**sections))


COPY_PER_PRODUCT = 'precision "mxfp8" scales weights along what is contracted, so that each product needs its own copy'
NO_FP8 = "choose one of fp8_deepseek, fp8_deepseek_ue8m0, fp8_tensorwise, fp8_gradient_blocks, mxfp8, or set it to"
IMPOSSIBLE_FP8 = [
    ("fp8_deepsek", {}, 'unknown precision "fp8_deepsek"; did you mean fp8_deepseek?'),
    ("fp8_deepseek", dict(fp8=dict(accumulation="fp24")), 'unknown fp8.accumulation "fp24"; did you mean'),
    (
        "fp8_deepseek",
        dict(monitor=dict(quantisation_every_steps=0)),
        "quantisation_every_steps is 0, but must be above 0",
    ),
    (
        "bf16",
        dict(fp8=dict(accumulation="fp22")),
        f'fp8.accumulation is fp22, but precision "bf16" has no FP8; {NO_FP8} fp32',
    ),
    (
        "fp32",
        dict(monitor=dict(quantisation_every_steps=5)),
        f'monitor.quantisation_every_steps is 5, but precision "fp32" has no FP8; {NO_FP8} None',
    ),
    ("bf16", dict(fp8=dict(working_copy=True)), f'fp8.working_copy is True, but precision "bf16" has no FP8; {NO_FP8}'),
    ("mxfp8", dict(fp8=dict(working_copy=True)), f"fp8.working_copy is True, but {COPY_PER_PRODUCT}"),
    *(
        (
            name,
            dict(fp8=dict(accumulation=accumulation)),
            f'fp8.accumulation "{accumulation}" needs tiles of 1x128, but precision "{name}" has others; '
            'choose fp8_deepseek, or set it to "fp32"',
        )
        for name, accumulation in (
            ("mxfp8", "fp22"),
            ("fp8_tensorwise", "fp22_promote128"),
            ("fp8_gradient_blocks", "fp22"),
        )
    ),
]


@pytest.mark.parametrize("precision, sections, part", IMPOSSIBLE_FP8, ids=[part[:50] for *_, part in IMPOSSIBLE_FP8])
def test_what_a_precision_does_not_have_is_refused(precision, sections, part):
    assert part in refusal(check, dataclasses.replace(replaced(**sections), precision=precision))


@pytest.mark.parametrize("accumulation", ["fp32", "fp22", "fp22_promote128"])
@pytest.mark.parametrize("precision", ["fp8_deepseek", "fp8_deepseek_ue8m0"])
def test_fp8_options_are_accepted_where_they_have_an_effect(precision, accumulation):
    config = replaced(fp8=dict(accumulation=accumulation), monitor=dict(quantisation_every_steps=1))
    check(dataclasses.replace(config, precision=precision))
