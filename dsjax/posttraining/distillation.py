"""Distillation as R1 did it [R1 §2.4]: a student fine-tuned on its teacher's right answers, and nothing else."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dsjax.config import Config, ConfigError, to_dict
from dsjax.posttraining.collection import collect
from dsjax.training.changes import check_same_run
from dsjax.training.lock import lock
from dsjax.training.loop import train
from dsjax.training.summary import Summary
from dsjax.training.workdir import claim, has_checkpoint, read_config, write_config

ANSWERS = "teacher.jsonl"  # in the run's directory


def distill(
    config: Config, teacher: str, workdir: Path, problems: int, samples: int, allow_change: Sequence[str] = ()
) -> Summary:
    """Draws `samples` answers to each of `problems` training problems, keeps the right ones, and trains on them.

    `config` is the student's; its data.sources become the teacher's answers, which lie in `workdir`. Interrupted, both
    parts go on where they were.

    Raises:
      ConfigError: as `collect` and `train`, before anything is written where `workdir` is that of another run; or no
        answer was right.
    """
    answers = workdir / ANSWERS
    data = dataclasses.replace(config.data, sources=(f"chat:{answers}",))
    config = dataclasses.replace(config, data=data)
    claim(workdir)
    with lock(workdir):
        _begin(workdir, config, allow_change)
        done = collect(config, answers, problems, teacher, samples)
    if not done.kept:
        raise ConfigError(
            f"none of the {done.drawn} answers of {teacher} is right, so there is nothing to learn from; draw more with"
            " --samples, or take a better teacher"
        )
    return train(config, workdir, allow_change)


def _begin(workdir: Path, config: Config, allow_change: Sequence[str]) -> None:
    """Makes `workdir` that of a run under `config` where nothing is saved yet; later that is left to `train`.

    Raises ConfigError where the run that is there cannot go on under `config`.
    """
    if has_checkpoint(workdir):
        begun = {"config": to_dict(read_config(workdir)), "data_fingerprint": ""}  # the data may not be there yet
        check_same_run(begun, config, "", allow_change)
    else:
        write_config(workdir, config)
