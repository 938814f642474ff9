"""Sets to fine-tune on: a task's worked solutions, or a model's own that a rule accepted (rejection sampling)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.config import Config, ConfigError
from dsjax.data.chat import find_template
from dsjax.inference.loading import load
from dsjax.posttraining.rewards import make_judge
from dsjax.posttraining.rollouts import draw_samples, seed_of
from dsjax.posttraining.tasks import Problem, Task, make_task
from dsjax.training.monitor import append_line, read_rows
from dsjax.training.workdir import find_tokenizer

CHUNK = 64  # problems between two writes


class Collected(NamedTuple):
    """What a set came from."""

    problems: int
    drawn: int  # samples, or worked solutions
    kept: int  # of them, in the file


def collect(
    config: Config,
    out: Path,
    problems: int,
    checkpoint: str | None = None,
    samples: int = 1,
    first: int = 0,
    brief: float = 0.0,
    tell: Callable[[str], None] = print,
) -> Collected:
    """Writes conversations that `--config.data.sources=chat:FILE` trains on, one a line; goes on with what is there.

    Args:
      config: its task and seed; with `checkpoint` also how to sample, grpo.temperature and the rest.
      out: the file.
      problems: how many of the task's training problems, from the `first` on.
      checkpoint: a run or a published model, of whose samples those are kept that have all the rewards they can have;
        None: the task's own worked solutions.
      samples: of each problem.
      brief: share of the worked solutions, chosen by a hash of the problem, that are the answer without a thought.
      tell: is called with a line about the progress.

    Raises:
      ConfigError: the file cannot be written or was collected in another way, the task has no worked solutions.
    """
    task = make_task(config.task, config.training.seed)
    how: dict[str, Any] = {"task": task.fingerprint, "first": first, "samples": samples, "brief": brief}
    how["checkpoint"] = None if checkpoint is None else Path(checkpoint).name
    begun, kept = _begun(out, how), 0
    source = _worked(task, config, brief) if checkpoint is None else _accepted(task, config, checkpoint, samples)
    for start in range(0, problems, CHUNK):
        end = min(start + CHUNK, problems)
        if start + first < begun.next:
            kept = begun.kept
            continue
        chunk = [(index, task.problem(index)) for index in range(start + first, end + first)]
        lines = list(source(chunk))
        kept += len(lines)
        text = "".join(json.dumps(line | {"how": how}, ensure_ascii=False) + "\n" for line in lines)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            append_line(out, text)
        except OSError as error:
            raise ConfigError(
                f"{out} cannot be written ({error.strerror}); what is there stays, go on elsewhere"
            ) from error
        tell(f"{end} of {problems} problems, {kept} solutions kept")
    return Collected(problems, problems * samples, kept)


class _Begun(NamedTuple):
    next: int  # the first problem that is not done
    kept: int


def _begun(out: Path, how: dict[str, Any]) -> _Begun:
    """What an earlier call has left. Raises ConfigError where it collected something else."""
    rows = read_rows(out)
    if not rows:
        if out.exists() and out.stat().st_size:
            raise ConfigError(f"{out} holds something else; choose another file")
        return _Begun(0, 0)
    if any(row.get("how") != how for row in rows):
        raise ConfigError(f"{out} was collected in another way; choose another file, or delete it")
    done = max(row["problem"] for row in rows) - how["first"]
    return _Begun(how["first"] + (done // CHUNK + 1) * CHUNK, len(rows))


Source = Callable[[list[tuple[int, Problem]]], Iterator[dict[str, Any]]]


def _line(config: Config, index: int, problem: Problem, answer: str) -> dict[str, Any]:
    system = [] if config.task.system is None else [{"role": "system", "content": config.task.system}]
    turns = [*system, {"role": "user", "content": problem.prompt}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "problem": index}


def _worked(task: Task, config: Config, brief: float) -> Source:
    def run(chunk: list[tuple[int, Problem]]) -> Iterator[dict[str, Any]]:
        for index, problem in chunk:
            is_brief = seed_of(config.training.seed, "brief", index, 0) < brief * 2**32
            yield _line(config, index, problem, task.brief(problem) if is_brief else task.worked(problem))

    return run


def _accepted(task: Task, config: Config, path: str, samples: int) -> Source:
    engine = load(path, slots=config.grpo.slots)
    template = find_template(find_tokenizer(Path(path), engine.config.data.tokenizer))
    best = sum((1.0,) * len(config.task.rewards) if config.task.weights is None else config.task.weights)

    def run(chunk: list[tuple[int, Problem]]) -> Iterator[dict[str, Any]]:
        drawn = draw_samples(engine, config, template, chunk, samples)
        indices = [index for index, _ in chunk for _ in range(samples)]
        with make_judge(config.task, task) as judge:
            judged = judge(
                [one.problem.prompt for one in drawn],
                [one.text for one in drawn],
                [one.problem.answer for one in drawn],
            )
        seen: set[tuple[int, str]] = set()
        for index, one, reward in zip(indices, drawn, judged.total, strict=True):
            text = one.text.strip()
            if reward >= best and (index, text) not in seen:
                seen.add((index, text))
                yield _line(config, index, one.problem, text)

    return run
