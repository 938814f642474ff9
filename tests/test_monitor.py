"""What a run tells: rows that are JSON and whole, a line that fits, a cost that adds up."""

import dataclasses
import io
import json
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Config, ConfigError, DataConfig, HardwareConfig, ModelConfig, MonitorConfig, TrainingConfig
from dsjax.numerics.recipe import recipe
from dsjax.planning import counts, hardware
from dsjax.training import monitor as monitor_module
from dsjax.training.machine import Machine, machine, matmul_flops_per_second
from dsjax.training.monitor import (
    Console,
    Monitor,
    Step,
    append_line,
    drop_rows_after,
    duration,
    magnitude,
    read_rows,
)
from dsjax.training.workdir import EXPERT_LOAD, METRICS

T = 32
CONFIG = Config(data=DataConfig(sequence_length=T), training=TrainingConfig(total_steps=10))
FREE = Machine(chips=1, peak_flops_per_second=1e12, dollars_per_hour=0.0, note="free")


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Stands for the `time` module: it passes when told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(monitor_module, "time", self)

    def monotonic(self):
        return self.now

    perf_counter = monotonic


def step(number, batch_size=4, **metrics):
    loads = jnp.asarray([[1, 3, 0, 0], [1, 1, 1, 1]])
    values = {"loss": 2.5, "mtp_loss": 2.75, "balance_loss": 1e-4, "grad_norm": 0.5, "dropped_tokens": 0}
    values |= {
        "dispatch_rounds": 1.0,
        "dispatch_bytes": 4096.0,
        "dispatch_bytes_in_node": 0.0,
        "expert_load": loads,
    } | metrics
    settings = {"learning_rate": 1e-3, "bias_update_speed": 1e-3, "mtp_loss_weight": 0.3}
    return Step(number, number * batch_size, batch_size, settings, {k: jnp.asarray(v) for k, v in values.items()})


def make(workdir, config=CONFIG, chips=FREE, done=0, stream=None):
    return Monitor(config, workdir, chips, 10 * 4 * T, done, stream or io.StringIO())


