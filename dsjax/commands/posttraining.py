"""sft, grpo, collect, distill."""

import argparse
from pathlib import Path

from dsjax.commands.arguments import Add, add_config, add_devices, path
from dsjax.config import Config
from dsjax.sections import ConfigError

EXAMPLE = "configs/r1_tiny.py"


def add_to(add: Add) -> None:
    """The four parsers."""
    for name, function, summary in (
        (
            "sft",
            _sft,
            "fine-tune on conversations: loss on the answers alone, or go on where the run directory left off",
        ),
        ("grpo", _grpo, "train by rewards: sample answers, judge them by rule, prefer the better ones; or go on"),
        ("distill", _distill, "fine-tune on a teacher's answers: draw them, keep the right ones, train"),
    ):
        command = add(name, function, summary)
        add_config(command, example=EXAMPLE)
        add_devices(command)
        command.add_argument("--workdir", required=True, type=path, metavar="DIR", help="the directory of the run")
        command.add_argument(
            "--allow-change",
            action="append",
            default=[],
            metavar="SECTION.FIELD",
            help="go on though this field is not what the run was begun with; may be repeated",
        )
        if name == "distill":
            command.add_argument(
                "--teacher", required=True, type=path, metavar="PATH", help="a run or a published model"
            )
            _add_amounts(command)

    collect = add(
        "collect", _collect, "write a set for sft: a task's worked solutions, or a model's that were accepted"
    )
    add_config(collect, example=EXAMPLE)
    collect.set_defaults(needs_weights=False)  # its config says what to solve, --checkpoint who does
    add_devices(collect)
    collect.add_argument("--out", required=True, type=path, metavar="FILE.jsonl", help="gone on with if it is there")
    collect.add_argument("--checkpoint", type=path, metavar="PATH", help="whose samples; default: worked solutions")
    collect.add_argument(
        "--brief", type=float, metavar="SHARE", help="of worked solutions: so many without the way there; default 0"
    )
    collect.add_argument("--first", type=int, default=0, metavar="N", help="the first training problem; default 0")
    _add_amounts(collect)


def _add_amounts(command: argparse.ArgumentParser) -> None:
    command.add_argument("--problems", type=int, required=True, metavar="N", help="training problems of the task")
    command.add_argument("--samples", type=int, default=1, metavar="K", help="of each problem; default 1")


def _check_amounts(args: argparse.Namespace) -> None:
    for name in ("problems", "samples"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}, but must be at least 1")


def _sft(args: argparse.Namespace, config: Config) -> int:
    from dsjax.training.changes import check_allowed

    check_allowed(args.allow_change)
    if not config.data.is_chat:
        raise ConfigError(
            f"dsjax sft trains on conversations, but data.sources is {', '.join(config.data.sources)}; name files of"
            " them, as in --config.data.sources=chat:FILE.jsonl"
        )
    from dsjax.training.loop import train

    return train(config, args.workdir, tuple(args.allow_change)).exit_code


def _grpo(args: argparse.Namespace, config: Config) -> int:
    from dsjax.training.changes import check_allowed

    check_allowed(args.allow_change)
    from dsjax.posttraining.loop import reinforce

    return reinforce(config, args.workdir, tuple(args.allow_change)).exit_code


def _collect(args: argparse.Namespace, config: Config) -> None:
    _check_amounts(args)
    if args.first < 0:
        raise ConfigError(f"--first is {args.first}, but must not be negative")
    if args.brief is not None and not 0 <= args.brief <= 1:
        raise ConfigError(f"--brief is {args.brief}, but is a share, from 0 to 1")
    if args.brief is not None and args.checkpoint is not None:
        raise ConfigError("--brief is of worked solutions, which --checkpoint does not write; leave one of them out")
    if args.checkpoint is None and args.samples > 1:
        raise ConfigError("a problem has one worked solution; --samples needs --checkpoint")
    from dsjax.posttraining.collection import collect

    how = (args.checkpoint, args.samples, args.first, args.brief or 0.0)
    done = collect(config, Path(args.out), args.problems, *how)
    print(f"{args.out}: {done.kept} of {done.drawn} solutions of {done.problems} problems")


def _distill(args: argparse.Namespace, config: Config) -> int:
    from dsjax.training.changes import check_allowed

    check_allowed(args.allow_change)
    _check_amounts(args)
    from dsjax.posttraining.distillation import distill

    how = (args.problems, args.samples, tuple(args.allow_change))
    return distill(config, args.teacher, Path(args.workdir), *how).exit_code
