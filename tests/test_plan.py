"""dsjax plan: a plan's parts agree with hand counts, what does not fit is told, and no JAX is needed for it."""

import dataclasses
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import small

from dsjax.__main__ import main
from dsjax.config import Config, ConfigError, TrainingConfig, load
from dsjax.planning import cost, hardware, pages
from dsjax.planning.collectives import flows
from dsjax.planning.layout import nearest_batch
from dsjax.planning.memory import kept_per_layer
from dsjax.planning.plan import knobs, make_plan, notes
from dsjax.planning.roofline import EFFICIENCY, LINK_EFFICIENCY, StepTime, step_time
from dsjax.planning.search import best_plan, meshes, search

ON_H800 = """
    training.batch_size=16384 training.microbatch_size=2048 training.initial_batch_size=2048
    dispatch.ranks_per_node=8 evaluation.sequences=2048
""".split()
ON_V5P = """
    precision=bf16 fp8.working_copy=false training.microbatch_size=3072 dispatch.chunks=3
""".split()
H800, V5P = hardware.get("h800"), hardware.get("v5p")


@pytest.fixture(scope="module")
def v3_file():
    from conftest import REPOSITORY

    return str(REPOSITORY / "configs" / "deepseek_v3.py")


@pytest.fixture(scope="module")
def on_h800(v3_file):
    return make_plan(load(v3_file, ON_H800), H800, 2048, 14.8e12)


@pytest.fixture(scope="module")
def on_v5p(v3_file):
    return make_plan(load(v3_file, ON_V5P), V5P, 1024, 14.8e12)


def test_deepseeks_own_run_lies_between_the_bounds(on_h800):
    """39.1% and 2,664K hours: below what hiding everything gives, above what hiding nothing does.

    All hidden means here that the slow link is busy all the time: DeepSeek's pipeline over 16 stages moves no weights.
    """
    serial, expected, hidden = (
        on_h800.mfu(s) for s in (on_h800.time.serial, on_h800.time.expected, on_h800.time.hidden)
    )
    assert serial < expected < hidden
    assert 0.15 < serial < 0.391 and hidden == pytest.approx(0.391, abs=0.05)
    assert on_h800.chip_hours(on_h800.time.hidden) == pytest.approx(2.664e6, rel=0.15)
    products_only = on_h800.mfu(on_h800.time.compute)
    assert products_only > 0.391


def test_compute_time_by_hand(on_h800):
    """FP8 for projections and experts at 60% of 1,979, the core at 60%, the rest at 70% of 989 TFLOP/s."""
    tokens = 16384 * 4096 / 2048
    core = 62 * 6 * 4097 / 2 * 128 * 320
    fp8 = 6 * (62 * 187_105_280 + 3 * 396_361_728 + 59 * 9 * 44_040_192)
    gate, heads, join = 6 * 59 * 256 * 7168, 6 * 2 * 926_679_040, 6 * 2 * 7168**2
    seconds = fp8 * 4 / 3 / (1979e12 * EFFICIENCY["fp8"]) + core * (1 + 1 / 3 + 192 / 320 / 3) / (
        989e12 * EFFICIENCY["attention"]
    )
    seconds += (gate * 4 / 3 + heads + join) / (989e12 * EFFICIENCY["bf16"])
    assert on_h800.time.compute == pytest.approx(tokens * seconds, rel=1e-3)


def test_link_time_is_bytes_over_bandwidth(on_h800):
    assert on_h800.time.slow == pytest.approx(sum(one.slow for one in on_h800.flows) / (50e9 * LINK_EFFICIENCY))
    assert on_h800.time.fast == pytest.approx(sum(one.fast for one in on_h800.flows) / (160e9 * LINK_EFFICIENCY))


def test_an_all_to_all_passes_the_links_of_a_torus(on_v5p):
    """Over 64 ranks, 4 x 4 x 4: three links on average."""
    moved = {"all-to-all": 0.0, "other": 0.0}
    for one in on_v5p.flows:
        assert one.slow == 0  # one slice
        hops = 3 if one.cause.endswith("experts") else 3 * 8 / 4 if one.collective == "all-to-all" else 1
        moved["other"] += one.fast * hops
    assert on_v5p.time.fast == pytest.approx(moved["other"] / (600e9 * LINK_EFFICIENCY), rel=1e-6)


@pytest.mark.parametrize(
    ("times", "serial", "expected", "hidden"),
    [
        ((4, 2, 3, 6), 15, 9, 6),  # 4 + 2, and half of 6 beside
        ((1, 1, 1, 10), 13, 10, 10),  # the link is never quicker than itself
        ((5, 0, 0, 0), 5, 5, 5),
    ],
)
def test_bounds_by_hand(times, serial, expected, hidden):
    time = StepTime(*map(float, times))
    assert (time.serial, time.expected, time.hidden) == (serial, expected, hidden)


