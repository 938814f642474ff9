"""tokenizer, prepare, train, report, bench."""

import argparse
import json
from pathlib import Path

from dsjax.checks import CHOICES
from dsjax.commands.arguments import Add, add_config, add_devices, add_processes, path
from dsjax.config import Config
from dsjax.sections import ConfigError


def add_to(add: Add) -> None:
    """The five parsers."""
    tokenizer = add("tokenizer", _tokenizer, "learn model.vocab_size tokens from the text of a config: data.tokenizer")
    add_config(tokenizer)

    prepare = add("prepare", _prepare, "tokenise and pack the text of a config, once; train does it by itself")
    add_config(prepare)

    train = add("train", _train, "train, or go on where the run directory left off")
    add_config(train)
    add_devices(train)
    train.add_argument("--workdir", required=True, type=path, metavar="DIR", help="the directory of the run")
    train.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="SECTION.FIELD",
        help="go on though this field is not what the run was begun with; may be repeated",
    )
    add_processes(train)

    report = add("report", _report, "draw the curves of a run to PNG and one HTML page")
    report.add_argument(
        "runs", nargs="+", type=path, metavar="RUN", help="the directory of a run; of several, with --against"
    )
    report.add_argument("--against", type=path, metavar="BASELINE", help="a run that the losses are compared with")
    report.add_argument("--out", type=path, metavar="DIR", help="where to write; default: inside the only run")

    bench = add("bench", _bench, "time the train step and print JSON")
    timed = bench.add_mutually_exclusive_group(required=True)
    add_config(bench, timed)
    add_devices(bench)
    add_processes(bench)
    bench.add_argument(
        "--baseline",
        action="append",
        choices=("dense", *CHOICES["precision"]),
        help="time a dense model of equal active parameters too, or the model in another precision; may be repeated",
    )
    timed.add_argument(
        "--products", action="store_true", help="time not a train step, but FP8 products at the shapes of DeepSeek-V3"
    )
    bench.add_argument(
        "--checkpoint", action="store_true", help="time what a save every N steps (default 50) costs, and a restart"
    )
    bench.add_argument(
        "--decode", action="store_true", help="time decoding on one device: tokens/s, bytes of a token, cached prefixes"
    )
    bench.add_argument("--batch", metavar="N[,N]", help="of --decode: requests decoded together; default 1,8")
    bench.add_argument("--tokens", metavar="N[,N]", help="rows of the products; default: as published, on a CPU 128")
    bench.add_argument("--table", type=path, metavar="FILE", help="write the products' speeds as Markdown too")
    bench.add_argument("--steps", type=int, metavar="N", help="timed steps, at least 10; default 20")


def _tokenizer(args: argparse.Namespace, config: Config) -> None:
    from dsjax.data.vocabulary import learn

    print(learn(config.data, config.model.vocab_size))


def _prepare(args: argparse.Namespace, config: Config) -> None:
    from dsjax.data.prepare import prepare, summary

    for prepared in prepare(config.data):
        print(summary(prepared))


def _train(args: argparse.Namespace, config: Config) -> int:
    from dsjax.training.changes import check_allowed

    check_allowed(args.allow_change)
    from dsjax.training.loop import train

    return train(config, args.workdir, tuple(args.allow_change)).exit_code


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
    if args.batch is not None and not args.decode:
        raise ConfigError("--batch is for --decode; leave it out")
    if args.decode:
        for flag in ("baseline", "steps", "checkpoint", "distributed", "coordinator"):
            if _is_given(getattr(args, flag)):
                raise ConfigError(f"--{flag} is for a train step, which --decode does not time; leave it out")
        from dsjax.inference.decode_bench import decode_bench

        batches = (1, 8) if args.batch is None else _whole_numbers("--batch", args.batch, 1)
        print(json.dumps(decode_bench(config, batches), indent=2))
        return
    steps = 20 if args.steps is None else args.steps
    if steps < 10:
        raise ConfigError(f"--steps is {steps}, but a median needs at least 10")
    if args.checkpoint:
        _bench_checkpoint(args, config)
        return
    from dsjax.training.bench import bench
    from dsjax.training.cluster import is_first

    figures = bench(config, tuple(args.baseline or ()), steps)
    if is_first():
        print(json.dumps(figures, indent=2))


def _is_given(value: object) -> bool:
    """Also where it is 0, which equals False."""
    return value is not None and value is not False


def _bench_checkpoint(args: argparse.Namespace, config: Config) -> None:
    for flag in ("baseline", "distributed", "coordinator"):
        if _is_given(getattr(args, flag)):
            raise ConfigError(f"--{flag} is not for --checkpoint; leave it out")
    from dsjax.training.checkpoint_bench import checkpoint_bench

    print(json.dumps(checkpoint_bench(config, args.steps or 50), indent=2))


def _bench_products(args: argparse.Namespace) -> None:
    for flag in ("baseline", "steps", "checkpoint", "decode", "batch", "distributed", "coordinator"):
        if _is_given(getattr(args, flag)):
            raise ConfigError(f"--{flag} is for a model, and --products times products alone; leave it out")
    tokens = None if args.tokens is None else _whole_numbers("--tokens", args.tokens, 16)
    if args.table is not None and not Path(args.table).parent.is_dir():
        raise ConfigError(f"--table: the directory {Path(args.table).parent} does not exist; create it first")
    if args.table is not None and Path(args.table).is_dir():
        raise ConfigError(f"--table: {args.table} is a directory; name a file, as in {args.table}/products.md")
    from dsjax.training.product_bench import product_bench, table

    figures = product_bench(tokens)
    print(json.dumps(figures, indent=2))
    if args.table is not None:
        Path(args.table).write_text(table(figures))


def _whole_numbers(flag: str, text: str, multiple: int) -> tuple[int, ...]:
    """The numbers of a list with commas. Raises ConfigError unless all are above 0 and multiples of `multiple`."""
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 and int(word) % multiple == 0 for word in words):
        wanted = "above 0" if multiple == 1 else f"multiples of {multiple}"
        raise ConfigError(f"{flag} is {text}, but must be {wanted}, as in {flag} {4 * multiple},{8 * multiple}")
    return tuple(map(int, words))
