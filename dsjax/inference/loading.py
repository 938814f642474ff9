"""From a directory to an engine: the newest sound checkpoint of a run, or a published one."""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dsjax import hub
from dsjax.config import Config, ConfigError, MeshConfig, from_dict
from dsjax.data import tokenizer as tokenizers
from dsjax.hub.architecture import is_published
from dsjax.hub.directory import read_architecture
from dsjax.inference.engine import Engine
from dsjax.sharding import make_mesh
from dsjax.training import checkpoint
from dsjax.training.machine import use_compile_cache
from dsjax.training.state import abstract_state
from dsjax.training.workdir import CHECKPOINTS, find_tokenizer


class Ready(NamedTuple):
    """A model on its devices."""

    config: Config
    mesh: Mesh
    params: Any
    router_bias: Any


def load(path: str | Path, *, tokenizer: str | None = None, step: int | None = None, **options: Any) -> Engine:
    """An engine with the newest sound checkpoint of a run, or with a published checkpoint.

    >>> from dsjax.inference import load
    >>> engine = load("runs/tiny")
    >>> text = engine.complete("def main():", max_new_tokens=8)
    >>> len(text) <= 8
    True

    Args:
      path: the directory of either.
      tokenizer: as config.data.tokenizer; None: the run's, or the one beside the published weights.
      step: of a run; None: that of its newest sound checkpoint.
      options: what `Engine` takes by keyword.

    Raises:
      ConfigError: there is no usable checkpoint, or the tokenizer does not fit the model.
    """
    directory, speculative = Path(path), bool(options.get("speculative"))
    if step is None and not is_published(directory):
        step = find_step(directory)
    config = read_config(directory, step, tokenizer, mtp=speculative)
    text = tokenizers.load(config.data.tokenizer)
    if text.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer {config.data.tokenizer!r} has {text.vocab_size} tokens, but the model only"
            f" {config.model.vocab_size}; give the model's own with --tokenizer"
        )
    use_compile_cache(config.monitor.compile_cache)
    model = read_weights(directory, step, config)
    return Engine(model.config, model.params, model.router_bias, model.mesh, tokenizer=text, **options)


def read_config(directory: Path, step: int | None, tokenizer: str | None = None, *, mtp: bool = False) -> Config:
    """What decoding needs of a Config, of a run after `step` or, without one, of a published checkpoint.

    A published architecture comes without its MTP, unless asked for.
    """
    if step is None:
        return _published_config(directory, tokenizer, mtp)
    config = from_dict(checkpoint.read_meta(directory / CHECKPOINTS, step)["config"])
    return _with_tokenizer(config, tokenizer or find_tokenizer(directory, config.data.tokenizer))


def read_weights(directory: Path, step: int | None, config: Config) -> Ready:
    """The weights of either kind, over as many devices as they were trained on or divide among."""
    return _load_published(directory, config) if step is None else _load_run(directory, step, config)


def find_step(run: Path) -> int:
    """The step of a run's newest sound checkpoint; a warning names newer ones that are damaged.

    Raises:
      ConfigError: there is no checkpoint, or none is sound.
    """
    step = checkpoint.newest_to_read(run / CHECKPOINTS)
    if step is None:
        raise ConfigError(
            f"{run} holds no checkpoint of a dsjax run, and no config.json of a published one; give the --workdir of a"
            " run that saved one, or a directory as on the Hugging Face hub"
        )
    return step


def _published_config(directory: Path, tokenizer: str | None, mtp: bool) -> Config:
    """The architecture, BF16 arithmetic, the tokenizer beside it."""
    model = read_architecture(directory)
    if not mtp:
        model = dataclasses.replace(model, num_nextn_predict_layers=0)
    own = tokenizers.beside(directory)
    if tokenizer is None and own is None:
        files = " nor ".join(tokenizers.FILES)
        raise ConfigError(f"{directory} has no {files}; give a tokenizer with --tokenizer bytes|deepseek|FILE")
    return _with_tokenizer(Config(model=model), tokenizer or str(own))


def _with_tokenizer(config: Config, name: str) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=name))


def _load_run(run: Path, step: int, config: Config) -> Ready:
    """What was verified when `step` was chosen."""
    mesh = _mesh_for(_spread(config) if -1 in (config.mesh.fsdp, config.mesh.expert) else config.mesh)
    state = abstract_state(config, mesh)
    wanted = {"params": state.params, "router_bias": state.router_bias}
    loaded = checkpoint.restore(run / CHECKPOINTS, step, wanted, part=True, verify=False)
    return Ready(config, mesh, loaded["params"], loaded["router_bias"])


def _load_published(directory: Path, config: Config) -> Ready:
    """Weights as stored, over all devices."""
    mesh = _mesh_for(_spread(config))
    loaded = hub.load(directory, mesh, config=config.model)
    return Ready(config, mesh, loaded.params, loaded.router_bias)


def _spread(config: Config) -> MeshConfig:
    """All devices: experts first, where tokens may travel to them, then fsdp, as far as the sizes divide."""
    model, count = config.model, len(jax.devices())
    cut = math.gcd(model.hidden_size, model.kv_lora_rank, model.q_lora_rank or 0)
    expert = 1 if config.dispatch.form == "local" else math.gcd(model.n_routed_experts, count, cut)
    return MeshConfig(1, math.gcd(cut // expert, count // expert), expert)


def _mesh_for(trained: MeshConfig) -> Mesh:
    """A mesh without its data axis, which is of no use to one text; one device if there are too few."""
    devices = jax.devices()
    wanted = trained.fsdp * trained.expert
    if len(devices) < wanted:
        return make_mesh(MeshConfig(1, 1, 1), devices[:1])
    return make_mesh(MeshConfig(1, trained.fsdp, trained.expert), devices[:wanted])