def test_a_run_is_steps_hours_and_dollars(on_h800):
    steps = 14.8e12 / (16384 * 4096)
    assert on_h800.run_seconds(20.0) == pytest.approx(steps * 20)
    assert on_h800.chip_hours(20.0) == pytest.approx(steps * 20 * 2048 / 3600)
    assert on_h800.dollars(20.0) == 2 * on_h800.chip_hours(20.0)
    assert on_h800.kilowatt_hours(20.0) == pytest.approx(0.7 * on_h800.chip_hours(20.0))
    own = dataclasses.replace(on_h800.config.hardware, price_per_chip_hour=0.5)
    cheaper = dataclasses.replace(on_h800, config=dataclasses.replace(on_h800.config, hardware=own))
    assert cheaper.dollars(20.0) == on_h800.dollars(20.0) / 4


def test_two_devices_of_a_chip_share_what_it_has(v3_file):
    config = load(v3_file, ["precision=bf16", "fp8.working_copy=false"])
    plan = make_plan(config, hardware.get("tpu7x"), 512, 1e12)
    assert plan.devices == 1024 and plan.limit == 0.9 * 96 * 2**30
    assert plan.price is None and plan.dollars(1.0) is None and plan.kilowatt_hours(1.0) is None
    assert "no price known" in pages.as_text(plan)


def test_what_fits_says_so_and_what_does_not_names_the_knob(on_v5p, v3_file):
    assert on_v5p.fits and "fits: 52.7 GiB at the peak (feed-forward)" in pages.verdict(on_v5p)
    less = make_plan(load(v3_file, [*ON_V5P, "training.remat=none"]), V5P, 1024, 14.8e12)
    assert not less.fits
    assert "does not fit" in (text := pages.as_text(less)) and "above 85.5 GiB, 90% of a device's 95.0" in text
    found = knobs(less)
    assert [one.peak for one in found] == sorted(one.peak for one in found)
    assert found[0].change == "training.remat=full" and found[0].peak == on_v5p.memory.peak
    assert "what helps most is training.remat=full: 52.7 GiB, which fits" in text
    assert all(one.peak < less.memory.peak for one in found)


def test_experts_on_more_ranks_are_a_knob_where_they_were_on_one(repository):
    lite = load(str(repository / "configs" / "deepseek_v2_lite.py"), ["mesh.data=-1", "mesh.fsdp=1", "mesh.expert=1"])
    plan = make_plan(lite, hardware.get("h100"), 8, 1e12)
    assert not plan.fits and plan.config.dispatch.form == "local"
    assert "mesh.data=1 mesh.expert=8" in [one.change for one in knobs(plan)]


def test_a_batch_that_does_not_divide_is_planned_as_the_nearest_that_does(v3_file):
    plan = make_plan(load(v3_file), H800, 2048, 1e12)
    assert (plan.config.training.batch_size, plan.config.training.microbatch_size) == (14336, 2048)
    told = "training.batch_size = 14336 instead of 15360 and training.microbatch_size = 2048 instead of 1024"
    assert told in plan.chosen and told in " ".join(pages.as_text(plan).split())
    sizes = ["batch_size=16384", "microbatch_size=4096", "initial_batch_size=None", "batch_ramp_tokens=0"]
    even = [*(f"training.{one}" for one in sizes), "dispatch.form=all_to_all"]
    assert make_plan(load(v3_file, even), H800, 2048, 1e12).chosen == ""


def test_a_mesh_that_does_not_fit_is_told(v3_file):
    with pytest.raises(ConfigError, match="does not fit 768 device"):
        make_plan(load(v3_file, ["training.microbatch_size=1536"]), H800, 768, 1e12)


def test_notes_say_what_figures_do_not(on_h800, v3_file):
    assert notes(on_h800) == ["no maker states watts of H800"]
    plain = load(v3_file, [one for one in ON_H800 if not one.startswith(("dispatch", "evaluation"))])
    told = " ".join(notes(make_plan(plain, H800, 2048, 1e12)))
    assert "dispatch.ranks_per_node=8 sends them once to each node" in told
    assert "evaluation.sequences = 1024" in told
    told = notes(make_plan(load(v3_file), hardware.get("v5e"), 1024, 1e12))
    assert "mesh.data = 2 does not divide over 4 slices of 256 chips" in " ".join(told)
    assert "v5p has no FP8 units" in " ".join(notes(make_plan(load(v3_file), V5P, 1024, 1e12)))


