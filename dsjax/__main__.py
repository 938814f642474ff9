"""The command line: `dsjax COMMAND`, the same as `python -m dsjax COMMAND`.

Only argparse is imported before a command runs; JAX comes last, after the configuration has been checked and the
environment that it reads at import has been set.
"""

import argparse
import errno
import io
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import dsjax
from dsjax.checks import CHOICES
from dsjax.config import Config, load
from dsjax.planning import hardware
from dsjax.sections import ConfigError, did_you_mean

EXAMPLES = """\
examples:
  dsjax train --config configs/tiny.py --devices 8 --workdir runs/tiny
  dsjax train --config configs/tiny.py --devices 8 --workdir runs/tiny --config.training.total_steps=500
  dsjax prepare --config configs/tiny.py --config.data.sources=text_files:books
  dsjax generate --checkpoint runs/tiny --prompt "def main():" --max-new-tokens 200
  dsjax report runs/tiny
  dsjax report runs/fp8 --against runs/bf16
  dsjax convert runs/tiny tiny-bf16
  dsjax inspect tiny-bf16
  dsjax bench --config configs/bench.py --baseline dense

Any field of the configuration can be set: --config.section.field=value. `dsjax COMMAND --help` tells more.
"""

# What the system says of paths that a user gave; any other error of the system's is told with its traceback.
USERS_ERRORS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
CONVERTED = {"bf16": "bfloat16", "fp8": "float8_e4m3fn", "fp32": "float32"}
SCALE_FORMATS = ("float32", "ue8m0")

