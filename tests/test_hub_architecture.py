"""config.json <-> ModelConfig: both dialects, nothing ignored, and transformers reads what is written."""

import dataclasses
import json
import random
from pathlib import Path

import pytest

from dsjax.config import ConfigError, ModelConfig, RopeScaling, base_config, check, from_dict, load
from dsjax.hub.architecture import (
    FAMILIES,
    NULL_MEANS,
    RELATIVES,
    ROUTING_FIELDS,
    Quantization,
    is_published,
    published_config,
    read_config,
)
from dsjax.model.layers import rope_amplitude, rope_frequencies, softmax_scale

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
# What DeepSeek-V3's own file says, with the fields that have no meaning for the computation.
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V2_LITE = V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "quantization_config": None,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
MOONLIGHT = V3 | {
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "quantization_config": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}
TINY = {
    "vocab_size": 96,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 40,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "max_position_embeddings": 256,
}
TINY_YARN = YARN | {"factor": 8.0, "original_max_position_embeddings": 32}


@pytest.fixture
def read(tmp_path):
    """The Published of a dict, or of any text."""

    def read(values: dict | str):
        text = values if isinstance(values, str) else json.dumps(values)
        (tmp_path / "config.json").write_text(text)
        return read_config(tmp_path)

    return read


@pytest.fixture
def refusal(read, tmp_path):
    """The one sentence that refuses a config.json, without its path."""

    def refusal(values: dict | str) -> str:
        with pytest.raises(ConfigError) as caught:
            read(values)
        message = str(caught.value)
        assert "\n" not in message and str(tmp_path / "config.json") in message
        return message.replace(str(tmp_path / "config.json"), "").removeprefix(": ")

    return refusal


def tiny(**changes) -> dict:
    return {"model_type": "deepseek_v3"} | TINY | changes


@pytest.mark.parametrize(
    "values, file",
    [
        (V3, "deepseek_v3.py:released"),
        (V2_LITE, "deepseek_v2_lite.py:released"),
        (MOONLIGHT, "moonlight_16b.py"),
        (MOONLIGHT | {"model_type": "kimi_k2"}, "moonlight_16b.py"),
    ],
)
def test_published_files_are_the_repositorys_configs(read, repository, values, file):
    model = load(str(repository / "configs" / file)).model
    # Not of the architecture: the files' initializer_range is none of the training, and most have no balance loss.
    same = {name: getattr(model, name) for name in ("initializer_range", "aux_loss_alpha")}
    assert dataclasses.replace(read(values).model, **same) == model


def test_everything_beside_the_model_is_read(read):
    published = read(V3)
    assert published.model_type == "deepseek_v3"
    assert published.dtype == "bfloat16"
    assert published.quantization == Quantization((128, 128), "float32")
    assert published.values == V3
    powers_of_two = read(V3 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0", "weight_block_size": [64, 32]}})
    assert powers_of_two.quantization == Quantization((64, 32), "ue8m0")
    assert read(V2_LITE).quantization is None
    assert read(tiny(dtype="float32")).dtype == "float32"
    assert read(tiny()).dtype is None


@pytest.mark.parametrize("yarn", [None, TINY_YARN])
def test_both_dialects_say_the_same(read, yarn):
    old = tiny(rope_theta=5e4, rope_scaling=yarn, torch_dtype="bfloat16", num_nextn_predict_layers=1)
    parameters = {"rope_theta": 5e4} | ({"rope_type": "default"} if yarn is None else yarn | {"rope_type": "yarn"})
    new = tiny(rope_parameters=parameters, dtype="bfloat16", num_mtp_layers=1, head_dim=4, qk_head_dim=12)
    new["num_local_experts"] = new.pop("n_routed_experts")
    first, second = read(old), read(new)
    assert first.model == second.model and first.dtype == second.dtype
    assert first.model.rope_theta == 5e4 and (first.model.rope_scaling is None) == (yarn is None)
    assert read(old | new).model == first.model


def test_yarn_without_optional_fields_means_what_transformers_takes_it_for(read):
    scaling = {"rope_type": "yarn", "factor": 2, "beta_fast": None, "mscale_all_dim": None}
    model = read(tiny(rope_scaling=scaling)).model
    assert model.rope_scaling == RopeScaling(
        factor=2.0, original_max_position_embeddings=256, beta_fast=32.0, beta_slow=1.0, mscale=0.0, mscale_all_dim=0.0
    )
    assert read(tiny(rope_scaling={"type": "default"})).model.rope_scaling is None
    assert read(tiny(rope_parameters={"rope_theta": 7})).model.rope_theta == 7


def test_attention_factor_is_accepted_only_where_it_follows_from_the_rest(read, refusal):
    equal = TINY_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
    assert read(tiny(rope_scaling=equal | {"attention_factor": 1.0})).model == read(tiny(rope_scaling=equal)).model
    bare = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 32}
    assert read(tiny(rope_scaling=bare | {"attention_factor": 1.2079441541679836}))
    message = refusal(tiny(rope_scaling=bare | {"attention_factor": 1.0}))
    assert "rope_scaling.attention_factor is 1.0, but only 1.20794" in message