def test_search_finds_only_what_divides_and_fits(v3_file):
    config = load(v3_file, ["precision=bf16", "fp8.working_copy=false"])
    found = search(config, V5P, 1024)
    limit = 0.9 * V5P.memory_bytes
    assert found.ranked and found.tried > 500 and found.batch_size == 15360
    for one in found.ranked:
        mesh = one.config.mesh
        assert mesh.data * mesh.fsdp * mesh.expert == 1024 and 512 % (mesh.fsdp * mesh.expert) == 0
        assert one.peak <= limit and one.config.training.batch_size % one.config.training.microbatch_size == 0
    times = [one.step_seconds for one in found.ranked]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("name", "chip", "chips", "given", "told"),
    [
        ("deepseek_v3", "v5p", 1024, [], "training.initial_batch_size=None --config.training.batch_ramp_tokens=0"),
        ("deepseek_v3", "h800", 2048, [], "evaluation.sequences=2048 --config.dispatch.ranks_per_node=8"),
        ("deepseek_v2_lite", "h100", 64, ["dispatch.form=all_gather"], "dispatch.form=auto"),
        ("tiny", "h100", 8, ["dispatch.form=local", "mesh.expert=1"], "dispatch.form=auto"),
        ("tiny", "h100", 8, ["dispatch.ranks_per_node=4"], "dispatch.ranks_per_node=None"),
    ],
)
def test_overrides_of_a_search_are_the_plan_that_it_shows(repository, name, chip, chips, given, told):
    file, chip = str(repository / "configs" / f"{name}.py"), hardware.get(chip)
    found = search(load(file, given), chip, chips)
    best = found.ranked[0]
    assert told in best.overrides
    for one in found.ranked[:: max(1, len(found.ranked) // 4)]:
        again = load(file, [*given, *(word.removeprefix("--config.") for word in one.overrides.split())])
        plan = make_plan(again, chip, chips, 1e12)
        assert (plan.memory.peak, plan.time.expected) == (one.peak, one.step_seconds)
        assert plan == make_plan(one.config, chip, chips, 1e12)
    assert best_plan(found, chip, chips, 1e12) == make_plan(best.config, chip, chips, 1e12)


def test_search_cuts_only_data_over_slices(v3_file):
    found = search(load(v3_file, ["precision=bf16", "fp8.working_copy=false"]), hardware.get("v6e"), 1024)
    assert all(one.config.mesh.data % 4 == 0 for one in found.ranked)
    assert found.tried and (found.ranked or found.least)


def test_search_tells_how_much_is_missing(v3_file):
    found = search(load(v3_file), hardware.get("v5e"), 256)
    assert not found.ranked and found.least is not None
    assert "the least that any of them needs is" in pages.ranking(found, 1e12)


def test_all_meshes_of_a_model_without_experts_have_one_expert_rank():
    dense = dataclasses.replace(small.MODEL, first_k_dense_replace=2, num_nextn_predict_layers=0)
    assert {mesh.expert for mesh in meshes(Config(model=dense), 12)} == {1}
    assert {mesh.fsdp for mesh in meshes(Config(model=dense), 12)} == {1, 2, 4}


@pytest.mark.parametrize(("sequences", "devices", "nearest"), [(15360, 2048, 14336), (15361, 2048, 16384), (3, 8, 8)])
def test_nearest_batch(sequences, devices, nearest):
    assert nearest_batch(sequences, devices) == nearest


def test_remat_none_gathers_experts_once(v3_file):
    sizes = {"data": 2, "fsdp": 8, "expert": 64}
    once, twice = (
        {one.cause: one.total for one in flows(load(v3_file, [f"training.remat={remat}"]), sizes, "all_to_all")}
        for remat in ("none", "full")
    )
    assert once["weights, forward"] == twice["weights, forward"] == twice["weights, backward"]
    experts = 59 * 256 / 64 * 3 * 7168 * 2048 * 7 / 8 * 15  # a byte each, from 7 of 8 devices, 15 microbatches
    assert twice["weights, backward"] - once["weights, backward"] == pytest.approx(experts)
    assert kept_per_layer(load(v3_file), sizes, "all_to_all") == {"layer input": 14336}


def test_fp32_has_no_fast_units():
    config = dataclasses.replace(small.config(), training=TrainingConfig(batch_size=8))
    sizes = {"data": 1, "fsdp": 1, "expert": 1}
    fp32, bf16 = (
        step_time(dataclasses.replace(config, precision=p), sizes, "local", H800).compute for p in ("fp32", "bf16")
    )
    assert fp32 == 4 * bf16


class Checker(HTMLParser):
    """Tags balance, nothing is fetched."""

    VOID = ("meta",)

    def __init__(self):
        super().__init__()
        self.open, self.widths = [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert "src" not in values and "href" not in values
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "div" and "width:" in (values.get("style") or ""):
            self.widths.append(float(values["style"].partition("width:")[2].partition("%")[0]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_command_prints_json_and_writes_a_page(v3_file, tmp_path, capsys):
    words = ["plan", "--config", v3_file, "--hardware", "V5P", "--chips", "1024"]
    words += [f"--config.{one}" for one in ON_V5P]
    assert main([*words, "--json", "--html", str(tmp_path / "plan.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == {"data": 2, "fsdp": 8, "expert": 64} and found["memory"]["fits"]
    assert sum(found["memory"]["by_category"].values()) == pytest.approx(found["memory"]["peak"])
    assert found["tokens"] == pytest.approx(14.8e12, rel=0.02)  # the ramp is counted
    assert found["tokens"] < 244_108 * 15360 * 4096
    checker = Checker()
    checker.feed((tmp_path / "plan.html").read_text())
    assert checker.open == []
    assert sum(checker.widths) == pytest.approx(100 * found["memory"]["peak"] / V5P.memory_bytes, abs=0.2)


def test_command_draws_the_mesh_and_ends_with_1_where_it_does_not_fit(v3_file, capsys):
    words = ["plan", "--config", v3_file, "--hardware", "v5e", "--chips", "1024", "--show-sharding"]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "mesh of 1,024 devices: data 2 x fsdp 8 x expert 64" in out
    [line] = [line for line in out.splitlines() if line.startswith("  moe_layers.mlp.experts.down_proj")]
    assert line.split("  ")[-1] == "1,624.00" and "expert: expert, embed: fsdp" in line
    assert max(map(len, out.splitlines())) <= 130


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hardware", "h1000", "--chips", "8"], 'unknown hardware "h1000"'),
        (["--hardware", "h100", "--chips", "0"], "--chips is 0, but must be at least 1"),
        (["--hardware", "h100", "--chips", "8", "--tokens", "-1"], "--tokens is -1.0, but must be above 0"),
        (["--hardware", "h100", "--chips", "7"], "does not fit 7 device(s)"),
        (["--hardware", "h100"], "--chips"),
        # Both before a compilation of minutes.
        (["--hardware", "h100", "--chips", "8", "--compile", "--html", "/nowhere/a.html"], "/nowhere does not exist"),
        (["--hardware", "h100", "--chips", "8", "--compile", "--html", "/"], "/ is a directory; name a file"),
        (["--hardware", "h100", "--chips", "8", "--json", "--show-sharding"], "--json has none; leave one of them out"),
    ],
)
def test_mistakes_are_sentences(repository, words, message, capsys):
    assert main(["plan", "--config", str(repository / "configs" / "tiny.py"), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.5, "0.5"), (950, "950"), (999.4, "999"), (999.6, "1K"), (999_600, "1M"), (1.23e7, "12.3M"), (2.5e12, "2,500B")],
)
def test_numbers_are_told_with_their_letter(value, told):
    assert pages.number(value) == told


def test_small_models_are_told_in_mebibytes(repository):
    tiny = load(str(repository / "configs" / "tiny.py"))
    plan = make_plan(tiny, hardware.HARDWARE["H100"], 8, 1e6)
    assert re.match(r"fits: \d+\.\d+ MiB at the peak .* of 67\.1 GiB", pages.verdict(plan))


def test_cost_of_what_cannot_run_says_so(v3_file, capsys):
    words = ["cost", "--config", v3_file, "--hardware", "h800", "--chips", "64", "--tokens", "1.4e11", "--json"]
    assert main([*words, "--config.mesh.fsdp=8", "--config.mesh.expert=8"]) == 1
    ran = capsys.readouterr()
    assert "WARNING: it does not fit: 377.4 GiB" in ran.err and json.loads(ran.out)
    assert "0.14T tokens" in cost.as_text([cost.Figure("ours", "tokens", 1.4e11, "tokens", "stated", "")])


def test_cost_prices_a_run_of_your_own(repository, capsys):
    tiny = str(repository / "configs" / "tiny.py")
    assert main(["cost", "--config", tiny, "--hardware", "h800", "--chips", "8"]) == 0
    assert "your run on 8 H800" in capsys.readouterr().out
    assert main(["cost", "--hardware", "h800"]) == 2
    assert "name it with --config" in capsys.readouterr().err
    assert main(["cost", "--config", tiny]) == 2
    assert "needs --config, --hardware and --chips together" in capsys.readouterr().err


def test_neither_plan_nor_cost_imports_jax(v3_file):
    code = f"""
import sys
from dsjax.__main__ import main
assert main(["plan", "--config", {v3_file!r}, "--hardware", "v5p", "--chips", "1024", "--config.precision=bf16",
             "--config.fp8.working_copy=false", "--show-sharding"]) == 0
assert main(["cost"]) == 0
assert not {{"jax", "flax", "numpy.core"}} & set(sys.modules), "heavy imports"
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
