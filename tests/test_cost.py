"""The published bill comes out of its parts, and every figure says where it is from."""

import dataclasses
import json

import pytest

from dsjax.__main__ import main
from dsjax.config import load
from dsjax.planning import published
from dsjax.planning.cost import as_text, figures, shown
from dsjax.planning.counts import parameters


@pytest.fixture(scope="module")
def values():
    return {(one.run, one.name): one for one in figures()}


@pytest.mark.parametrize(
    ("run", "name", "expected", "tolerance"),
    [
        ("DeepSeek-V3", "FLOPs per token", 250.5e9, 0.05e9),
        ("DeepSeek-V3", "MFU", 0.391, 0.0005),
        ("DeepSeek-V3", "MFU, all pairs counted", 0.439, 0.0005),
        ("DeepSeek-V3", "MFU of that step", 0.3894, 0.002),  # the paper's own count of FLOPs is a little lower
        ("DeepSeek-V3", "pretraining, hours", 2_664_000, 0),
        ("DeepSeek-V3", "hours, all stages", 2_788_000, 0),
        ("DeepSeek-V3", "cost, all stages", 5_576_000, 0),
        ("DeepSeek-V3", "cost per trillion tokens", 360_000, 0),  # 180K hours
        ("DeepSeek-V3", "days of pretraining", 54.2, 0.05),
        ("DeepSeek-V3", "tokens per second and chip", 1543, 0.5),
        ("DeepSeek-R1, on top of V3", "hours, all stages", 147_000, 0),
        ("DeepSeek-R1, on top of V3", "cost, all stages", 294_000, 0),
        ("DeepSeek-V2", "FLOPs per token", 155.31e9, 0.01e9),
        ("DeepSeek-V2", "pretraining, hours", 1.4e6, 0.001e6),
        ("Llama-3.1-405B", "hours over DeepSeek-V3's", 11.06, 0.01),
        ("Llama-3.1-405B", "cost of pretraining", 61.68e6, 1),
        ("Kimi-K2", "FLOPs of pretraining", 3.18e24, 0.01e24),
        ("Kimi-K2", "pretraining, hours", 2.29e6, 0.005e6),
        ("GPT-4", "cost over DeepSeek-V3's", 78 / 5.576, 0.001),
    ],
)
def test_figures_equal_the_published_ones(values, run, name, expected, tolerance):
    assert values[run, name].value == pytest.approx(expected, abs=max(tolerance, 1e-6))


def test_stages_are_hours_times_two_dollars():
    for run in published.RUNS:
        for stage in run.stages:
            assert stage.dollars.value == 2 * stage.chip_hours.value


@pytest.mark.parametrize(("model", "name"), [(published.V3, "deepseek_v3"), (published.V2, "deepseek_v2")])
def test_models_are_those_of_the_configurations(repository, model, name):
    assert parameters(model) == parameters(load(str(repository / "configs" / f"{name}.py")).model)


def test_kimi_has_its_published_parameters():
    assert parameters(published.KIMI_K2).total == 1_026_408_232_448
    assert parameters(published.KIMI_K2).active == 32_861_500_928


def test_every_figure_has_a_status_and_a_footnote():
    found = figures()
    assert {one.status for one in found} == {"stated", "measured", "estimated", "computed"}
    lines = as_text(found).splitlines()
    sources = {line.split()[0] for line in lines[lines.index("sources") + 1 :]}
    told = [line.split() for line in lines[: lines.index("sources")] if line.startswith("  ")]
    assert len(told) == len(found)
    assert {words[-1] for words in told} == sources
    assert max(map(len, lines)) <= 120


def test_command_prints_text_and_json(capsys):
    assert main(["cost"]) == 0
    out = capsys.readouterr().out
    for figure in ("250.5 GFLOP", "39.1%", "2,664K H800 hours", "119K", "5K", "$5.576M", "147K H800 hours", "$294K"):
        assert figure in out
    assert main(["cost", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["figures"]
    assert rows == [dataclasses.asdict(one) for one in figures()]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (5.576e6, "dollars", "$5.576M"),
        (294e3, "dollars", "$294K"),
        (0.3908, "share", "39.1%"),
        (11.06, "ratio", "11.1 x"),
        (0.0527, "ratio", "0.05 x"),
        (250.46e9, "FLOP", "250.5 GFLOP"),
        (172_800, "H800 hours", "172.8K H800 hours"),
        (54.2, "days", "54.2 days"),
        (0.00123, "days", "0.0012 days"),
        (0.0004, "ratio", "0.0004 x"),
        (0.012, "dollars", "$0.012"),
        (8.69, "dollars", "$8.69"),
        (3e6, "FLOP", "3.0 MFLOP"),
        (2048, "H800", "2,048 H800"),
    ],
)
def test_values_are_shown_with_the_digits_that_are_known(value, unit, text):
    assert shown(value, unit) == text
