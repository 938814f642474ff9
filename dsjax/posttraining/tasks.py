"""Problems with answers that a rule can check, any of them at any time: what a model is trained on by its rewards.

A problem is a function of the task's settings, a seed, a split and an index, computed from SHA-256 alone: the same on
every machine and every version of Python, so that where a run stands in its data is one number.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.checks import TASKS
from dsjax.config import ConfigError, TaskConfig
from dsjax.posttraining.answers import expression, number
from dsjax.sections import did_you_mean

SPLITS = ("train", "validation")
TRIES = 100_000  # draws for one problem before its split is held to be empty
PROMPT_KEYS = ("prompt", "question", "problem")  # of a line of a file; the first that is there
FEISTEL_ROUNDS = 4


class Problem(NamedTuple):
    """What is asked, the answer to compare with, and the language to think in."""

    prompt: str
    answer: str
    language: str = "en"


@dataclass(frozen=True)
class Task:
    """An endless sequence of problems for each split, and how an answer to one is checked.

    No prompt is in both splits: a hash of the prompt alone decides on which side it is, whatever the seed.
    """

    name: str
    fingerprint: str  # of everything that decides the problems; the content of a file, not its place
    language: str
    pick: Callable[[int, str], tuple[str, str]]  # (index, split) -> (prompt, answer)
    check: Callable[[str, str], bool]  # (given, reference) -> whether the given answer is right
    think: Callable[[Problem], str] | None  # the way to the answer; None: the task knows none

    def problem(self, index: int, split: str = "train") -> Problem:
        """The problem at an index from 0, of "train" or "validation".

        Raises ConfigError where the split has no problem, ValueError for an index or a split that cannot be.
        """
        if index < 0 or split not in SPLITS:
            raise ValueError(f"there is no problem {index} of split {split!r}; an index is from 0, a split of {SPLITS}")
        prompt, answer = self.pick(int(index), split)
        return Problem(prompt, answer, self.language)

    def worked(self, problem: Problem) -> str:
        """The solution of one of this task's problems, as a model is to write it: `<think>...</think><answer>...`.

        Raises ConfigError for a task whose problems come without solutions.
        """
        if self.think is None:
            raise ConfigError(
                f"task {self.name} has answers but no worked solutions; take arithmetic or countdown for a cold start"
            )
        return f"<think>{self.think(problem)}</think><answer>{problem.answer}</answer>"

    def brief(self, problem: Problem) -> str:
        """The answer alone, without a thought: how most people write one down."""
        return f"<think></think><answer>{problem.answer}</answer>"


def make_task(config: TaskConfig, seed: int) -> Task:
    """The task that `config` names: its problems come from its settings and `seed`.

    - `arithmetic`: `7+5-3*2=?`, a chain of `steps_min` to `steps` operations on numbers from 1 to `largest`. It is
      worked off strictly from left to right, without precedence: each operation applies to the result so far, and the
      example gives 18. Every result on the way is from 0 to `limit`.
    - `countdown`: `Use 3, 7, 25, 50 once each to make 200.`, with `numbers` numbers from 1 to `largest`, in ascending
      order. There always is a solution that needs whole numbers from 1 to `limit` only. Any expression that uses
      exactly these numbers and has that value is right; the reference answer is one.
    - `jsonl:FILE`: a line {"prompt": text, "answer": number or text} each; "question" and "problem" are other names of
      "prompt". Of an answer with `####`, as in GSM8K, only what follows counts. Numbers are compared exactly, see
      `dsjax.posttraining.answers.number`. Each epoch goes through all lines of the split in another order.

    Raises ConfigError for an unknown name, and a file that cannot be read or has a line that is no such object.
    """
    kind, _, file = config.name.partition(":")
    if config.name == "arithmetic":
        return _generated(config, seed, ("steps", "steps_min", "largest", "limit"), _chain, _same_number, _chain_steps)
    if config.name == "countdown":
        return _generated(config, seed, ("numbers", "largest", "limit"), _countdown, _same_target, _countdown_steps)
    if kind == "jsonl" and file:
        return _collected(config, seed, Path(file).expanduser())
    raise ConfigError(f'unknown task.name "{config.name}"{did_you_mean(config.name, TASKS)}')


class Draws:
    """Whole numbers from SHA-256 in counter mode, one digest each."""

    def __init__(self, key: str):
        self._key, self._count = key, 0

    def below(self, size: int) -> int:
        """From 0 to size - 1, all alike but for size / 2**256."""
        self._count += 1
        return _digest(f"{self._key} {self._count}") % size

    def between(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return low + self.below(high - low + 1)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def _is_validation(prompt: str, fraction: float) -> bool:
    return _digest(f"split {prompt}") < fraction * 2.0**256


def _fingerprint(config: TaskConfig, seed: int, decided_by: dict[str, Any]) -> str:
    facts = {"seed": seed, "language": config.language, "validation_fraction": config.validation_fraction}
    return hashlib.sha256(json.dumps(facts | decided_by, sort_keys=True).encode()).hexdigest()


def _empty(config: TaskConfig, split: str) -> ConfigError:
    return ConfigError(
        f"task {config.name} has no problem for the {split} split (task.validation_fraction ="
        f" {config.validation_fraction}); ask for more different problems, or change the fraction"
    )


def _generated(
    config: TaskConfig,
    seed: int,
    fields: tuple[str, ...],
    draw: Callable[[TaskConfig, Draws], tuple[str, str] | None],
    check: Callable[[str, str], bool],
    think: Callable[[Problem], str],
) -> Task:
    """A task whose problems are drawn; `fields` of the configuration decide them, `draw` is None where it got stuck."""

    def pick(index: int, split: str) -> tuple[str, str]:
        for attempt in range(TRIES):
            drawn = draw(config, Draws(f"{config.name} {seed} {split} {index} {attempt}"))
            if drawn and _is_validation(drawn[0], config.validation_fraction) == (split == "validation"):
                return drawn
        raise _empty(config, split)

    values = dataclasses.asdict(config)
    fingerprint = _fingerprint(config, seed, {name: values[name] for name in ("name", *fields)})
    return Task(config.name, fingerprint, config.language, pick, check, think)


def _chain(config: TaskConfig, draws: Draws) -> tuple[str, str]:
    """`7+5-3*2=?` and `18`. From any result from 0 to limit an operation leads to another, so it never gets stuck."""
    steps = draws.between(config.steps if config.steps_min is None else config.steps_min, config.steps)
    result = draws.between(1, min(config.largest, config.limit))
    text = str(result)
    for _ in range(steps):
        highest = {
            "+": min(config.largest, config.limit - result),
            "-": min(config.largest, result),
            "*": min(config.largest, config.limit // result if result else config.largest),
        }
        possible = [symbol for symbol, high in highest.items() if high > 0]
        symbol = possible[draws.below(len(possible))]
        operand = draws.between(1, highest[symbol])
        text += f"{symbol}{operand}"
        result = _applied(result, symbol, operand)
    return f"{text}=?", str(result)


def _applied(left: int, symbol: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[symbol]


def _chain_steps(problem: Problem) -> str:
    """`7+5=12;12-3=9;9*2=18`."""
    first, *rest = re.findall(r"([+*-]?)([0-9]+)", problem.prompt)
    result, steps = int(first[1]), []
    for symbol, operand in rest:
        before, result = result, _applied(result, symbol, int(operand))
        steps.append(f"{before}{symbol}{operand}={result}")
    return ";".join(steps)


def _same_number(given: str, reference: str) -> bool:
    value = number(given)
    return value is not None and value == number(reference)


def _countdown(config: TaskConfig, draws: Draws) -> tuple[str, str] | None:
    """Numbers and a target, and the expression that made it; None where the numbers lead above the limit."""
    numbers = sorted(draws.between(1, config.largest) for _ in range(config.numbers))
    parts = [(value, str(value)) for value in numbers]
    while len(parts) > 1:
        pair = [parts.pop(draws.below(len(parts))), parts.pop(draws.below(len(parts)))]
        (high, long), (low, short) = sorted(pair, key=lambda part: part[0], reverse=True)
        results = {"+": high + low, "-": high - low, "*": high * low} | ({} if high % low else {"/": high // low})
        # Without 0 on the way: a product with 0 would make numbers meaningless.
        possible = [symbol for symbol, value in results.items() if 0 < value <= config.limit]
        if not possible:
            return None
        symbol = possible[draws.below(len(possible))]
        parts.append((results[symbol], f"({long}{symbol}{short})"))
    target, text = parts[0]
    return f"Use {', '.join(map(str, numbers))} once each to make {target}.", text[1:-1]


def _countdown_steps(problem: Problem) -> str:
    """`3+7=10;25*10=250;250-50=200`."""
    solution = expression(problem.answer)
    assert solution is not None, problem
    return ";".join(solution.steps)


def _same_target(given: str, reference: str) -> bool:
    """Whether both expressions use the same numbers and have the same value."""
    found, wanted = expression(given), expression(reference)
    return bool(found and wanted and (found.value, found.numbers) == (wanted.value, wanted.numbers))


def _collected(config: TaskConfig, seed: int, path: Path) -> Task:
    """A task whose problems are the lines of a file."""
    rows = _read(path)
    sides: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for row in rows:
        sides["validation" if _is_validation(row[0], config.validation_fraction) else "train"].append(row)

    def pick(index: int, split: str) -> tuple[str, str]:
        side = sides[split]
        if not side:
            raise _empty(config, split)
        epoch, position = divmod(index, len(side))
        return side[_shuffled(position, len(side), f"jsonl {seed} {split} {epoch}")]

    return Task(config.name, _fingerprint(config, seed, {"rows": rows}), config.language, pick, _same_number, None)


def _shuffled(position: int, size: int, key: str) -> int:
    """Where a keyed permutation of 0 to size - 1 puts `position`, without the permutation itself.

    A Feistel network permutes the numbers of 2 * half bits; those above `size` are sent on until they come back below.
    """
    half = ((size - 1).bit_length() + 1) // 2 or 1
    while True:
        left, right = position >> half, position & (1 << half) - 1
        for turn in range(FEISTEL_ROUNDS):
            left, right = right, left ^ _digest(f"{key} {turn} {right}") & (1 << half) - 1
        position = left << half | right
        if position < size:
            return position


def _read(path: Path) -> list[tuple[str, str]]:
    """(prompt, answer) of every line that is not blank. Raises ConfigError."""
    rows = []
    try:
        with path.open(encoding="utf-8") as file:  # not splitlines: JSON may hold U+2028 as it is
            for count, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_row(line, f"{path}, line {count},"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"task jsonl: {path} cannot be read ({reason}); give a file of JSON lines") from error
    if not rows:
        raise ConfigError(
            f'task jsonl: {path} holds no problem; write a line {{"prompt": ..., "answer": ...}} for each'
        )
    return rows


def _row(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line, parse_int=str, parse_float=str)  # numbers as they are written: 0.10 is 1/10, not a float
    except (ValueError, RecursionError):
        row = None
    fields = row if isinstance(row, dict) else {}
    prompt, answer = next((fields[key] for key in PROMPT_KEYS if key in fields), None), fields.get("answer")
    reference = answer.rpartition("####")[2].strip() if isinstance(answer, str) else ""
    if not isinstance(prompt, str) or not _is_unicode(prompt) or number(reference) is None:
        raise ConfigError(
            f'{where} must be a JSON object with a text "prompt" (or "question", "problem") and a number as "answer",'
            f" but is {line.strip()[:60]!r}"
        )
    return prompt, reference


def _is_unicode(text: str) -> bool:
    """Whether `text` is free of lone surrogates, which JSON can write but no tokenizer can read."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
