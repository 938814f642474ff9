"""A run begins with the weights it is told to, takes its architecture from them, and can be published again."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from test_integrity import files, flip
from tiny_runs import quick_runs

from dsjax import hub
from dsjax.__main__ import main
from dsjax.config import Config, ConfigError, RopeScaling, load
from dsjax.data.tokenizer import ByteTokenizer, JsonTokenizer
from dsjax.hub import architecture, names
from dsjax.inference.generate import generate
from dsjax.model.moe import Execution
from dsjax.model.transformer import network
from dsjax.training.adoption import adopt
from dsjax.training.export import export, load_run
from dsjax.training.monitor import read_rows
from dsjax.training.workdir import METRICS, read_config

MODEL = dataclasses.replace(small.MODEL, vocab_size=264, max_position_embeddings=64)

# Weights stay what they were.
FROZEN = ("--config.optimizer.learning_rate=1e-30", "--config.optimizer.decay_learning_rate=1e-30")

CONFIG = """
from dsjax.config import base_config

def get_config():
    config = base_config()
    config.model.aux_loss_alpha = 0.25
    config.mesh.update(data=2, expert=4)
    config.dispatch.capacity_factor = 8.0
    config.hardware.peak_flops_per_second = 1e12
    config.data.update(sources=("text_files:{text}",), sequence_length=16, validation_fraction=0.2, directory="{data}")
    config.training.update(total_steps=2, batch_size=8, bias_update_speed=0.0)
    config.checkpoint.every_steps = 1
    config.evaluation.sequences = 8
    config.precision = "fp32"
    config.monitor.compile_cache = None
    return config
