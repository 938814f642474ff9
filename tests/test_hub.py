"""Published checkpoints go in and out without losing a bit, whatever the mesh; damaged ones are told in a sentence."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from dsjax import hub
from dsjax.config import ConfigError, RopeScaling, load
from dsjax.hub import names, reading, writing
from dsjax.hub.architecture import Quantization, published_config
from dsjax.hub.block_fp8 import Blocks
from dsjax.hub.inspection import inspect
from dsjax.hub.safetensors import Writer, open_tensors
from dsjax.model.moe import Execution
from dsjax.model.transformer import network

CASES = sorted((Path(__file__).parent / "parity").iterdir())
MTP_CASE = Path(__file__).parent / "parity" / "v3_mtp"
# Blocks that are cut at every edge, and a q_proj instead of q_a and q_b.
ODD = dataclasses.replace(
    small.MODEL, hidden_size=136, moe_intermediate_size=72, intermediate_size=200, q_lora_rank=None, kv_lora_rank=24
)


def random_model(config, seed=0) -> hub.Loaded:
    net = network(config, Execution(small.mesh(), small.FP32))
    params, bias = (small.weights_like(shapes, seed) for shapes in (net.shapes, net.bias_shapes))
    return hub.Loaded(config, params, bias)


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    with open_tensors(directory) as tensors:
        return {name: tensors.read(name) for name in tensors.entries}


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    a, b = tensors_of(ours), tensors_of(theirs)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_load_and_save_keep_every_bit(case, tmp_path):
    hub.save(tmp_path / "copy", hub.load(case))
    assert_same_tensors(tmp_path / "copy", case)
    assert hub.load(tmp_path / "copy").config == hub.load(case).config


@pytest.mark.parametrize(
    "dtype, scale_format", [("bfloat16", None), *(("float8_e4m3fn", f) for f in ("float32", "ue8m0"))]
)
def test_low_precision_keeps_every_bit_through_load_and_save_on_a_mesh(tmp_path, dtype, scale_format):
    hub.save(tmp_path / "first", random_model(ODD), dtype, scale_format=scale_format, max_shard_bytes=50_000)
    loaded = hub.load(tmp_path / "first", small.mesh(1, 2, 4), dtype)
    assert loaded.quantization == (Quantization((128, 128), scale_format) if scale_format else None)
    hub.save(tmp_path / "second", loaded)
    assert_same_tensors(tmp_path / "first", tmp_path / "second")
    assert len(list((tmp_path / "first").glob("*.safetensors"))) > 2


def test_every_mesh_holds_the_same_numbers(tmp_path):
    whole = hub.load(MTP_CASE)
    for sizes in [(1, 8, 1), (2, 1, 4), (2, 2, 2)]:
        mesh = small.mesh(*sizes)
        cut = hub.load(MTP_CASE, mesh)
        expected = network(cut.config, Execution(mesh, small.FP32)).param_shardings()
        assert jax.tree.map(lambda a: a.sharding, cut.params) == expected
        small.assert_trees_close(cut.params, whole.params, 0)
        small.assert_trees_close(cut.router_bias, whole.router_bias, 0)


def test_accelerators_are_filled_with_the_same_numbers(monkeypatch, tmp_path):
    mesh = small.mesh(2, 2, 2)
    hub.save(tmp_path / "fp8", random_model(ODD), "float8_e4m3fn")
    expected = hub.load(tmp_path / "fp8", mesh, "float32")
    monkeypatch.setattr(reading, "HostPart", reading.DevicePart)
    small.assert_trees_close(hub.load(tmp_path / "fp8", mesh, "float32").params, expected.params, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_one_expert_is_fetched_from_many_processes_without_the_others(dtype):
    mesh = small.mesh(1, 2, 4)
    numbers = np.random.default_rng(0).standard_normal((2, 8, 16, 4)).astype(dtype)
    numbers[1, 3, 0, 0] = -0.0
    cut = PartitionSpec(None, "expert", "fsdp")
    array = jax.device_put(numbers, NamedSharding(mesh, cut))
    take = writing._taker(mesh, (False, True))
    for index in [(1, 3), (0, 7), (0, 0)]:
        assert np.asarray(take(array, tuple(map(np.int32, index)))).tobytes() == numbers[index].tobytes()
        assert writing._take(array, index).tobytes() == numbers[index].tobytes()
    program = take.lower(array, (np.int32(0), np.int32(0))).compile().as_text()
    assert "all-gather(" in program  # over fsdp
    assert not re.search(r"\[8,[^ ]* all-gather\(", program)


def test_what_is_kept_in_fp8_means_what_is_dequantised(tmp_path):
    hub.save(tmp_path / "fp8", random_model(ODD), "float8_e4m3fn")
    kept, wide = hub.load(tmp_path / "fp8", dtype="float8_e4m3fn"), hub.load(tmp_path / "fp8", dtype="float32")
    blocks, experts = (m.params["moe_layers"]["mlp"]["experts"]["gate_proj"] for m in (kept, wide))
    assert isinstance(blocks, Blocks)
    assert blocks.weight.dtype == ml_dtypes.float8_e4m3fn
    scale = np.repeat(np.repeat(np.asarray(blocks.scale_inv), 128, -2), 128, -1)[..., :136, :72]
    assert np.array_equal(np.asarray(blocks.weight, np.float32) * scale, experts)
    assert not isinstance(kept.params["embed_tokens"], Blocks)
    assert not isinstance(kept.params["mtp"]["eh_proj"]["weight"], Blocks)


def test_unquantised_parts_of_an_fp8_checkpoint_are_those_of_deepseek(tmp_path):
    hub.save(tmp_path / "fp8", random_model(ODD), "float8_e4m3fn")
    dtypes = {name: array.dtype for name, array in tensors_of(tmp_path / "fp8").items()}
    wide = [name for name, dtype in dtypes.items() if dtype == ml_dtypes.bfloat16]
    assert {name.rsplit(".", 2)[-2] for name in wide} == {
        *("embed_tokens", "lm_head", "head", "norm", "gate", "eh_proj", "enorm", "hnorm"),
        *("input_layernorm", "post_attention_layernorm", "kv_a_layernorm"),
    }
    precise = [name for name in dtypes if name.endswith(("e_score_correction_bias", "scale_inv"))]
    assert {dtypes[name] for name in precise} == {np.dtype("float32")}


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_convert_equals_load_and_save(tmp_path, scale_format):
    hub.save(tmp_path / "fp32", random_model(ODD))
    for dtype, scales in [("float8_e4m3fn", scale_format), ("bfloat16", None)]:
        hub.save(tmp_path / f"saved_{dtype}", hub.load(tmp_path / "fp32"), dtype, scale_format=scales)
        hub.convert(tmp_path / "fp32", tmp_path / f"converted_{dtype}", dtype, scale_format=scales)
        assert_same_tensors(tmp_path / f"saved_{dtype}", tmp_path / f"converted_{dtype}")
    hub.convert(tmp_path / "saved_float8_e4m3fn", tmp_path / "again", "float8_e4m3fn")
    assert_same_tensors(tmp_path / "saved_float8_e4m3fn", tmp_path / "again")
    hub.convert(tmp_path / "again", tmp_path / "wide", "float32")
    assert "quantization_config" not in json.loads((tmp_path / "wide" / "config.json").read_text())
    small.assert_trees_close(
        hub.load(tmp_path / "wide").params, hub.load(tmp_path / "again", dtype="float32").params, 0
    )


@pytest.mark.parametrize("name", ["deepseek_v3:released", "deepseek_v2", "deepseek_v2_lite", "moonlight_16b"])
def test_every_published_tensor_has_one_place_and_every_number_of_ours_is_in_one(repository, name):
    file, _, form = name.partition(":")
    config = load(f"{repository}/configs/{file}.py" + f":{form}" * bool(form)).model
    net = network(config, Execution(small.mesh(), small.FP32))
    shapes = names.flat(net.shapes) | names.flat(net.bias_shapes)
    places = names.places(shapes, config)
    assert len({(place.path, place.index) for place in places.values()}) == len(places)
    filled = sum(int(np.prod(place.shape)) for place in places.values())
    assert filled == sum(int(np.prod(leaf.shape)) for leaf in shapes.values())
    layers = {names.layer_of(name) for name in places}
    assert layers == {None, *range(config.num_hidden_layers + config.num_nextn_predict_layers)}


def test_mtp_can_be_left_out_and_its_absence_is_seen(tmp_path):
    whole = hub.load(MTP_CASE)
    without = dataclasses.replace(whole.config, num_nextn_predict_layers=0)
    cut = hub.load(MTP_CASE, config=without)
    assert "mtp" not in cut.params
    small.assert_trees_close(cut.params, {k: v for k, v in whole.params.items() if k != "mtp"}, 0)
    hub.save(tmp_path / "cut", cut)
    values = json.loads((tmp_path / "cut" / "config.json").read_text())
    # What transformers leaves behind: the field, but no tensor of it.
    (tmp_path / "cut" / "config.json").write_text(json.dumps(values | {"num_nextn_predict_layers": 1}))
    assert hub.load(tmp_path / "cut").config == without
    with pytest.raises(ConfigError, match=r"layers.3.input_layernorm.weight is missing"):
        hub.load(tmp_path / "cut", config=whole.config)


def test_fp8_stays_what_it_was_unless_asked_otherwise(tmp_path):
    hub.save(tmp_path / "v31", random_model(ODD), "float8_e4m3fn", scale_format="ue8m0")
    kept = hub.load(tmp_path / "v31", dtype="float8_e4m3fn")
    hub.save(tmp_path / "again", kept, "float8_e4m3fn")
    assert_same_tensors(tmp_path / "again", tmp_path / "v31")
    hub.save(tmp_path / "v3", kept, "float8_e4m3fn", scale_format="float32")
    assert "scale_fmt" not in json.loads((tmp_path / "v3" / "config.json").read_text())["quantization_config"]


def test_mtp_copies_of_embedding_and_head_are_written_and_compared(tmp_path):
    directory = Path(shutil.copytree(MTP_CASE, tmp_path / "case"))
    tensors = load_file(directory / "model.safetensors")
    layer = "model.layers.3."
    assert np.array_equal(tensors[layer + "embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert np.array_equal(tensors[layer + "shared_head.head.weight"], tensors["lm_head.weight"])
    tensors[layer + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, directory / "model.safetensors")
    told = r"embed_tokens.weight differs from model.embed_tokens.weight"
    for attempt in (lambda: hub.load(directory), lambda: hub.convert(directory, tmp_path / "out")):
        with pytest.raises(ConfigError, match=told):
            attempt()
    text, is_complete = inspect(directory, values=True)
    assert not is_complete and "differs from model.embed_tokens.weight" in text
    tensors[layer + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"][1:]
    save_file(tensors, directory / "model.safetensors")
    for attempt in (lambda: hub.load(directory), lambda: hub.convert(directory, tmp_path / "out")):
        with pytest.raises(ConfigError, match="must repeat model.embed_tokens.weight, but has another shape"):
            attempt()


def test_a_run_can_be_extended_to_longer_contexts(tmp_path):
    yarn = dataclasses.replace(small.MODEL, rope_scaling=RopeScaling(factor=8.0), max_position_embeddings=32768)
    hub.save(tmp_path / "long", random_model(yarn))
    assert hub.load(tmp_path / "long").config.rope_scaling == yarn.rope_scaling


def test_tokenizer_files_are_carried_along(tmp_path):
    source = Path(shutil.copytree(MTP_CASE, tmp_path / "case"))
    carried = "tokenizer.json tokenizer_config.json tiktoken.model generation_config.json chat_template.jinja".split()
    for name in [*carried, "weights.bin", "notes.txt"]:
        (source / name).write_text(name)
    hub.convert(source, tmp_path / "converted")
    hub.save(tmp_path / "saved", hub.load(source), companions=source)
    for out in ("converted", "saved"):
        found = {file.name for file in (tmp_path / out).iterdir()}
        assert found == {*carried, "config.json", "model.safetensors"}
        assert (tmp_path / out / "tiktoken.model").read_text() == "tiktoken.model"


def test_a_directory_in_use_is_left_alone(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="used exists already"):
        hub.save(tmp_path / "used", random_model(small.MODEL))
    assert [file.name for file in (tmp_path / "used").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "options, told",
    [
        (dict(scale_format="ue8m0"), "has no effect without FP8"),
        (dict(dtype="float8_e4m3fn", scale_format="e5m2"), "unknown scale format 'e5m2'; valid are float32, ue8m0"),
        (dict(companions="nowhere"), "there is no directory nowhere"),
        (dict(max_shard_bytes=0), "max_shard_bytes is 0"),
        (dict(dtype="int8"), "parameters cannot be 'int8'"),
    ],
)
def test_an_option_without_effect_or_sense_is_refused(tmp_path, options, told):
    with pytest.raises(ConfigError, match=told):
        hub.save(tmp_path / "model", random_model(small.MODEL), **options)
    assert not list(tmp_path.iterdir())


def test_what_overflows_in_bf16_is_not_written(tmp_path):
    model = random_model(small.MODEL)
    model.params["norm"]["weight"][0] = 3.4e38
    with pytest.raises(ConfigError, match="model.norm.weight holds a number too large for bfloat16"):
        hub.save(tmp_path / "model", model, "bfloat16")
    assert not list(tmp_path.iterdir())


def test_absurd_sizes_are_told_before_they_are_built(tmp_path):
    directory = Path(shutil.copytree(MTP_CASE, tmp_path / "case"))
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 10**9}))
    with pytest.raises(ConfigError, match="tensors, but its config.json asks for more than"):
        hub.load(directory)


def test_nothing_half_written_is_left(tmp_path):
    model = random_model(small.MODEL)
    model.params["moe_layers"]["mlp"]["experts"]["down_proj"][0, 3, 1, 1] = np.nan
    with pytest.raises(ConfigError, match=r"layers.1.mlp.experts.3.down_proj.weight holds NaN"):
        hub.save(tmp_path / "nan", model)
    assert not list(tmp_path.iterdir())


def damaged(directory: Path, change) -> str:
    """The sentence that loading and converting `directory` end with after `change(tensors, config)`."""
    tensors = tensors_of(directory)
    values = json.loads((directory / "config.json").read_text())
    change(tensors, values)
    target = directory.with_name("damaged")
    target.mkdir()
    (target / "config.json").write_text(json.dumps(values))
    with Writer(target, {name: (array.dtype, array.shape) for name, array in tensors.items()}) as writer:
        for name, array in tensors.items():
            writer.add(name, array)
    sentences = set()
    for attempt in (lambda: hub.load(target), lambda: hub.convert(target, directory.with_name("out"))):
        with pytest.raises(ConfigError) as caught:
            attempt()
        sentences.add(str(caught.value))
    assert not directory.with_name("out").exists()
    assert len(sentences) == 1
    return sentences.pop()


GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
SCALE = GATE + "_scale_inv"


def poison(tensors, _):
    tensors[GATE] = tensors[GATE].copy()
    tensors[GATE].view(np.uint8)[0, 0] = 0x7F  # E4M3's NaN


DAMAGES = [  # what is done to (tensors, config), and what is told of it
    (lambda t, c: t.pop(GATE), f"{GATE} is missing, which the architecture asks for"),
    (lambda t, c: t.pop(SCALE), f"{GATE} is in FP8, but its scales, {SCALE}, are missing"),
    (
        lambda t, c: t.update({GATE: t[GATE][:-1]}),
        f"{GATE} has the shape [71, 136], but the architecture asks for [72, 136]",
    ),
    (lambda t, c: t.update({SCALE: t[SCALE][:, :1]}), f"{SCALE} has the shape [1, 1], but blocks of 128 x 128 make it"),
    (
        lambda t, c: t.update({SCALE: np.full((1, 2), np.inf, np.float32)}),
        f"{SCALE} holds a scale that is not above 0, not finite",
    ),
    (lambda t, c: t.update({SCALE: -t[SCALE]}), f"{SCALE} holds a scale that is not above 0"),
    (lambda t, c: t.update({SCALE: np.full((1, 2), 1e37, np.float32)}), f"{SCALE} holds a scale that is not above 0"),
    (lambda t, c: t.update({SCALE: t[SCALE].astype(np.int8)}), f"{SCALE} holds int8, but scales are FP32"),
    (lambda t, c: t.update(extra=t["model.norm.weight"]), "extra is there, but the architecture has no place for it"),
    (lambda t, c: t.update({GATE: t[GATE].view(np.int8)}), f"{GATE} holds int8, but weights are FP32"),
    (lambda t, c: t["model.norm.weight"].view(np.uint16).fill(0xFFFF), "model.norm.weight holds NaN or infinity"),
    (poison, f"{GATE} holds NaN or infinity"),
    (lambda t, c: c.pop("quantization_config"), "no quantization_config"),
    (lambda t, c: c.update(vocab_size=51), "has the shape [50, 136], but the architecture asks for [51, 136]"),
    (lambda t, c: c.update(num_hidden_layers=3), "problems in all)"),
    (lambda t, c: c.update(model_type="llama"), "llama"),
    (lambda t, c: c.update(sparkle=1), "sparkle"),
]


@pytest.mark.parametrize("change, told", DAMAGES, ids=[told for _, told in DAMAGES])
def test_a_damaged_checkpoint_is_one_sentence_and_nothing_is_written(tmp_path, change, told):
    hub.save(tmp_path / "good", random_model(ODD), "float8_e4m3fn")
    sentence = damaged(tmp_path / "good", change)
    assert told in sentence
    assert "\n" not in sentence


def test_inspect_tells_every_problem_and_the_parts_add_up(tmp_path):
    hub.save(tmp_path / "model", random_model(ODD), "bfloat16")
    text, is_complete = inspect(tmp_path / "model", values=True)
    assert is_complete
    copies = names.copies(ODD)
    total = sum(a.size for name, a in tensors_of(tmp_path / "model").items() if name not in copies)
    assert f"{total:,}" in text
    tensors = tensors_of(tmp_path / "model")
    for name in (GATE, "model.norm.weight"):
        del tensors[name]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    text, is_complete = inspect(tmp_path / "model")
    assert not is_complete
    assert f"{GATE} is missing" in text
    assert "model.norm.weight is missing" in text


def test_config_json_is_published_vocabulary():
    values = published_config(small.MODEL, "bfloat16", None, 0, 1)
    assert values["model_type"] == "deepseek_v3"
    assert {"rope_theta", "rope_scaling", "scoring_func", "topk_method"} <= values.keys()


@pytest.mark.slow
def test_memory_beside_the_arrays_does_not_grow_with_the_model(repository):
    """Two GB are read with a few hundred MB beside the arrays themselves."""
    command = [sys.executable, str(repository / "tests" / "import_benchmark.py"), "--gigabytes", "2"]
    measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(measured)
    assert measured["checkpoint_gb"] > 2
    assert measured["peak_gb_beside_arrays"] < 0.4
