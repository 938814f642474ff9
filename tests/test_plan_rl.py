"""dsjax plan --rl: rollouts, scoring and updates against hand counts; R1's stages are planned without their weights."""

import dataclasses
import json
import subprocess
import sys

import pytest
import small
from test_plan import Checker

from dsjax.__main__ import main
from dsjax.config import Config, ConfigError, GRPOConfig, load
from dsjax.inference import decoding
from dsjax.planning import hardware, rl, rl_pages
from dsjax.planning.collectives import forward_flows
from dsjax.planning.cost import figures
from dsjax.planning.counts import flops_per_token
from dsjax.planning.memory import MOMENTS, memory
from dsjax.planning.plan import make_plan
from dsjax.planning.rl import CASES, make_rl_plan
from dsjax.planning.roofline import EFFICIENCY, HBM_EFFICIENCY, StepTime, forward_time, without_mtp
from dsjax.planning.weights import weights

H200 = hardware.get("h200")
GiB = 2**30
# V3, MTP included and left out, routing biases left out.
ALL, MAIN = 671_026_419_200 + 11_610_068_224 - 59 * 256, 671_026_419_200 - 58 * 256
NORMS = 61 * (2 * 7168 + 1536 + 512) + 7168


@pytest.fixture(scope="module")
def r1():
    from conftest import REPOSITORY

    return lambda *changes, form="r1_zero": load(str(REPOSITORY / "configs" / f"r1.py:{form}"), changes)


@pytest.fixture(scope="module")
def zero(r1):
    return make_rl_plan(r1("dispatch.ranks_per_node=8"), H200, 512)


def term(plan, name: str) -> rl.Term:
    [found] = [one for one in plan.plan.memory.terms if one.name == name]
    return found


def grown(config: Config, section: str = "grpo", **values) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


@pytest.fixture
def tiny() -> Config:
    """2 questions x 4 samples a step, 2 steps a rollout, rows of 64 tokens, one device."""
    config = small.config(data=-1, batch_size=8, microbatch_size=4, total_steps=10)
    config = grown(config, "data", sequence_length=64)
    grpo = GRPOConfig(group_size=4, minibatches=2, max_new_tokens=48, slots=4, kl_coefficient=0.001)
    return dataclasses.replace(config, grpo=grpo)


# --- the rollout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "length", "token_steps"),
    [
        (2048, 8192, 32768),  # 8,192 samples of 8,192 tokens, 2,048 at a time: exactly the longest's
        (1024, 8192, 65536),
        (8192, 8192, 32768),  # all at once: the longest decides
        (16384, 100, 32768),  # slots that stay empty help nobody
        (512, 16384, 262144),
    ],
)
def test_token_steps_give_all_tokens_and_the_longest_sample(r1, slots, length, token_steps):
    plan = make_rl_plan(r1(f"grpo.slots={slots}"), H200, 512, length)
    assert plan.token_steps == token_steps


def test_a_sample_has_a_quarter_of_the_limit_where_nobody_says(zero, r1):
    assert zero.response_length == 8192 and zero.plan.tokens == 10_400 * 512 * 8192
    # The limit is the smaller of the two.
    assert make_rl_plan(r1("grpo.max_new_tokens=4096"), H200, 512).response_length == 1024


def test_slots_are_spread_over_the_devices(tiny):
    assert make_rl_plan(grown(tiny, slots=5), H200, 1).slots == 5
    assert make_rl_plan(grown(tiny, slots=5), H200, 4).slots == 8