def test_a_row_holds_what_the_step_measured(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    monitor = make(tmp_path)
    clock.now += 2.0
    monitor.write(monitor.measure(step(3)) | {"validation_loss": 2.25})
    (row,) = map(json.loads, (tmp_path / METRICS).read_text().splitlines())
    flops = counts.flops_per_token(CONFIG.model, T, mtp=True)
    assert row == {
        "step": 3,
        "tokens": 3 * 4 * T,
        "loss": 2.5,
        "mtp_loss": 2.75,
        "balance_loss": pytest.approx(1e-4),
        "grad_norm": 0.5,
        "lr": 1e-3,
        "batch_size": 4,
        "step_seconds": 2.0,
        "tokens_per_second": 4 * T / 2.0,
        "mfu": pytest.approx(4 * T / 2.0 * flops / 1e12),
        "expert_load_max_over_mean": 3.0,
        "dropped_tokens": 0,
        "dispatch_rounds": 1.0,
        "dispatch_bytes": 4096.0,
        "dispatch_bytes_in_node": 0.0,
        "cost_usd": 0.0,
        "seconds": 2.0,
        "validation_loss": 2.25,
    }


def test_what_happens_between_steps_is_not_part_of_a_step(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    monitor = make(tmp_path)
    clock.now += 1.0
    monitor.measure(step(1))
    clock.now += 50.0
    monitor.restart_clock()
    clock.now += 2.0
    row = monitor.measure(step(2))
    assert row["step_seconds"] == 2.0 and row["seconds"] == 53.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_is_null_and_told_once(tmp_path, value):
    stream = io.StringIO()
    monitor = make(tmp_path, stream=stream)
    for number in (1, 2):
        monitor.write(monitor.measure(step(number, loss=value)))
    monitor.close()
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["loss"] for line in lines] == [None, None]
    assert stream.getvalue().count("WARNING: loss is not a finite number at step 1") == 1
    assert stream.getvalue().count("WARNING") == 1


def test_a_validation_loss_that_is_no_number_is_null_and_told(tmp_path):
    stream = io.StringIO()
    monitor = make(tmp_path, stream=stream)
    monitor.write(monitor.measure(step(1)) | {"validation_loss": float("nan")})
    (line,) = (tmp_path / METRICS).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["validation_loss"] is None
    assert "WARNING: validation_loss is not a finite number at step 1" in stream.getvalue()


def test_a_closed_pipe_silences_the_console_and_nothing_else(tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monitor = make(tmp_path, stream=Closed())
    for number in (1, 2):
        monitor.write(monitor.measure(step(number)))
    monitor.say("done")
    monitor.close()
    assert [row["step"] for row in read_rows(tmp_path / METRICS)] == [1, 2]


def test_a_dense_model_without_mtp_has_no_loads(tmp_path):
    config = dataclasses.replace(CONFIG, model=ModelConfig(first_k_dense_replace=4, num_nextn_predict_layers=0))
    metrics = {"loss": jnp.float32(1), "mtp_loss": jnp.float32(0), "grad_norm": jnp.float32(1)}
    monitor = make(tmp_path, config)
    row = monitor.measure(Step(1, 4, 4, {"learning_rate": 1e-3}, metrics))
    monitor.write(row)
    assert row["mtp_loss"] is row["expert_load_max_over_mean"] is row["balance_loss"] is None
    assert row["dropped_tokens"] == 0
    assert not (tmp_path / EXPERT_LOAD).exists()


def test_expert_load_is_over_the_mean_of_its_layer_and_now_and_then(tmp_path):
    config = dataclasses.replace(CONFIG, monitor=MonitorConfig(expert_load_every_steps=3))
    monitor = make(tmp_path, config)
    for number in range(1, 8):
        monitor.measure(step(number))
    rows = read_rows(tmp_path / EXPERT_LOAD)
    assert [row["step"] for row in rows] == [1, 3, 6]
    assert rows[0]["load"] == [[1.0, 3.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]


def test_every_step_is_there_once_after_a_resume(tmp_path):
    monitor = make(tmp_path)
    for number in range(1, 8):
        monitor.write(monitor.measure(step(number)))
    monitor.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 8, "loss": 1.')
    monitor = make(tmp_path, done=5)
    for number in range(6, 9):
        monitor.write(monitor.measure(step(number)))
    assert [row["step"] for row in read_rows(tmp_path / METRICS)] == list(range(1, 9))


def test_lost_work_stays_in_the_cost_however_often_the_run_dies(tmp_path):
    rows = [{"step": step, "seconds": 10.0 * step, "cost_usd": 1.0 * step} for step in range(1, 8)]
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [make(tmp_path, done=2).cost_usd for _ in range(3)] == [7.0] * 3
    assert [row["step"] for row in read_rows(tmp_path / METRICS)] == [1, 2]


def test_dropping_rows_leaves_the_others_byte_for_byte(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = [json.dumps({"step": number, "loss": 1 / 3 / number}) + "\n" for number in range(1, 5)]
    path.write_text("".join(lines) + "null\n")
    drop_rows_after(path, 2)
    assert path.read_text() == "".join(lines[:2])
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_cost_and_time_add_up_over_resumes(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    chips = Machine(chips=4, peak_flops_per_second=None, dollars_per_hour=8.0, note="4 x $2 per hour")
    for part in (1, 2):
        monitor = make(tmp_path, chips=chips, done=part - 1)
        clock.now += 1800.0
        monitor.write(monitor.measure(step(part)))
    rows = read_rows(tmp_path / METRICS)
    assert [row["cost_usd"] for row in rows] == [4.0, 8.0]
    assert [row["seconds"] for row in rows] == [1800.0, 3600.0]
    assert rows[0]["mfu"] is None
    assert monitor.cost() == "$8.00 (4 x $2 per hour)"


def test_a_metrics_file_that_cannot_be_written_is_told_once(tmp_path):
    stream = io.StringIO()
    monitor = make(tmp_path, stream=stream)
    (tmp_path / METRICS).mkdir()
    for number in (1, 2):
        monitor.write(monitor.measure(step(number)))
    assert stream.getvalue().count("training goes on") == 1


def test_simulated_devices_are_one_machine_and_free():
    here = machine(HardwareConfig(peak_flops_per_second=1e12), "fp32")
    assert jax.device_count() == 8
    assert (here.chips, here.peak_flops_per_second, here.dollars_per_hour) == (1, 1e12, 0.0)
    assert "free" in here.note
    priced = machine(HardwareConfig(peak_flops_per_second=1e12, price_per_chip_hour=0.5), "fp32")
    assert priced.dollars_per_hour == 0.5 and priced.note == "1 x $0.5 per hour"
    named = machine(HardwareConfig(name="H800", peak_flops_per_second=1e12), "fp32")
    assert named.dollars_per_hour == 0.0, "a simulated mesh is not rented"


@pytest.mark.parametrize(
    ("kind", "devices", "chips", "dollars", "known"),
    [("NVIDIA H800", 16, 16, 32.0, True), ("TPU7x", 8, 4, 0.0, True), ("NPU x1", 4, 4, 0.0, False)],
)
def test_accelerators_are_priced_by_the_table(monkeypatch, kind, devices, chips, dollars, known):
    class Device:
        platform = "gpu"
        device_kind = kind

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    here = machine(HardwareConfig(), "bf16")
    row = hardware.find(kind)
    assert here.chips == chips and here.dollars_per_hour == dollars
    assert here.peak_flops_per_second == (row.peak_flops_bf16 * chips if known else None)
    assert ("no price known" in here.note) == (dollars == 0.0)
    asked = machine(HardwareConfig(price_per_chip_hour=1.0, peak_flops_per_second=2.0), "bf16")
    assert (asked.dollars_per_hour, asked.peak_flops_per_second) == (1.0 * chips, 2.0 * chips)


def test_matmul_rate_is_that_of_this_machine():
    assert 1e8 < matmul_flops_per_second(recipe("fp32"), repeats=1) < 1e15


def test_the_line_of_a_terminal_is_updated_in_place_and_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor_module.shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((48, 24)))
    clock = Clock(monkeypatch)
    stream = Terminal()
    monitor = make(tmp_path, stream=stream)
    for number in range(1, 11):
        clock.now += 1.0
        monitor.write(monitor.measure(step(number)))
    monitor.say("a line that stays")
    monitor.close()
    shown = stream.getvalue()
    assert shown.count("\n") == 1 and shown.endswith("a line that stays\n")
    updates = [part.split("\x1b[K")[0] for part in shown.split("\r")[1:-1]]
    assert len(updates) == 10 and all(len(update) <= 47 for update in updates)
    assert updates[0].startswith("step 1/10  loss 2.5000  ETA 0:09")


def test_a_terminal_is_not_flooded(monkeypatch):
    clock = Clock(monkeypatch)
    stream = Terminal()
    console = Console(stream)
    for number in range(1000):
        clock.now += 0.001
        console.progress([f"step {number}"])
    console.finish()
    assert stream.getvalue().count("\r") <= 12
    assert stream.getvalue().endswith("\rstep 999\x1b[K\n")


def test_without_a_terminal_lines_are_plain_and_few_but_first_and_last(monkeypatch):
    clock = Clock(monkeypatch)
    stream = io.StringIO()
    console = Console(stream)
    for number in range(1, 101):
        clock.now += 0.1
        console.progress([f"step {number}", "loss 1.0"])
    console.finish()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1  loss 1.0" and lines[-1] == "step 100  loss 1.0"
    assert 2 <= len(lines) <= 4 and "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_other_processes_are_silent():
    stream = io.StringIO()
    console = Console(stream, enabled=False)
    console.progress(["step 1"])
    console.say("hello")
    console.finish()
    assert stream.getvalue() == ""


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    config = dataclasses.replace(CONFIG, monitor=MonitorConfig(tensorboard=True))
    monitor = make(tmp_path, config)
    monitor.write(monitor.measure(step(1)))
    monitor.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"grad_norm" in events.read_bytes()


def test_tensorboard_that_is_not_installed_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install 'dsjax\[tensorboard\]'"):
        make(tmp_path, dataclasses.replace(CONFIG, monitor=MonitorConfig(tensorboard=True)))


def test_numbers_are_short():
    assert [duration(s) for s in (0, 7.4, 750, 11_100, 4_680_000)] == ["0:00", "0:07", "12:30", "3:05:00", "54d 04h"]
    assert [magnitude(n) for n in (0, 7, 999, 1_000, 12_345, 999_950, 2_457_600, 14.8e12)] == [
        "0",
        "7",
        "999",
        "1.00k",
        "12.3k",
        "1.00M",
        "2.46M",
        "14.8T",
    ]
    assert np.all(np.diff([len(magnitude(10.0**n)) for n in range(13)]) < 3)


def test_a_line_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    append_line(path, '{"step": 1}\n')
    with monkeypatch.context() as patch:
        write = os.write
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
        with pytest.raises(OSError, match="No space left"):
            append_line(path, '{"step": 2}\n')
    append_line(path, '{"step": 3}\n')
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_lines_of_two_writers_do_not_mix(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"writer": writer, "text": "x" * 20_000}) + "\n" for writer in range(2)]
    threads = [
        threading.Thread(target=lambda line=line: [append_line(path, line) for _ in range(50)]) for line in lines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.read_text().splitlines(True)) == sorted(lines * 50)
