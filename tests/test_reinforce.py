"""A run of reinforcement learning as a whole: resumed, interrupted, refused, told."""

import dataclasses
import signal
import types

import jax
import numpy as np
import pytest
import small
from tiny_runs import change, start, wait_for

from dsjax.config import Config, ConfigError, DataConfig, GRPOConfig, TaskConfig
from dsjax.data.chat import find_template
from dsjax.data.tokenizer import ByteTokenizer
from dsjax.inference.loading import load
from dsjax.planning import counts
from dsjax.posttraining import collection, evaluation, loop
from dsjax.posttraining.collection import collect
from dsjax.posttraining.evaluation import Accuracy, answer_of, evaluate_problems, vote
from dsjax.posttraining.loop import reinforce
from dsjax.posttraining.rewards import make_judge
from dsjax.posttraining.rollouts import Sample
from dsjax.posttraining.tasks import Problem, make_task
from dsjax.training import checkpoint
from dsjax.training.monitor import read_rows
from dsjax.training.workdir import CHECKPOINTS, EXPERT_LOAD, METRICS

MODEL = dataclasses.replace(small.MODEL, vocab_size=264)
# What must come back to the last bit; the rest are times.
EXACT = (
    *("step", "tokens", "loss", "kl", "entropy", "grad_norm", "reward", "reward_accuracy", "reward_format"),
    *("response_length", "truncated_fraction", "zero_variance_groups", "log_prob_gap", "validation_accuracy"),
)

