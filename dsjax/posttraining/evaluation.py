"""Accuracy on held-out problems: one answer each, and the answer that most of several agree on."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.config import Config
from dsjax.data.chat import Template, find_template
from dsjax.inference.engine import Engine
from dsjax.inference.loading import load
from dsjax.posttraining.rewards import accuracy_for
from dsjax.posttraining.rollouts import Sample, draw_samples
from dsjax.posttraining.tasks import Task, make_task


class Accuracy(NamedTuple):
    """Shares from 0 to 1."""

    pass_at_1: float  # the mean over all samples: what one sample is expected to have
    majority: float  # of problems whose most frequent answer is right
    samples: list[Sample]


def measure_accuracy(
    engine: Engine,
    config: Config,
    task: Task,
    template: Template | None,
    problems: int,
    samples: int,
    on_result: Callable[[], None] = lambda: None,
) -> Accuracy:
    """On the first `problems` held-out problems, `samples` of each, by the sampling that `config.grpo` has."""
    asked = [(index, task.problem(index, "validation")) for index in range(problems)]
    drawn = draw_samples(engine, config, template, asked, samples, "validation", on_result)
    is_right = accuracy_for(task)
    right = [is_right(one.problem.prompt, one.text, one.problem.answer) for one in drawn]
    votes = 0.0
    for first in range(0, len(drawn), samples):
        group = range(first, first + samples)
        votes += right[group[vote([drawn[i].text for i in group])]]
    return Accuracy(sum(right) / len(right), votes / problems, drawn)


def evaluate_problems(
    path: str, config: Config | None, problems: int, samples: int, tokenizer: str | None = None
) -> dict[str, Any]:
    """Accuracy of a run or a published checkpoint on held-out problems, as JSON.

    config: its task, seed and sampling; None: the run's own.
    """
    directory = Path(path)
    engine = load(directory, tokenizer=tokenizer, slots=(config or Config()).grpo.slots)
    asked = engine.config if config is None else dataclasses.replace(engine.config, task=config.task, grpo=config.grpo)
    if config is not None:
        length = min(config.data.sequence_length, engine.config.model.max_position_embeddings)
        asked = dataclasses.replace(
            asked, training=config.training, data=dataclasses.replace(asked.data, sequence_length=length)
        )
    template = find_template(engine.config.data.tokenizer)
    task = make_task(asked.task, asked.training.seed)
    found = measure_accuracy(engine, asked, task, template, problems, samples)
    return {
        "task": task.name,
        "problems": problems,
        "samples": samples,
        "temperature": asked.grpo.temperature,
        "pass_at_1": round(found.pass_at_1, 4),
        "majority": round(found.majority, 4),
        "mean_response_tokens": round(sum(len(one.tokens) for one in found.samples) / len(found.samples), 1),
        "truncated": round(sum(one.is_truncated for one in found.samples) / len(found.samples), 4),
    }


def vote(completions: Sequence[str]) -> int:
    """Which completion has the answer that most of them have; of answers with equally many, the one given first.

    A completion without an answer has no vote.
    """
    answers = [answer_of(text) for text in completions]
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return 0
    return answers.index(max(counts, key=counts.__getitem__))


def answer_of(completion: str) -> str | None:
    """What stands in the last <answer>...</answer>, without the spaces around it; None where there is none."""
    head, found, _ = completion.rpartition("</answer>")
    _, opened, answer = head.rpartition("<answer>")
    return answer.strip() if found and opened else None
