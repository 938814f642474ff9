"""What a run takes over from the checkpoint that `init_from` names, before its configuration is checked. No JAX.

The checkpoint decides the architecture and the tokenizer; the config file decides everything about training. A
`--config.` override wins over both.
"""

import dataclasses
from pathlib import Path
from typing import Any

from dsjax.config import ConfigError, ModelConfig
from dsjax.data import tokenizer
from dsjax.hub.architecture import is_published, neither
from dsjax.hub.directory import read_architecture
from dsjax.training import workdir

# Fields of `model` that are no property of the weights.
OF_TRAINING = ("aux_loss_alpha", "initializer_range")
DEFAULT_TOKENIZER = "bytes"


def adopt(values: dict[str, Any], init_from: str, run: str | None = None) -> None:
    """Puts into the nested `values` of a config file what the checkpoint decides.

    Where the file has YaRN and the checkpoint has none, the context is to be extended: the file's positions stay.

    Args:
      values: changed in place.
      init_from: the directory of a published checkpoint or of a run.
      run: the directory of the run to be; where it has got a checkpoint of its own, that decides instead.

    Raises:
      ConfigError: there is no checkpoint in `init_from`, or one that dsjax cannot read.
    """
    source = Path(init_from).expanduser()
    if run is not None and workdir.has_checkpoint(Path(run)):
        source = Path(run)
    from_run = not is_published(source)
    model, own = _of_run(source) if from_run else _published(source)
    file, data = values.get("model") or {}, values.setdefault("data", {})
    if not isinstance(file, dict) or not isinstance(data, dict):
        return  # told when the sections are built
    kept = list(OF_TRAINING)
    if not from_run and model.mtp_hidden_state == ModelConfig().mtp_hidden_state:
        kept.append("mtp_hidden_state")  # published vocabulary has no field for it, so the file may say
    if model.rope_scaling is None and file.get("rope_scaling") is not None:
        kept += ["rope_scaling", "max_position_embeddings"]
    values["model"] = dataclasses.asdict(model) | {name: file[name] for name in kept if name in file}
    if own is not None and data.get("tokenizer", DEFAULT_TOKENIZER) == DEFAULT_TOKENIZER:
        data["tokenizer"] = own


def _published(directory: Path) -> tuple[ModelConfig, str | None]:
    file = tokenizer.beside(directory)
    return read_architecture(directory), str(file) if file else None


def _of_run(directory: Path) -> tuple[ModelConfig, str]:
    if not workdir.has_checkpoint(directory):
        raise ConfigError(f"init_from: {neither(directory)}")
    config = workdir.read_config(directory)
    return config.model, workdir.find_tokenizer(directory, config.data.tokenizer)
