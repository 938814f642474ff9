"""The report of a run that rewards trained: its own pictures, and no loss in nats that is none."""

import json
import re

import numpy as np
import pytest

from dsjax.config import Config
from dsjax.training import summary
from dsjax.training.reinforcement import (
    draw_accuracy,
    draw_objective,
    draw_policy,
    draw_response_length,
    draw_reward,
    draw_seconds,
    is_reinforcement,
)
from dsjax.training.report import report
from dsjax.training.workdir import METRICS, write_config


def row(step: int, minibatches: int = 2, **more) -> dict:
    """A row of dsjax grpo; the first of `minibatches` has the seconds of its rollout."""
    values = {"step": step, "tokens": step * 8192, "loss": 1e-3 * (-1) ** step, "mtp_loss": None, "grad_norm": 0.5}
    values |= {"lr": 1e-3, "batch_size": 30 + step % 3, "step_seconds": 2.0, "tokens_per_second": 4000.0, "mfu": None}
    values |= {"expert_load_max_over_mean": 1.5, "dropped_tokens": 0, "cost_usd": 0.25, "seconds": 10.0 * step}
    values |= {"reward": 0.01 * step + 0.5, "reward_accuracy": 0.01 * step, "reward_format": 0.5, "kl": 0.001 * step}
    values |= {"response_length": 20.0 + step, "truncated_fraction": 0.25, "zero_variance_groups": 3}
    values |= {"reward_failures": 0, "entropy": 0.5, "clip_fraction": 0.125, "off_policy_fraction": 0.0}
    values |= {"log_prob_gap": 1e-5}
    if step % minibatches == 1 or minibatches == 1:
        values |= {"rollout_seconds": 8.0, "reward_seconds": 1.0, "scoring_seconds": 4.0}
    if step % 10 == 0:
        values |= {"validation_accuracy": 0.008 * step, "validation_majority": 0.009 * step}
    return values | more


def write(workdir, rows):
    write_config(workdir, Config())
    (workdir / METRICS).write_text("".join(json.dumps(one) + "\n" for one in rows))
    return workdir


def lines(axes) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def test_a_run_by_rewards_has_its_own_plots_and_facts(tmp_path):
    write(tmp_path, [row(step) for step in range(1, 61)])
    text = report(tmp_path).read_text()
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {
        "reward", "accuracy", "response_length", "policy", "seconds", "objective", "learning_rate", "throughput",
    }  # fmt: skip
    assert len(re.findall(r"base64,", text)) == 8
    facts = dict(re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", text))
    # Steps 41 to 60.
    assert facts["reward"] == "1.005 (accuracy 0.505, format 0.500), mean of the last 20 steps"
    assert facts["accuracy"] == "48.0% on held-out problems, by majority 54.0% (step 60)"
    assert facts["completions"] == "70 tokens, 25.0% cut off at the limit"
    assert facts["time of steps"] == "rollout 4:00, rewards 0:30, scoring 2:00, update 2:00"
    assert facts["task"] == "arithmetic; rewards accuracy, format"
    assert "training loss" not in facts and "nats per token" not in " ".join(facts.values())
    assert "python_stdlib" not in facts["data"]
    assert summary.draw(tmp_path) == f"reward plot: {tmp_path / 'plots/reward.png'}; report: {tmp_path / 'report.html'}"


def test_any_other_run_has_none_of_them(tmp_path):
    plain = [{name: value for name, value in row(1).items() if not name.startswith("reward")}]
    assert not is_reinforcement(plain) and is_reinforcement([row(1)])
    write(tmp_path, plain)
    report(tmp_path)
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"loss", "learning_rate", "throughput"}


def test_every_reward_is_drawn_and_nothing_that_only_begins_like_one():
    rows = [row(step, reward_language_consistency=0.75) for step in range(1, 4)]
    drawn = lines(draw_reward(rows).axes[0])
    assert set(drawn) == {"total", "accuracy", "format", "language consistency"}
    assert drawn["total"] == [0.51, 0.52, 0.53] and drawn["language consistency"] == [0.75] * 3


