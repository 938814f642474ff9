"""A plan for readers: text that fits a terminal, one HTML page that needs nothing else, a picture of the mesh."""

import html
import math
import textwrap
from collections.abc import Mapping

from dsjax.planning.counts import parameters
from dsjax.planning.placement import AXES
from dsjax.planning.plan import USABLE, Knob, Plan, knobs, notes
from dsjax.planning.search import Found
from dsjax.planning.weights import Weight, weights

GiB, WIDTH = 2**30, 100
SHOWN_KNOBS, SHOWN_CANDIDATES, BAR = 5, 8, 30
COLOURS = ("#3465a4", "#7aa6da", "#e07b00", "#2e7d32", "#8e5ea2", "#c0392b", "#9a9a9a", "#d4b106", "#17a2b8")

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem }}
h2 {{ font-size: 1.1rem; margin-top: 2rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ padding: .2rem 1.5rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top; text-align: left }}
td:first-child {{ color: #666 }}
.bar {{ display: flex; height: 2.2rem; background: #eee; position: relative }}
.limit {{ position: absolute; top: -.3rem; bottom: -.3rem; border-left: 2px dashed #c0392b }}
.swatch {{ display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem }}
.verdict {{ font-weight: bold; color: {colour} }}
pre {{ overflow-x: auto; font-size: .8rem; line-height: 1.3 }}
</style>
<h1>{title}</h1>
<p class="verdict">{verdict}</p>
{body}
</html>
"""


def as_text(plan: Plan) -> str:
    """Whether it fits, how long it takes, what it costs, on which mesh."""
    lines = [headline(plan), *(wrapped(f"  {name:<10}", value) for name, value in facts(plan).items())]
    lines += ["", *memory_lines(plan)]
    if not plan.fits:
        lines += ["", *knob_lines(knobs(plan), plan.limit)]
    lines += ["", *table(rows(plan))]
    lines += ["", "links, GB into a device and step", *table(traffic_rows(plan))]
    if told := notes(plan):
        lines += ["", *(wrapped("note: ", one) for one in told)]
    return "\n".join(lines)


def wrapped(label: str, text: str) -> str:
    """`text` behind `label`, in as many lines of a terminal as it needs."""
    return textwrap.fill(text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label))


def headline(plan: Plan) -> str:
    counted = parameters(plan.config.model)
    mtp = f" + {number(counted.mtp)} of MTP" if counted.mtp else ""
    return (
        f"{number(counted.total)} parameters{mtp}, {number(counted.active)} active, {plan.config.precision},"
        f" on {plan.chips:,} x {plan.chip.name}"
    )


def facts(plan: Plan) -> dict[str, str]:
    """What the plan is of, by name."""
    training, dispatch = plan.config.training, plan.config.dispatch
    batch = training.batch_size
    node = f", {dispatch.ranks_per_node} ranks a node" if dispatch.ranks_per_node else ""
    found = {
        "mesh": " x ".join(f"{axis} {size}" for axis, size in plan.sizes.items()),
        "batch": f"{batch:,} sequences of {plan.config.data.sequence_length:,} tokens,"
        f" {batch // training.sequences_per_microbatch} microbatches; remat {training.remat}",
        "dispatch": f"{dispatch.form}{node}, {dispatch.chunks} chunks",
    }
    if plan.chosen:
        found["chosen"] = plan.chosen
    return found


def verdict(plan: Plan) -> str:
    """Whether it fits, in a sentence."""
    peak, limit = plan.memory.peak, plan.limit
    share = f"{limit / GiB:.1f} GiB, {USABLE:.0%} of a device's {limit / USABLE / GiB:.1f}"
    needed = f"{memory_told(peak)} at the peak ({plan.memory.moment})"
    return (
        f"fits: {needed}, of {share}"
        if plan.fits
        else f"does not fit: {needed} is {(peak - limit) / GiB:.1f} above {share}"
    )


def memory_lines(plan: Plan) -> list[str]:
    """The verdict, and what is held at the peak as bars."""
    lines = [verdict(plan)]
    for name, size in plan.memory.by_category().items():
        mark = "#" * round(BAR * size / max(plan.limit, plan.memory.peak))
        lines.append(f"  {name:<18}{size_told(size):>12}  {mark}".rstrip())
    return lines


def knob_lines(found: list[Knob], limit: float, otherwise: str = "combine, or use --search") -> list[str]:
    """What would help, most first; `otherwise` says what to do where nothing is enough."""
    if not found:
        return ["no single change saves memory: take more chips, or a smaller model"]
    best = found[0]
    enough = "which fits" if best.peak <= limit else f"which is still too much: {otherwise}"
    lines = [f"what helps most is {best.change}: {memory_told(best.peak)}, {enough}"]
    for one in found[:SHOWN_KNOBS]:
        lines.append(f"  {one.change:<38}{memory_told(one.peak):>12}{seconds_told(one.step_seconds):>10} s a step")
    return lines


def rows(plan: Plan) -> list[list[str]]:
    """The run under three assumptions of what hides behind what."""
    time = plan.time
    cases = {"serial": time.serial, "expected": time.expected, "all hidden": time.hidden}

    def line(name: str, value) -> list[str]:
        return [name, *(value(seconds) for seconds in cases.values())]

    return [
        [f"{plan.tokens / 1e12:.3g}T tokens" if plan.tokens >= 1e11 else f"{plan.tokens:,.0f} tokens", *cases],
        line("step", lambda s: f"{s:.3g} s"),
        line("MFU", lambda s: f"{plan.mfu(s):.1%}"),
        line("MFU with MTP", lambda s: f"{plan.mfu(s, mtp=True):.1%}"),
        line("run", lambda s: duration(plan.run_seconds(s))),
        line("chip hours", lambda s: number(plan.chip_hours(s))),
        line("cost", lambda s: known(plan.dollars(s), "${}", "no price known")),
        line("energy of chips", lambda s: known(plan.kilowatt_hours(s), "{} kWh", "not published")),
    ]


def known(value: float | None, form: str, otherwise: str) -> str:
    """`value` in `form`, where there is one."""
    return otherwise if value is None else form.format(number(value))


def traffic_rows(plan: Plan) -> list[list[str]]:
    """What moves, by cause; and the times of the four resources."""
    found = [["", "", "slow", "fast"]]
    found += [[one.cause, one.collective, f"{one.slow / 1e9:.4g}", f"{one.fast / 1e9:.4g}"] for one in plan.flows]
    time = plan.time
    found.append(
        ["seconds", f"products {time.compute:.3g}, memory {time.memory:.3g}", f"{time.slow:.3g}", f"{time.fast:.3g}"]
    )
    return found


def table(cells: list[list[str]]) -> list[str]:
    """Columns as wide as they must be, the first to the left."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  "
        + row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in cells
    ]


def ranking(found: Found, total_tokens: float) -> str:
    """What a search came to; the overrides of the first ones."""
    lines = [f"{found.tried:,} meshes, microbatches, remat policies and chunks tried; {len(found.ranked):,} fit"]
    if found.least is not None:
        lines.append(f"the least that any of them needs is {memory_told(found.least.peak)}: {found.least.overrides}")
    for place, one in enumerate(found.ranked[:SHOWN_CANDIDATES], 1):
        training, mesh = one.config.training, one.config.mesh
        each = training.sequences_per_microbatch // (mesh.data * mesh.fsdp * mesh.expert)
        run = total_tokens / (training.batch_size * one.config.data.sequence_length) * one.step_seconds
        sizes = " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES)
        lines.append(
            f"  {place}. {sizes:<32} {each} sequence(s) a device, remat {training.remat}, {one.config.dispatch.chunks}"
            f" chunk(s): {memory_told(one.peak)}, {one.step_seconds:.3g} s a step, {duration(run)}"
        )
    if found.ranked:
        lines += ["the first as overrides:", f"  {found.ranked[0].overrides}"]
    return "\n".join(lines)


def sharding_picture(plan: Plan) -> str:
    """The mesh, and where each weight lives: shape, the axes that cut it, what a device holds of it."""
    sizes = plan.sizes
    width = 6 * min(sizes["expert"], 8) + (5 if sizes["expert"] > 8 else 0)
    lines = [f"mesh of {plan.devices:,} devices: " + " x ".join(f"{axis} {size}" for axis, size in sizes.items())]
    lines.append(f"  {'expert ->':<{width + 8}}  sequences are cut over all three axes")
    fold = 0
    for row in range(min(sizes["fsdp"], 4)):
        ranks = "".join(f"{row * sizes['expert'] + column:>6}" for column in range(min(sizes["expert"], 8)))
        lines.append(f"  {'fsdp ' + str(row):<8}{ranks}{'  ...' if sizes['expert'] > 8 else ''}")
        fold = row + 1
    if sizes["fsdp"] > fold:
        lines.append("  ...")
    if sizes["data"] > 1:
        lines.append(f"  and so {sizes['data']} times: every weight is held once by each of these blocks")
    listed = weights(plan.config.model)
    held = sum(one.per_device(sizes) for one in listed)
    total = f"  {held:,} weights a device, {4 * held / GiB:.2f} GiB in FP32; Adam's moments and gradients lie alike"
    header = ["weight", "shape", "dimension: mesh axes", "MiB a device"]
    return "\n".join([*lines, "", *table([header, *(_placed(one, sizes) for one in listed)]), total])


def _placed(one: Weight, sizes: Mapping[str, int]) -> list[str]:
    shape = " x ".join(map(str, one.shape))
    cut = [f"{axis}: {' x '.join(over)}" for axis, over in zip(one.axes, one.placed(sizes), strict=True) if over]
    return [one.name, shape, ", ".join(cut) or "whole", f"{4 * one.per_device(sizes) / 2**20:,.2f}"]


def as_html(plan: Plan, found: Found | None = None) -> str:
    """One page: a bar of a device's memory, the run, the traffic, where weights live."""
    body = [
        html_table([[name, value] for name, value in facts(plan).items()]),
        *memory_html(plan, [] if plan.fits else knob_lines(knobs(plan), plan.limit)),
        "<h2>The run</h2>",
        html_table(rows(plan), head=True),
        "<h2>Bytes into a device, GB a step</h2>",
        html_table(traffic_rows(plan), head=True),
        *([f"<h2>Search</h2><pre>{html.escape(ranking(found, plan.tokens))}</pre>"] if found else []),
        *sources_html(plan),
    ]
    return page(plan, body)


def page(plan: Plan, body: list[str]) -> str:
    """The page of a plan, whether it fits on top."""
    colour = "#2e7d32" if plan.fits else "#c0392b"
    title = f"Plan: {headline(plan)}"
    return PAGE.format(
        title=html.escape(title), colour=colour, verdict=html.escape(verdict(plan)), body="\n".join(body)
    )


def memory_html(plan: Plan, remedies: list[str]) -> list[str]:
    """A device's memory at the peak as a bar, and what would help where it is too much."""
    whole = max(plan.limit / USABLE, plan.memory.peak)
    parts, legend = [], []
    for (name, size), colour in zip(plan.memory.by_category().items(), _colours(), strict=False):
        label = f"{name}: {size_told(size)}"
        parts.append(f'<div title="{html.escape(label)}" style="width:{size / whole:.2%};background:{colour}"></div>')
        swatch = f'<span class="swatch" style="background:{colour}"></span>'
        legend.append(f"<tr><td>{swatch}{html.escape(name)}</td><td>{size_told(size)}</td></tr>")
    limit = f'<div class="limit" title="limit" style="left:{plan.limit / whole:.2%}"></div>'
    return [
        "<h2>Memory of a device at the peak</h2>",
        f'<div class="bar">{"".join(parts)}{limit}</div>',
        f"<p>The bar is {whole / GiB:.1f} GiB; dashed: {USABLE:.0%} of a device's memory.</p>",
        f"<table>{''.join(legend)}</table>",
        *([f"<pre>{html.escape(chr(10).join(remedies))}</pre>"] if remedies else []),
    ]


def sources_html(plan: Plan) -> list[str]:
    """Where weights live, and where figures are from."""
    told = [["hardware", plan.chip.source], ["price", plan.chip.price_source], *(["note", one] for one in notes(plan))]
    return [
        "<h2>Where weights live</h2>",
        f"<pre>{html.escape(sharding_picture(plan))}</pre>",
        "<h2>Sources</h2>",
        html_table(told),
    ]


def _colours():
    while True:
        yield from COLOURS


def html_table(cells: list[list[str]], *, head: bool = False) -> str:
    """Rows of cells; with `head`, the first one in bold."""
    lines = []
    for place, row in enumerate(cells):
        tag = "th" if head and place == 0 else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def duration(seconds: float) -> str:
    """54.2 days, 3.1 hours, 12 minutes."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} seconds"


def number(value: float) -> str:
    """With a letter where it is large: 950, 12.3K, 2.66M."""
    for letter, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= 0.9995 * size:  # which three digits make the next letter's 1
            return f"{value / size:.3g}{letter}" if value < 999.5 * size else f"{value / size:,.0f}{letter}"
    if 0 < value < 1:
        return f"{value:.2g}"
    return f"{value:.0f}" if value == math.floor(value) or value >= 100 else f"{value:.2f}"


def memory_told(size: float) -> str:
    """Bytes of a whole device: to a tenth of a GiB, where it has one."""
    return f"{size / GiB:.1f} GiB" if size >= GiB else size_told(size)


def seconds_told(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 0.1 else f"{seconds:.2g}"


def size_told(size: float) -> str:
    """Bytes as GiB, or as MiB where that would be nothing."""
    return f"{size / GiB:.2f} GiB" if size >= 0.1 * GiB else f"{size / 2**20:.2f} MiB"
