"""Prompts in, texts out, a JSON object a line; what is interrupted goes on where it was."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from dsjax.config import ConfigError
from dsjax.data.chat import Template, conversation_tokens
from dsjax.inference.chat import with_stop
from dsjax.inference.engine import Engine, Result
from dsjax.inference.sampling import SEEDS, Sampling

AT_ONCE = 16  # groups of requests, in slots: what is in flight where a prompt turns out to be unusable
OWN = {field.name for field in dataclasses.fields(Sampling)} - {"stop_tokens"}


def complete_file(engine: Engine, prompts: str, out: str, sampling: Sampling, template: Template | None) -> str:
    """Continues every line of `prompts` into a line of `out`, as they are finished; a summary in a sentence.

    A line of `prompts` is {"prompt": text} or {"messages": [{"role": ..., "content": ...}, ...]}; fields of Sampling in
    it win over `sampling`; without a seed of its own the n-th line has sampling.seed + n. A line of `out` has `index`
    (from 0), `prompt_sha256`, `text`, `finish_reason`, `new_tokens`, `prompt_cache_hit_tokens`,
    `prompt_cache_miss_tokens`, or `error`, a sentence, where the line cannot be continued; and the line's `id`, if it
    has one. Lines that `out` holds already are not computed again; a half-written last one is.

    Raises ConfigError for a file that cannot be read or written, a line that is no such object, and an `out` that holds
    other prompts' texts.
    """
    lines = _read_prompts(Path(prompts))
    done = _read_done(Path(out), lines)
    left = [i for i in range(len(lines)) if i not in done]
    failed = tokens = 0
    try:
        # What UTF-8 cannot write, a lone surrogate in an id, is written as JSON escapes it.
        file = open(out, "a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}); choose another --out") from error
    with file, tqdm(total=len(lines), initial=len(done), unit=" prompts", disable=None) as bar:
        for start in range(0, len(left), AT_ONCE * engine.slots):
            ready = []
            for index in left[start : start + AT_ONCE * engine.slots]:
                try:
                    ready.append((index, *_request(engine, lines[index], index, sampling, template)))
                except ConfigError as error:
                    _write(file, lines[index], index, {"error": str(error)})
                    failed += 1
                    bar.update()

            def finished(at: int, result: Result, ready: list[Any] = ready) -> None:
                nonlocal tokens
                tokens += len(result.tokens)
                _write(file, lines[ready[at][0]], ready[at][0], _told(result))
                bar.update()

            engine.generate([tokens for _, tokens, _ in ready], [s for _, _, s in ready], on_result=finished)
    return (
        f"{len(left) - failed} prompts continued by {tokens} tokens, {failed} could not be,"
        f" {len(done)} had been done before: {out}"
    )


def _told(result: Result) -> dict[str, Any]:
    names = ("text", "finish_reason", "prompt_cache_hit_tokens", "prompt_cache_miss_tokens")
    return {name: getattr(result, name) for name in names} | {"new_tokens": len(result.tokens)}


def _write(file: TextIO, line: dict[str, Any], index: int, told: dict[str, Any]) -> None:
    own = {"id": line["id"]} if "id" in line else {}
    row = {"index": index, **own, "prompt_sha256": _digest(line), **told}
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def _request(
    engine: Engine, line: dict[str, Any], index: int, sampling: Sampling, template: Template | None
) -> tuple[list[int], Sampling]:
    """(tokens, Sampling) of a line. Raises ConfigError where they cannot be."""
    own = {name: value for name, value in line.items() if name in OWN}
    if isinstance(own.get("stop"), str):
        own["stop"] = (own["stop"],)
    own.setdefault("seed", (sampling.seed + index) % SEEDS)
    asked = dataclasses.replace(sampling, **own)
    assert engine.tokenizer is not None
    is_text = isinstance(line.get("prompt"), str)
    said = [line["prompt"]] if is_text else [m[part] for m in line["messages"] for part in ("role", "content")]
    try:
        "".join(said).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"a text is not Unicode ({error}); leave lone surrogates out") from error
    if is_text:
        tokens = engine.tokenizer.encode(line["prompt"])
    else:
        tokens = conversation_tokens(engine.tokenizer, line["messages"], template)
        asked = with_stop(asked, template)
    engine.check(tokens, asked)
    return tokens, asked


def _digest(line: dict[str, Any]) -> str:
    what = {name: line[name] for name in ("prompt", "messages") if name in line}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _read_prompts(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:  # not splitlines: JSON may hold U+2028 as it is
            rows = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {path} cannot be read ({getattr(error, 'strerror', 'not UTF-8')})") from error
    lines = []
    for number, row in enumerate(rows, 1):
        try:
            line = json.loads(row)
        except (ValueError, RecursionError):
            line = None
        is_text = isinstance(line, dict) and isinstance(line.get("prompt"), str)
        messages = line.get("messages") if isinstance(line, dict) else None
        is_talk = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not is_text and not is_talk:
            raise ConfigError(
                f'{path}, line {number}, must be a JSON object with "prompt" or "messages", but is {row.strip()[:60]!r}'
            )
        lines.append(line)
    return lines


def _read_done(path: Path, lines: list[dict[str, Any]]) -> set[int]:
    """The indices in `out`; cuts off a last line that was not written to its end."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); choose another --out") from error
    whole = content.rfind(b"\n") + 1
    done = set()
    for row in content[:whole].splitlines():
        try:
            told = json.loads(row)
            index, digest = told["index"], told["prompt_sha256"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} holds something else than results; choose another --out") from None
        if not isinstance(index, int) or not 0 <= index < len(lines) or digest != _digest(lines[index]):
            raise ConfigError(f"{path} holds the results of other prompts (index {index}); choose another --out")
        done.add(index)
    if whole < len(content):
        os.truncate(path, whole)
    return done