def test_the_cache_has_room_as_the_engine_makes_it():
    assert (rl.SMALLEST_BUCKET, rl.STEPS) == (decoding.SMALLEST_BUCKET, decoding.STEPS)
    for length, most in ((1, 4096), (32, 4096), (33, 4096), (64, 4096), (250, 256), (4000, 4096), (32768, 163840)):
        config = grown(grown(small.config(), "data", sequence_length=length), "model", max_position_embeddings=most)
        assert rl.cache_room(config) == decoding.bucket(min(length + decoding.STEPS, most))
        shorter = grown(config, max_new_tokens=max(1, length // 2))
        assert rl.cache_room(shorter) == decoding.bucket(min(max(1, length // 2) + decoding.STEPS, most))


def test_token_step_by_hand(zero):
    """4 tokens a device; BF16 weights, of which experts lie on 256 ranks; caches of 65,536 positions."""
    dense = 61 * 187_105_280 + 3 * 396_361_728 + 58 * 44_040_192  # projections, dense and shared feed-forward
    head, gate, expert = 129280 * 7168, 58 * 7168 * 256, 58 * 44_040_192
    norms = 2 * (61 * (2 * 7168 + 1536 + 512) + 7168)  # not cut: read once, as they lie
    weights_read = 2 * (2 * (dense + head + expert) + 4 * gate) + norms  # written where gathered, and read
    cache = 4 * 65536 * 61 * 576 * 2
    seconds = (weights_read + cache) / (4.8e12 * HBM_EFFICIENCY)
    # Activations of 4 tokens are nothing beside that; rows of experts are rounded up to 128.
    assert zero.token_step.memory == pytest.approx(seconds, rel=0.02) and zero.token_step.memory > seconds
    core = 4 * 65536 * 2 * 61 * 128 * (512 + 512 + 64) / (989e12 * EFFICIENCY["attention"])
    products = 4 * 2 * 36_624_596_992 / (989e12 * EFFICIENCY["bf16"])
    assert zero.token_step.compute == pytest.approx(core + products, rel=1e-3)


def test_links_of_a_token_step_are_those_of_a_forward_pass(zero, r1):
    """Every weight is gathered for every token step: 2 bytes of each, but what a device or its rank has."""
    config = zero.plan.config
    one = grown(grown(config, "training", batch_size=2048, microbatch_size=2048), "data", sequence_length=1)
    found = {flow.cause: flow for flow in forward_flows(without_mtp(one), zero.plan.sizes, "all_to_all", 8)}
    assert set(found) == {
        "weights, forward", "head", "embedding, forward", "tokens to experts", "sums from experts",
    }  # fmt: skip
    cut = 61 * 187_105_280 + 3 * 396_361_728 + 58 * 44_040_192
    gathered = 2 * cut * 511 / 512 + 4 * 58 * 7168 * 256 * 511 / 512 + 2 * 58 * 44_040_192 / 2
    assert found["weights, forward"].total == pytest.approx(gathered, rel=1e-3)
    assert found["head"].total == pytest.approx(2 * 129280 * 7168 * 511 / 512)
    slow = sum(flow.slow for flow in found.values())
    assert zero.token_step.slow == pytest.approx(slow / (50e9 * 0.85))


def test_decoding_gathers_weights_as_the_closed_form_says():
    """The compiled program of a token step: every matrix that the mesh cuts comes whole to each device."""
    code = """
import os, re, sys
os.environ["XLA_FLAGS"], os.environ["JAX_PLATFORMS"] = "--xla_force_host_platform_device_count=8", "cpu"
sys.path[:0] = [".", "tests"]
import dataclasses
import jax, numpy as np, small
from dsjax.inference import decoding
from dsjax.training.state import abstract_state
model = dataclasses.replace(small.MODEL, vocab_size=80, hidden_size=64, num_nextn_predict_layers=0)
config = small.config(model, fsdp=2, expert=4)
programs = decoding.programs(config, small.mesh(1, 2, 4))
state = abstract_state(config, small.mesh(1, 2, 4))
prepared = programs.prepare.lower(state.params, state.router_bias)
place = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)
given = jax.tree.map(place, prepared.out_info, prepared.compile().output_shardings)
step = programs.decode.lower(*given, programs.empty_state(8, 64), np.ones(8, bool), np.int32(1))
for line in step.compile().as_text().splitlines():
    found = re.search(r"= f32\\[([0-9,]+)\\]\\S* all-gather", line)
    if found:
        print(found[1])
"""
    from conftest import REPOSITORY

    told = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    shapes = [sorted(n for n in map(int, line.split(",")) if n > 1) for line in told.stdout.split()]
    model = dataclasses.replace(small.MODEL, vocab_size=80, hidden_size=64, num_nextn_predict_layers=0)
    sizes, missing = {"data": 1, "fsdp": 2, "expert": 4}, []
    for one in weights(model):
        dims = one.shape[1:] if one.axes[0] == "layers" else one.shape
        if one.is_expert:
            dims = (dims[0] // 4, *dims[1:])
        if one.part != "embedding" and one.ways(sizes) > 1 and sorted(dims) not in shapes:
            missing.append(one.name)
    assert len(shapes) > 10 and missing == []


# --- scoring, update, and their sum ----------------------------------------------------------------------------------


def test_forward_pass_by_hand(zero):
    """A third of forward and backward, on 32,768 tokens a device, at the efficiencies of a train step."""
    core = 61 * 2 * 32769 / 2 * 128 * 320
    rest = 2 * 36_624_596_992
    seconds = 32768 * (core / EFFICIENCY["attention"] + rest / EFFICIENCY["bf16"]) / 989e12
    assert zero.old.compute == pytest.approx(seconds, rel=1e-3)
    assert zero.reference == zero.old
    # Full recomputation: a third more of the layers, and the scores again.
    update = (3 + 1 + 192 / 320) * core / EFFICIENCY["attention"] + 4 * (rest - 2 * 926_679_040) / EFFICIENCY["bf16"]
    update += 3 * 2 * 926_679_040 / EFFICIENCY["bf16"]
    assert zero.plan.time.compute == pytest.approx(32768 * update / 989e12, rel=1e-3)


def test_rows_are_whole_microbatches(tiny):
    # 8 samples of 12 tokens fill 2 rows of 64, which take one microbatch of 4; of 48 tokens 6 rows, and two.
    short, long = (make_rl_plan(tiny, H200, 1, length) for length in (12, 48))
    assert (short.rows, long.rows) == (4, 8)
    assert long.old.compute == pytest.approx(2 * short.old.compute)


def test_no_reference_without_a_kl_term(tiny):
    plan, without = make_rl_plan(tiny, H200, 1), make_rl_plan(grown(tiny, kl_coefficient=0.0), H200, 1)
    assert without.reference is None and plan.reference == plan.old
    for case, seconds in CASES.items():
        assert plan.phases(case)["scoring"] == 2 * without.phases(case)["scoring"] == 2 * seconds(plan.old)
    assert plan.flops_by_phase["scoring"] == 2 * without.flops_by_phase["scoring"]
    assert plan.plan.memory.peak - without.plan.memory.peak == term(plan, "FP32 weights").bytes


def test_a_kept_mask_scores_twice(tiny):
    plan = make_rl_plan(tiny, H200, 1)
    kept = make_rl_plan(grown(tiny, keep_sampling_mask=True, top_p=0.9), H200, 1)
    assert kept.old.serial == pytest.approx(2 * plan.old.serial) and kept.reference == plan.reference


def test_a_step_is_its_share_of_a_rollout_scoring_and_an_update(tiny):
    plan = dataclasses.replace(
        make_rl_plan(grown(tiny, "hardware", price_per_chip_hour=3.0), H200, 4),
        token_steps=100.0,
        token_step=StepTime(1.0, 2.0, 4.0, 8.0),
        old=StepTime(10.0, 0.0, 0.0, 0.0),
        reference=StepTime(20.0, 0.0, 0.0, 0.0),
    )
    plan = dataclasses.replace(plan, plan=dataclasses.replace(plan.plan, time=StepTime(30.0, 10.0, 0.0, 20.0)))
    # 50 token steps each: 15 s serial, 8 expected (the slow link alone), 8 hidden, 3 without links.
    assert plan.phases("serial") == {"rollout": 750.0, "scoring": 30.0, "update": 60.0}
    assert plan.phases("expected") == {"rollout": 400.0, "scoring": 30.0, "update": 50.0}
    assert plan.phases("all hidden") == {"rollout": 400.0, "scoring": 30.0, "update": 30.0}
    assert plan.phases("no links") == {"rollout": 150.0, "scoring": 30.0, "update": 40.0}
    assert plan.step_seconds("no links") == 220.0 and plan.run_seconds("no links") == 2200.0
    assert plan.chip_hours("no links") == pytest.approx(2200 * 4 / 3600)
    assert plan.dollars("no links") == pytest.approx(3 * 2200 * 4 / 3600)
    assert plan.kilowatt_hours("no links") == pytest.approx(0.7 * 2200 * 4 / 3600)


def test_flops_are_those_of_the_tokens_drawn(zero):
    tokens, per_token = 512 * 8192, flops_per_token(zero.plan.config.model, 8192)
    assert zero.flops_by_phase == pytest.approx(
        {"rollout": tokens * per_token / 3, "scoring": tokens * per_token * 2 / 3, "update": tokens * per_token}
    )
    seconds = zero.step_seconds("expected")
    assert zero.mfu("expected") == pytest.approx(2 * tokens * per_token / (seconds * 512 * 989e12))


# --- memory ----------------------------------------------------------------------------------------------------------


def test_reference_is_held_as_the_weights_are(zero):
    cut = ALL - NORMS - (2 * 7168 + 1536 + 512 + 3 * 7168)
    held = 4 * (cut / 512 + (ALL - cut)) + 4 * 59 * 256
    assert term(zero, "FP32 weights").bytes == pytest.approx(held, rel=1e-6)
    assert set(term(zero, "FP32 weights").alive) == {"rollout", *MOMENTS}


def test_engines_copy_is_of_matrices_and_only_where_they_are_multiplied_in_bf16(zero, r1, tiny):
    matrices = ALL - NORMS - (2 * 7168 + 1536 + 512 + 3 * 7168) - 59 * 7168 * 256
    copy = term(zero, "matrices in BF16")
    assert copy.bytes == pytest.approx(2 * matrices / 512, rel=1e-6) and copy.alive == ("rollout",)
    fp8 = make_rl_plan(r1("precision=fp8_deepseek"), H200, 512)
    for plan in (fp8, make_rl_plan(tiny, H200, 1)):
        assert "matrices in BF16" not in [one.name for one in plan.plan.memory.terms]


def test_cache_is_there_during_the_rollout_alone(zero):
    cache = term(zero, "4 samples of 65,536 positions")
    assert cache.bytes == 4 * 65536 * 61 * 576 * 2 and cache.alive == ("rollout",)
    growing = term(zero, "the smaller one, while it grows")
    assert growing.bytes == cache.bytes / 2 and growing.alive == ("rollout",)


def test_update_holds_what_a_train_step_does_but_mtps_activations(r1):
    config = r1("model.num_nextn_predict_layers=0", "grpo.kl_coefficient=0", "dispatch.form=all_to_all")
    plan, step = make_rl_plan(config, H200, 512), make_plan(config, H200, 512, 1.0)
    for moment in MOMENTS:
        assert plan.plan.memory.at(moment) == pytest.approx(step.memory.at(moment))
    with_mtp = make_rl_plan(r1("grpo.kl_coefficient=0", "dispatch.form=all_to_all"), H200, 512)
    lean, full = (
        sum(one.bytes for one in each.terms if one.category == "activations")
        for each in (with_mtp.plan.memory, make_plan(with_mtp.plan.config, H200, 512, 1.0).memory)
    )
    assert full - lean == 32768 * 7168 * 2  # the input of MTP's layer, which recomputation keeps
    assert with_mtp.plan.memory.state > plan.plan.memory.state


def test_the_phase_that_holds_more_is_the_peak(tiny):
    def peak(slots: int) -> tuple[str, float]:
        found = make_rl_plan(grown(tiny, slots=slots), H200, 1).plan.memory
        assert found.peak == max(found.at(moment) for moment in ("rollout", *MOMENTS))
        return found.moment, found.peak

    few, many = peak(1), peak(4096)
    assert few[0] in MOMENTS and many[0] == "rollout" and many[1] > few[1]


def test_rollout_holds_no_gradients(zero):
    for one in zero.plan.memory.terms:
        if one.category in ("gradients", "activations", "attention"):
            assert "rollout" not in one.alive


# --- R1 --------------------------------------------------------------------------------------------------------------


def test_r1_zero_between_an_engine_without_links_and_this_one(zero):
    """101K hours: below both, as docs/planning.md says and why; above what update and scoring take by themselves."""
    [published] = [one.value for one in figures() if one.name == "R1-Zero, hours"]
    assert published == 101_000 and published == pytest.approx(512 * 198, rel=0.01)
    assert zero.chip_hours("no links") == pytest.approx(180e3, rel=0.01)
    assert zero.chip_hours("expected") == pytest.approx(580e3, rel=0.01)
    phases = zero.phases("no links")
    trained = (phases["scoring"] + phases["update"]) * 10_400 * 512 / 3600
    assert trained == pytest.approx(81.3e3, rel=0.01) and trained < published < zero.chip_hours("no links")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def words(repository):
    config = str(repository / "configs" / "r1.py:r1_zero")
    return ["plan", "--config", config, "--hardware", "h200", "--chips", "512", "--rl"]


def test_command_needs_no_weights_and_says_so(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "8,192 samples of 8,192 tokens on average, 2,048 at a time: 32,768 token steps" in " ".join(out.split())
    assert "there is no DeepSeek-V3-Base to begin with" in out
    assert max(map(len, out.splitlines())) <= 110
    # To run it, they are needed.
    assert main(["grpo", "--config", words[2], "--workdir", str(tmp_path / "run")]) == 2
    assert "there is no DeepSeek-V3-Base" in capsys.readouterr().err


def test_weights_that_are_there_decide_the_architecture_of_a_plan(words, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    assert main([*words, f"--config.init_from={tmp_path / 'nothing'}"]) == 2
    assert "is neither a published checkpoint" in capsys.readouterr().err


def test_command_prints_json_and_writes_a_page(words, tmp_path, capsys):
    page = tmp_path / "plan.html"
    assert main([*words, "--json", "--html", str(page), "--response-length", "4096"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["response_length"] == 4096 and found["steps"] == 10_400 and found["samples_per_step"] == 512
    assert sum(found["memory"]["by_category"].values()) == pytest.approx(found["memory"]["peak"])
    assert set(found["run"]) == {"serial", "expected", "all_hidden", "no_links"}
    for one in found["run"].values():
        assert sum(one["phases"].values()) == pytest.approx(one["step_seconds"])
        assert one["chip_hours"] == pytest.approx(one["step_seconds"] * 10_400 * 512 / 3600)
        assert one["dollars"] == pytest.approx(3.5 * one["chip_hours"])
    assert found["model_flops"] == pytest.approx(10_400 * sum(found["model_flops_per_step"].values()))
    assert set(found["time"]) == {"token_step", "scoring_old", "scoring_reference", "update"}
    checker = Checker()
    checker.feed(page.read_text())
    assert checker.open == [] and "scoring, reference" in page.read_text()


def test_what_does_not_fit_names_the_knob(words, capsys):
    assert main([*words, "--config.grpo.slots=8192", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["memory"]["fits"] and found["memory"]["moment"] in ("rollout", *MOMENTS)
    best = found["knobs"][0]
    assert best["change"] == "grpo.slots=4096" and best["peak"] < found["memory"]["peak"]
    assert main([*words, "--config.grpo.slots=8192"]) == 1
    assert "what helps most is grpo.slots=4096" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--search"], "--search is of plans of train steps"),
        (["--tokens", "1e9"], "--tokens is of plans of train steps"),
        (["--compile"], "--compile is of plans of train steps"),
        (["--response-length", "40000"], "samples of 40000 tokens on average cannot be: they have 1 to 32768"),
        (["--response-length", "0"], "samples of 0 tokens"),
        (["--chips", "500"], "does not fit 500 device(s)"),
    ],
)
def test_mistakes_are_sentences(words, more, message, capsys):
    assert main([*words, *more]) == 2
    assert message in capsys.readouterr().err


def test_response_length_alone_is_a_mistake(repository, capsys):
    tiny = ["plan", "--config", str(repository / "configs" / "tiny.py"), "--hardware", "h100", "--chips", "8"]
    assert main([*tiny, "--response-length", "10"]) == 2
    assert "--response-length is of --rl" in capsys.readouterr().err


def test_a_plan_imports_no_jax(repository):
    code = f"""
import sys
from dsjax.__main__ import main
words = ["--hardware", "h200", "--chips", "512", "--rl"]
assert main(["plan", "--config", {str(repository / "configs" / "r1.py:r1_rl")!r}, *words]) == 0
assert not {{"jax", "flax", "numpy"}} & set(sys.modules), "heavy imports"
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_pages_tell_what_a_sample_costs_to_hold(zero):
    assert rl_pages.facts(zero)["cache"] == "4 samples a device, with room for 65,536 positions each"
    assert "fits: 73.4 GiB at the peak (attention)" in rl_pages.as_text(zero)


def test_a_response_longer_than_a_row_cannot_be(tiny):
    with pytest.raises(ConfigError, match="they have 1 to 48, the smaller of"):
        make_rl_plan(tiny, H200, 1, 49)


def test_forward_pass_alone_is_cheaper_in_everything(tiny):
    sizes = {"data": 1, "fsdp": 2, "expert": 2}
    config = grown(without_mtp(tiny), "training", remat="full")
    plan = make_plan(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=2, expert=2)), H200, 4, 1.0)
    forward = forward_time(plan.config, sizes, plan.config.dispatch.form, H200)
    for name in ("compute", "memory", "fast"):
        assert 0 < getattr(forward, name) < getattr(plan.time, name) / 2
    assert memory(plan.config, sizes, plan.config.dispatch.form, splash=False).moments == MOMENTS
