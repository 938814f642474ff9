"""Sets to fine-tune on: a task's worked solutions, or a model's own that a rule accepted (rejection sampling)."""

import contextlib
import fcntl
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.config import Config, ConfigError
from dsjax.data.chat import find_template
from dsjax.hub.architecture import is_published
from dsjax.inference.loading import find_step, load
from dsjax.posttraining.rewards import make_judge
from dsjax.posttraining.rollouts import draw_samples, seed_of
from dsjax.posttraining.tasks import Problem, Task, make_task
from dsjax.training.monitor import append_line

CHUNK = 64  # problems between two writes


class Collected(NamedTuple):
    """What a set came from."""

    problems: int  # all of them, those of earlier calls included
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

    FILE.progress beside it tells how they were collected, and which problem is next.

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
      ConfigError: the file cannot be written, is being written or was collected in another way; the task has no worked
        solutions; there is no usable checkpoint.
    """
    task = make_task(config.task, config.training.seed)
    how: dict[str, Any] = {"task": task.fingerprint, "system": config.task.system, "first": first, "samples": samples}
    if checkpoint is None:
        task.worked(task.problem(first))  # a task that has none is told before anything is written
        how["brief"] = brief
    else:
        how |= _drawn(config, Path(checkpoint), out)
    with _held(out):
        begun = _begin(out, how)
        done, kept = begun.next - first, begun.kept
        if done < problems:
            source = _worked(task, config, brief) if checkpoint is None else _accepted(task, config, how)
        for start in range(done, problems, CHUNK):
            done = min(start + CHUNK, problems)
            lines = list(source([(index, task.problem(index)) for index in range(first + start, first + done)]))
            kept += len(lines)
            try:
                append_line(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            except OSError as error:
                raise _unwritable(out, error) from error
            _write_progress(out, how, _Begun(first + done, kept))
            tell(f"{done} of {problems} problems, {kept} solutions kept")
    return Collected(done, done * samples, kept)


def _drawn(config: Config, checkpoint: Path, out: Path) -> dict[str, Any]:
    """What decides which samples are kept: whose they are, how they are drawn and how they are judged.

    A set that is there goes on with the step that it began with, and needs no checkpoint once it is complete.
    """
    path, told = str(checkpoint.resolve()), _read_progress(out) if out.exists() else None
    if told is not None and told["how"].get("checkpoint") == path:
        step = told["how"].get("step")
    else:
        step = None if is_published(checkpoint) else find_step(checkpoint)
    return {
        "checkpoint": path,
        "step": step,
        "temperature": config.grpo.temperature,
        "top_p": config.grpo.top_p,
        "max_new_tokens": config.grpo.max_new_tokens,
        "sequence_length": config.data.sequence_length,
        "rewards": list(config.task.rewards),
        "weights": None if config.task.weights is None else list(config.task.weights),
    }


class _Begun(NamedTuple):
    """Where a set stands."""

    next: int  # the first problem that is not done
    kept: int  # lines of those before


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Makes `out` if need be, and keeps others from collecting into it until the end of the context."""
    with contextlib.ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(out.open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{out} is being written by another process; stop it, or choose another file") from error
        except OSError as error:
            raise _unwritable(out, error) from error
        yield


def _begin(out: Path, how: dict[str, Any]) -> _Begun:
    """Where an earlier call came to; cuts off what it did not finish. Raises ConfigError for another set."""
    try:
        content = out.read_bytes()
    except OSError as error:
        raise ConfigError(f"{out} cannot be read ({error.strerror}); choose another file") from error
    told, begun = _read_progress(out), _Begun(how["first"], 0)
    if content:
        _check_same_set(out, told, how)
    if told is not None and told["how"] == how:
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        begun = _where(out, lines, _Begun(told["next"], told["kept"]), how["first"])
        if (whole := sum(map(len, lines[: begun.kept]))) < len(content):
            os.truncate(out, whole)
    _write_progress(out, how, begun)
    return begun


def _check_same_set(out: Path, told: dict[str, Any] | None, how: dict[str, Any]) -> None:
    """Raises ConfigError unless what is in `out` was collected as `how` says."""
    if told is None:
        raise ConfigError(
            f"{out} is there without {_progress(out).name}, which tells how a set was collected; choose another file,"
            " or delete it"
        )
    old = told["how"]
    if changed := [name for name in {**old, **how} if old.get(name) != how.get(name)]:
        differences = "; ".join(f"{name}: {old.get(name)!r} -> {how.get(name)!r}" for name in changed)
        raise ConfigError(f"{out} was collected in another way ({differences}); choose another file, or delete it")


def _where(out: Path, lines: list[bytes], told: _Begun, first: int) -> _Begun:
    """Where the set stands that consists of `lines` by now and was `told` of last."""
    problems = [_problem(line) for line in lines]
    if any(later < before for before, later in itertools.pairwise([first, *problems])):
        raise ConfigError(f"{out} holds lines that were not collected into it; choose another file")
    if len(lines) == told.kept:
        return told
    # Killed before it was told, or cut since: the last problem may have had more lines.
    return _Begun(problems[-1], problems.index(problems[-1])) if problems else _Begun(first, 0)


def _problem(line: bytes) -> int:
    """Of which problem a line is; -1 where it is none of ours."""
    try:
        problem = json.loads(line)["problem"]
    except (ValueError, KeyError, TypeError):
        return -1
    return problem if isinstance(problem, int) else -1


def _progress(out: Path) -> Path:
    return out.with_name(f"{out.name}.progress")


def _read_progress(out: Path) -> dict[str, Any] | None:
    """What `_write_progress` wrote; None where it is missing."""
    try:
        told = json.loads(_progress(out).read_text(encoding="utf-8"))
        return told if isinstance(told["how"], dict) and int(told["next"]) >= 0 <= int(told["kept"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_progress(out: Path, how: dict[str, Any], begun: _Begun) -> None:
    """Beside the set, whole or not at all: of some problems no line is kept, so the set alone does not tell."""
    temporary = out.with_name(f".{out.name}.progress.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"how": how, "next": begun.next, "kept": begun.kept}, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, _progress(out))
    except OSError as error:
        raise _unwritable(out, error) from error


def _unwritable(out: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{out} cannot be written ({error.strerror}); what is there stays, go on elsewhere")


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


def _accepted(task: Task, config: Config, how: dict[str, Any]) -> Source:
    engine, samples = load(how["checkpoint"], step=how["step"], slots=config.grpo.slots), how["samples"]
    template = find_template(engine.config.data.tokenizer)

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
        for index, one, is_right in zip(indices, drawn, judged.is_right, strict=True):
            text = one.text.strip()
            if is_right and (index, text) not in seen:
                seen.add((index, text))
                yield _line(config, index, one.problem, text)

    return run