def test_layer_types_become_the_number_of_dense_layers(read, refusal):
    values = tiny(model_type="glm4_moe_lite", mlp_layer_types=["dense", "dense", "sparse"])
    del values["first_k_dense_replace"]
    assert read(values).model.first_k_dense_replace == 2
    assert "first_k_dense_replace is 1, but only 2" in refusal(values | {"first_k_dense_replace": 1})
    for kinds in (["sparse", "dense", "sparse"], ["dense", "sparse"], ["dense", "moe", "sparse"], "dense", {}):
        assert "mlp_layer_types must name all 3 layers" in refusal(values | {"mlp_layer_types": kinds})


def test_a_dense_family_has_no_routing(read, refusal):
    values = {name: value for name, value in tiny(model_type="youtu").items() if name not in ROUTING_FIELDS}
    model = read(values).model
    assert model.first_k_dense_replace == model.num_hidden_layers == 3
    assert model.tie_word_embeddings and model.num_nextn_predict_layers == 0
    assert "unknown field n_routed_experts" in refusal(values | {"n_routed_experts": 4})


def test_every_unknown_field_is_named_with_the_nearest_known_one(refusal):
    message = refusal(tiny(n_routed_expert=4, index_topk=2048, sliding_window=None))
    assert message == "unknown fields index_topk, n_routed_expert (did you mean n_routed_experts?), sliding_window"


