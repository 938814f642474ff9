"""The run as a whole: interrupted, resumed, extended, refused."""

import dataclasses
import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from tiny_runs import STEPS, T, change, exact, quick_runs, start, tiny_run, wait_for

from dsjax.config import (
    Config,
    ConfigError,
    DispatchConfig,
    MeshConfig,
)
from dsjax.data.loader import Loader
from dsjax.numerics.linear import CLASSES
from dsjax.training import checkpoint, loop, validation
from dsjax.training.lock import lock
from dsjax.training.loop import train
from dsjax.training.monitor import read_rows
from dsjax.training.state import abstract_state
from dsjax.training.workdir import CHECKPOINTS, CONFIG, EXPERT_LOAD, METRICS, read_config


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    """One uninterrupted run, and what it returned."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, train(config, workdir)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_runs(draws=lambda workdir: workdir.name.startswith("straight")):
        yield


def final_arrays(config, workdir):
    target = abstract_state(config, loop.make_mesh(config.mesh))
    restored = checkpoint.restore(workdir / CHECKPOINTS, STEPS, target)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


def stop_after(monkeypatch, step):
    monkeypatch.setattr(loop, "should_stop", lambda interrupt, done: done == step)


def test_a_run_leaves_what_it_should(config, straight):
    workdir, summary = straight
    rows = read_rows(workdir / METRICS)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["batch_size"] for row in rows] == [8, 8, 8, 16, 24, 24]
    assert rows[-1]["tokens"] == summary.tokens == 88 * T
    assert [row["step"] for row in rows if "validation_loss" in row] == [4, 6]
    assert rows[-1]["validation_loss"] == summary.validation_loss > 0
    assert all(row["dropped_tokens"] == 0 and row["mtp_loss"] > 1 and row["tokens_per_second"] > 0 for row in rows)
    assert [row["step"] for row in read_rows(workdir / EXPERT_LOAD)] == [1, 2, 4, 6]
    assert read_config(workdir) == config
    assert checkpoint.steps(workdir / CHECKPOINTS) == [STEPS]
    assert summary.exit_code == 0 and summary.step == STEPS
    assert (workdir / "plots" / "loss.png").stat().st_size > 1000 and (workdir / "report.html").exists()


@pytest.mark.parametrize("stop", [1, 4])
def test_resume_is_bitwise(config, straight, tmp_path, monkeypatch, stop):
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        first = train(config, tmp_path)
    assert first.step == stop and checkpoint.steps(tmp_path / CHECKPOINTS) == [stop]
    assert [row["step"] for row in read_rows(tmp_path / METRICS)] == list(range(1, stop + 1))
    second = train(config, tmp_path)
    assert second.step == STEPS
    assert exact(tmp_path) == exact(straight[0])
    assert read_rows(tmp_path / EXPERT_LOAD) == read_rows(straight[0] / EXPERT_LOAD)
    assert second.validation_loss == straight[1].validation_loss
    assert second.seconds > first.seconds
    arrays, wanted = final_arrays(config, tmp_path), final_arrays(config, straight[0])
    for array, want in zip(arrays, wanted, strict=True):
        np.testing.assert_array_equal(array, want)


@pytest.mark.slow
def test_resume_is_bitwise_in_bf16_over_fsdp_and_in_several_rounds(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, precision="bf16", mesh=MeshConfig(data=2, fsdp=2, expert=2))
    config = dataclasses.replace(config, dispatch=DispatchConfig(capacity_factor=0.5))
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    whole = train(config, straight)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train(config, stopped)
    assert train(config, stopped).validation_loss == whole.validation_loss
    assert exact(stopped) == exact(straight)
    assert min(row["dispatch_rounds"] for row in read_rows(straight / METRICS)) > 1
    for array, want in zip(final_arrays(config, stopped), final_arrays(config, straight), strict=True):
        np.testing.assert_array_equal(array, want)


def test_quantisation_is_measured_before_every_nth_step_and_its_row_says_so(config, straight, tmp_path, monkeypatch):
    steps_done, figures = [], {"weight": {"error": 0.5, "overflow": 0.0, "underflow": 0.25}}

    def measure(state, tokens, values):
        assert tokens.shape == (3, 8, T + 1) and set(values) >= {"mtp_loss_weight"}
        steps_done.append(int(state.step))
        return figures

    monkeypatch.setattr(loop, "measure_quantisation", lambda config, mesh: measure)
    train(change(config, "monitor", quantisation_every_steps=2), tmp_path)
    rows = read_rows(tmp_path / METRICS)
    assert steps_done == [1, 3, 5]
    assert {row["step"]: row["quantisation"] for row in rows if "quantisation" in row} == dict.fromkeys(
        (2, 4, 6), figures
    )
    assert exact(tmp_path) == exact(straight[0])
    assert not any("quantisation" in row for row in read_rows(straight[0] / METRICS))


@pytest.mark.slow
def test_a_resumed_and_measured_run_in_fp8_is_bitwise_the_straight_one(config, tmp_path, monkeypatch):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    # One layer compiles faster.
    config = change(config, "model", num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    config = dataclasses.replace(config, precision="fp8_deepseek")
    train(config, straight)
    measured = change(config, "monitor", quantisation_every_steps=2)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train(measured, stopped)
    train(measured, stopped)
    assert exact(stopped) == exact(straight)
    for array, want in zip(final_arrays(config, stopped), final_arrays(config, straight), strict=True):
        np.testing.assert_array_equal(array, want)
    assert not any("quantisation" in row for row in read_rows(straight / METRICS))
    found = {row["step"]: row["quantisation"] for row in read_rows(stopped / METRICS) if "quantisation" in row}
    assert set(found) == {2, 4, 6}
    for classes in found.values():
        assert set(classes) == set(CLASSES)
        assert all(0.01 < rates["error"] < 0.05 and rates["overflow"] == 0 for rates in classes.values())


def test_steps_done_after_the_last_checkpoint_are_done_again_once(config, straight, tmp_path, monkeypatch):
    """As after SIGKILL: metrics reach further than the newest checkpoint, and end in half a line."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        train(config, tmp_path)
    last = read_rows(tmp_path / METRICS)[-1]
    with (tmp_path / METRICS).open("a") as file:
        for step in (3, 4):
            file.write(json.dumps(last | {"step": step, "loss": -1.0, "seconds": 1e6, "cost_usd": 7.0}) + "\n")
        file.write('{"step": 5, "lo')
    summary = train(config, tmp_path)
    assert exact(tmp_path) == exact(straight[0])
    assert summary.cost_usd >= 7.0 and summary.seconds >= 1e6, "work that was lost was paid for"


