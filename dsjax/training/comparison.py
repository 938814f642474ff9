"""Runs beside a baseline: how far their losses lie from its own, in one picture and one sentence a run.

As DeepSeek holds FP8 against BF16 [V3 appendix B]: the relative difference of the losses, each smoothed by an
exponential moving average with coefficient 0.9, which stays below 0.25% there.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsjax.config import Config, ConfigError, to_dict
from dsjax.training import checkpoint
from dsjax.training.drawing import COLOURS, GREY, SIZE, Rows, figure_class, style
from dsjax.training.monitor import magnitude
from dsjax.training.report import contents, read_run, write_page
from dsjax.training.workdir import CHECKPOINTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EMA = 0.9
START_UP = 10  # steps left out: so early the average still rests on a few losses
BOUND = 0.25  # percent

# What two runs of one experiment may differ in: how they compute, what they tell, and where their files lie. What the
# data is, beside its options, its fingerprint tells.
FREE = ("precision", "fp8", "monitor", "checkpoint", "hardware", "data.directory", "data.tokenizer")


@dataclass(frozen=True)
class Run:
    """What is on disk of a run."""

    workdir: Path
    label: str
    config: Config
    rows: Rows


@dataclass(frozen=True)
class Difference:
    """Of a run from the baseline, over the steps that both have and after the start-up of the average."""

    label: str
    steps: np.ndarray
    tokens: int  # seen after the last of them
    loss: np.ndarray  # smoothed, nats per token
    baseline_loss: np.ndarray
    no_number_from: int | None  # the first step at which one of the two has no finite loss; `steps` end before it
    validation_steps: np.ndarray  # up to the last of `steps`
    validation_percent: np.ndarray  # not smoothed

    @property
    def percent(self) -> np.ndarray:
        return _percent(self.loss, self.baseline_loss)


def compare(
    workdirs: Sequence[str | Path], baseline: str | Path, out: str | Path | None = None
) -> tuple[Path, list[str]]:
    """Draws every run beside `baseline` to `plots/against.png` and `report.html`, in `out` or the only run itself.

    The page of a single run holds its own report as well.

    Returns:
      The page; a sentence for each run, after a warning where more than precision tells it from the baseline.

    Raises:
      ConfigError: one of them is no run or is named twice, a run shares too few steps with `baseline`, several runs
        come without `out`, or what raises in `report`.
    """
    paths, base_path = [Path(workdir) for workdir in workdirs], Path(baseline)
    if out is None and len(paths) > 1:
        raise ConfigError(f"{len(paths)} runs make one picture; say where to write it with --out DIR")
    _check_distinct([*paths, base_path])
    *runs, base = _read([*paths, base_path])
    differences = [difference(run, base) for run in runs]
    told = {
        run.label: [*_warnings(run, base), sentence(d, base.label)] for run, d in zip(runs, differences, strict=True)
    }

    facts = {f"{label} against {base.label}": "; ".join(lines) for label, lines in told.items()}
    figures = {"against": draw_against(differences, base.label)}
    if len(runs) == 1:
        own_facts, own_figures = contents(paths[0])
        facts, figures = facts | own_facts, figures | own_figures
    names = ", ".join(path.resolve().name for path in paths)
    page = write_page(Path(out or paths[0]), f"{names} against {base_path.resolve().name}", facts, figures)
    return page, [line for lines in told.values() for line in lines]


def smooth(values: np.ndarray) -> np.ndarray:
    """The exponential moving average of `values`, corrected for its start: the weights sum to 1 at every step."""
    average, averages = 0.0, []
    for count, value in enumerate(values, 1):
        average = EMA * average + (1 - EMA) * value
        averages.append(average / (1 - EMA**count))
    return np.array(averages)


def difference(run: Run, base: Run) -> Difference:
    """How far `run` is from `base`; raises ConfigError where they share no more steps than the start-up takes."""
    steps, losses, base_losses = _common(run.rows, base.rows, "loss")
    is_number = np.isfinite(losses) & np.isfinite(base_losses)
    # The average of a number that is none is none ever after: the comparison ends, and says so.
    end = len(steps) if is_number.all() else int(np.argmin(is_number))
    if end <= START_UP:
        raise ConfigError(
            f"{run.workdir} and {base.workdir} share {end or 'no'} steps with finite losses, of which the first "
            f"{START_UP} do not count; compare runs with more steps"
        )
    shown = slice(START_UP, end)
    validation_steps, validation, base_validation = _common(run.rows, base.rows, "validation_loss")
    in_reach = validation_steps <= steps[end - 1]
    return Difference(
        label=run.label,
        steps=steps[shown],
        tokens=next(row["tokens"] for row in run.rows if row["step"] == steps[end - 1]),
        loss=smooth(losses[:end])[shown],
        baseline_loss=smooth(base_losses[:end])[shown],
        no_number_from=int(steps[end]) if end < len(steps) else None,
        validation_steps=validation_steps[in_reach],
        validation_percent=_percent(validation, base_validation)[in_reach],
    )


def sentence(difference: Difference, baseline: str) -> str:
    """What the picture shows of one run, in numbers."""
    percent, steps = difference.percent, difference.steps
    largest = int(np.argmax(np.abs(percent)))
    parts = [
        f"{difference.label} against {baseline}, steps {steps[0]} to {steps[-1]} (EMA {EMA}; its start-up, "
        f"{START_UP} steps, left out): loss differs by {np.mean(np.abs(percent)):.3f}% on average "
        f"(signed {np.mean(percent):+.3f}%), most at step {steps[largest]} ({percent[largest]:+.3f}%), "
        f"at the last by {percent[-1]:+.3f}%; beyond {BOUND}% at {np.mean(np.abs(percent) > BOUND):.1%} of the steps"
    ]
    validation = difference.validation_percent
    if len(validation):
        most = int(np.argmax(np.abs(validation)))
        parts.append(
            f"validation loss by {np.mean(np.abs(validation)):.3f}% on average of {len(validation)}, "
            f"most at step {difference.validation_steps[most]} ({validation[most]:+.3f}%), "
            f"at the last by {validation[-1]:+.3f}%"
        )
    if difference.no_number_from is not None:
        parts.append(f"NOT COMPARED from step {difference.no_number_from} on, where one of the losses is not a number")
    return "; ".join(parts)


def draw_against(differences: Sequence[Difference], baseline: str) -> "Figure":
    """The smoothed losses, and below them the relative differences in percent, validation losses as dots."""
    figure = figure_class()(figsize=(SIZE[0], 6), layout="constrained", dpi=120)
    top, bottom = figure.subplots(2, 1, sharex=True)
    style(top, f"Loss against {baseline}", f"loss (EMA {EMA})\nnats per token")
    style(bottom, "", "relative difference")
    longest = max(differences, key=lambda difference: difference.steps[-1])
    top.plot(longest.steps, longest.baseline_loss, color=GREY, linewidth=3.5, alpha=0.6, label=baseline)
    for place, difference in enumerate(differences):
        colour, dashes = COLOURS[place % len(COLOURS)], "-" if place < len(COLOURS) else "--"
        top.plot(difference.steps, difference.loss, dashes, color=colour, linewidth=1.3, label=difference.label)
        bottom.plot(difference.steps, difference.percent, dashes, color=colour, linewidth=1.3)
        validated = (difference.validation_steps, difference.validation_percent)
        bottom.plot(*validated, "o", color=colour, markeredgecolor="white")
    _scale(bottom, differences)
    top.set_xlabel("")
    bottom.set_xlabel(f"step ({magnitude(longest.tokens)} tokens after the last)")
    top.legend(frameon=False)
    return figure


def _scale(axes: "Axes", differences: Sequence[Difference]) -> None:
    """Draws what DeepSeek stayed within, and scales the axis so that it can be seen beside what is far from it."""
    axes.axhline(0, color=GREY, linewidth=1)
    for bound in (-BOUND, BOUND):
        axes.axhline(bound, color=GREY, linewidth=1, linestyle="--")
        # Beside the axes, where no curve runs through it.
        axes.text(1.005, bound, f"{bound:+}%", fontsize=8, va="center", transform=axes.get_yaxis_transform())
    if any(len(difference.validation_steps) for difference in differences):
        axes.set_title("dots: validation loss, not smoothed", loc="right", fontsize=9)
    drawn = np.concatenate(
        [[-BOUND, BOUND], *(d.percent for d in differences), *(d.validation_percent for d in differences)]
    )
    low, high = float(np.nanmin(drawn)), float(np.nanmax(drawn))
    if max(-low, high) > 10 * BOUND:
        axes.set_yscale("symlog", linthresh=2 * BOUND, linscale=1.5)
        axes.set_yticks([tick for tick in (-100, -10, -1, 0, 1, 10, 100) if low <= tick <= high])
        axes.set_ylim(1.6 * low, 1.6 * high)  # matplotlib's own margin is thinner than a dot here
    axes.yaxis.set_major_formatter(lambda percent, _: f"{percent:+g}%" if percent else "0")


def _common(rows: Rows, base_rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The steps at which both recorded `name`, and both values there; NaN stands for what was no finite number."""
    ours, theirs = ({row["step"]: row[name] for row in those if name in row} for those in (rows, base_rows))
    steps = sorted(ours.keys() & theirs.keys())
    values, base_values = (np.array([found[step] for step in steps], float) for found in (ours, theirs))
    return np.array(steps, int), values, base_values