REFUSED = [
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu", but only "silu" is supported'),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1, but only 0 is supported"),
    ({"pretraining_tp": 2}, "pretraining_tp is 2"),
    ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ({"mlp_bias": True}, "mlp_bias is true, but only false"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"seq_aux": False}, "seq_aux is false"),
    ({"hidden_act": "gelu", "mlp_bias": True, "foo": 1}, "unknown field foo; hidden_act is"),
    ({"scoring_func": "softmax"}, 'scoring_func is "softmax", but only "sigmoid"'),
    ({"topk_method": "greedy"}, 'topk_method is "greedy", but only "noaux_tc"'),
    ({"num_key_value_heads": 2}, "num_key_value_heads is 2, but only 4 (num_attention_heads)"),
    ({"head_dim": 12}, "head_dim is 12, but only 4 (qk_rope_head_dim)"),
    ({"qk_head_dim": 8}, "qk_head_dim is 8, but only 12"),
    ({"num_local_experts": 4}, "num_local_experts is 4, but only 8 (n_routed_experts)"),
    ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2, but must be 0 or 1"),
    ({"mtp_hidden_state": "mid_norm"}, 'unknown mtp_hidden_state "mid_norm"'),
    ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob is true, but only false"),
    ({"model_type": "deepseek_v2", "rope_interleave": False}, "rope_interleave is false"),
    ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, '"greedy" or "group_limited_greedy" is supported'),
    ({"model_type": "deepseek_v2", "num_experts_per_tok": None}, "num_experts_per_tok must be a whole number"),
    ({"hidden_size": "big"}, "hidden_size must be a whole number, but got 'big'"),
    ({"hidden_size": 24.5}, "hidden_size must be a whole number"),
    ({"hidden_size": True}, "hidden_size must be a whole number"),
    ({"hidden_size": None}, "hidden_size must be a whole number"),
    ({"hidden_size": {"text": 24}}, "hidden_size must be a whole number"),
    ({"hidden_size": [24]}, "hidden_size must be a whole number"),
    ({"hidden_size": -1}, "hidden_size is -1, but must be above 0"),
    ({"num_hidden_layers": "3", "mlp_layer_types": ["dense"] * 3}, "mlp_layer_types"),
    ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
    ({"attention_bias": None}, "attention_bias must be true or false"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a finite number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
    ({"first_k_dense_replace": 4}, "first_k_dense_replace is 4, but there are only 3 layers (num_hidden_layers)"),
    ({"n_group": 3}, "n_routed_experts = 8 does not divide into n_group = 3 groups"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
    ({"qk_rope_head_dim": 5}, "rotary dimensions come in pairs"),
    ({"rope_theta": None}, "rope_theta must be a finite number"),
    ({"rope_theta": 0}, "rope_theta is 0"),
    ({"rope_scaling": "yarn"}, 'rope_scaling must be an object or null, but is "yarn"'),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'the type "linear"'),
    ({"rope_scaling": TINY_YARN | {"rope_type": "default"}}, 'the type "default" and "yarn"'),
    ({"rope_scaling": {"factor": 2.0}}, 'rope_scaling of type "default" has unknown fields: factor'),
    (
        {"rope_scaling": TINY_YARN | {"short_factor": []}},
        'rope_scaling of type "yarn" has unknown fields: short_factor',
    ),
    ({"rope_scaling": TINY_YARN | {"truncate": False}}, "rope_scaling.truncate is false"),
    ({"rope_scaling": TINY_YARN | {"factor": None}}, "rope_scaling has no factor"),
    ({"rope_scaling": TINY_YARN | {"factor": "8"}}, "rope_scaling.factor must be a finite number"),
    ({"rope_scaling": TINY_YARN | {"factor": 0.5}}, "rope_scaling.factor is 0.5"),
    ({"rope_scaling": TINY_YARN | {"mscale": [1]}}, "rope_scaling.mscale must be a finite number"),
    (
        {"rope_scaling": TINY_YARN, "rope_parameters": {"rope_theta": 1e4}},
        "rope_scaling and rope_parameters contradict",
    ),
    (
        {"rope_theta": 5e4, "rope_parameters": {"rope_theta": 1e4}},
        "rope_parameters.rope_theta and rope_theta contradict",
    ),
    ({"torch_dtype": "float32", "dtype": "bfloat16"}, "dtype and torch_dtype contradict"),
    ({"torch_dtype": "int8"}, 'torch_dtype is "int8"'),
    ({"torch_dtype": ["float32"]}, "torch_dtype is"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, 'quantization_config.quant_method is "awq"'),
    ({"quantization_config": {"quant_method": "gptq"}}, 'quant_method is "gptq"'),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, 'quant_method is "bitsandbytes"'),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, 'quant_method is "compressed-tensors"'),
    ({"quantization_config": {}}, "quantization_config.quant_method is null"),
    ({"quantization_config": "fp8"}, "quantization_config must be an object"),
    ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size must be two whole numbers"),
    ({"quantization_config": FP8 | {"weight_block_size": [128, 0]}}, "weight_block_size must be two whole numbers"),
    ({"quantization_config": FP8 | {"fmt": "e5m2"}}, 'quantization_config.fmt is "e5m2"'),
    ({"quantization_config": FP8 | {"activation_scheme": "static"}}, 'activation_scheme is "static"'),
    ({"quantization_config": FP8 | {"expert_dtype": "fp4"}}, "quantization_config has unknown fields: expert_dtype"),
    ({"architectures": ["DeepseekV3ForSequenceClassification"]}, 'only ["DeepseekV3ForCausalLM"] loads'),
    ({"model_type": "llama"}, 'model_type is "llama"; those that load are deepseek_v2'),
    ({"model_type": None}, "model_type is null"),
    ({"model_type": ["deepseek_v3"]}, "model_type is"),
]