"""


@pytest.fixture(scope="module")
def model() -> hub.Loaded:
    net = network(MODEL, Execution(small.mesh(), small.FP32))
    return hub.Loaded(MODEL, small.weights_like(net.shapes), small.weights_like(net.bias_shapes, 1))


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory, model, quick) -> Path:
    """A config file, texts, a published checkpoint, and a run that began with it."""
    place = tmp_path_factory.mktemp("place")
    (place / "text").mkdir()
    for number in range(40):
        (place / "text" / f"{number}.txt").write_text(f"{number} squared is {number * number}. " * (number + 5))
    (place / "config.py").write_text(CONFIG.format(text=place / "text", data=place / "data"))
    hub.save(place / "published", model)
    assert train(place, "run", "published") == 0
    return place


def train(place: Path, run: str, init_from: str, *more: str) -> int:
    words = ["train", "--config", str(place / "config.py"), "--workdir", str(place / run)]
    return main([*words, f"--config.init_from={place / init_from}", *more])


def losses(place: Path, run: str) -> list[float]:
    return [row["loss"] for row in read_rows(place / run / METRICS)]


def test_a_run_takes_the_architecture_and_begins_with_the_weights(place, model):
    config = read_config(place / "run")
    assert config.model == dataclasses.replace(MODEL, aux_loss_alpha=0.25, initializer_range=0.006)
    assert train(place, "frozen", "published", *FROZEN) == 0
    _, kept = load_run(place / "frozen")
    small.assert_trees_close(kept.params, model.params, 1e-6)
    small.assert_trees_close(kept.router_bias, model.router_bias, 0)
    assert losses(place, "frozen")[0] == losses(place, "run")[0] != losses(place, "run")[1]


@pytest.mark.slow
def test_another_run_may_be_begun_with(place):
    _, before = load_run(place / "run")
    assert train(place, "second", "run", *FROZEN) == 0
    _, kept = load_run(place / "second")
    small.assert_trees_close(kept.params, before.params, 1e-6)


@pytest.mark.slow
def test_exported_in_fp32_a_run_goes_on_with_the_same_losses(place):
    export(place / "run", place / "exported", "float32")
    tokenizer = ("--config.data.tokenizer", "bytes")  # else its tokenizer.json is prepared anew: the same ids
    assert train(place, "from_export", "exported", *tokenizer) == 0
    assert train(place, "from_run", "run", *tokenizer) == 0
    assert losses(place, "from_export") == losses(place, "from_run")


def test_a_run_keeps_the_tokenizer_it_began_with(place, tmp_path, monkeypatch, capsys):
    export(place / "run", tmp_path / "published", "float32")
    for name in ("config.py", "text", "data"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    words = ["train", "--config", "config.py", "--workdir", "run", "--config.init_from=published"]
    assert main([*words, "--config.training.total_steps=1"]) == 0
    expected = generate("run", "12 squared", 8, 0.0, 0)
    shutil.rmtree("published")
    assert generate("run", "12 squared", 8, 0.0, 0) == expected
    assert main(["convert", "run", "out"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main([*words[:2], "../config.py", "--workdir", "../run", words[-1]]) == 0
    assert "going on after step 1" in capsys.readouterr().out
    assert main(["inspect", "../out"]) == 0
    assert JsonTokenizer(tmp_path / "out" / "tokenizer.json").encode("ab") == [*b"ab"]


@pytest.mark.slow
def test_a_run_goes_on_without_what_it_began_with(place, capsys):
    shutil.copytree(place / "run", place / "resumed")
    assert train(place, "resumed", "published", "--config.training.total_steps=3") == 0
    shutil.copytree(place / "run", place / "orphan")
    shutil.copytree(place / "published", place / "gone")
    assert train(place, "orphan", "gone", "--config.training.total_steps=3") == 0
    shutil.rmtree(place / "gone")
    assert train(place, "orphan", "gone", "--config.training.total_steps=4") == 0
    assert losses(place, "orphan")[2] == losses(place, "resumed")[2]
    assert "going on after step 3" in capsys.readouterr().out


@pytest.mark.slow
def test_fp8_and_bf16_checkpoints_are_trained_in_fp32(place, model):
    for dtype in ("bfloat16", "float8_e4m3fn"):
        hub.save(place / dtype, model, dtype)
        assert train(place, f"run_{dtype}", dtype) == 0
        assert {leaf.dtype.name for leaf in jax.tree.leaves(load_run(place / f"run_{dtype}")[1].params)} == {"float32"}
        assert losses(place, f"run_{dtype}")[0] == pytest.approx(losses(place, "run")[0], rel=0.01)


@pytest.mark.parametrize(
    "more, told",
    [
        (["--config.model.hidden_size=64"], "but the architecture asks for"),
        (["--config.model.num_nextn_predict_layers=2"], "must be 0 or 1"),
        (["--config.data.sequence_length=65"], "the model ends at model.max_position_embeddings = 64"),
        (["--config.mesh.expert=3"], "cannot be divided over mesh.expert = 3"),
    ],
)
def test_an_override_that_does_not_fit_the_weights_is_told(place, tmp_path, capsys, more, told):
    shutil.copytree(place / "published", tmp_path / "published")
    shutil.copytree(place / "text", tmp_path / "text")
    (tmp_path / "config.py").write_text((place / "config.py").read_text())
    assert train(tmp_path, "refused", "published", *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dsjax: ") and told in error


def test_a_damaged_config_json_is_told_as_such(place, tmp_path, capsys):
    shutil.copytree(place / "published", tmp_path / "published")
    (tmp_path / "published" / "config.json").write_text('{"model_type": "deepseek_v3",')
    path = str(tmp_path / "published")
    for words in (
        ["inspect", path],
        ["convert", path, path + "2"],
        ["generate", "--checkpoint", path, "--prompt", "x"],
    ):
        assert main(words) == 2
        assert "config.json is not JSON" in capsys.readouterr().err


def test_init_from_without_a_name_is_told(place, capsys):
    words = ["train", "--config", str(place / "config.py"), "--workdir", str(place / "refused")]
    assert main([*words, "--config.init_from="]) == 2
    assert "init_from is an empty text" in capsys.readouterr().err


@pytest.mark.parametrize("missing, told", [("nowhere", "there is no "), ("text", "is neither a published checkpoint")])
def test_nothing_to_begin_with_is_told(place, capsys, missing, told):
    assert train(place, "refused", missing) == 2
    assert told in capsys.readouterr().err
    assert not (place / "refused").exists()


def adopted(file, init_from) -> dict:
    values = json.loads(json.dumps(dataclasses.asdict(file)))
    adopt(values, str(init_from))
    return values


def test_yarn_of_the_file_extends_a_checkpoint_without_and_never_replaces_one(tmp_path, model):
    yarn = RopeScaling(factor=8.0)
    extension = Config(model=dataclasses.replace(Config().model, rope_scaling=yarn, max_position_embeddings=32768))
    hub.save(tmp_path / "plain", model)
    values = adopted(extension, tmp_path / "plain")
    assert values["model"]["rope_scaling"]["factor"] == 8
    assert (values["model"]["max_position_embeddings"], values["model"]["vocab_size"]) == (32768, 264)
    extended = dataclasses.replace(MODEL, rope_scaling=RopeScaling(factor=40.0), max_position_embeddings=163840)
    hub.save(tmp_path / "extended", dataclasses.replace(model, config=extended))
    for file in (Config(), extension):
        values = adopted(file, tmp_path / "extended")
        assert values["model"]["rope_scaling"]["factor"] == 40
        assert values["model"]["max_position_embeddings"] == 163840


def test_what_mtp_receives_is_what_the_weights_were_trained_with(tmp_path, model, place):
    before = dataclasses.replace(Config(), model=dataclasses.replace(Config().model, mtp_hidden_state="pre_norm"))
    hub.save(tmp_path / "post", model)  # the field is not written, so the file may say
    assert adopted(Config(), tmp_path / "post")["model"]["mtp_hidden_state"] == "post_norm"
    assert adopted(before, tmp_path / "post")["model"]["mtp_hidden_state"] == "pre_norm"
    trained = dataclasses.replace(MODEL, mtp_hidden_state="pre_norm")
    hub.save(tmp_path / "pre", dataclasses.replace(model, config=trained))
    assert adopted(Config(), tmp_path / "pre")["model"]["mtp_hidden_state"] == "pre_norm"
    assert adopted(before, place / "run")["model"]["mtp_hidden_state"] == "post_norm"


def test_the_tokenizer_is_that_of_the_checkpoint(tmp_path, model):
    hub.save(tmp_path / "model", model)
    assert adopted(Config(), tmp_path / "model")["data"]["tokenizer"] == "bytes"
    ByteTokenizer().write(tmp_path / "model")
    assert adopted(Config(), tmp_path / "model")["data"]["tokenizer"] == str(tmp_path / "model" / "tokenizer.json")
    named = dataclasses.replace(Config(), data=dataclasses.replace(Config().data, tokenizer="deepseek"))
    assert adopted(named, tmp_path / "model")["data"]["tokenizer"] == "deepseek"
    (tmp_path / "model" / "tokenizer.json").rename(tmp_path / "model" / "tiktoken.model")
    assert adopted(Config(), tmp_path / "model")["data"]["tokenizer"] == str(tmp_path / "model" / "tiktoken.model")


def test_published_bytes_are_the_bytes_we_trained_on(tmp_path):
    ByteTokenizer().write(tmp_path)
    ours, published = ByteTokenizer(), JsonTokenizer(tmp_path / "tokenizer.json")
    for text in ("def f(x):\n\treturn  x", "日本 ü \x00\x7f", "".join(map(chr, range(256))), "", "<|endoftext|>"):
        assert published.encode(text) == ours.encode(text)
        assert published.decode(ours.encode(text)) == text
    assert (published.vocab_size, published.eos_id, published.fim_ids) == (ours.vocab_size, ours.eos_id, ours.fim_ids)


def test_a_published_model_generates_what_its_run_generates(place, tmp_path):
    export(place / "run", tmp_path / "exported", "float32")
    # In FP32 and in BF16; the ninth token is a tie, 0.001 between the two likeliest.
    expected = generate(str(place / "run"), "12 squared", 8, 0.0, 0)
    assert expected == generate(str(tmp_path / "exported"), "12 squared", 8, 0.0, 0)
    (tmp_path / "exported" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer.json nor tiktoken.model; give a tokenizer"):
        generate(str(tmp_path / "exported"), "12", 4, 0.0, 0)
    assert expected == generate(str(tmp_path / "exported"), "12 squared", 8, 0.0, 0, "bytes")


def test_convert_and_inspect_take_a_run(place, tmp_path, capsys):
    for dtype, expected in [("bf16", "bfloat16"), ("fp8", "float8_e4m3fn"), ("fp32", "float32")]:
        assert main(["convert", str(place / "run"), str(tmp_path / dtype), "--dtype", dtype]) == 0
        assert main(["inspect", str(tmp_path / dtype), "--values"]) == 0
        out = capsys.readouterr().out
        assert expected in out and "complete: every tensor" in out
    assert main(["inspect", str(place / "run")]) == 0
    assert "checkpoints of step 1, 2" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "fp8"), str(tmp_path / "bf16")]) == 2
    assert "bf16 exists already" in capsys.readouterr().err
    (tmp_path / "fp8" / "model.safetensors").unlink()
    assert main(["inspect", str(tmp_path / "fp8")]) == 2
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def rot(run: Path, step: int) -> None:
    """Flips a bit in the largest file of a checkpoint."""
    file = max(files(run / "checkpoints" / str(step)), key=lambda file: file.stat().st_size)
    flip(file, file.stat().st_size // 2, 2)


def reading(place: Path, run: Path, out: Path) -> dict[str, list[str]]:
    """A command line of each kind that reads `run`, those that write into the new directory `out`."""
    text = f"text_files:{place / 'text'}"
    return {
        "generate": ["generate", "--checkpoint", str(run), "--prompt", "12 squared", "--max-new-tokens", "4"],
        "eval": ["eval", "--checkpoint", str(run), "--data", text, "--documents", "2"],
        "convert": ["convert", str(run), str(out / "converted")],
        "export": ["checkpoint", "export", str(run), str(out / "exported")],
        "inspect": ["inspect", str(run)],
    }


def test_who_reads_a_run_takes_its_newest_sound_checkpoint_and_renames_nothing(place, tmp_path, capsys):
    rotten, without = tmp_path / "rotten", tmp_path / "without"
    for run in (rotten, without):
        shutil.copytree(place / "run", run)
    rot(rotten, 2)
    shutil.rmtree(without / "checkpoints" / "2")
    lying = files(rotten)

    def run_both(kind: str) -> tuple[str, str]:
        told = []
        for run in (rotten, without):
            assert main(reading(place, run, tmp_path / f"of_{run.name}")[kind]) == 0
            shown = capsys.readouterr()
            warns = "WARNING: the checkpoint of step 2 is damaged (state/" in shown.err
            assert warns == ("that of step 1 is taken" in shown.err) == (run == rotten), kind
            told.append(shown.out.replace(run.name, "RUN"))
        assert files(rotten) == lying
        return told[0], told[1]

    for kind in ("generate", "eval"):
        ours, expected = run_both(kind)
        assert ours == expected
    for kind in ("convert", "export"):
        run_both(kind)
    assert "step 1: every array is there" in run_both("inspect")[0]
    for name in ("converted", "exported"):
        ours, expected = (tmp_path / f"of_{run.name}" / name / "model.safetensors" for run in (rotten, without))
        assert ours.read_bytes() == expected.read_bytes()


def test_a_run_begins_with_the_newest_sound_checkpoint_of_another(place, tmp_path, capsys):
    shutil.copytree(place / "run", place / "rotten")
    rot(place / "rotten", 2)
    _, before = load_run(place / "run", 1)
    assert train(place, "begun", "rotten", *FROZEN) == 0
    assert "that of step 1 is taken" in capsys.readouterr().err
    small.assert_trees_close(load_run(place / "begun")[1].params, before.params, 1e-6)


def test_where_no_checkpoint_is_sound_a_sentence_names_them_all(place, tmp_path, capsys):
    shutil.copytree(place / "run", place / "lost")
    for step in (1, 2):
        rot(place / "lost", step)
    for words in reading(place, place / "lost", tmp_path).values():
        assert main(words) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "holds no sound checkpoint" in told
        assert "the checkpoint of step 2 is damaged" in told and "the checkpoint of step 1 is damaged" in told
    assert train(place, "refused", "lost") == 2
    assert "holds no sound checkpoint" in capsys.readouterr().err


def test_v3_released_is_what_its_own_config_json_says(repository, tmp_path):
    released = load(f"{repository}/configs/deepseek_v3.py:released").model
    assert released.rope_scaling is not None and released.mtp_hidden_state == "post_norm"
    values = architecture.published_config(released, "bfloat16", None, 0, 1)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert architecture.read_config(tmp_path).model == released


def test_gradients_reach_tied_embeddings_from_both_sides():
    tied = dataclasses.replace(small.MODEL, tie_word_embeddings=True, num_nextn_predict_layers=0)
    config = small.config(tied)
    net, run = small.gradients(config, small.mesh())
    params, bias = small.weights_like(net.shapes), small.weights_like(net.bias_shapes, 1)
    assert "lm_head" not in params
    tokens = small.tokens(8, 9)
    settings = {"mtp_loss_weight": np.float32(0)}
    (_, _), shared = run(params, bias, tokens, settings)
    apart = small.config(dataclasses.replace(tied, tie_word_embeddings=False))
    _, run = small.gradients(apart, small.mesh())
    (_, _), separate = run(params | {"lm_head": params["embed_tokens"].T}, bias, tokens, settings)
    both = separate["embed_tokens"] + separate["lm_head"].T
    small.assert_trees_close(shared["embed_tokens"], both, 1e-5)
    assert names.copies(tied) == {"lm_head.weight": "model.embed_tokens.weight"}
