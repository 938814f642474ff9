"""The directory of a run, and what lies where in it."""

import json
import os
from pathlib import Path
from typing import Any

from dsjax.config import Config, ConfigError, from_dict, to_dict
from dsjax.data import tokenizer

CONFIG = "config.json"  # the config as used
METRICS = "metrics.jsonl"  # one object a step
EXPERT_LOAD = "expert_load.jsonl"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"  # the files of the tokenizer, where it is one of files
PLOTS = "plots"
LOSS_PLOT = "loss.png"  # in it, beside others
REWARD_PLOT = "reward.png"  # instead, where rewards train
REPORT = "report.html"

LOGS = (".log", ".out", ".err")  # what a launcher may have put there before us


def claim(workdir: Path) -> None:
    """Makes `workdir` if need be.

    Raises:
      ConfigError: it cannot be made, or holds something other than a run.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in workdir.iterdir())
    except OSError as error:
        raise ConfigError(
            f"the run directory {workdir} cannot be used ({error.strerror}); choose another --workdir"
        ) from error
    foreign = [name for name in names if not name.startswith(".") and not name.endswith(LOGS)]
    if foreign and _read(workdir) is None and CHECKPOINTS not in names:
        raise ConfigError(
            f"{workdir} is not the directory of a run but holds {', '.join(foreign[:3])}"
            f"{' and more' if len(foreign) > 3 else ''}; choose a new or empty directory for --workdir"
        )


def has_checkpoint(workdir: Path) -> bool:
    """Whether `workdir` is that of a run that has saved at least once."""
    return _read(workdir) is not None and any(path.name.isdecimal() for path in (workdir / CHECKPOINTS).glob("*"))


def find_tokenizer(workdir: Path, name: str) -> str:
    """The tokenizer of a run, called `name` in its config: the run's own copy where it is one of files.

    Another file may lie under that name by now, or under the same relative one somewhere else.
    """
    own = tokenizer.beside(workdir / TOKENIZER)
    return name if own is None or name in tokenizer.NAMES else str(own)


def write_config(workdir: Path, config: Config) -> None:
    """Writes `config` where `read_config` finds it; whole or not at all."""
    temporary = workdir / f".{CONFIG}.tmp"
    try:
        temporary.write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, workdir / CONFIG)
    except OSError as error:
        raise ConfigError(f"{workdir} cannot be written to ({error.strerror}); choose another --workdir") from error


def read_config(workdir: Path) -> Config:
    """The config that the run in `workdir` was last started with.

    Raises:
      ConfigError: there is no run in `workdir`, or its config is none of ours.
    """
    values = _read(workdir)
    if values is None:
        raise ConfigError(f"{workdir} is not the directory of a run: it has no {CONFIG} written by dsjax train")
    return from_dict(values)


def _read(workdir: Path) -> dict[str, Any] | None:
    """What config.json holds; None if it is missing or, like that of a Hugging Face model, none of ours."""
    try:
        values = json.loads((workdir / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and {"model", "training"} <= values.keys() else None