@pytest.mark.parametrize("changes, words", REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_what_cannot_be_computed_is_refused_by_name(refusal, changes, words):
    assert words in refusal(tiny(**changes))


ODD_VALUES = [None, True, 0, -1, 3, 0.5, 1e308, float("nan"), 10**400, "", "yarn", [], [1], {}, {"type": "yarn"}]


@pytest.mark.parametrize("seed", range(20))
def test_any_value_in_any_field_reads_or_is_one_sentence(read, seed):
    draw = random.Random(seed)
    known = V3 | V2_LITE | {"mlp_layer_types": None, "rope_parameters": YARN, "head_dim": 64, "num_local_experts": 8}
    for _ in range(50):
        values = tiny(rope_scaling=dict(TINY_YARN), quantization_config=dict(FP8))
        place = draw.choice([values, values, values["rope_scaling"], values["quantization_config"]])
        names = list(known if place is values else [*place, "attention_factor", "rope_theta", "truncate", "scale_fmt"])
        for name in draw.sample(names, 2):
            place[name] = draw.choice(ODD_VALUES)
        try:
            read(values)
        except ConfigError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("model_type", RELATIVES)
def test_relatives_are_refused_with_the_reason(refusal, model_type):
    assert f'model_type is "{model_type}", which {RELATIVES[model_type]}' in refusal(tiny(model_type=model_type))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"deepseek_v3"', "[" * 100_000, '{"a": 1e400', "\x00"])
def test_a_file_that_is_no_object_is_one_sentence(refusal, text):
    assert "not JSON" in refusal(text) or "must hold a JSON object" in refusal(text)


def test_numbers_beyond_float_are_refused(refusal):
    assert "hidden_size must be a whole number" in refusal(
        json.dumps(tiny()).replace('"hidden_size": 24', '"hidden_size": 1e400')
    )


def test_directories_of_other_kinds_are_told_apart(read, refusal, tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*config.json: No such file"):
        read_config(tmp_path)
    assert not is_published(tmp_path)
    assert "of a dsjax run" in refusal({"model": {}, "training": {}, "precision": "bf16"})
    assert not is_published(tmp_path)
    read(tiny())
    assert is_published(tmp_path)
    (tmp_path / "config.json").write_text("[")
    assert not is_published(tmp_path)


def repository_models() -> dict[str, ModelConfig]:
    folder = Path(__file__).parents[1] / "configs"
    files = [path.name for path in sorted(folder.glob("*.py"))]
    forms = [f"{name}.py:released" for name in ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3")]
    return {file: load(str(folder / file)).model for file in files + forms}


def random_models(count: int) -> dict[str, ModelConfig]:
    """Small valid models of both families, with every field drawn."""
    draw = random.Random(0)
    return {f"random {index}": random_model(draw) for index in range(count)}


def random_model(draw: random.Random) -> ModelConfig:
    heads, groups, v3 = draw.randint(1, 5), draw.choice([1, 2, 4]), draw.random() < 0.5
    layers = draw.randint(1, 6)
    scaling = RopeScaling(
        factor=draw.choice([1.0, 8.0, 40.0]),
        original_max_position_embeddings=draw.choice([32, 4096]),
        beta_fast=draw.choice([1.0, 32.0]),
        mscale=draw.choice([0.0, 0.707, 1.0]),
        mscale_all_dim=draw.choice([0.0, 0.707, 1.0]),
    )
    return ModelConfig(
        vocab_size=draw.randint(1, 999),
        hidden_size=heads * draw.randint(1, 9),
        num_hidden_layers=layers,
        first_k_dense_replace=draw.randint(0, layers),
        intermediate_size=draw.randint(1, 99),
        moe_intermediate_size=draw.randint(1, 99),
        n_routed_experts=groups * draw.randint(2, 6),
        n_shared_experts=draw.randint(0, 3),
        num_experts_per_tok=draw.randint(1, 2),
        n_group=groups if v3 or groups > 1 else 1,
        topk_group=draw.randint(1, groups),
        topk_method="noaux_tc" if v3 else "greedy" if groups == 1 else "group_limited_greedy",
        scoring_func="sigmoid" if v3 else "softmax",
        norm_topk_prob=v3 and draw.random() < 0.7,
        routed_scaling_factor=draw.uniform(0.5, 16),
        num_attention_heads=heads,
        q_lora_rank=draw.choice([None, 7]),
        kv_lora_rank=draw.randint(1, 9),
        qk_nope_head_dim=draw.randint(1, 9),
        qk_rope_head_dim=2 * draw.randint(1, 9),
        v_head_dim=draw.randint(1, 9),
        rope_theta=draw.choice([10000.0, 5e4]),
        rope_scaling=draw.choice([None, scaling]),
        rope_interleave=not v3 or draw.random() < 0.7,
        max_position_embeddings=32,
        rms_norm_eps=draw.choice([1e-6, 1e-5]),
        attention_bias=draw.random() < 0.5,
        tie_word_embeddings=draw.random() < 0.5,
        initializer_range=draw.uniform(0.001, 0.1),
        num_nextn_predict_layers=draw.randint(0, 1),
        mtp_hidden_state=draw.choice(["post_norm", "pre_norm"]),
        aux_loss_alpha=draw.choice([0.0, 1e-4]),
    )


MODELS = repository_models() | random_models(40)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_is_written_reads_back_the_same(read, model):
    check(from_dict(base_config().to_dict() | {"model": dataclasses.asdict(model)} | {"data": {"sequence_length": 1}}))
    quantization = Quantization((128, 64), "ue8m0")
    values = published_config(model, "bfloat16", quantization, bos_token_id=3, eos_token_id=None)
    published = read(values)
    assert published.model == model
    assert (published.dtype, published.quantization) == ("bfloat16", quantization)
    assert (values["bos_token_id"], values["eos_token_id"]) == (3, None)
    assert ("mtp_hidden_state" in values) == (model.mtp_hidden_state == "pre_norm")
    plain = read(published_config(model, "float32", None, None, None))
    assert plain.quantization is None and plain.model == model


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"topk_method": "greedy"}, 'scoring_func "sigmoid" and topk_method "greedy"'),
        ({"scoring_func": "softmax"}, 'scoring_func "softmax" and topk_method "noaux_tc"'),
        ({"scoring_func": "softmax", "topk_method": "greedy"}, "norm_topk_prob is true"),
        (
            {
                "scoring_func": "softmax",
                "topk_method": "greedy",
                "norm_topk_prob": False,
                "rope_interleave": False,
            },
            "rope_interleave is false",
        ),
        (
            {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "num_attention_heads": 3},
            "hidden_size = 128 does not divide by 3 heads",
        ),
    ],
)
def test_an_architecture_without_a_published_class_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        published_config(ModelConfig(**changes), "float32", None, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model({"kimi_k2": "deepseek_v3"}.get(model_type, model_type)).to_dict()
    theirs |= {name: value for name, value in NULL_MEANS.items() if theirs.get(name, 0) is None}
    theirs["rope_theta"] = theirs["rope_parameters"]["rope_theta"]
    if "mlp_layer_types" in theirs:
        theirs["first_k_dense_replace"] = theirs["mlp_layer_types"].count("dense")
    family = FAMILIES[model_type]
    assert (
        f"{type(transformers.AutoConfig.for_model(theirs['model_type'])).__name__[:-6]}ForCausalLM"
        == family.architecture
    )
    ours = dict(family.defaults)
    # Not a field there, or read otherwise here, for a reason that the table gives.
    for name in ("scoring_func", "num_nextn_predict_layers") + (
        ("topk_method",) if model_type != "deepseek_v2" else ()
    ):
        ours.pop(name, None)
    assert {name: theirs[name] for name in ours} == ours
    of_model_config = {"attention_bias": False, "tie_word_embeddings": False, "rope_interleave": True}
    for name in theirs.keys() & {field.name for field in dataclasses.fields(ModelConfig)} - ours.keys():
        # What the table leaves to ModelConfig; MTP and new weights aside.
        if name not in ("num_nextn_predict_layers", "initializer_range"):
            assert theirs[name] == of_model_config[name] == getattr(ModelConfig(), name), name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if "released" in name] + [f"random {n}" for n in range(12)])
def test_transformers_reads_the_same_architecture(tmp_path, name):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v2 import modeling_deepseek_v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    model = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(published_config(model, "float32", None, 0, 1)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    parts = {"deepseek_v3": (modeling_deepseek_v3, "DeepseekV3"), "deepseek_v2": (modeling_deepseek_v2, "DeepseekV2")}
    module, prefix = parts[theirs.model_type]
    rotary = getattr(module, prefix + "RotaryEmbedding")(theirs)
    assert rotary.inv_freq.numpy() == pytest.approx(rope_frequencies(model), rel=1e-6)
    assert rotary.attention_scaling == pytest.approx(rope_amplitude(model.rope_scaling), rel=1e-6)
    scale = module.yarn_apply_mscale(theirs.rope_parameters, model.qk_head_dim**-0.5)
    assert scale == pytest.approx(softmax_scale(model), rel=1e-6)
    for field in dataclasses.fields(model):
        if field.name not in ("rope_theta", "rope_scaling") and hasattr(theirs, field.name):
            assert getattr(theirs, field.name) == getattr(model, field.name), field.name
