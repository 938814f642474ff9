"""What every picture of a run is made of: its size, colours, curves over steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dsjax.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]

SIZE = (9, 4.5)  # inches
BLUE, ORANGE, GREEN, GREY = "#3465a4", "#e07b00", "#2e7d32", "#9a9a9a"
COLOURS = (BLUE, ORANGE, GREEN, "#b3261e", "#7b3294", "#00838f")


def series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have `name`."""
    known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return np.array([step for step, _ in known]), np.array([value for _, value in known], float)


def curve(axes: "Axes", steps: np.ndarray, values: np.ndarray, label: str, colour: str) -> None:
    """A line; a long one pale, with its running mean on top."""
    window = len(steps) // 50
    if not len(steps):
        return
    if window < 2:
        axes.plot(steps, values, color=colour, label=label)
        return
    sums, places = np.concatenate(([0.0], np.cumsum(values))), np.arange(len(steps))
    first, last = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(steps))
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, (sums[last] - sums[first]) / (last - first), color=colour, label=label)


def new_figure(title: str, ylabel: str) -> tuple["Figure", "Axes"]:
    """A figure with one plot over steps."""
    figure = figure_class()(figsize=SIZE, layout="constrained", dpi=120)
    axes = figure.add_subplot()
    style(axes, title, ylabel)
    return figure, axes


def style(axes: "Axes", title: str, ylabel: str) -> None:
    """Title, labels and the look of every plot over steps."""
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)


def figure_class() -> type["Figure"]:
    """matplotlib's Figure; raises ConfigError where it is not installed."""
    # Figure itself, not pyplot: no display is looked for, and no figure outlives its function.
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'dsjax[plots]', then dsjax report RUN") from error
    return Figure