def _percent(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return 100 * (values - reference) / reference


def _read(paths: Sequence[Path]) -> list[Run]:
    """The runs, labelled by precision, by directory where that says more, by path where both say too little."""
    found = [(path, *read_run(path)) for path in paths]
    labels = []
    for path, config, _ in found:
        name = path.resolve().name
        labels.append(name if config.precision == name else f"{config.precision} ({name})")
    shared = {label for label, count in Counter(labels).items() if count > 1}
    labels = [
        f"{config.precision} ({path})" if label in shared else label
        for label, (path, config, _) in zip(labels, found, strict=True)
    ]
    return [Run(path, label, config, rows) for label, (path, config, rows) in zip(labels, found, strict=True)]


def _check_distinct(paths: Sequence[Path]) -> None:
    for place, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:place]]:
            raise ConfigError(f"{path} is named twice; a run is compared with other runs")


def _warnings(run: Run, base: Run) -> list[str]:
    """Why the two may differ for other reasons than precision, as one line or none."""
    found = [name for name in _differing(to_dict(run.config), to_dict(base.config)) if not _is_free(name)]
    prints = [_data_fingerprint(one.workdir) for one in (run, base)]
    if None not in prints and prints[0] != prints[1]:
        found.append("the prepared data (its fingerprint)")
    return [f"WARNING: {run.label} and {base.label} differ in more than precision: {', '.join(found)}"] if found else []


def _differing(values: Any, others: Any, name: str = "") -> Iterator[str]:
    """The dotted names of the fields in which two configurations differ."""
    if isinstance(values, dict) and isinstance(others, dict):
        for key in values | others:
            yield from _differing(values.get(key), others.get(key), f"{name}.{key}" if name else key)
    elif values != others:
        yield name


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE)


def _data_fingerprint(workdir: Path) -> str | None:
    """What the newest checkpoint says of the data; None without one, as in a run of which only the rows were kept."""
    step = checkpoint.latest(workdir / CHECKPOINTS)
    return None if step is None else checkpoint.read_meta(workdir / CHECKPOINTS, step).get("data_fingerprint")
