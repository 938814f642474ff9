"""The command line: `dsjax COMMAND`, the same as `python -m dsjax COMMAND`.

Only argparse is imported before a command runs; JAX comes last, after the configuration has been checked and the
environment that it reads at import has been set.
"""

import argparse
import errno
import io
import os
import sys
from functools import partial
from typing import Any, NoReturn

import dsjax
from dsjax.commands import checkpoints, plans, posttraining, running, texts
from dsjax.config import load
from dsjax.planning import hardware
from dsjax.sections import ConfigError, did_you_mean

EXAMPLES = """\
examples:
  dsjax train --config configs/tiny.py --devices 8 --workdir runs/tiny
  dsjax train --config configs/tiny.py --devices 8 --workdir runs/tiny --config.training.total_steps=500
  dsjax prepare --config configs/tiny.py --config.data.sources=text_files:books
  dsjax tokenizer --config configs/fp8_experiment.py
  dsjax generate --checkpoint runs/tiny --prompt "def main():" --max-new-tokens 200
  dsjax report runs/tiny
  dsjax checkpoint verify runs/tiny
  dsjax report runs/fp8 --against runs/bf16
  dsjax convert runs/tiny tiny-bf16
  dsjax inspect tiny-bf16
  dsjax generate --checkpoint runs/tiny --prompts prompts.jsonl --out texts.jsonl
  dsjax eval --checkpoint runs/tiny --data text_files:books
  dsjax sft --config configs/r1_tiny.py:cold_start --workdir runs/r1_tiny/cold_start
  dsjax grpo --config configs/r1_tiny.py:rl --workdir runs/r1_tiny/rl
  dsjax cache size
  dsjax bench --config configs/bench.py --baseline dense
  dsjax plan --config configs/deepseek_v3.py --hardware v5p --chips 1024 --search
  dsjax plan --config configs/bench.py --hardware h100 --chips 8 --compile
  dsjax cost

Any field of the configuration can be set: --config.section.field=value. `dsjax COMMAND --help` tells more.
"""

# What the system says of paths that a user gave; any other error of the system's is told with its traceback.
USERS_ERRORS = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
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
        return _failed(f"dsjax: {error}", 2)
    except BrokenPipeError:  # who reads, `| head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in USERS_ERRORS:
            raise
        return _failed(f"dsjax: {error.filename or 'a file'} cannot be used ({error.strerror})", 2)
    except KeyboardInterrupt:
        return _failed("dsjax: interrupted", 130)


def _failed(told: str, code: int) -> int:
    """Tells why; one of several processes ends here, since an orderly end would wait for those that go on."""
    print(told.encode(errors="backslashreplace").decode(), file=sys.stderr)  # an argument may be no UTF-8
    if "dsjax.training.cluster" in sys.modules:
        from dsjax.training import cluster

        if cluster.has_joined():
            cluster.leave(code)
    return code


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
        needed = getattr(args, "needs_weights", True)
        config = load(args.config, overrides, partial(_adopt, run=getattr(args, "workdir", None), is_needed=needed))
        hardware.check_name(config.hardware.name)
    _set_environment(args)
    return args.function(args, config) or 0


def _adopt(values: dict[str, Any], init_from: str, run: str | None, is_needed: bool) -> None:
    """What the checkpoint decides; a plan can do without one that is not here yet."""
    if not is_needed and not os.path.exists(os.path.expanduser(init_from)):
        return
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

    for group in (running, posttraining, checkpoints, texts, plans):
        group.add_to(add)
    return parser, dict(commands.choices)


def _set_environment(args: argparse.Namespace) -> None:
    """What must stand before JAX is imported (simulated devices) or first used (other processes)."""
    devices = getattr(args, "devices", None)
    if getattr(args, "command", None) in ("convert", "inspect", "checkpoint"):
        os.environ["JAX_PLATFORMS"] = "cpu"  # they move bytes; accelerators are left to others
    if getattr(args, "compile", False):
        from dsjax.aot import topology

        topology.set_environment(hardware.get(args.hardware).name)
    if devices is not None:
        if devices < 1:
            raise ConfigError(f"--devices is {devices}, but must be at least 1")
        simulation = SIMULATED_FLAGS.format(devices=devices)
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {simulation}".strip()
        os.environ["JAX_PLATFORMS"] = "cpu"
    flags = [getattr(args, name, None) for name in ("coordinator", "processes", "process")]
    is_told = any(flag is not None for flag in flags)
    if is_told and args.distributed:
        raise ConfigError("--distributed finds out what --coordinator, --processes and --process say; leave it out")
    if is_told or getattr(args, "distributed", False):
        from dsjax.training import cluster

        cluster.join(cluster.find(os.environ, *flags))


if __name__ == "__main__":
    sys.exit(main())
