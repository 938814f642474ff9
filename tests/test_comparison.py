"""Runs beside a baseline: the numbers are those of the definition, what is not comparable is told."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.__main__ import main
from dsjax.config import Config, DataConfig, MeshConfig, MonitorConfig, OptimizerConfig, TrainingConfig, to_dict
from dsjax.training.checkpoint import Saver
from dsjax.training.comparison import COLOURS, Run, compare, difference, draw_against, sentence
from dsjax.training.workdir import CHECKPOINTS, METRICS, write_config

FP32 = Config(precision="fp32")


def rows_of(losses, validation=None, first=1):
    rows = [{"step": step, "tokens": 8192 * step, "loss": loss} for step, loss in enumerate(losses, first)]
    for row in rows:
        row |= {"mtp_loss": None, "lr": 1e-3, "batch_size": 32, "tokens_per_second": 1e3, "mfu": None}
        row |= {"dropped_tokens": 0, "cost_usd": 0.0, "seconds": 1.0}
        if validation and row["step"] in validation:
            row |= {"validation_loss": validation[row["step"]], "validation_nats_per_byte": 1.0}
    return rows


def write(workdir, rows, config=FP32):
    workdir.mkdir(parents=True)
    write_config(workdir, config)
    (workdir / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


def run(losses, label="a run", **more):
    return Run(label, label, FP32, rows_of(losses, **more))


def noisy(seed, count=60):
    return (2 + np.random.default_rng(seed).random(count)).tolist()


def test_the_difference_is_that_of_the_weighted_means():
    ours, theirs = np.array(noisy(0)), np.array(noisy(1))
    found = difference(run(ours.tolist()), run(theirs.tolist()))
    weights = [0.9 ** np.arange(count)[::-1] for count in range(11, 61)]
    means, base_means = (
        np.array([np.average(losses[: len(weight)], weights=weight) for weight in weights]) for losses in (ours, theirs)
    )
    assert found.steps.tolist() == list(range(11, 61))
    np.testing.assert_allclose(found.loss, means)
    np.testing.assert_allclose(found.percent, 100 * (means / base_means - 1), atol=1e-9)


def test_the_sentence_tells_mean_extreme_last_and_validation():
    base = [2.0] * 30
    ours = [2.0] * 20 + [2.02] * 10
    found = difference(run(ours, validation={10: 1.99, 30: 2.002}), run(base, "bf16", validation={10: 2.0, 30: 2.0}))
    expected = [0.0] * 10 + [1.0 * (1 - 0.9**k) * (1 / (1 - 0.9 ** (20 + k))) for k in range(1, 11)]
    np.testing.assert_allclose(found.percent, expected, atol=1e-9)
    text = sentence(found, "bf16")
    assert "a run against bf16, steps 11 to 30" in text and "its start-up, 10 steps, left out" in text
    assert f"by {np.mean(expected):.3f}% on average (signed +{np.mean(expected):.3f}%)" in text
    assert f"most at step 30 (+{expected[-1]:.3f}%), at the last by +{expected[-1]:.3f}%" in text
    assert "beyond 0.25% at 40.0% of the steps" in text  # from step 23 on: 8 of 20
    assert "by 0.300% on average of 2, most at step 10 (-0.500%), at the last by +0.100%" in text


def test_a_run_below_its_baseline_has_negative_differences():
    found = difference(run([1.98] * 20), run([2.0] * 20))
    np.testing.assert_allclose(found.percent, -1)
    assert "by 1.000% on average (signed -1.000%)" in sentence(found, "x")


def test_only_common_steps_count():
    whole, part = noisy(0), noisy(1)
    found = difference(run(part[4:40], first=5), run(whole))
    assert (found.steps[0], found.steps[-1], found.tokens) == (15, 40, 40 * 8192)
    np.testing.assert_allclose(found.percent, difference(run(part[4:40]), run(whole[4:40])).percent)


@pytest.mark.parametrize("who", [0, 1])
def test_a_loss_that_is_no_number_ends_the_comparison_and_is_told(who):
    both = [noisy(0), noisy(1)]
    both[who][39] = None
    found = difference(*(run(losses, validation={20: 2.0, 50: 9.0}) for losses in both))
    assert found.steps[-1] == 39 and np.isfinite(found.percent).all()
    assert found.validation_steps.tolist() == [20]
    assert "NOT COMPARED from step 40 on" in sentence(found, "x")


def test_a_single_run_keeps_its_own_report_and_gets_the_comparison(tmp_path):
    base, ours = write(tmp_path / "base", rows_of(noisy(0)), Config()), write(tmp_path / "ours", rows_of(noisy(1)))
    page, lines = compare([ours], base)
    assert page == ours / "report.html"
    assert {path.stem for path in (ours / "plots").iterdir()} == {"against", "loss", "learning_rate", "throughput"}
    text = page.read_text()
    assert text.count("base64,") == 4 and len(lines) == 1 and lines[0] in text
    assert lines[0].startswith("fp32 (ours) against bf16 (base), steps 11 to 60 ")
    assert not (base / "plots").exists()


def test_several_runs_make_one_picture(tmp_path, capsys):
    write(tmp_path / "bf16", rows_of(noisy(0)), Config())
    names = [str(write(tmp_path / name, rows_of(noisy(seed)))) for seed, name in enumerate("abc", 1)]
    assert main(["report", *names, "--against", str(tmp_path / "bf16"), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[:-1]] == [f"fp32 ({name}) against bf16" for name in "abc"]
    assert lines[-1] == str(tmp_path / "out" / "report.html")
    assert [path.name for path in (tmp_path / "out" / "plots").iterdir()] == ["against.png"]


def test_every_run_can_be_told_from_the_others():
    base = run([2.0] * 20)
    count = len(COLOURS) + 2
    found = [difference(run([2.0 + 0.001 * i] * 20, f"run {i}"), base) for i in range(count)]
    top, bottom = draw_against(found, "bf16").axes
    assert [text.get_text() for text in top.get_legend().texts] == ["bf16"] + [f"run {i}" for i in range(count)]
    looks = {(line.get_color(), line.get_linestyle()) for line in top.lines}
    assert len(looks) == count + 1
    for i, line in enumerate([line for line in bottom.lines if len(line.get_xdata()) == 10]):
        np.testing.assert_allclose(line.get_ydata(), 0.05 * i, atol=1e-9)


@pytest.mark.parametrize("factor", [1.0, 1.001, 1.5, 0.5, 1e3])
def test_the_bound_and_the_curve_are_both_in_the_picture(factor):
    found = difference(run([2.0 * factor] * 20, validation={15: 2.0 * factor}), run([2.0] * 20, validation={15: 2.0}))
    figure = draw_against([found], "bf16")
    figure.draw_without_rendering()
    low, high = figure.axes[1].get_ylim()
    extremes = [low, min(-0.25, found.percent.min()), max(0.25, found.percent.max()), high]
    bottom, lowest, highest, top = figure.axes[1].transData.transform([(11, value) for value in extremes])[:, 1]
    room = 0.015 * (top - bottom)  # half a dot
    assert bottom + room < lowest < highest < top - room


def test_runs_of_one_name_and_precision_are_labelled_by_path(tmp_path):
    workdirs = [write(tmp_path / parent / "run", rows_of(noisy(0))) for parent in "xy"]
    _, lines = compare(workdirs[:1], workdirs[1])
    assert lines[0].startswith(f"fp32 ({workdirs[0]}) against fp32 ({workdirs[1]})")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            dataclasses.replace(FP32, training=TrainingConfig(seed=1, batch_size=32)),
            "training.seed, training.batch_size",
        ),
        (dataclasses.replace(FP32, optimizer=OptimizerConfig(learning_rate=1e-3)), "optimizer.learning_rate"),
        (dataclasses.replace(FP32, data=DataConfig(sources=("text_files:x",))), "data.sources"),
        (dataclasses.replace(FP32, mesh=MeshConfig(fsdp=2)), "mesh.fsdp"),
        (dataclasses.replace(FP32, monitor=MonitorConfig(compile_cache=None), data=DataConfig(directory="/x")), None),
        (Config(), None),
    ],
    ids=["seed and batch", "rate", "source", "mesh", "monitor and place", "precision"],
)
def test_what_else_differs_is_told_and_not_refused(tmp_path, config, told):
    ours, base = write(tmp_path / "a", rows_of(noisy(0))), write(tmp_path / "b", rows_of(noisy(1)), config)
    page, lines = compare([ours], base)
    warnings = [line for line in lines if line.startswith("WARNING")]
    assert len(lines) == 1 + len(warnings) and (told is None) == (not warnings)
    assert not warnings or (warnings[0].endswith(f"more than precision: {told}") and warnings[0] in page.read_text())


@pytest.mark.parametrize("fingerprints", [("x", "x"), ("x", "y")])
def test_other_data_behind_the_same_options_is_told(tmp_path, fingerprints):
    workdirs = [write(tmp_path / name, rows_of(noisy(0))) for name in "ab"]
    for workdir, fingerprint in zip(workdirs, fingerprints, strict=True):
        saver = Saver(workdir / CHECKPOINTS, 1)
        meta = {"step": 60, "config": to_dict(FP32), "data_fingerprint": fingerprint}
        assert saver.save({"x": jnp.zeros(2)}, meta) is None and saver.finish() is None
    _, lines = compare(workdirs[:1], workdirs[1])
    assert any("the prepared data" in line for line in lines) == (fingerprints == ("x", "y"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("a b", "2 runs are compared with another; name it with --against BASELINE"),
        ("a b --against base", "2 runs make one picture; say where to write it with --out DIR"),
        ("a --against nowhere", "nowhere is not the directory of a run"),
        ("nowhere --against base", "nowhere is not the directory of a run"),
        ("a --against ./a", "a is named twice"),
        ("a b a --against base --out o", "a is named twice"),
        ("a --against empty", "records no step yet"),
        ("a --against late", "a and late share no steps with finite losses"),
        ("a --against short", "a and short share 10 steps with finite losses, of which the first 10 do not count"),
        ("a --against", "--against: expected one argument"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    for name, rows in {"a": noisy(0), "b": noisy(1), "base": noisy(2), "short": noisy(0, 10), "empty": []}.items():
        write(tmp_path / name, rows_of(rows))
    write(tmp_path / "late", rows_of(noisy(0), first=100))
    assert main(["report", *words.split()]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(r"dsjax: [^\n]+\n", told) and sentence in told
    assert not list(tmp_path.glob("*/plots"))