def rot(workdir, step):
    """Flips a bit in the largest file of a checkpoint."""
    file = max((workdir / CHECKPOINTS / str(step)).rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_a_rotten_checkpoint_is_told_and_the_run_goes_on_from_the_one_before(config, straight, tmp_path, capsys):
    saving = change(config, "checkpoint", every_steps=2)
    train(change(saving, "training", total_steps=4), tmp_path)
    assert checkpoint.steps(tmp_path / CHECKPOINTS) == [2, 4]
    rot(tmp_path, 4)
    capsys.readouterr()
    train(saving, tmp_path)
    told = capsys.readouterr().out
    assert "WARNING: the checkpoint of step 4 is damaged (state/" in told and "now called 4.damaged" in told
    assert "going on after step 2" in told
    assert exact(tmp_path) == exact(straight[0])
    assert checkpoint.steps(tmp_path / CHECKPOINTS) == [4, 6] and (tmp_path / CHECKPOINTS / "4.damaged").is_dir()


def test_a_run_without_a_sound_checkpoint_does_not_begin_again_by_itself(config, tmp_path):
    train(change(config, "training", total_steps=2), tmp_path)
    rot(tmp_path, 2)
    for _ in range(2):
        with pytest.raises(ConfigError, match="no sound checkpoint to go on from; .* 2.damaged"):
            train(config, tmp_path)
    assert len(read_rows(tmp_path / METRICS)) == 2


def test_two_runs_in_one_directory_are_refused(config, tmp_path):
    with lock(tmp_path), pytest.raises(ConfigError, match=f"is in use by process {os.getpid()} on "):
        train(config, tmp_path)
    assert not (tmp_path / METRICS).exists()


def test_an_open_mesh_is_filled_in_and_told(config, tmp_path, capsys):
    open_mesh = dataclasses.replace(config, mesh=MeshConfig(-1, 1, -1))
    train(change(open_mesh, "training", total_steps=1), tmp_path)
    out = capsys.readouterr().out
    assert "mesh.expert = 8 moves the fewest bytes" in out
    assert 'dispatch.form is "all_to_all": a token is sent away 1.75 times by all_to_all, 7.00 by all_gather' in out
    assert read_config(tmp_path).mesh == MeshConfig(-1, 1, -1)  # so that it can go on with other devices


def test_a_complete_run_does_nothing_and_can_be_extended(config, straight, tmp_path, capsys):
    train(change(config, "training", total_steps=5), tmp_path)
    before = (tmp_path / METRICS).read_bytes()
    capsys.readouterr()
    again = train(change(config, "training", total_steps=5), tmp_path)
    assert again.step == 5 and again.exit_code == 0
    assert "is complete" in (out := capsys.readouterr().out) and "training.total_steps above 5" in out
    assert (tmp_path / METRICS).read_bytes() == before
    train(config, tmp_path)
    assert "training.total_steps: 5 -> 6" in capsys.readouterr().out
    assert exact(tmp_path) == exact(straight[0])


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("model", {"n_routed_experts": 16}, "model.n_routed_experts: 8 -> 16"),
        ("data", {"sequence_length": 32}, "data.sequence_length: 16 -> 32"),
        ("training", {"seed": 5}, "training.seed: 0 -> 5"),
    ],
)
def test_another_run_is_refused_and_the_first_stays_as_it_was(config, straight, section, values, told):
    workdir = straight[0]
    before = {path: path.read_bytes() for path in (workdir / CONFIG, workdir / METRICS)}
    with pytest.raises(ConfigError, match=told):
        train(change(change(config, "training", total_steps=99), section, **values), workdir)
    assert {path: path.read_bytes() for path in before} == before


