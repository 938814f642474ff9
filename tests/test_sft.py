"""Fine-tuning on conversations is a run like any other; distillation is that on a teacher's answers."""

import dataclasses
import json

import pytest
import small
from tiny_runs import change

from dsjax.__main__ import main
from dsjax.config import Config, ConfigError, DataConfig, GRPOConfig, TaskConfig
from dsjax.posttraining.collection import collect
from dsjax.posttraining.distillation import ANSWERS, distill
from dsjax.training import loop
from dsjax.training.lock import lock
from dsjax.training.loop import train
from dsjax.training.monitor import read_rows
from dsjax.training.workdir import CHECKPOINTS, CONFIG, METRICS, read_config, write_config

MODEL = dataclasses.replace(small.MODEL, vocab_size=264)
EXACT = ("step", "loss", "mtp_loss", "grad_norm", "validation_loss")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("sft")
    (folder / "reward.py").write_text("def any(prompt, completion, answer):\n    return 1.0\n")
    config = small.config(MODEL, data=2, expert=4, total_steps=6, batch_size=16, microbatch_size=8)
    config = dataclasses.replace(
        config,
        data=DataConfig(
            sources=(f"chat:{folder}/set.jsonl",),
            sequence_length=96,
            validation_fraction=0.2,
            directory=str(folder / "data"),
        ),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=3e-3, decay_learning_rate=3e-3),
        task=TaskConfig(steps=1, rewards=(f"{folder}/reward.py:any",)),
        grpo=GRPOConfig(max_new_tokens=8, slots=8),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=None),
        evaluation=dataclasses.replace(config.evaluation, every_steps=3, sequences=8),
        monitor=dataclasses.replace(config.monitor, compile_cache=None),
        hardware=dataclasses.replace(config.hardware, peak_flops_per_second=1e12),
    )
    collect(config, folder / "set.jsonl", 100, tell=lambda line: None)
    return config


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    compiled, patch = [], pytest.MonkeyPatch()

    def compile_step(*arguments, original=loop.compile_step):
        compiled.extend([] if compiled else [original(*arguments)])
        return compiled[0]

    patch.setattr(loop, "compile_step", compile_step)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    train(config, workdir)
    return workdir


def exact(workdir):
    return [{name: row.get(name) for name in EXACT} for row in read_rows(workdir / METRICS)]


def test_answers_are_learned(straight):
    rows = exact(straight)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert rows[-1]["validation_loss"] < rows[2]["validation_loss"] < rows[0]["loss"]


def test_interrupted_it_goes_on_bit_for_bit(config, straight, tmp_path):
    train(change(config, "training", total_steps=3), tmp_path)
    train(config, tmp_path)
    assert exact(tmp_path)[3:] == exact(straight)[3:]


def test_student_learns_what_the_teacher_got_right(config, straight, tmp_path, capsys):
    summary = distill(config, str(straight), tmp_path, problems=40, samples=2)
    rows = [json.loads(line) for line in (tmp_path / ANSWERS).read_text().splitlines()]
    assert summary.step == 6 and 40 <= len(rows) <= 80
    assert f"{len(rows)} solutions kept" in capsys.readouterr().out
    assert distill(config, str(straight), tmp_path, problems=40, samples=2).step == 6
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="collected in another way"):
        distill(config, str(straight), tmp_path, problems=40, samples=3)


def test_another_run_is_left_as_it_is(config, tmp_path):
    (tmp_path / CHECKPOINTS / "5").mkdir(parents=True)
    write_config(tmp_path, change(config, "model", hidden_size=2 * config.model.hidden_size))
    before = (tmp_path / CONFIG).read_bytes()
    with lock(tmp_path), pytest.raises(ConfigError, match="is in use by process"):
        distill(config, "nowhere", tmp_path, problems=8, samples=1)
    with pytest.raises(ConfigError, match="this run was begun with something else .*model.hidden_size: "):
        distill(config, "nowhere", tmp_path, problems=8, samples=1)
    assert (tmp_path / CONFIG).read_bytes() == before and not (tmp_path / ANSWERS).exists()


def test_what_may_change_is_written_when_the_run_goes_on(config, tmp_path):
    with pytest.raises(ConfigError, match="nowhere holds no checkpoint"):
        distill(config, "nowhere", tmp_path, problems=8, samples=1)
    changed = change(change(config, "training", total_steps=9), "optimizer", clip_norm=0.5)
    with pytest.raises(ConfigError, match="nowhere holds no checkpoint"):  # nothing is saved yet: it begins anew
        distill(changed, "nowhere", tmp_path, problems=8, samples=1)
    assert read_config(tmp_path).optimizer.clip_norm == 0.5
    with pytest.raises(ConfigError, match="nowhere holds no checkpoint"):
        distill(config, "nowhere", tmp_path, problems=8, samples=1)
    before = (tmp_path / CONFIG).read_bytes()
    (tmp_path / CHECKPOINTS / "5").mkdir(parents=True)
    with pytest.raises(ConfigError, match="--allow-change optimizer.clip_norm"):
        distill(changed, "nowhere", tmp_path, problems=8, samples=1)
    with pytest.raises(ConfigError, match="nowhere holds no checkpoint"):
        distill(changed, "nowhere", tmp_path, problems=8, samples=1, allow_change=("optimizer.clip_norm",))
    assert (tmp_path / CONFIG).read_bytes() == before


def test_a_teacher_without_a_right_answer_is_told(config, straight, tmp_path):
    strict = change(config, "task", rewards=("accuracy", "format"))
    with pytest.raises(ConfigError, match="none of the 8 answers .* is right"):
        distill(strict, str(straight), tmp_path, problems=8, samples=1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sft", "--workdir", "x"], "data.sources is python_stdlib; name files of them"),
        (["collect", "--out", "x", "--problems", "0"], "--problems is 0, but must be at least 1"),
        (["collect", "--out", "x", "--problems", "2", "--samples", "2"], "--samples needs --checkpoint"),
        (["collect", "--out", "x", "--problems", "2", "--first", "-1"], "--first is -1"),
        (["distill", "--workdir", "x", "--teacher", "x", "--problems", "1", "--samples", "0"], "--samples is 0"),
        (["eval", "--checkpoint", "x", "--problems", "0"], "--problems is 0"),
        (["eval", "--checkpoint", "x", "--samples", "2", "--data", "python_stdlib"], "only with --problems"),
        (["eval", "--checkpoint", "x", "--problems", "2", "--text-key", "text"], "--text-key has a meaning only with"),
        (["eval", "--checkpoint", "x", "--tasks", "arc", "--text-key", "body"], "--text-key has a meaning only with"),
    ],
)
def test_mistakes_are_told_in_a_sentence(capsys, arguments, told):
    command = arguments if arguments[0] == "eval" else [*arguments, "--config", "configs/tiny.py"]
    assert main(command) == 2
    assert told in capsys.readouterr().err
