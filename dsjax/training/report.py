"""A run in pictures: PNG plots, and one HTML page that holds them and needs nothing else."""

import base64
import html
import io
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsjax.config import Config, ConfigError
from dsjax.planning import counts
from dsjax.training.drawing import BLUE, GREEN, GREY, ORANGE, SIZE, Rows, curve, figure_class, new_figure, series, style
from dsjax.training.monitor import dollars, duration, magnitude, read_rows
from dsjax.training.reinforcement import draw_reinforcement, is_reinforcement, reinforcement_facts
from dsjax.training.workdir import EXPERT_LOAD, METRICS, PLOTS, REPORT, read_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SLICES = 6  # moments shown of the expert load
SAME_CHIPS = 1.2  # peaks further apart are those of other chips; a CPU's is measured anew at each start
# One colour for each kind of tensor, dashes where it is the operand of the weight gradient.
QUANTISED = {
    "activation": (BLUE, "-"),
    "weight": (GREEN, "-"),
    "gradient": (ORANGE, "-"),
    "activation (Wgrad)": (BLUE, "--"),
    "gradient (Wgrad)": (ORANGE, "--"),
}

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem }}
table {{ border-collapse: collapse; margin: 1rem 0 2rem }}
td {{ padding: .2rem 1.5rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top }}
td:first-child {{ color: #666 }}
img {{ width: 100%; height: auto; margin-bottom: 1.5rem }}
</style>
<h1>{title}</h1>
<table>
{facts}
</table>
{images}
</html>
"""


def report(workdir: str | Path, out: str | Path | None = None) -> Path:
    """Draws the run in `workdir` to `plots/*.png` and `report.html`, inside it or in `out`; returns the page.

    Raises:
      ConfigError: `workdir` is no run, no step of it is recorded, matplotlib is missing, or `out` cannot be written.
    """
    workdir = Path(workdir)
    return write_page(Path(out or workdir), f"Run {workdir.resolve().name}", *contents(workdir))


def read_run(workdir: Path) -> tuple[Config, Rows]:
    """The configuration of the run in `workdir`, and its steps as recorded, at least one.

    Raises:
      ConfigError: `workdir` is no run, or no step of it is recorded.
    """
    config = read_config(workdir)
    rows = [row for row in read_rows(workdir / METRICS) if isinstance(row.get("step"), int)]
    if not rows:
        raise ConfigError(f"{workdir / METRICS} records no step yet, so there is nothing to draw")
    return config, rows


def contents(workdir: Path) -> tuple[dict[str, str], dict[str, "Figure"]]:
    """The facts and the figures of the run in `workdir`, by name; raises as `report` does."""
    config, rows = read_run(workdir)
    loads = [row for row in read_rows(workdir / EXPERT_LOAD) if row.get("load")]
    by_rewards = is_reinforcement(rows)
    figures = draw_reinforcement(rows) if by_rewards else {"loss": draw_loss(rows)}
    # Rows that samples fill differ in number from step to step: no batch that grows.
    figures["learning_rate"] = draw_learning_rate(rows, has_ramp=not by_rewards)
    figures["throughput"] = draw_throughput(rows, "Throughput of updates" if by_rewards else "Throughput")
    if loads:
        figures["expert_load"] = draw_expert_load(rows, loads, config.model.num_moe_layers)
    if any(row.get("quantisation") for row in rows):
        figures["quantisation"] = draw_quantisation(rows)
    facts = _facts(config, rows)
    if by_rewards:
        data = f"{config.data.tokenizer}; rows of {config.data.sequence_length} tokens"
        facts |= {"data": f"samples of the policy; tokenizer {data}"}
        del facts["training loss"]
        facts = reinforcement_facts(config, rows) | facts
    return facts, figures


def write_page(out: Path, title: str, facts: Mapping[str, str], figures: Mapping[str, "Figure"]) -> Path:
    """Writes `figures` to `out/plots` and all of it to one page in `out`; returns the page.

    Raises:
      ConfigError: `out` cannot be written.
    """
    images = {name: _png(figure) for name, figure in figures.items()}
    page = _page(title, facts, images)
    try:
        (out / PLOTS).mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            (out / PLOTS / f"{name}.png").write_bytes(image)
        (out / REPORT).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {out} ({error.strerror}); choose another --out") from error
    return out / REPORT


def draw_loss(rows: Rows) -> "Figure":
    """Training, MTP and validation loss over steps."""
    figure, axes = new_figure("Loss", "nats per token")
    for name, label, colour in (("loss", "training", BLUE), ("mtp_loss", "MTP", ORANGE)):
        curve(axes, *series(rows, name), label, colour)
    steps, losses = series(rows, "validation_loss")
    if len(steps):
        axes.plot(steps, losses, "o-", color=GREEN, markersize=5, label=f"validation ({losses[-1]:.3f} at the end)")
    axes.legend(frameon=False)
    return figure


def draw_learning_rate(rows: Rows, *, has_ramp: bool = True) -> "Figure":
    """Learning rate over steps, and the batch size where it changes."""
    figure, axes = new_figure("Learning rate", "learning rate")
    steps, rates = series(rows, "lr")
    axes.plot(steps, rates, color=BLUE, label="learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    steps, sizes = series(rows, "batch_size")
    if has_ramp and len(set(sizes)) > 1:
        axes.set_title("Learning rate and batch size", loc="left", fontweight="bold")
        right = axes.twinx()
        right.step(steps, sizes, where="post", color=ORANGE)
        right.set_ylabel("sequences per step", color=ORANGE)
        right.set_ylim(bottom=0)
        right.spines["top"].set_visible(False)
        axes.set_ylabel("learning rate", color=BLUE)
    return figure


def draw_throughput(rows: Rows, title: str = "Throughput") -> "Figure":
    """Tokens per second over steps, with MFU on the right where one scale serves all: the chips were the same."""
    figure, axes = new_figure(title, "tokens per second")
    steps, rates = series(rows, "tokens_per_second")
    median = statistics.median(rates)
    curve(axes, steps, rates, f"median {magnitude(median)} tokens/s", BLUE)
    axes.set_ylim(0, 1.15 * np.percentile(rates, 99))
    axes.yaxis.set_major_formatter(lambda value, _: magnitude(value))
    scales = [row["mfu"] / row["tokens_per_second"] for row in rows if row.get("mfu") and row.get("tokens_per_second")]
    if scales and max(scales) < SAME_CHIPS * min(scales):
        percent = 100 * statistics.median(scales)
        right = axes.secondary_yaxis("right", functions=(lambda rate: rate * percent, lambda mfu: mfu / percent))
        right.set_ylabel("model FLOPs utilisation (%)")
    axes.legend(frameon=False, loc="lower right")
    return figure


def draw_expert_load(rows: Rows, loads: Rows, layers: int) -> "Figure":
    """The busiest expert over steps, and layers x experts at a few moments, as load over the layer's mean.

    A row of loads past the model's MoE `layers` is MTP's.
    """
    figure_type = figure_class()
    from matplotlib.colors import TwoSlopeNorm

    moments = sorted({round(place) for place in np.linspace(0, len(loads) - 1, SLICES)})
    slices = [np.asarray(loads[moment]["load"], float) for moment in moments]
    columns = 2 if len(slices) > 1 else 1
    lines = -(-len(slices) // columns)
    height = float(np.clip(0.22 * len(slices[0]) + 0.7, 1.2, 4.0))
    figure = figure_type(figsize=(SIZE[0], 2.4 + lines * height), layout="constrained", dpi=120)
    grid = figure.add_gridspec(lines + 1, columns, height_ratios=[2.0] + [height] * lines)

    top = figure.add_subplot(grid[0, :])
    curve(top, *series(rows, "expert_load_max_over_mean"), "", BLUE)
    style(top, "Expert load", "busiest expert\n(load / mean)")
    top.axhline(1, color=GREY, linewidth=1, linestyle=":")
    top.set_ylim(bottom=0.9)

    norm = TwoSlopeNorm(vcenter=1, vmin=0, vmax=max(2.0, float(np.percentile(slices, 99))))
    panels = []
    for place, (moment, load_LE) in enumerate(zip(moments, slices, strict=True)):
        axes = figure.add_subplot(grid[1 + place // columns, place % columns])
        image = axes.imshow(load_LE, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
        axes.set_title(f"step {loads[moment]['step']}", loc="left", fontsize=10)
        _label_experts(axes, load_LE.shape, has_mtp=len(load_LE) > layers)
        axes.set_ylabel("MoE layer" if place % columns == 0 else "", fontsize=9)
        axes.set_xlabel("expert" if place + columns >= len(slices) else "", fontsize=9)
        panels.append(axes)
    bar = figure.colorbar(image, ax=panels, extend="max", fraction=0.03, pad=0.02)
    bar.set_label("load / mean of the layer")
    return figure


def draw_quantisation(rows: Rows) -> "Figure":
    """What FP8 does to each class of tensors, over the steps that measured it: error, overflow and underflow rate."""
    figure = figure_class()(figsize=SIZE, layout="constrained", dpi=120)
    panels = figure.subplots(1, 3)
    measured = [row for row in rows if row.get("quantisation")]
    names = dict.fromkeys(name for row in measured for name in row["quantisation"])
    titles = {"error": "relative RMS error", "overflow": "overflow rate", "underflow": "underflow rate"}
    for axes, (measure, title) in zip(panels, titles.items(), strict=True):
        style(axes, title, "")
        drawn: list[float] = []
        for name in names:
            values = [row["quantisation"].get(name, {}).get(measure) for row in measured]
            known = [(row["step"], value) for row, value in zip(measured, values, strict=True) if value is not None]
            colour, dashes = QUANTISED.get(name, (GREY, ":"))
            marker = "." if len(known) < 40 else ""  # few points, or a single one, would make no line
            axes.plot([step for step, _ in known], [value for _, value in known], dashes, color=colour, marker=marker)
            drawn += [value for _, value in known]
        _scale_rates(axes, np.array(drawn, float))
    figure.suptitle("Quantisation", x=0.01, ha="left", fontweight="bold")
    figure.legend(panels[0].lines, list(names), loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _scale_rates(axes: "Axes", rates: np.ndarray) -> None:
    """Percent from 0 on: linear or, where the rates lie far apart, logarithmic above the smallest that is not 0."""
    positive = rates[rates > 0]
    if len(positive) == 0:
        axes.set_ylim(0, 1)
        axes.set_yticks([0])
        axes.text(0.5, 0.5, "0 at every step" if len(rates) else "not measured", ha="center", transform=axes.transAxes)
    elif positive.max() > 30 * positive.min():
        axes.set_yscale("symlog", linthresh=10 ** np.floor(np.log10(positive.min())), linscale=0.5)
        axes.set_ylim(0, 2 * positive.max())
    else:
        axes.set_ylim(0, 1.15 * positive.max())
    # Rates of one in a million are common here: written out, not with an exponent.
    axes.yaxis.set_major_formatter(
        lambda rate, _: np.format_float_positional(float(f"{100 * rate:.3g}"), trim="-") + "%"
    )


def _label_experts(axes: "Axes", shape: tuple[int, ...], has_mtp: bool) -> None:
    """Names the layers (some, where there are many) and a few experts."""
    layers, experts = shape
    names = [str(layer + 1) for layer in range(layers)]
    if has_mtp:
        names[-1] = "MTP"
    shown = list(range(layers)) if layers <= 12 else sorted({round(layer) for layer in np.linspace(0, layers - 1, 6)})
    axes.set_yticks(shown, [names[layer] for layer in shown])
    axes.set_xticks(sorted({0, experts // 4, experts // 2, 3 * experts // 4, experts - 1}))
    axes.tick_params(labelsize=8)


def _facts(config: Config, rows: Rows) -> dict[str, str]:
    """What a reader wants to know first, by name."""
    last, model, parameters = rows[-1], config.model, counts.parameters(config.model)
    validated = [row for row in rows if row.get("validation_loss") is not None]
    known: Callable[[str], list[float]] = lambda name: [row[name] for row in rows if row.get(name) is not None]  # noqa: E731
    facts = {
        "progress": f"step {last['step']:,} of {config.training.total_steps:,}",
        "tokens": magnitude(last["tokens"]),
        "parameters": f"{parameters.total:,} ({parameters.active:,} active)"
        + (f" + {parameters.mtp:,} of MTP" if parameters.mtp else ""),
        "architecture": f"{model.num_hidden_layers} layers, hidden {model.hidden_size}, "
        f"{model.n_routed_experts} routed experts (top {model.num_experts_per_tok}) + {model.n_shared_experts} shared",
        "data": f"{', '.join(config.data.sources)}; tokenizer {config.data.tokenizer}; "
        f"rows of {config.data.sequence_length} tokens",
        "training loss": "not a number" if last["loss"] is None else f"{last['loss']:.4f} nats per token",
    }
    if validated:
        best = validated[-1]
        facts["validation loss"] = (
            f"{best['validation_loss']:.4f} nats per token, {best['validation_nats_per_byte']:.4f} nats per byte "
            f"(step {best['step']:,})"
        )
    facts["throughput"] = f"{magnitude(statistics.median(known('tokens_per_second')))} tokens/s (median)" + (
        f", MFU {statistics.median(known('mfu')):.1%}" if known("mfu") else ""
    )
    facts["time"] = duration(last["seconds"])
    facts["cost"] = dollars(last["cost_usd"])
    facts["dropped tokens"] = f"{sum(known('dropped_tokens')):,.0f}"
    return facts


def _page(title: str, facts: Mapping[str, str], images: Mapping[str, bytes]) -> str:
    cells = [f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in facts.items()]
    pictures = [
        f'<img alt="{name.replace("_", " ")}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        for name, image in images.items()
    ]
    return PAGE.format(title=html.escape(title), facts="\n".join(cells), images="\n".join(pictures))


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
