"""checkpoint, convert, inspect."""

import argparse
from pathlib import Path

from dsjax.commands.arguments import CONVERTED, Add, path
from dsjax.config import CheckpointConfig
from dsjax.sections import ConfigError

CHECKPOINT_FLAGS: dict[str, tuple[str, ...]] = {  # action: what it takes besides the run
    "list": (),
    "verify": ("step",),
    "prune": ("keep_last", "keep_every", "keep_best"),
    "export": ("destination", "step", "dtype"),
}
SCALE_FORMATS = ("float32", "ue8m0")


def add_to(add: Add) -> None:
    """The three parsers."""
    _add_checkpoint_arguments(add("checkpoint", _checkpoint, "list, verify, prune or export what a run has saved"))

    convert = add("convert", _convert, "write a run or a published checkpoint as a published one, in another precision")
    convert.add_argument("source", type=path, metavar="SRC", help="a run, or a directory as on the Hugging Face hub")
    convert.add_argument("destination", type=path, metavar="DST", help="a new directory")
    convert.add_argument("--dtype", choices=tuple(CONVERTED), default="bf16", help="default: bf16; fp8: in blocks")
    convert.add_argument(
        "--scale-format", choices=SCALE_FORMATS, help="scales of fp8: float32 (V3) or ue8m0 (V3.1); default: as in SRC"
    )

    inspect = add("inspect", _inspect, "tell what is in a published checkpoint or a run, and whether it is all there")
    inspect.add_argument("path", type=path, metavar="PATH", help="a published checkpoint or a run")
    inspect.add_argument(
        "--values", action="store_true", help="read all numbers of a published one: their magnitudes, and any NaN"
    )


def _add_checkpoint_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("action", choices=tuple(CHECKPOINT_FLAGS))
    command.add_argument("run", type=path, metavar="RUN", help="the directory of a run")
    command.add_argument("destination", nargs="?", type=path, metavar="DST", help="of export: a new directory")
    command.add_argument("--step", type=int, metavar="N", help="of verify and export: this one alone")
    command.add_argument("--dtype", choices=tuple(CONVERTED), help="of export: as of convert")
    command.add_argument("--keep-last", type=int, metavar="N", help="of prune: as checkpoint.keep_last, which is")
    command.add_argument("--keep-every", type=int, metavar="K", help="the default, and so of these two;")
    command.add_argument("--keep-best", type=int, metavar="N", help="with any of the three given, the others are off")


def _checkpoint(args: argparse.Namespace, config: None) -> int:
    for name in ("destination", "step", "dtype", "keep_last", "keep_every", "keep_best"):
        value = getattr(args, name)
        flag = "DST" if name == "destination" else f"--{name.replace('_', '-')}"
        if value is not None and name not in CHECKPOINT_FLAGS[args.action]:
            raise ConfigError(f"dsjax checkpoint {args.action} takes no {flag}; leave it out")
        if isinstance(value, int) and value < (0 if name == "step" else 1):
            raise ConfigError(f"{flag} is {value}, but must be at least {0 if name == 'step' else 1}")
    if args.action == "export":
        if args.destination is None:
            raise ConfigError("dsjax checkpoint export needs a new directory: dsjax checkpoint export RUN DST")
        from dsjax.training.export import export

        export(args.run, args.destination, CONVERTED[args.dtype or "bf16"], step=args.step)
        print(f"written: {args.destination}")
        return 0
    from dsjax.training import inventory

    if args.action == "list":
        print(*inventory.list_checkpoints(args.run), sep="\n")
        return 0
    if args.action == "verify":
        lines, is_sound = inventory.verify_checkpoints(args.run, args.step)
        print(*lines, sep="\n")
        return 0 if is_sound else 1
    given = {name: getattr(args, name) for name in CHECKPOINT_FLAGS["prune"] if getattr(args, name) is not None}
    policy = CheckpointConfig(**{"keep_last": 1} | given) if given else None  # the newest stays in any case
    print(*inventory.prune_checkpoints(args.run, policy), sep="\n")
    return 0


def _convert(args: argparse.Namespace, config: None) -> None:
    from dsjax import hub
    from dsjax.hub.architecture import is_published
    from dsjax.training.export import export

    dtype = CONVERTED[args.dtype]
    if is_published(Path(args.source)):
        hub.convert(args.source, args.destination, dtype, scale_format=args.scale_format)
    else:
        export(args.source, args.destination, dtype, scale_format=args.scale_format)
    print(f"written: {args.destination}")


def _inspect(args: argparse.Namespace, config: None) -> int:
    from dsjax.hub.architecture import is_published
    from dsjax.hub.inspection import inspect
    from dsjax.training.export import inspect_run

    if not is_published(Path(args.path)):
        print(inspect_run(args.path))
        return 0
    text, is_complete = inspect(args.path, args.values)
    print(text)
    return 0 if is_complete else 1
