"""Rewards by rule, as DeepSeek-R1-Zero was trained with, and the judge that gives them to a batch of completions.

A reward is a function (prompt, completion, answer) -> float. Those here pass over a completion once, whatever it is,
and run where they are called; a user's own, `FILE.py:FUNCTION`, runs in a process that is killed when it hangs.

Source: DeepSeek-R1, section 2.2.2 (accuracy and format) and 2.3.2 (language consistency).
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dsjax.config import ConfigError, TaskConfig
from dsjax.posttraining.tasks import Task
from dsjax.posttraining.worker import Reward, RewardError, Worker, load, score, tell

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
WORD = re.compile(f"(?P<zh>[{CJK}])|[^\\W\\d_{CJK}]+")  # a Chinese character, or a run of other letters


def accuracy_for(task: Task) -> Reward:
    """1 where the last <answer>...</answer> of a completion is right by the task's own check, else 0."""

    def accuracy(prompt: str, completion: str, answer: str) -> float:
        end = completion.rfind("</answer>")
        start = completion.rfind("<answer>", 0, end) if end >= 0 else -1
        return float(start >= 0 and task.check(completion[start + len("<answer>") : end], answer))

    return accuracy


def format(prompt: str, completion: str, answer: str) -> float:
    """1 where a completion is `<think>...</think><answer>...</answer>` with each tag once, else 0.

    Whitespace before, between and behind the two blocks is allowed, nothing else is.
    """
    text = completion.strip()
    if any(text.count(tag) != 1 for tag in TAGS):
        return 0.0
    thought, _, rest = text.partition("</think>")
    return float(thought.startswith("<think>") and rest.lstrip().startswith("<answer>") and rest.endswith("</answer>"))


def language_consistency_for(language: str) -> Reward:
    """The share of the words of the chain of thought that are in `language`, "en" or "zh".

    The chain of thought is what stands between <think> and </think>; where a tag is missing it reaches to that end of
    the completion. Words are told by script alone: a run of ASCII letters is English, each CJK ideograph is a Chinese
    word, any other run of letters is neither. French without accents thus passes as English, as LaTeX commands do,
    "don't" is two words, and Japanese kanji pass as Chinese. Numbers and signs are no words: a thought of them alone
    has nothing in another language, and 1; an empty one has 0.
    """

    def language_consistency(prompt: str, completion: str, answer: str) -> float:
        thought = completion.partition("<think>")[2] if "<think>" in completion else completion
        thought = thought.partition("</think>")[0]
        words = fitting = 0
        for word in WORD.finditer(thought):
            words += 1
            fitting += (word.lastgroup or ("en" if word[0].isascii() else None)) == language
        return fitting / words if words else float(bool(thought.strip()))

    return language_consistency


@dataclass(frozen=True)
class FileReward:
    """A user's reward, as its file was when it was loaded. Called, it runs here; a judge runs it in a process."""

    file: str
    name: str
    source: str
    function: Reward

    def __call__(self, prompt: str, completion: str, answer: str) -> float:
        return self.function(prompt, completion, answer)


def load_reward(text: str) -> FileReward:
    """The reward `FILE.py:FUNCTION`. The file is run once here, to see what is in it.

    Raises ConfigError for a file that cannot be read or raises, and a function that is not there or takes other
    arguments than (prompt, completion, answer).
    """
    file, _, name = text.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ConfigError(f'"{text}" names no reward of a file; write FILE.py:FUNCTION, as in mine.py:reward')
    try:
        source = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read the reward file {file} ({reason}); give the path of a Python file") from error
    try:
        function = load(source, file, name)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"the reward file {file} cannot be run ({tell(error)}); correct it, or name another"
        ) from error
    if not callable(function):
        raise ConfigError(f"{file} has no function {name}(prompt, completion, answer); define it, or name another")
    try:
        inspect.signature(function).bind("", "", "")
    except TypeError:
        raise ConfigError(
            f"{name} of {file} takes {inspect.signature(function)}, but is called with (prompt, completion, answer)"
        ) from None
    except ValueError:  # a function of an extension module may have no signature to look at
        pass
    return FileReward(file, name, source, function)


class Judged(NamedTuple):
    """The rewards of a batch of completions."""

    total: list[float]  # the weighted sum, one a completion
    parts: dict[str, list[float]]  # by reward: one a completion, without its weight
    is_right: list[bool]  # whether it has every reward in full, 1 or more, and none whose weight is negative
    failed: int  # rewards that could not be computed and count as 0
    reasons: list[str]  # why: "NAME: PHRASE", the first of each reward


class Judge:
    """Gives each completion its rewards, whatever they do; to be closed, or used in a `with` statement.

    One that raises, hangs, or returns NaN, infinity or no number counts as 0 and as failed, and the rest goes on. Only
    a FileReward can hang without harm: it has a process of its own, started at its first call, killed after
    timeout_seconds and started again at the next. Any other function runs here, at no cost, and must come to an end.

    Completions are judged one after the other, so that a reward that always hangs takes timeout_seconds for each.
    """

    def __init__(self, rewards: Mapping[str, tuple[Reward, float]], timeout_seconds: float = 5.0):
        """rewards: (function, weight) by name; timeout_seconds: for each call of a FileReward."""
        self._weights = {name: weight for name, (_, weight) in rewards.items()}
        self._workers = {
            name: Worker(reward.source, reward.file, reward.name, timeout_seconds)
            for name, (reward, _) in rewards.items()
            if isinstance(reward, FileReward)
        }
        self._scores = {
            name: self._workers[name].score if name in self._workers else partial(score, reward)
            for name, (reward, _) in rewards.items()
        }

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        answers: Sequence[str],
        on_result: Callable[[], None] = lambda: None,
    ) -> Judged:
        """The rewards of completions[i] to prompts[i], answers[i] being right. Raises ValueError for other lengths.

        `on_result` is called as each reward is known; what it raises ends the judging.
        """
        parts: dict[str, list[float]] = {}
        failures: dict[str, list[str]] = {}
        for name, reward in self._scores.items():
            parts[name], failures[name] = [], []
            for prompt, completion, answer in zip(prompts, completions, answers, strict=True):
                try:
                    parts[name].append(reward(prompt, completion, answer))
                except RewardError as error:
                    parts[name].append(0.0)
                    failures[name].append(str(error))
                on_result()
        total = [
            sum(weight * parts[name][i] for name, weight in self._weights.items()) for i in range(len(completions))
        ]
        is_right = [
            all(
                parts[name][i] >= 1 if weight > 0 else parts[name][i] <= 0
                for name, weight in self._weights.items()
                if weight
            )
            for i in range(len(completions))
        ]
        reasons = [f"{name}: {phrases[0]}" for name, phrases in failures.items() if phrases]
        return Judged(total, parts, is_right, sum(map(len, failures.values())), reasons)

    def close(self) -> None:
        """Ends the processes; a later call starts them again."""
        for worker in self._workers.values():
            worker.close()

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_judge(config: TaskConfig, task: Task) -> Judge:
    """The judge of a task's completions by `config.rewards` and their weights. Raises ConfigError, see load_reward."""
    built_in = {
        "accuracy": accuracy_for(task),
        "format": format,
        "language_consistency": language_consistency_for(task.language),
    }
    weights = (1.0,) * len(config.rewards) if config.weights is None else config.weights
    rewards = {
        name: (built_in.get(name) or load_reward(name), weight)
        for name, weight in zip(config.rewards, weights, strict=True)
    }
    return Judge(rewards, config.timeout_seconds)