def test_a_directory_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not the directory of a run but holds config.json, thesis.tex;"):
        train(config, tmp_path)
    with pytest.raises(ConfigError, match="cannot be used"):
        train(config, tmp_path / "thesis.tex")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "thesis.tex"]


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="set --config.model.vocab_size=260 or more"):
        train(change(config, "model", vocab_size=200), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_config_beside_checkpoints_does_not_lose_the_run(config, straight, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(straight[0], workdir)
    (workdir / CONFIG).write_text("{")
    assert train(config, workdir).step == STEPS
    assert "is complete" in capsys.readouterr().out


def test_validation_has_chunks_that_divide_its_own_tokens(config, monkeypatch):
    """A microbatch of 24 x 16 tokens on 8 devices can have 3 chunks; 8 sequences to validate with cannot."""
    chunks = []
    monkeypatch.setattr(validation, "evaluate_step", lambda config, _: chunks.append(config.dispatch.chunks))
    monkeypatch.setattr(validation, "place_batch", lambda *_: None)
    config = change(change(config, "dispatch", chunks=3), "evaluation", sequences=8)
    config = change(config, "training", batch_size=48, microbatch_size=24, initial_batch_size=24)
    loop.make_validation(config, loop.make_mesh(config.mesh), loop.prepare(config.data))
    assert chunks == [1]


def test_validation_reads_no_more_than_the_split_holds(config, monkeypatch):
    placed = []
    monkeypatch.setattr(validation, "place_batch", lambda rows, shape, mesh: placed.append(shape[0]))
    prepared = loop.prepare(config.data, progress=False)
    rows = Loader(prepared, config.data, seed=0, split="validation").num_rows
    loop.make_validation(change(config, "evaluation", sequences=10**9), loop.make_mesh(config.mesh), prepared)
    assert rows <= sum(placed) < rows + placed[0]


def test_a_batch_that_the_mesh_does_not_divide_is_refused(config, tmp_path):
    small = change(config, "training", microbatch_size=4, batch_size=4, initial_batch_size=None, batch_ramp_tokens=0)
    with pytest.raises(ConfigError, match="training.microbatch_size = 4"):
        train(small, tmp_path)


def test_training_goes_on_when_checkpoints_cannot_be_written(config, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.ocp, "save_async", full)
    summary = train(change(config, "checkpoint", every_steps=2), tmp_path)
    assert summary.step == STEPS and summary.exit_code == 1
    assert len(read_rows(tmp_path / METRICS)) == STEPS
    assert "WARNING: the checkpoint of step 2 could not be written" in capsys.readouterr().out


def test_a_smaller_batch_reads_only_its_own_rows(config):
    class Recorder:
        def __init__(self):
            self.read = []

        def rows(self, indices):
            self.read += indices
            return np.asarray(indices, np.int32)[:, None] + np.zeros((1, T + 1), np.int32)

    schedule = loop.Schedule(config.training, config.optimizer, T)
    loader = Recorder()
    mesh = loop.make_mesh(config.mesh)
    seen, expected = 0, []
    for tokens, size in loop.batches(config, mesh, loader, schedule, loop.Position(0, 0)):
        rows = np.asarray(tokens).reshape(-1, T + 1)
        assert tokens.shape == (3, 8, T + 1)
        np.testing.assert_array_equal(rows[:size, 0], np.arange(seen, seen + size))
        assert not rows[size:].any()
        seen += size
        expected.append(size)
    assert expected == [8, 8, 8, 16, 24, 24]
    assert set(range(seen)) <= set(loader.read)


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_step_saves_and_the_run_goes_on_bitwise(config, tmp_path, number, code):
    workdir = tmp_path / "run"
    process = start(change(config, "training", total_steps=100_000), workdir)
    wait_for(lambda: len(read_rows(workdir / METRICS)) >= 2, process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    assert "finishing this step" in output and "the same command goes on from here" in output
    done = len(read_rows(workdir / METRICS))
    assert checkpoint.steps(workdir / CHECKPOINTS) == [done]
    longer = change(config, "training", total_steps=done + 2)
    train(longer, workdir)
    train(longer, tmp_path / "straight")
    assert exact(workdir) == exact(tmp_path / "straight")


def test_an_interrupt_before_the_first_step_leaves_at_once(config, tmp_path):
    process = start(change(config, "model", num_attention_heads=3), tmp_path)  # not in the compile cache
    while "run directory" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 130
    assert "SIGINT before the first step: nothing to save" in output
    assert "Traceback" not in output