HALF = "def half(prompt, completion, answer):\n    return (len(completion) % 7) / 7\n"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Four steps in two rollouts, on 2 x 4 devices; rewards that differ whatever an untrained model says."""
    reward = tmp_path_factory.mktemp("rewards") / "rewards.py"
    reward.write_text(HALF)
    config = small.config(MODEL, data=2, expert=4, total_steps=4, batch_size=16, microbatch_size=8)
    return dataclasses.replace(
        config,
        data=DataConfig(sequence_length=64),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-2, decay_learning_rate=1e-2, weight_decay=0.0),
        task=TaskConfig(steps=1, rewards=(f"{reward}:half", "format")),
        grpo=GRPOConfig(
            group_size=4, minibatches=2, max_new_tokens=10, slots=16, reference_every_steps=2, validation_samples=2
        ),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=2, keep_last=5),
        evaluation=dataclasses.replace(config.evaluation, every_steps=2, sequences=8),
        monitor=dataclasses.replace(config.monitor, compile_cache=None),
        hardware=dataclasses.replace(config.hardware, peak_flops_per_second=1e12, price_per_chip_hour=1.0),
    )


def once(make):
    """`make` that gives the first result to every later call: all runs of this module are compiled alike."""
    kept = []

    def first(*arguments):
        kept.extend([] if kept else [make(*arguments)])
        return kept[0]

    return first


MAKERS = {name: vars(loop)[name] for name in ("make_train_step", "make_scorer")}


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """Runs of this module share what they compile."""
    patch = pytest.MonkeyPatch()
    for name, make in MAKERS.items():
        patch.setattr(loop, name, once(make))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, reinforce(config, workdir)


def exact(workdir):
    return [{name: row.get(name) for name in EXACT} for row in read_rows(workdir / METRICS)]


def arrays(config, workdir, step):
    position = loop.Position(step, 0)
    return jax.device_get(loop.load_policy(config, small.mesh(2, 1, 4), workdir, position))


def test_run_tells_what_it_did(straight, capsys):
    workdir, summary = straight
    rows = read_rows(workdir / METRICS)
    assert (summary.step, summary.exit_code) == (4, 0)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [("rollout_seconds" in row, "validation_accuracy" in row) for row in rows] == [(1, 0), (0, 1)] * 2
    for row in rows:
        assert row["log_prob_gap"] < 1e-3 and 0 <= row["reward"] <= 2 and 0 < row["response_length"] <= 10
        assert row["reward_failures"] == 0 and 0 <= row["zero_variance_groups"] <= 4 and row["grad_norm"] > 0
    # The reference is renewed after two steps; one step later the policy has moved off it again.
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[1]["kl"] > 1e-5
    assert rows[2]["kl"] == pytest.approx(0, abs=1e-6) and rows[3]["kl"] > 1e-5
    assert checkpoint.steps(workdir / CHECKPOINTS) == [2, 4]


def test_routing_biases_and_mtp_take_no_part(config, straight):
    workdir, _ = straight
    state = loop.load_policy(config, small.mesh(2, 1, 4), workdir, loop.Position(4, 0))
    assert config.training.bias_update_speed > 0
    assert not any(np.any(bias) for bias in jax.tree.leaves(state.router_bias))
    # Nor do FLOPs count MTP.
    row = read_rows(workdir / METRICS)[-1]
    flops = counts.flops_per_token(config.model, config.data.sequence_length, mtp=False)
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / 1e12)
    load_LE = read_rows(workdir / EXPERT_LOAD)[0]["load"]
    assert len(load_LE) == config.model.num_moe_layers


def test_interrupted_between_rollouts_it_goes_on_bit_for_bit(config, straight, tmp_path):
    shorter = change(config, "training", total_steps=2)
    assert reinforce(shorter, tmp_path).step == 2
    assert reinforce(config, tmp_path).step == 4
    assert exact(tmp_path) == exact(straight[0])
    for a, b in zip(
        jax.tree.leaves(arrays(config, tmp_path, 4)), jax.tree.leaves(arrays(config, straight[0], 4)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_killed_behind_a_save_it_goes_on_bit_for_bit(config, straight, tmp_path):
    """The save of step 2 may have been finished or not."""
    process = start(config, tmp_path, reinforce)
    wait_for(lambda: len(read_rows(tmp_path / METRICS)) >= 3, process)
    process.kill()
    process.wait()
    process.stdout.close()
    assert reinforce(config, tmp_path).step == 4
    assert exact(tmp_path) == exact(straight[0])


def test_asked_to_stop_while_it_samples_it_saves_and_goes_on(config, straight, tmp_path, monkeypatch, capsys):
    original, drawn = loop.sample, []

    def sample(run, *rest):
        drawn.append(1)
        if len(drawn) == 2:  # of the second rollout
            run.interrupt.requested = signal.SIGINT
        return original(run, *rest)

    monkeypatch.setattr(loop, "sample", sample)
    never = change(config, "checkpoint", every_steps=None)
    stopped = reinforce(never, tmp_path)
    assert (stopped.step, stopped.exit_code) == (2, 130)
    assert "the same command goes on from here" in capsys.readouterr().out
    monkeypatch.setattr(loop, "sample", original)
    assert reinforce(never, tmp_path).exit_code == 0
    assert exact(tmp_path) == exact(straight[0])


@pytest.mark.slow
@pytest.mark.parametrize("old_log_probs", ["trainer", "rollout"])
def test_corrections_of_v32_run_together(config, tmp_path, monkeypatch, old_log_probs):
    for name, make in MAKERS.items():
        monkeypatch.setattr(loop, name, make)
    mask = {"keep_sampling_mask": True, "top_p": 0.9} if old_log_probs == "trainer" else {}
    corrected = {"unbiased_kl": True, "off_policy_threshold": 0.1, "keep_routes": True, "old_log_probs": old_log_probs}
    reinforce(change(config, "grpo", **corrected, **mask), tmp_path)
    rows = read_rows(tmp_path / METRICS)
    assert len(rows) == 4
    for row in rows:
        assert row["log_prob_gap"] < 1e-3 and np.isfinite(row["loss"]) and row["grad_norm"] > 0
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6), "the reference chooses from the same"


def test_complete_run_says_so(config, straight, capsys):
    again = reinforce(config, straight[0])
    assert again.step == 4 and "is complete" in capsys.readouterr().out


def test_trained_policy_is_loaded_like_any_run(straight):
    engine = load(straight[0])
    assert isinstance(engine.complete("1+1=?", max_new_tokens=4), str)


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        (
            "training",
            {"batch_size": 24, "total_steps": 3},
            r"training.total_steps is 3, .* multiple of grpo.minibatches",
        ),
        ("grpo", {"group_size": 5}, r"training.batch_size is 16, .* multiple of grpo.group_size = 5"),
        ("evaluation", {"every_steps": 3}, r"evaluation.every_steps is 3"),
        ("checkpoint", {"keep_best": 1, "every_steps": 2}, r"keep_best is 1, but dsjax grpo has no such thing"),
        ("model", {"vocab_size": 100}, r"tokenizer 'bytes' has 260 tokens"),
        ("task", {"rewards": ("nowhere.py:f",)}, r"cannot read the reward file nowhere.py"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(config, tmp_path, section, values, told):
    with pytest.raises(ConfigError, match=told):
        reinforce(change(config, section, **values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_task_is_another_run(config, straight):
    with pytest.raises(ConfigError, match="task.steps: 1 -> 2"):
        reinforce(change(change(config, "task", steps=2), "training", total_steps=6), straight[0])


def test_prompts_are_written_by_the_tokenizer_in_use(config, tmp_path, monkeypatch):
    for folder, template in (("mine", "mine"), ("run/tokenizer", "the run's"), ("given", "given")):
        (tmp_path / folder).mkdir(parents=True)
        ByteTokenizer().write(tmp_path / folder)
        (tmp_path / folder / "chat_template.jinja").write_text(template)
    engine = types.SimpleNamespace(config=change(config, "data", tokenizer=str(tmp_path / "given" / "tokenizer.json")))
    seen = []

    def measure(engine, config, task, template, problems, samples):
        seen.append(template.source)
        return Accuracy(0.0, 0.0, [Sample(Problem("1+1=?", "2"), [1], [2], [0.0], "2", is_truncated=False)])

    monkeypatch.setattr(evaluation, "load", lambda *_, **__: engine)
    monkeypatch.setattr(evaluation, "measure_accuracy", measure)
    evaluate_problems(str(tmp_path / "run"), None, 1, 1, tokenizer=engine.config.data.tokenizer)
    assert seen == ["given"]

    # A run by rewards goes on with its own copy, whatever lies where it came from.
    class Seen(Exception):
        """Ends the run."""

    def stop(*_, tokenizer, **__):
        seen.append(tokenizer._path)
        raise Seen

    monkeypatch.setattr(loop, "Engine", stop)
    monkeypatch.setattr(loop, "load_policy", lambda *_: types.SimpleNamespace(params=None, router_bias=None))
    monkeypatch.setattr(loop, "introduce", lambda *_: None)
    mine = change(config, "data", tokenizer=str(tmp_path / "mine" / "tokenizer.json"))
    with pytest.raises(Seen):
        reinforce(mine, tmp_path / "new")
    copy = tmp_path / "new" / "tokenizer" / "tokenizer.json"
    assert copy.read_bytes() == seen[-1].read_bytes() and find_template(str(copy)).source == "mine"
    (tmp_path / "mine" / "tokenizer.json").unlink()
    (tmp_path / "new" / CHECKPOINTS / "2").mkdir(parents=True)
    monkeypatch.setattr(loop, "find_start", lambda *_: types.SimpleNamespace(position=loop.Position(2, 8)))
    with pytest.raises(Seen):
        reinforce(mine, tmp_path / "new")
    assert seen[-1] == copy


def test_rollouts_that_do_not_meet_the_checkpoint_are_told(config, straight):
    """Steps would go 4, 7, 10: past the end at 6, and past every save."""
    longer = change(change(config, "training", total_steps=6), "evaluation", every_steps=3)
    longer = change(change(longer, "checkpoint", every_steps=3), "grpo", minibatches=3, reference_every_steps=3)
    with pytest.raises(ConfigError, match="grpo.minibatches is 3, .* do not meet step 4, .* a divisor of 4"):
        reinforce(longer, straight[0], ["grpo.minibatches", "grpo.reference_every_steps"])
    assert checkpoint.steps(straight[0] / CHECKPOINTS) == [2, 4] and len(read_rows(straight[0] / METRICS)) == 4


def test_rewards_and_scoring_that_take_long_are_no_stuck_process(config, monkeypatch):
    """Each of the two steps has 16 samples with two rewards, and is scored once; no step has ended yet."""
    problem, beats = Problem("1+1=?", "2"), []
    samples = [Sample(problem, [1], [2], [-1.0], "<answer>2</answer>", False)] * 32
    monkeypatch.setattr(loop, "sample", lambda *_: samples)
    monkeypatch.setattr(loop, "gain_experience", lambda *_: (None, 0.0))
    task = make_task(config.task, 0)

    class Begun(Exception):
        """The first step."""

    def one_step(*_):
        raise Begun

    monkeypatch.setattr(loop, "one_step", one_step)
    monitor = types.SimpleNamespace(restart_clock=lambda: None)
    watchdog = types.SimpleNamespace(beat=lambda: beats.append(1))
    with make_judge(config.task, task) as judge, pytest.raises(Begun):
        run = types.SimpleNamespace(config=config, task=task, judge=judge, monitor=monitor, watchdog=watchdog)
        loop.one_rollout(run, None, None, loop.Position(0, 0), None)
    assert len(beats) == 2 * 16 * 2 + 2


def test_votes():
    a, b = "<answer>4</answer>", "<think>x</think><answer> 5 </answer>"
    assert vote([a, b, b, "none"]) == 1 and vote([a, b]) == 0 and vote(["none", "", a]) == 2 and vote(["", ""]) == 0
    assert answer_of(b) == "5" and answer_of("<answer>") is None and answer_of("</answer>") is None


def quiet(line):
    """Instead of print."""


def test_worked_solutions_are_collected_and_gone_on_with(config, tmp_path):
    out = tmp_path / "set.jsonl"
    told = []
    assert collect(config, out, 70, tell=told.append).kept == 70
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    assert [row["problem"] for row in read_rows(out)] == list(range(70)) and len(told) == 2
    out.write_text("".join(lines[:64]))
    assert collect(config, out, 70, tell=told.append).kept == 70
    assert out.read_text() == whole
    with pytest.raises(ConfigError, match="collected in another way .first: 0 -> 3.; choose another file"):
        collect(config, out, 70, first=3)


def test_a_set_grows_by_exactly_what_is_missing(config, tmp_path):
    straight, out = tmp_path / "straight.jsonl", tmp_path / "set.jsonl"
    collect(config, straight, 192, first=5, tell=quiet)
    whole = straight.read_bytes()
    collect(config, out, 10, first=5, tell=quiet)
    assert collect(config, out, 100, first=5, tell=quiet) == (100, 100, 100)
    assert out.read_bytes() == b"".join(whole.splitlines(keepends=True)[:100])
    before = (tmp_path / "set.jsonl.progress").read_bytes()
    assert collect(config, out, 192, first=5, tell=quiet).kept == 192 and out.read_bytes() == whole
    # Killed in the middle of the last write.
    out.write_bytes(whole[:-40])
    (tmp_path / "set.jsonl.progress").write_bytes(before)
    assert collect(config, out, 192, first=5, tell=quiet).kept == 192 and out.read_bytes() == whole
    assert collect(config, out, 50, first=5, tell=quiet) == (192, 192, 192), "what the file holds"


def test_problems_of_which_nothing_is_kept_are_not_drawn_again(config, tmp_path, monkeypatch):
    drawn = []

    def accepted(task, config, how):
        def run(chunk):
            drawn.extend(index for index, _ in chunk)
            yield from ({"messages": [], "problem": index} for index, _ in chunk if index % 100 == 50 for _ in "ab")

        return run

    monkeypatch.setattr(collection, "_accepted", accepted)
    monkeypatch.setattr(collection, "find_step", lambda run: 7)
    out = tmp_path / "set.jsonl"
    for problems in (10, 40, 140, 140):
        done = collect(config, out, problems, "runs/a/rl", samples=2, tell=quiet)
    assert drawn == list(range(140)) and done == (140, 280, 2)
    # The second sample of a problem is lost: the problem is done again, and what comes after it.
    out.write_bytes(out.read_bytes().splitlines(keepends=True)[0])
    assert collect(config, out, 140, "runs/a/rl", samples=2, tell=quiet) == done
    assert drawn[140:] == list(range(50, 140)) and len(read_rows(out)) == 2


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("task", {"system": "Think hard."}, "system: None -> 'Think hard.'"),
        ("task", {"rewards": ("accuracy",)}, "rewards: .* -> ..accuracy.."),
        ("task", {"weights": (1.0, 2.0)}, "weights: None -> .1.0, 2.0."),
        ("grpo", {"temperature": 0.7}, "temperature: 1.0 -> 0.7"),
        ("grpo", {"top_p": 0.9}, "top_p: 1.0 -> 0.9"),
        ("grpo", {"max_new_tokens": 3}, "max_new_tokens: .* -> 3"),
        (None, "runs/b/rl", "checkpoint: '.*runs/a/rl' -> '.*runs/b/rl'"),
    ],
)
def test_what_was_collected_in_another_way_is_not_mixed(config, tmp_path, monkeypatch, section, values, told):
    line = {"messages": [], "problem": 0}
    monkeypatch.setattr(collection, "_accepted", lambda task, config, how: lambda chunk: iter([line]))
    monkeypatch.setattr(collection, "find_step", lambda run: 7)
    out, checkpoint = tmp_path / "set.jsonl", "runs/a/rl"
    config = change(config, "task", rewards=("accuracy", "format"))
    collect(config, out, 1, checkpoint, tell=quiet)
    if section is None:
        checkpoint = values
    else:
        config = change(config, section, **values)
    with pytest.raises(ConfigError, match=f"set.jsonl was collected in another way .{told}.; choose another file"):
        collect(config, out, 2, checkpoint, tell=quiet)
    assert read_rows(out) == [line]
    out.unlink()
    assert collect(config, out, 1, checkpoint, tell=quiet).kept == 1, "deleted, as the sentence says"


def test_a_set_goes_on_with_the_step_that_it_began_with(config, tmp_path, monkeypatch):
    """Whatever its model has learnt since; and a complete one needs no model."""
    steps = []

    def accepted(task, config, how):
        steps.append(how["step"])
        return lambda chunk: iter([{"messages": [], "problem": chunk[0][0]}])

    monkeypatch.setattr(collection, "_accepted", accepted)
    monkeypatch.setattr(collection, "find_step", lambda run: newest.pop())
    newest, out = [8, 7], tmp_path / "set.jsonl"
    for problems in (1, 2, 2):
        collect(config, out, problems, "runs/a/rl", tell=quiet)
    assert steps == [7, 7] and newest == [8]
    out.unlink()
    collect(config, out, 1, "runs/a/rl", tell=quiet)
    assert steps == [7, 7, 8]


def test_a_set_belongs_to_one_process_and_to_us(config, tmp_path):
    out = tmp_path / "set.jsonl"
    with collection._held(out), pytest.raises(ConfigError, match="is being written by another process; stop it"):
        collect(config, out, 3)
    out.write_text("notes without an end")
    with pytest.raises(ConfigError, match="is there without set.jsonl.progress, which tells how"):
        collect(config, out, 3)
    assert out.read_text() == "notes without an end"
    with pytest.raises(ConfigError, match="cannot be written .Is a directory."):
        collect(config, tmp_path, 3)
    out.unlink()
    collect(config, out, 3, tell=quiet)
    out.write_text(out.read_text() + '{"messages": []}\n')
    with pytest.raises(ConfigError, match="holds lines that were not collected into it"):
        collect(config, out, 9)


def test_some_solutions_are_the_answer_alone(config, tmp_path):
    out = tmp_path / "set.jsonl"
    collect(config, out, 300, brief=0.6, tell=quiet)
    texts = [row["messages"][-1]["content"] for row in read_rows(out)]
    assert len(texts) == 300 and 150 < sum(text.startswith("<think></think><answer>") for text in texts) < 210


def test_only_the_right_answers_of_a_model_are_kept(config, straight, tmp_path):
    generous = change(config, "task", rewards=(config.task.rewards[0],))
    loose = tmp_path / "loose.py"
    loose.write_text("def some(prompt, completion, answer):\n    return float(len(completion) % 2)\n")
    generous = change(config, "task", rewards=(f"{loose}:some",))
    out = tmp_path / "set.jsonl"
    done = collect(generous, out, 8, str(straight[0]), samples=4, tell=quiet)
    rows = read_rows(out)
    assert 0 < done.kept == len(rows) < done.drawn == 32
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
