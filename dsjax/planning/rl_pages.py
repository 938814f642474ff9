"""A plan of reinforcement learning for readers: text that fits a terminal, or one HTML page."""

from collections.abc import Callable

from dsjax.planning.pages import (
    duration,
    headline,
    html_table,
    knob_lines,
    known,
    memory_html,
    memory_lines,
    number,
    page,
    sources_html,
    table,
    wrapped,
)
from dsjax.planning.plan import notes
from dsjax.planning.rl import CASES, PHASES, RLPlan, cache_room, knobs


def as_text(rl: RLPlan) -> str:
    """Whether it fits, what a step is made of, how long the run takes, what it costs."""
    plan = rl.plan
    lines = [headline(plan), *(wrapped(f"  {name:<10}", value) for name, value in facts(rl).items())]
    lines += ["", *memory_lines(plan)]
    if not plan.fits:
        lines += ["", *remedies(rl)]
    lines += ["", *table(rows(rl)), "", *table(resources(rl))]
    if told := notes(plan):
        lines += ["", *(wrapped("note: ", one) for one in told)]
    return "\n".join(lines)


def as_html(rl: RLPlan) -> str:
    """The same as one page, with where weights live."""
    plan = rl.plan
    body = [
        html_table([[name, value] for name, value in facts(rl).items()]),
        *memory_html(plan, [] if plan.fits else remedies(rl)),
        "<h2>The run</h2>",
        html_table(rows(rl), head=True),
        "<h2>Where the time goes</h2>",
        html_table(resources(rl), head=True),
        *sources_html(plan),
    ]
    return page(plan, body)


def remedies(rl: RLPlan) -> list[str]:
    """What would help where it does not fit."""
    return knob_lines(knobs(rl), rl.plan.limit, "combine them")


def facts(rl: RLPlan) -> dict[str, str]:
    """What the plan is of, by name."""
    config = rl.plan.config
    training, grpo, length = config.training, config.grpo, config.data.sequence_length
    samples = training.batch_size * grpo.minibatches
    found = {
        "mesh": " x ".join(f"{axis} {size}" for axis, size in rl.plan.sizes.items()),
        "rollout": f"{samples:,} samples of {rl.response_length:,.0f} tokens on average, {rl.slots:,} at a time:"
        f" {rl.token_steps:,.0f} token steps, for {grpo.minibatches} steps of training",
        "cache": f"{rl.slots // rl.plan.devices} samples a device, with room for {cache_room(config):,} positions each",
        "step": f"{training.batch_size:,} samples in {rl.rows:,} rows of {length:,} tokens,"
        f" {rl.rows // training.sequences_per_microbatch} microbatches; remat {training.remat}",
    }
    if rl.plan.chosen:
        found["chosen"] = rl.plan.chosen
    return found


def rows(rl: RLPlan) -> list[list[str]]:
    """The run under four assumptions: of what hides behind what, and without the links."""

    def line(name: str, value: Callable[[str], str]) -> list[str]:
        return [name, *(value(case) for case in CASES)]

    steps = rl.plan.config.training.total_steps
    return [
        [f"{steps:,} steps, {number(rl.plan.tokens)} tokens drawn", *CASES],
        *([f"{phase}, a step", *(f"{rl.phases(case)[phase]:.3g} s" for case in CASES)] for phase in PHASES),
        line("step", lambda case: f"{rl.step_seconds(case):.3g} s"),
        line("MFU", lambda case: f"{rl.mfu(case):.1%}"),
        line("run", lambda case: duration(rl.run_seconds(case))),
        line("chip hours", lambda case: number(rl.chip_hours(case))),
        line("cost", lambda case: known(rl.dollars(case), "${}", "no price known")),
        line("energy of chips", lambda case: known(rl.kilowatt_hours(case), "{} kWh", "not published")),
    ]


def resources(rl: RLPlan) -> list[list[str]]:
    """Seconds of a device by what takes them."""
    parts = {"token step": rl.token_step, "scoring, policy": rl.old, "scoring, reference": rl.reference}
    parts["update"] = rl.plan.time
    return [
        ["seconds", "products", "memory", "fast link", "slow link"],
        *(
            [name, *(f"{value:.3g}" for value in (time.compute, time.memory, time.fast, time.slow))]
            for name, time in parts.items()
            if time is not None
        ),
    ]
