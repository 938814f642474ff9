"""The architecture of a published directory: what its config.json says, as far as its files bear it out. No JAX."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from dsjax.config import ModelConfig
from dsjax.hub.architecture import read_config
from dsjax.hub.safetensors import open_tensors


def read_architecture(directory: Path) -> ModelConfig:
    """The architecture that `hub.load` finds in `directory`, from config.json and the headers of the files.

    Raises:
      ConfigError: either of them is damaged, or of another family.
    """
    stored = read_config(directory)
    with open_tensors(directory) as tensors:
        return without_missing_mtp(stored.model, tensors.entries)


def without_missing_mtp(model: ModelConfig, found: Iterable[str]) -> ModelConfig:
    """`model`, without MTP where not one tensor of it is there: transformers drops them and keeps the field."""
    layer = f"model.layers.{model.num_hidden_layers}."
    if any(name.startswith(layer) for name in found):
        return model
    return dataclasses.replace(model, num_nextn_predict_layers=0)
