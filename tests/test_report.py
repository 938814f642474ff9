"""The report: drawn from what is on disk, whatever state that is in."""

import base64
import dataclasses
import io
import json
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Config, ConfigError, MonitorConfig
from dsjax.training.machine import Machine
from dsjax.training.monitor import Monitor, Step, read_rows
from dsjax.training.report import draw_quantisation, draw_throughput, report
from dsjax.training.workdir import EXPERT_LOAD, METRICS, write_config

PNG = b"\x89PNG"
CONFIG = Config()


def row(step: int, **more) -> dict:
    values = {"step": step, "tokens": step * 8192, "loss": 5.0 / step + 1, "mtp_loss": 5.0 / step + 2, "lr": 1e-3}
    values |= {"tokens_per_second": 1000.0 + step, "mfu": (1000.0 + step) / 5000, "expert_load_max_over_mean": 1.5}
    return values | {"dropped_tokens": 0, "batch_size": 32, "cost_usd": 0.25, "seconds": 61.0} | more


def write(workdir, rows, loads=None):
    write_config(workdir, Config())
    (workdir / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if loads is not None:
        (workdir / EXPERT_LOAD).write_text("".join(json.dumps(load) + "\n" for load in loads))


def loads(steps, layers=4, experts=16):
    return [
        {"step": step, "load": [[(e + step + layer) % 3 for e in range(experts)] for layer in range(layers)]}
        for step in steps
    ]


def test_plots_and_a_page_that_needs_nothing_else(tmp_path):
    rows = [row(step) for step in range(1, 151)]
    rows[99] |= {"validation_loss": 1.25, "validation_nats_per_byte": 1.125}
    write(tmp_path, rows, loads(range(10, 151, 10)))
    page = report(tmp_path)
    assert page == tmp_path / "report.html"
    plots = {path.stem: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert set(plots) == {"loss", "learning_rate", "throughput", "expert_load"}
    text = page.read_text()
    embedded = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", text)]
    assert sorted(embedded) == sorted(plots.values()) and all(image.startswith(PNG) for image in embedded)
    assert "http" not in text and "<script" not in text and 'src="data:' in text
    for fact in ("1.2500 nats per token, 1.1250 nats per byte (step 100)", "$0.25", "1:01", "step 150 of 300", "1.23M"):
        assert fact in text


def test_the_report_can_be_written_elsewhere(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    write(run, [row(1), row(2)])
    assert report(run, out) == out / "report.html"
    assert (out / "plots" / "loss.png").exists() and not (run / "plots").exists()


@pytest.mark.parametrize(
    "rows",
    [
        [row(1)],
        [row(1, loss=None, mtp_loss=None), row(2, loss=None)],
        [row(1, batch_size=8), row(2, batch_size=16), row(3)],
        [row(1, mfu=None, expert_load_max_over_mean=None, mtp_loss=None)],
    ],
    ids=["one step", "no number", "batch ramp", "dense, no peak, no MTP"],
)
def test_any_run_can_be_drawn(tmp_path, rows):
    write(tmp_path, rows, loads([1], layers=1))
    assert report(tmp_path).exists()


@pytest.mark.parametrize(("second", "has_axis"), [(1.1, True), (2.0, False)])
def test_an_axis_of_mfu_is_drawn_where_it_is_true_of_every_step(second, has_axis):
    """After a run has gone on with half of its chips, the same rate is twice the MFU."""
    rows = [row(1), row(2, mfu=second * 1002 / 5000)]
    (axes,) = draw_throughput(rows).axes
    assert bool(axes.child_axes) == has_axis


def test_many_layers_and_experts_can_be_drawn(tmp_path):
    write(tmp_path, [row(1), row(2)], loads([1, 2], layers=59, experts=256))
    report(tmp_path)
    assert (tmp_path / "plots" / "expert_load.png").read_bytes().startswith(PNG)


def test_half_a_last_line_is_tolerated(tmp_path):
    write(tmp_path, [row(1), row(2)], loads([1]))
    for name in (METRICS, EXPERT_LOAD):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 3, "lo')
    assert "step 2 of 300" in report(tmp_path).read_text()


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "lo', "[]\n"])
def test_a_run_without_steps_is_a_sentence(tmp_path, content):
    write_config(tmp_path, Config())
    if content is not None:
        (tmp_path / METRICS).write_text(content)
    with pytest.raises(ConfigError, match="records no step yet"):
        report(tmp_path)


def test_a_directory_that_is_no_run_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="is not the directory of a run"):
        report(tmp_path / "nowhere")


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path, [row(1)])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'dsjax\[plots\]'"):
        report(tmp_path)


def test_an_out_that_cannot_be_written_is_a_sentence(tmp_path):
    write(tmp_path, [row(1)])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another --out"):
        report(tmp_path, tmp_path / "file")


def rates(error=0.026, overflow=0.0, underflow=1e-4) -> dict:
    return {"error": error, "overflow": overflow, "underflow": underflow}


def measured(monitor: Monitor, number: int, quantisation: dict | None) -> None:
    """Writes a step whose metrics hold `quantisation`, as arrays on the device."""
    values = {"loss": 2.5, "mtp_loss": 2.75, "grad_norm": 0.5} | (
        {"quantisation": quantisation} if quantisation else {}
    )
    arrays = {
        name: {c: {n: jnp.float32(x) for n, x in r.items()} for c, r in value.items()}
        if isinstance(value, dict)
        else jnp.float32(value)
        for name, value in values.items()
    }
    monitor.write(monitor.measure(Step(number, 4 * number, 4, {"learning_rate": 1e-3}, arrays)))


def monitor_of(workdir, config=CONFIG):
    write_config(workdir, config)
    chips = Machine(chips=1, peak_flops_per_second=1e12, dollars_per_hour=0.0, note="free")
    return Monitor(config, workdir, chips, 1000, stream=io.StringIO())


def test_quantisation_goes_from_the_step_to_the_picture(tmp_path):
    monitor = monitor_of(tmp_path)
    given = {"activation": rates(), "gradient (Wgrad)": rates(float("nan"), 0.5, float("inf"))}
    for number, value in enumerate((None, given, None), 1):
        measured(monitor, number, value)
    rows = read_rows(tmp_path / METRICS)
    assert ["quantisation" in row for row in rows] == [False, True, False]
    assert rows[1]["quantisation"]["gradient (Wgrad)"] == rates(None, 0.5, None)
    assert rows[1]["quantisation"]["activation"] == pytest.approx(rates())
    report(tmp_path)
    assert (tmp_path / "plots" / "quantisation.png").read_bytes().startswith(PNG)
    assert 'alt="quantisation"' in (tmp_path / "report.html").read_text()


def test_tensorboard_gets_every_class_of_tensors(tmp_path):
    pytest.importorskip("tensorboardX")
    monitor = monitor_of(tmp_path, dataclasses.replace(Config(), monitor=MonitorConfig(tensorboard=True)))
    measured(monitor, 1, {"weight": rates(error=float("nan"))})
    monitor.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    assert b"quantisation/weight/underflow" in written and b"quantisation/weight/error" not in written


@pytest.mark.parametrize(
    "values",
    [
        [{"weight": rates(underflow=0.0)}],
        [{"weight": rates(None, None, None)}],
        [{"weight": rates()}, {"weight": rates(underflow=0.5), "gradient": rates(0.5, 1e-9, 0.0)}],
        [{"activation": rates()}, {"weight": rates(error=None)}],
        [{"of another kind": rates(1.0, 1.0, 1.0)}],
    ],
    ids=["one step of zeros", "no number", "far apart", "other classes at other steps", "unknown class"],
)
def test_any_quantisation_can_be_drawn_and_none_is_left_out(values):
    figure = draw_quantisation([row(1), *(row(2 + i, quantisation=value) for i, value in enumerate(values))])
    figure.draw_without_rendering()
    names = list(dict.fromkeys(name for value in values for name in value))
    assert [text.get_text() for text in figure.legends[0].texts] == names
    for axes, measure in zip(figure.axes, ("error", "overflow", "underflow"), strict=True):
        low, high = axes.get_ylim()
        for name, line in zip(names, axes.lines, strict=True):
            points = [(2 + i, value[name][measure]) for i, value in enumerate(values) if name in value]
            drawn = [(step, rate) for step, rate in points if rate is not None]
            assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == drawn
            assert all(low <= rate < high for _, rate in drawn)
            shown = axes.transData.transform(np.array(drawn).reshape(-1, 2))
            assert np.isfinite(shown).all()  # a zero on a logarithmic scale would not be