# On a simulated mesh all devices share the cores, so ranks of one collective can arrive minutes apart.
SIMULATED_FLAGS = (
    "--xla_force_host_platform_device_count={devices}"
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=300"
    " --xla_cpu_collective_call_terminate_timeout_seconds=1200"
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; the exit status is 0, 1 for a failure that was told, 2 for a user's mistake, 130 for SIGINT."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a character must not end a run
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(f"dsjax: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in USERS_ERRORS:
            raise
        print(f"dsjax: {error.filename or 'a file'} cannot be used ({error.strerror})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dsjax: interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    parser, commands = _parser()
    if not argv:
        parser.print_help()
        return 0
    if not argv[0].startswith("-") and argv[0] not in commands:
        raise ConfigError(f'unknown command "{argv[0]}"{did_you_mean(argv[0], commands)}')
    words, overrides = _split_overrides(argv)
    _check_flags(words, commands.get(argv[0], parser))
    args, rest = parser.parse_known_args(words)
    if args.command is None:
        raise ConfigError(f"no command; valid are {', '.join(commands)}")
    if rest:
        raise ConfigError(f'unexpected argument "{rest[0]}"; see dsjax {args.command} --help')
    if overrides and getattr(args, "config", None) is None:
        raise ConfigError(f"dsjax {args.command} reads no config file, so --config.{overrides[0]} has no effect")
    config = None
    if getattr(args, "config", None) is not None:
        config = load(args.config, overrides, partial(_adopt, run=getattr(args, "workdir", None)))
        hardware.check_name(config.hardware.name)
    _set_environment(args)
    return args.function(args, config) or 0


def _adopt(values: dict[str, Any], init_from: str, run: str | None) -> None:
    from dsjax.training.adoption import adopt

    adopt(values, init_from, run)


def _split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words without `--config.name=value` and `--config.name value`, and those as `name=value`."""
    words, overrides = [], []
    rest = iter(argv)
    for word in rest:
        if not word.startswith("--config."):
            words.append(word)
            continue
        override = word.removeprefix("--config.")
        if "=" not in override:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"{word} needs a value, as in {word}=VALUE")
            override += f"={value}"
        overrides.append(override)
    return words, overrides


def _check_flags(words: list[str], parser: argparse.ArgumentParser) -> None:
    """Raises ConfigError for a flag that `parser` lacks, before it complains of what is missing because of that."""
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in flags:
            raise ConfigError(f"unknown flag {flag}{did_you_mean(flag, flags)}")


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaints told like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser() -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    """The parser of everything, and the parsers of the commands by name."""
    parser = _Parser(
        prog="dsjax",
        description=dsjax.__doc__.splitlines()[0] if dsjax.__doc__ else None,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dsjax {dsjax.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def add(name: str, function, summary: str) -> _Parser:
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(function=function)
        return command

    prepare = add("prepare", _prepare, "tokenise and pack the text of a config, once; train does it by itself")
    train = add("train", _train, "train, or go on where the run directory left off")
    generate = add("generate", _generate, "continue a prompt with a run's newest checkpoint, or with a published one")
    report = add("report", _report, "draw the curves of a run to PNG and one HTML page")
    bench = add("bench", _bench, "time the train step and print JSON")
    convert = add("convert", _convert, "write a run or a published checkpoint as a published one, in another precision")
    inspect = add("inspect", _inspect, "tell what is in a published checkpoint or a run, and whether it is all there")

    path = os.path.expanduser  # shells leave the ~ of --workdir=~/run alone
    timed = bench.add_mutually_exclusive_group(required=True)
    for command, place in ((prepare, prepare), (train, train), (bench, timed)):
        place.add_argument(
            "--config",
            required=place is command,
            type=path,
            metavar="FILE.py[:ARGUMENT]",
            help="a file like configs/tiny.py",
        )
        command.add_argument("--config.SECTION.FIELD", metavar="VALUE", help="change one field of the configuration")
    for command in (train, generate, bench):
        command.add_argument("--devices", type=int, metavar="N", help="simulate N devices on the CPU")
    train.add_argument("--workdir", required=True, type=path, metavar="DIR", help="the directory of the run")
    train.add_argument("--distributed", action="store_true", help="one of several processes (SLURM, TPU pod, ...)")
    generate.add_argument(
        "--checkpoint", required=True, type=path, metavar="PATH", help="the directory of a run, or of a published model"
    )
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest token")
    generate.add_argument("--seed", type=int, default=0, metavar="S")
    generate.add_argument(
        "--tokenizer", type=path, metavar="NAME", help="bytes, deepseek or a tokenizer.json; default: the model's own"
    )
    report.add_argument(
        "runs", nargs="+", type=path, metavar="RUN", help="the directory of a run; of several, with --against"
    )
    report.add_argument("--against", type=path, metavar="BASELINE", help="a run that the losses are compared with")
    report.add_argument("--out", type=path, metavar="DIR", help="where to write; default: inside the only run")
    bench.add_argument(
        "--baseline",
        action="append",
        choices=("dense", *CHOICES["precision"]),
        help="time a dense model of equal active parameters too, or the model in another precision; may be repeated",
    )
    timed.add_argument(
        "--products", action="store_true", help="time not a train step, but FP8 products at the shapes of DeepSeek-V3"
    )
    bench.add_argument("--tokens", metavar="N[,N]", help="rows of the products; default: as published, on a CPU 128")
    bench.add_argument("--table", type=path, metavar="FILE", help="write the products' speeds as Markdown too")
    convert.add_argument("source", type=path, metavar="SRC", help="a run, or a directory as on the Hugging Face hub")
    convert.add_argument("destination", type=path, metavar="DST", help="a new directory")
    convert.add_argument("--dtype", choices=tuple(CONVERTED), default="bf16", help="default: bf16; fp8: in blocks")
    convert.add_argument(
        "--scale-format", choices=SCALE_FORMATS, help="scales of fp8: float32 (V3) or ue8m0 (V3.1); default: as in SRC"
    )
    inspect.add_argument("path", type=path, metavar="PATH", help="a published checkpoint or a run")
    inspect.add_argument(
        "--values", action="store_true", help="read all numbers of a published one: their magnitudes, and any NaN"
    )
    bench.add_argument("--steps", type=int, metavar="N", help="timed steps, at least 10; default 20")
    return parser, dict(commands.choices)


def _set_environment(args: argparse.Namespace) -> None:
    """What must stand before JAX is imported (simulated devices) or first used (other processes)."""
    devices = getattr(args, "devices", None)
    distributed = getattr(args, "distributed", False)
    if getattr(args, "command", None) in ("convert", "inspect"):
        os.environ["JAX_PLATFORMS"] = "cpu"  # they move bytes; accelerators are left to others
    if devices is not None:
        if devices < 1:
            raise ConfigError(f"--devices is {devices}, but must be at least 1")
        if distributed:
            raise ConfigError("--devices simulates a mesh inside one process; leave it out with --distributed")
        flags = SIMULATED_FLAGS.format(devices=devices)
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        os.environ["JAX_PLATFORMS"] = "cpu"
    if distributed:
        import jax

        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"--distributed found no cluster to join ({reason}); see launch/ for examples") from error


def _prepare(args: argparse.Namespace, config: Config) -> None:
    from dsjax.data.prepare import prepare, summary

    for prepared in prepare(config.data):
        print(summary(prepared))


def _train(args: argparse.Namespace, config: Config) -> int:
    from dsjax.training.loop import train

    return train(config, args.workdir).exit_code


def _generate(args: argparse.Namespace, config: None) -> None:
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {args.max_new_tokens}, but must be at least 1")
    if not 0 <= args.temperature < math.inf:
        raise ConfigError(f"--temperature is {args.temperature}, but must be 0 or a positive number")
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"--seed is {args.seed}, but must be at least 0 and below {2**32}")
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("--prompt is not UTF-8; set the terminal to UTF-8 or choose another text") from error
    from dsjax.inference.generate import generate

    print(generate(args.checkpoint, args.prompt, args.max_new_tokens, args.temperature, args.seed, args.tokenizer))


def _report(args: argparse.Namespace, config: None) -> None:
    if args.against is not None:
        from dsjax.training.comparison import compare

        page, lines = compare(args.runs, args.against, args.out)
        print(*lines, page, sep="\n")
        return
    if len(args.runs) > 1:
        raise ConfigError(f"{len(args.runs)} runs are compared with another; name it with --against BASELINE")
    from dsjax.training.report import report

    print(report(args.runs[0], args.out))


def _bench(args: argparse.Namespace, config: Config | None) -> None:
    if config is None:
        _bench_products(args)
        return
    for flag in ("tokens", "table"):
        if getattr(args, flag) is not None:
            raise ConfigError(f"--{flag} is for --products; leave it out")
    steps = 20 if args.steps is None else args.steps
    if steps < 10:
        raise ConfigError(f"--steps is {steps}, but a median needs at least 10")
    from dsjax.training.bench import bench

    print(json.dumps(bench(config, tuple(args.baseline or ()), steps), indent=2))


def _bench_products(args: argparse.Namespace) -> None:
    for flag in ("baseline", "steps"):
        if getattr(args, flag) is not None:
            raise ConfigError(f"--{flag} is for a train step, which --products does not time; leave it out")
    words = [] if args.tokens is None else args.tokens.split(",")
    if not all(word.isdecimal() and int(word) > 0 and int(word) % 16 == 0 for word in words):
        raise ConfigError(f"--tokens is {args.tokens}, but must be multiples of 16, as in --tokens 4096,8192")
    if args.table is not None and not Path(args.table).parent.is_dir():
        raise ConfigError(f"--table: the directory {Path(args.table).parent} does not exist; create it first")
    from dsjax.training.product_bench import product_bench, table

    figures = product_bench(tuple(map(int, words)) or None)
    print(json.dumps(figures, indent=2))
    if args.table is not None:
        Path(args.table).write_text(table(figures))


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


if __name__ == "__main__":
    sys.exit(main())
