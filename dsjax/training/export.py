"""A run as a published checkpoint: what others load without a line of ours."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsjax import hub
from dsjax.config import Config, ConfigError, MeshConfig, from_dict
from dsjax.data import tokenizer
from dsjax.hub import names
from dsjax.hub.architecture import neither
from dsjax.hub.inspection import by_part, describe, table
from dsjax.sharding import make_mesh
from dsjax.training import checkpoint
from dsjax.training.state import abstract_state
from dsjax.training.workdir import CHECKPOINTS, find_tokenizer


def load_run(run: str | Path, step: int | None = None) -> tuple[Config, hub.Loaded]:
    """The configuration and the weights, FP32 and on the first device, of a run after `step`.

    Args:
      run: its directory.
      step: None takes the newest sound one, with a warning where that is not the newest.

    Raises:
      ConfigError: there is no such checkpoint, or it is damaged.
    """
    if step is None:
        return _load(run, _newest(run), verify=False)
    return _load(run, step, verify=True)


def _newest(run: str | Path) -> int:
    step = checkpoint.newest_to_read(Path(run) / CHECKPOINTS)
    if step is None:
        raise ConfigError(neither(Path(run)))
    return step


def _load(run: str | Path, step: int, verify: bool) -> tuple[Config, hub.Loaded]:
    directory = Path(run) / CHECKPOINTS
    config = from_dict(checkpoint.read_meta(directory, step)["config"])
    state = abstract_state(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    wanted = {"params": state.params, "router_bias": state.router_bias}
    arrays = checkpoint.restore(directory, step, wanted, part=True, verify=verify)
    return config, hub.Loaded(config.model, arrays["params"], arrays["router_bias"])


def export(
    run: str | Path,
    destination: str | Path,
    dtype: Any = None,
    *,
    scale_format: str | None = None,
    step: int | None = None,
) -> None:
    """Writes a run after `step` (None: its newest sound) as `hub.save` does (dtype None: in FP32), with its tokenizer.

    Raises:
      ConfigError: as `load_run` and `hub.save` do.
    """
    config, model = load_run(run, step)
    with tempfile.TemporaryDirectory() as scratch:
        text = tokenizer.load(find_tokenizer(Path(run), config.data.tokenizer))
        text.write(Path(scratch))
        hub.save(destination, model, dtype, scale_format=scale_format, companions=scratch, eos_token_id=text.eos_id)


def inspect_run(run: str | Path) -> str:
    """A text for people: the architecture of a run, its parameters by part, and the steps of its checkpoints."""
    step = _newest(run)
    config, model = _load(run, step, verify=False)
    steps = checkpoint.steps(Path(run) / CHECKPOINTS)
    lines = [f"{run}: a run, with checkpoints of step {', '.join(map(str, steps))}"]
    lines += [f"  {name:<13} {text}" for name, text in describe(config.model)]
    lines += ["", *table(by_part(_tensors(model)))]
    return "\n".join([*lines, "", f"step {step}: every array is there, and every number finite"])


def _tensors(model: hub.Loaded) -> Iterator[tuple[str, np.dtype, tuple[int, ...], float]]:
    for tree in (model.params, model.router_bias):
        for name, array in names.published(tree, model.config):
            if not np.isfinite(array).all():
                raise ConfigError(f"the checkpoint is of no use: {name} holds NaN or infinity")
            yield name, array.dtype, array.shape, float(np.abs(array).max(initial=0))
