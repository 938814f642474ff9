"""Pictures of a run that was trained by rewards, from the fields that only its rows have."""

import itertools
import math
import statistics
from typing import TYPE_CHECKING

import numpy as np

from dsjax.config import Config
from dsjax.training.drawing import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    SIZE,
    Rows,
    curve,
    figure_class,
    new_figure,
    series,
    style,
)
from dsjax.training.monitor import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_REWARDS = ("reward_seconds", "reward_failures")  # fields that only begin like one
# Fields of a row that hold seconds; those but the last are of a whole rollout, on its first row.
PHASES = {
    "rollout": "rollout_seconds",
    "rewards": "reward_seconds",
    "scoring": "scoring_seconds",
    "update": "step_seconds",
}
LAST = 20  # steps, at most, that a fact is the mean of


def is_reinforcement(rows: Rows) -> bool:
    """Whether the rows are of a run that was trained by rewards."""
    return any("reward" in row for row in rows)


def draw_reinforcement(rows: Rows) -> dict[str, "Figure"]:
    """The figures of such a run, by name."""
    figures = {"reward": draw_reward(rows)}
    if any(row.get("validation_accuracy") is not None for row in rows):
        figures["accuracy"] = draw_accuracy(rows)
    return figures | {
        "response_length": draw_response_length(rows),
        "policy": draw_policy(rows),
        "seconds": draw_seconds(rows),
        "objective": draw_objective(rows),
    }


def draw_reward(rows: Rows) -> "Figure":
    """The reward of a step's samples on average, and each of its parts before they are weighted."""
    figure, axes = new_figure("Reward", "mean of a step's samples")
    for name, colour in zip(_reward_parts(rows), itertools.cycle(COLOURS[1:]), strict=False):
        curve(axes, *series(rows, name), name.removeprefix("reward_").replace("_", " "), colour)
    curve(axes, *series(rows, "reward"), "total", BLUE)
    axes.legend(frameon=False)
    return figure


def draw_accuracy(rows: Rows) -> "Figure":
    """Accuracy on held-out problems over steps: of a sample, and of the majority where several were drawn."""
    figure, axes = new_figure("Accuracy on held-out problems", "share that is right")
    for name, label, colour in (
        ("validation_accuracy", "a sample", GREEN),
        ("validation_majority", "majority of several", ORANGE),
    ):
        steps, values = series(rows, name)
        if len(steps):
            axes.plot(steps, values, "o-", color=colour, markersize=5, label=f"{label} ({values[-1]:.1%} at the end)")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(_percent)
    axes.legend(frameon=False, loc="best")
    return figure


def draw_response_length(rows: Rows) -> "Figure":
    """Tokens of a completion on average, and on the right how many were cut off at the limit."""
    figure, axes = new_figure("Length of completions", "tokens")
    curve(axes, *series(rows, "response_length"), "", BLUE)
    _from_zero(axes)
    steps, shares = series(rows, "truncated_fraction")
    if len(steps):
        axes.set_ylabel("tokens", color=BLUE)
        right = axes.twinx()
        curve(right, steps, shares, "", ORANGE)
        right.set_ylabel("share cut off at the limit", color=ORANGE)
        right.set_ylim(0, max(0.01, 1.15 * float(shares.max())))
        right.yaxis.set_major_formatter(_percent)
        right.margins(x=0.01)
        right.spines["top"].set_visible(False)
    return figure


def draw_policy(rows: Rows) -> "Figure":
    """How far the policy moves: KL from the reference, entropy, samples that clipping or masking held back, and how far
    the log-probabilities of rollout and trainer are apart."""
    figure = figure_class()(figsize=(SIZE[0], 6.5), layout="constrained", dpi=120)
    panels = figure.subplots(2, 2)
    for axes, name, title, unit in (
        (panels[0, 0], "kl", "KL from the reference", "nats per token"),
        (panels[0, 1], "entropy", "Entropy", "nats per token"),
        (panels[1, 0], "clip_fraction", "Clipped and masked", "share of tokens"),
        (panels[1, 1], "log_prob_gap", "Rollout against trainer", "nats, worst token"),
    ):
        style(axes, title, unit)
        curve(axes, *series(rows, name), "clipped" if name == "clip_fraction" else "", BLUE)
        if name == "clip_fraction":
            curve(axes, *series(rows, "off_policy_fraction"), "masked as off-policy", ORANGE)
            axes.yaxis.set_major_formatter(_percent)
            axes.legend(frameon=False)
        _from_zero(axes)
    return figure


