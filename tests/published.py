"""Checkpoints as DeepSeek publishes them, read for tests: tensors by their published names, ours by the same names."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import ModelConfig, RopeScaling


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one file: eight bytes of length, a JSON header, then the numbers."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    dtypes = {"F32": np.float32, "BF16": jnp.bfloat16, "I64": np.int64}
    tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            first, last = (start + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(raw[first:last], dtypes[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_config(path: Path) -> ModelConfig:
    """The fields of a published config.json that ModelConfig has; a null keeps the default."""
    values = json.loads(path.read_text())
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    kept = {name: value for name, value in values.items() if name in known and value is not None}
    kept["q_lora_rank"] = values["q_lora_rank"]
    kept["num_nextn_predict_layers"] = values.get("num_nextn_predict_layers", 0)
    if values["rope_scaling"]:
        kept["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    return ModelConfig(**kept)


def published_names(path: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The published tensors that make up our array at `path`, and where in it each of them lies."""
    top, _, rest = path.partition(".")
    if top in ("embed_tokens", "norm"):
        yield f"model.{top}.weight", ()
    elif top == "lm_head":
        yield "lm_head.weight", ()
    elif top == "mtp":
        layer = f"model.layers.{config.num_hidden_layers}."
        inner = rest.removeprefix("block.")
        if rest.startswith("block."):
            yield from _of_layer(layer, inner, shape, ())
        else:
            yield layer + ("shared_head.norm.weight" if rest == "norm.weight" else rest), ()
    else:
        first = config.first_k_dense_replace if top == "moe_layers" else 0
        for index in range(shape[0]):
            yield from _of_layer(f"model.layers.{first + index}.", rest, shape[1:], (index,))


def _of_layer(layer: str, rest: str, shape: tuple[int, ...], index: tuple[int, ...]):
    if rest.startswith("mlp.experts."):
        projection = rest.removeprefix("mlp.experts.")
        for expert in range(shape[0]):
            yield f"{layer}mlp.experts.{expert}.{projection}.weight", (*index, expert)
    else:
        yield layer + rest, index


def _as_published(name: str, array: np.ndarray) -> np.ndarray:
    """Between [in, out] and the published [out, in]; the embedding is [vocabulary, hidden] in both."""
    return array.T if array.ndim == 2 and "embed_tokens" not in name else array


def load(tensors: dict[str, np.ndarray], shapes: Any, config: ModelConfig) -> Any:
    """A tree of arrays like `shapes`, filled from published tensors."""

    def fill(path: Any, leaf: Any) -> np.ndarray:
        out = np.full(leaf.shape, np.nan, np.float32)
        for name, index in published_names(jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape, config):
            out[index] = _as_published(name, tensors[name])
        assert np.isfinite(out).all()
        return out

    return jax.tree_util.tree_map_with_path(fill, shapes)


def named(tree: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """Our arrays under the published names and in the published layout."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        for name, index in published_names(jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape, config):
            found[name] = _as_published(name, np.asarray(leaf)[index])
    return found