def test_seconds_of_a_rollout_are_shared_by_its_steps():
    axes = draw_seconds([row(step) for step in range(1, 6)]).axes[0]  # the last rollout has come to one step of two
    tops = {patch.get_label().partition(" ")[0]: patch.get_data() for patch in axes.patches}
    assert list(tops) == ["rollout", "rewards", "scoring", "update"]
    assert list(tops["rollout"].values) == [4, 4, 4, 4, 8] and np.all(tops["rollout"].baseline == 0)
    assert list(tops["rewards"].values) == [4.5, 4.5, 4.5, 4.5, 9]
    assert list(tops["scoring"].values) == [6.5, 6.5, 6.5, 6.5, 13]
    assert list(tops["update"].values) == [8.5, 8.5, 8.5, 8.5, 15]
    assert list(tops["update"].baseline) == list(tops["scoring"].values)
    assert list(tops["update"].edges) == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    # 24 + 3 + 12 + 10 seconds
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "rollout (49%)", "rewards (6%)", "scoring (24%)", "update (20%)",
    ]  # fmt: skip


def test_rows_before_a_rollout_that_is_not_recorded_have_their_own_seconds():
    rows = [row(step) for step in range(2, 5)]  # the first row is the second of its rollout
    tops = {patch.get_label().partition(" ")[0]: patch.get_data() for patch in draw_seconds(rows).axes[0].patches}
    assert list(tops["rollout"].values) == [0, 4, 4] and list(tops["update"].values) == [2, 8.5, 8.5]


def test_policy_and_length_show_every_measure():
    rows = [row(step) for step in range(1, 4)]
    kl, entropy, clipped, gap = draw_policy(rows).axes
    assert list(lines(kl).values()) == [[0.001, 0.002, 0.003]] and list(lines(entropy).values()) == [[0.5] * 3]
    assert lines(clipped) == {"clipped": [0.125] * 3, "masked as off-policy": [0.0] * 3}
    assert list(lines(gap).values()) == [[1e-5] * 3]
    length, cut = draw_response_length(rows).axes
    assert list(lines(length).values()) == [[21.0, 22.0, 23.0]] and list(lines(cut).values()) == [[0.25] * 3]


def test_measures_of_a_policy_begin_at_zero_and_end_below_the_top():
    rows = [row(step, kl=-1e-11, entropy=4.0) for step in range(1, 4)]  # a KL that is rounding
    kl, entropy, _, gap = draw_policy(rows).axes
    assert kl.get_ylim() == (0, 1) and entropy.get_ylim() == (0, pytest.approx(4.6))
    assert gap.get_ylim() == (0, pytest.approx(1.15e-5))


def test_accuracy_is_drawn_where_it_was_measured():
    [axes] = draw_accuracy([row(step) for step in range(1, 31)]).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[10, 20, 30]] * 2
    assert list(lines(axes)) == ["a sample (24.0% at the end)", "majority of several (27.0% at the end)"]
    alone = [{name: value for name, value in row(10).items() if name != "validation_majority"}]
    assert list(lines(draw_accuracy(alone).axes[0])) == ["a sample (8.0% at the end)"]


def test_the_objective_is_not_called_a_loss_in_nats():
    left, right = draw_objective([row(step) for step in range(1, 4)]).axes
    assert left.get_title("left") == "Objective" and "nats" not in left.get_ylabel()
    assert list(left.lines[0].get_ydata()) == [-0.001, 0.001, -0.001] and list(right.lines[0].get_ydata()) == [0.5] * 3


@pytest.mark.parametrize(
    "rows",
    [
        [row(1)],
        [row(1, loss=None, grad_norm=None, kl=None, entropy=None, reward=None)],
        [row(1, step_seconds=0.0, rollout_seconds=0.0, reward_seconds=0.0, scoring_seconds=0.0)],
        [row(1, kl=0.0, truncated_fraction=0.0, response_length=0.0), row(2)],
        [row(step, minibatches=1, validation_accuracy=None) for step in range(1, 301)],
        [row(2), row(3)],
    ],
    ids=["one step", "no number", "no time", "zeros", "many steps", "begins within a rollout"],
)
def test_any_such_run_can_be_drawn(tmp_path, rows):
    assert report(write(tmp_path, rows)).exists()


def test_rewards_of_a_users_own_are_drawn_under_their_names(tmp_path):
    rows = [row(1, **{f"reward_{name}": 1.0 for name in "abcdefgh"})]
    assert len(draw_reward(rows).axes[0].lines) == 11  # the total, accuracy, format and eight more