def draw_seconds(rows: Rows) -> "Figure":
    """Where the time of a step went, stacked; a rollout's is shared by the steps that were taken with it."""
    figure, axes = new_figure("Seconds of a step", "seconds")
    spent = _seconds(rows)
    total = sum(float(values.sum()) for values in spent.values())
    colours = (BLUE, GREEN, ORANGE, GREY)
    labels = [f"{name} ({float(values.sum()) / total:.0%})" if total else name for name, values in spent.items()]
    # Steps, not slopes between them: a step has one time.
    edges = np.append([row["step"] for row in rows], rows[-1]["step"] + 1) - 0.5
    below = np.zeros(len(rows))
    for label, values, colour in zip(labels, spent.values(), colours, strict=True):
        axes.stairs(below + values, edges, baseline=below, fill=True, color=colour, label=label)
        below = below + values
    # The first step of a run compiles, and would hide the others.
    axes.set_ylim(0, 1.25 * float(np.percentile(below, 95)) or 1)
    axes.legend(frameon=False, loc="upper right", ncols=len(labels))
    return figure


def draw_objective(rows: Rows) -> "Figure":
    """What is made small, which says little: it is near 0 by its making; and the norm of its gradient."""
    figure = figure_class()(figsize=SIZE, layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    style(left, "Objective", "minus advantage, plus KL")
    curve(left, *series(rows, "loss"), "", BLUE)
    left.axhline(0, color=GREY, linewidth=1, linestyle=":")
    style(right, "Norm of its gradient", "before clipping")
    curve(right, *series(rows, "grad_norm"), "", BLUE)
    _from_zero(right)
    return figure


def reinforcement_facts(config: Config, rows: Rows) -> dict[str, str]:
    """What a reader wants to know first of such a run, by name."""
    last = rows[-LAST:]

    def mean(name: str) -> float:
        return statistics.fmean(series(last, name)[1]) if len(series(last, name)[1]) else math.nan

    parts = [f"{name.removeprefix('reward_').replace('_', ' ')} {mean(name):.3f}" for name in _reward_parts(last)]
    facts = {
        "task": f"{config.task.name}; rewards {', '.join(config.task.rewards)}",
        "reward": f"{mean('reward'):.3f} ({', '.join(parts)}), mean of the last {len(last)} steps",
    }
    measured = [row for row in rows if row.get("validation_accuracy") is not None]
    if measured:
        best = measured[-1]
        majority = best.get("validation_majority")
        voted = "" if majority is None else f", by majority {majority:.1%}"
        facts["accuracy"] = f"{best['validation_accuracy']:.1%} on held-out problems{voted} (step {best['step']:,})"
    facts["completions"] = (
        f"{mean('response_length'):,.0f} tokens, {mean('truncated_fraction'):.1%} cut off at the limit"
    )
    spent = {name: float(values.sum()) for name, values in _seconds(rows).items()}
    facts["time of steps"] = ", ".join(f"{name} {duration(seconds)}" for name, seconds in spent.items())
    return facts


def _reward_parts(rows: Rows) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("reward_"))
    return [name for name in names if name not in NO_REWARDS]


def _seconds(rows: Rows) -> dict[str, np.ndarray]:
    """Of each row and phase."""
    spent = {name: np.array([row.get(field) or 0.0 for row in rows], float) for name, field in PHASES.items()}
    begins = [place for place, row in enumerate(rows) if row.get("rollout_seconds") is not None]
    for start, end in zip(begins, [*begins[1:], len(rows)], strict=True):
        for name in ("rollout", "rewards", "scoring"):
            spent[name][start:end] = spent[name][start] / (end - start)
    return spent


def _from_zero(axes: "Axes") -> None:
    """The vertical axis begins at 0 and has room above the highest value."""
    highest = max((float(np.asarray(line.get_ydata(), float).max()) for line in axes.lines), default=0.0)
    axes.set_ylim(0, 1.15 * highest if highest > 0 else 1)


def _percent(share: float, _: float = 0.0) -> str:
    return f"{100 * share:.3g}%"
