"""plan, cost."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsjax.commands.arguments import Add, add_config, path
from dsjax.config import Config
from dsjax.planning import hardware
from dsjax.sections import ConfigError

if TYPE_CHECKING:
    from dsjax.aot.compile import CompiledStep
    from dsjax.planning.plan import Plan
    from dsjax.planning.search import Found


def add_to(add: Add) -> None:
    """The two parsers."""
    plan = add("plan", _plan, "whether a run fits on hardware that is not here, how long it takes, what it costs")
    cost = add("cost", _cost, "what published runs cost, with sources; with --config, what a run of your own would")
    add_config(plan, example="configs/deepseek_v3.py")
    cost_config = cost.add_argument_group()
    add_config(cost, cost_config, example="configs/deepseek_v3.py")
    for command in (plan, cost):
        command.set_defaults(needs_weights=False)
        command.add_argument(
            "--hardware", required=command is plan, metavar="NAME", help=f"one of {', '.join(hardware.HARDWARE)}"
        )
        command.add_argument("--chips", type=int, required=command is plan, metavar="N", help="how many of them")
        command.add_argument(
            "--tokens", type=float, metavar="N", help="of the whole run; default: training.total_steps"
        )
        command.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--rl", action="store_true", help="plan dsjax grpo: rollouts, scoring and updates")
    plan.add_argument(
        "--response-length", type=float, metavar="N", help="of --rl: tokens of a sample, on average; default: limit / 4"
    )
    plan.add_argument("--search", action="store_true", help="try meshes, microbatches and remat, rank what fits")
    plan.add_argument("--show-sharding", action="store_true", help="draw the mesh and where each weight lives")
    plan.add_argument("--html", type=path, metavar="FILE", help="write one page, too")
    plan.add_argument(
        "--compile", action="store_true", help="compile the real step for these chips, without them; takes minutes"
    )
    plan.add_argument(
        "--topology",
        metavar="AxBxC",
        help="of --compile: sides of the TPU slice; default: as near to a cube as it gets",
    )


def _plan(args: argparse.Namespace, config: Config) -> int:
    if args.rl:
        return _plan_rl(args, config)
    if args.response_length is not None:
        raise ConfigError("--response-length is of --rl; give both or neither")
    from dsjax.planning import pages
    from dsjax.planning.plan import make_plan
    from dsjax.planning.search import best_plan, search

    if args.topology is not None and not args.compile:
        raise ConfigError("--topology is of --compile; give both or neither")
    _check_output(args)
    chip, tokens = _planned_on(args, config)
    found = search(config, chip, args.chips) if args.search else None
    plan = best_plan(found, chip, args.chips, tokens) if found else make_plan(config, chip, args.chips, tokens)
    if plan is None:
        raise ConfigError(f"no mesh divides {args.chips} chips, the experts and the weights; take another number")
    step = _compile(plan, args.topology) if args.compile else None
    if args.html is not None:
        _write(args.html, pages.as_html(plan, found))
    if args.json:
        print(json.dumps(_as_json(plan, found, step), indent=2))
    else:
        print(_as_text(args, plan, found, step))
    peak = plan.memory.peak if step is None else step.peak_bytes
    return 0 if peak <= plan.limit else 1


def _plan_rl(args: argparse.Namespace, config: Config) -> int:
    from dsjax.planning import pages, rl, rl_pages

    for name in ("search", "compile", "topology", "tokens"):
        if getattr(args, name):
            raise ConfigError(f"--{name} is of plans of train steps, and --rl counts other ones; leave one of them out")
    _check_output(args)
    chip, _ = _planned_on(args, config)
    plan = rl.make_rl_plan(config, chip, args.chips, args.response_length)
    if args.html is not None:
        _write(args.html, rl_pages.as_html(plan))
    if args.json:
        print(json.dumps(rl.as_json(plan), indent=2))
    else:
        picture = [pages.sharding_picture(plan.plan)] if args.show_sharding else []
        written = [f"page: {args.html}"] if args.html is not None else []
        print("\n\n".join([rl_pages.as_text(plan), *picture, *written]))
    return 0 if plan.plan.fits else 1


def _compile(plan: "Plan", sides: str | None) -> "CompiledStep":
    from dsjax.aot import topology
    from dsjax.aot.plan import compile_plan

    def tell(sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)  # standard output may be JSON

    return compile_plan(plan, topology.read_sides(sides), tell)


def _as_json(plan: "Plan", found: "Found | None", step: "CompiledStep | None") -> dict[str, Any]:
    from dsjax.planning.plan import as_json

    told = as_json(plan)
    if found is not None:
        told["ranked"] = [one.overrides for one in found.ranked]
    if step is not None:
        from dsjax.aot import told as compiled

        told["compiled"] = compiled.as_json(plan, step)
    return told


def _as_text(args: argparse.Namespace, plan: "Plan", found: "Found | None", step: "CompiledStep | None") -> str:
    from dsjax.planning import pages

    parts = [] if found is None else [pages.ranking(found, plan.tokens)]
    parts.append(pages.as_text(plan))
    if args.show_sharding:
        parts.append(pages.sharding_picture(plan))
    if step is not None:
        from dsjax.aot import told as compiled

        parts.append(compiled.as_text(plan, step))
    if args.html is not None:
        parts.append(f"page: {args.html}")
    return "\n\n".join(parts)


def _planned_on(args: argparse.Namespace, config: Config) -> tuple[hardware.Hardware, float]:
    """(the chip, tokens of the run), checked."""
    from dsjax.training.schedule import Schedule

    if args.hardware is None or args.chips is None:
        raise ConfigError("a price for your own run needs --config, --hardware and --chips together")
    if args.chips < 1:
        raise ConfigError(f"--chips is {args.chips}, but must be at least 1")
    if args.tokens is not None and not 0 < args.tokens < math.inf:
        raise ConfigError(f"--tokens is {args.tokens}, but must be above 0, as in --tokens 14.8e12")
    length = config.data.sequence_length
    if args.tokens is not None:
        return hardware.get(args.hardware), args.tokens
    schedule = Schedule(config.training, config.optimizer, length)
    return hardware.get(args.hardware), float(schedule.total_sequences(config.training.total_steps) * length)


def _check_output(args: argparse.Namespace) -> None:
    """Before a plan that may take minutes. Raises ConfigError where it could not be told as asked."""
    if args.json and args.show_sharding:
        raise ConfigError("--show-sharding is a picture, and --json has none; leave one of them out")
    if args.html is not None and not Path(args.html).parent.is_dir():
        raise ConfigError(f"--html: the directory {Path(args.html).parent} does not exist; create it first")
    if args.html is not None and Path(args.html).is_dir():
        raise ConfigError(f"--html: {args.html} is a directory; name a file, as in {args.html}/plan.html")


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another file") from error


def _cost(args: argparse.Namespace, config: Config | None) -> int:
    from dsjax.planning import cost

    figures, fits = cost.figures(), True
    if config is not None:
        from dsjax.planning import pages
        from dsjax.planning.plan import make_plan

        chip, tokens = _planned_on(args, config)
        plan = make_plan(config, chip, args.chips, tokens)
        figures, fits = cost.of_plan(plan), plan.fits
        for note in (plan.chosen, "" if fits else f"WARNING: it {pages.verdict(plan)}"):
            if note:
                print(note, file=sys.stderr)
    elif args.hardware is not None or args.chips is not None or args.tokens is not None:
        raise ConfigError("--hardware, --chips and --tokens price a run of your own; name it with --config")
    print(json.dumps(cost.as_json(figures), indent=2) if args.json else cost.as_text(figures))
    return 0 if fits else 1
