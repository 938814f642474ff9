"""generate, eval, cache."""

import argparse
import json
import math
from typing import Any

from dsjax.commands.arguments import CONVERTED, Add, add_config, add_devices, path
from dsjax.config import Config
from dsjax.sections import ConfigError


def add_to(add: Add) -> None:
    """The three parsers."""
    _add_generate(
        add("generate", _generate, "continue a prompt with a run's newest checkpoint, or with a published one")
    )

    evaluate = add(
        "eval", _eval, "measure a run or a published checkpoint: perplexity, harness tasks, or accuracy on problems"
    )
    evaluate.set_defaults(needs_weights=False)  # the weights are those of --checkpoint
    add_devices(evaluate)
    evaluate.add_argument("--checkpoint", required=True, type=path, metavar="PATH", help="as of generate")
    on = evaluate.add_mutually_exclusive_group(required=True)
    on.add_argument("--data", metavar="SOURCE", help="python_stdlib, text_files:PATH, tfds:NAME: perplexity")
    on.add_argument("--tasks", metavar="NAME[,NAME]", help="tasks of lm-evaluation-harness; needs the extra eval")
    on.add_argument("--problems", type=int, metavar="N", help="held-out problems of --config's task: accuracy")
    evaluate.add_argument("--samples", type=int, metavar="K", help="of --problems: of each, and they vote; default 1")
    add_config(evaluate, evaluate.add_argument_group("of --problems"), example="configs/r1_tiny.py")
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N examples of each task")
    evaluate.add_argument("--text-key", metavar="NAME", help="the field of records with the text; default: text")
    evaluate.add_argument("--documents", type=int, metavar="N", help="the first N only")
    evaluate.add_argument("--sequence-length", type=int, metavar="T", help="context; default: as in training, or 2048")
    evaluate.add_argument("--tokenizer", type=path, metavar="NAME", help="as of generate")

    cache = add("cache", _cache, "list, measure or prune what is kept on disk: compiled programs, data, prefixes")
    cache.add_argument("action", choices=("list", "size", "prune"))
    cache.add_argument("--kind", choices=("compiled", "data", "prefix"), help="one of them; default: all")
    cache.add_argument(
        "--directory", type=path, metavar="DIR", help="where it is; needs --kind; default: ~/.cache/dsjax"
    )
    cache.add_argument("--max-size", metavar="SIZE", help="prune: leave at most this, as 500M or 10G, newest first")
    cache.add_argument("--older-than", type=float, metavar="DAYS", help="prune: what was not used for so long")


def _add_generate(generate: argparse.ArgumentParser) -> None:
    add_devices(generate)
    generate.add_argument(
        "--checkpoint", required=True, type=path, metavar="PATH", help="the directory of a run, or of a published model"
    )
    asked = generate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT")
    asked.add_argument("--prompts", type=path, metavar="FILE.jsonl", help="a prompt a line; see --out")
    asked.add_argument("--chat", action="store_true", help="talk, by the model's chat template if it has one")
    generate.add_argument("--out", type=path, metavar="FILE.jsonl", help="where the texts of --prompts go; resumed")
    generate.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest token")
    generate.add_argument("--top-k", type=int, metavar="K", help="only among the K likeliest tokens")
    generate.add_argument("--top-p", type=float, metavar="P", help="only among the likeliest that together have P")
    generate.add_argument("--min-p", type=float, metavar="P", help="only what is P times as likely as the likeliest")
    generate.add_argument("--stop", action="append", metavar="TEXT", help="ends the text; may be repeated")
    generate.add_argument("--seed", type=int, default=0, metavar="S")
    generate.add_argument("--slots", type=int, metavar="N", help="prompts decoded together; default 8 for --prompts")
    generate.add_argument("--cache-dtype", choices=tuple(CONVERTED), help="of the latent cache; default: as computed")
    generate.add_argument("--prefix-cache", type=path, metavar="DIR", help="keep the latents of prompts there")
    generate.add_argument("--speculative", action="store_true", help="let the MTP module propose tokens")
    generate.add_argument(
        "--tokenizer", type=path, metavar="NAME", help="bytes, deepseek or a tokenizer.json; default: the model's own"
    )


def _generate(args: argparse.Namespace, config: None) -> None:
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {args.max_new_tokens}, but must be at least 1")
    if not 0 <= args.temperature < math.inf:
        raise ConfigError(f"--temperature is {args.temperature}, but must be 0 or a positive number")
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"--seed is {args.seed}, but must be at least 0 and below {2**32}")
    try:
        (args.prompt or "").encode()
    except UnicodeEncodeError as error:
        raise ConfigError("--prompt is not UTF-8; set the terminal to UTF-8 or choose another text") from error
    if (args.prompts is None) != (args.out is None):
        raise ConfigError("--prompts and --out go together; give both")
    if args.slots is not None and args.slots < 1:
        raise ConfigError(f"--slots is {args.slots}, but must be at least 1")
    more: dict[str, Any] = {
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "stop": args.stop and tuple(args.stop),
        "slots": args.slots,
        "storage": args.cache_dtype and CONVERTED[args.cache_dtype],
        "prefix_cache": args.prefix_cache,
        "speculative": args.speculative or None,
    }
    more = {name: value for name, value in more.items() if value is not None}
    how = (args.max_new_tokens, args.temperature, args.seed, args.tokenizer)
    if args.chat:
        from dsjax.inference.generate import chat

        chat(args.checkpoint, *how, **more)
    elif args.prompts is not None:
        from dsjax.inference.generate import generate_file

        print(generate_file(args.checkpoint, args.prompts, args.out, *how, **more))
    else:
        from dsjax.inference.generate import generate

        print(generate(args.checkpoint, args.prompt, *how, **more))


EVAL_FLAGS = {  # what is measured: what else it takes
    "data": ("text_key", "documents", "sequence_length"),
    "tasks": ("limit",),
    "problems": ("samples", "config"),
}


def _eval(args: argparse.Namespace, config: Config | None) -> None:
    for on, flags in EVAL_FLAGS.items():
        for flag in flags:
            value, name = getattr(args, flag), "--" + flag.replace("_", "-")
            if value is not None and getattr(args, on) is None:
                raise ConfigError(f"{name} has a meaning only with --{on}; leave it out")
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1")
    if args.problems is not None:
        if args.problems < 1:
            raise ConfigError(f"--problems is {args.problems}, but must be at least 1")
        from dsjax.posttraining.evaluation import evaluate_problems

        print(
            json.dumps(
                evaluate_problems(args.checkpoint, config, args.problems, args.samples or 1, args.tokenizer), indent=2
            )
        )
        return
    if args.tasks is not None:
        from dsjax.inference.harness import run_tasks

        found = run_tasks(args.checkpoint, args.tasks.split(","), args.limit, args.tokenizer)
        print(json.dumps(found, indent=2, default=str))
        return
    from dsjax.inference.evaluation import evaluate

    key = "text" if args.text_key is None else args.text_key
    figures = evaluate(args.checkpoint, args.data, key, args.documents, args.sequence_length, args.tokenizer)
    print(json.dumps(figures, indent=2))


def _cache(args: argparse.Namespace, config: None) -> None:
    if args.directory is not None and args.kind is None:
        raise ConfigError("--directory needs --kind, which says what is in it")
    if args.action != "prune" and (args.max_size, args.older_than) != (None, None):
        raise ConfigError(f"--max-size and --older-than are for prune, not for {args.action}; leave them out")
    from dsjax.inference import kept

    entries = kept.entries(args.kind, args.directory)
    if args.action == "list":
        print(*kept.listed(entries), sep="\n")
    elif args.action == "prune":
        print(kept.prune(entries, args.max_size, args.older_than))
    else:
        print(*kept.sizes(entries), sep="\n")
