"""The one table of names: which published tensors make up each of our arrays, and where in it each one lies.

Ours are stacked over layers and experts, and hold matrices as [in, out]; published ones are single and [out, in].
Inside a block both bear the same names, so only what differs is written down here. Everything that reads or writes
published tensors asks `places`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dsjax.config import ModelConfig
from dsjax.hub.block_fp8 import Blocks

OUTSIDE = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
MTP = {"norm.weight": "shared_head.norm.weight"}  # below model.layers.<number of layers>.
EXPERTS = "mlp.experts."  # ours end in the projection, published ones in <expert>.<projection>.weight
SCALE = "_scale_inv"  # appended to the name of a tensor in block FP8
# Published next to weights, computed from the config and of no use to us.
COMPUTED = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Place:
    """Where a published tensor lies in our trees of parameters and routing biases."""

    path: str  # dotted name of our array
    index: tuple[int, ...]  # layer, expert, or both, in a stacked array
    shape: tuple[int, ...]  # as published
    transposed: bool

    def as_published(self, array: Any) -> Any:
        """What lies at `index` of our array, turned into the published layout, or back."""
        return array.T if self.transposed else array


def places(tree: Any, config: ModelConfig) -> dict[str, Place]:
    """The places of all published tensors that make up `tree`, in the order of the network.

    tree: parameters, gradients or routing biases, or their shapes; or a dict of several such trees merged by `flat`.
    """
    found = []
    for path, leaf in flat(tree).items():
        for name, index in _names(path, leaf.shape, config):
            shape = leaf.shape[len(index) :]
            transposed = len(shape) == 2 and path != "embed_tokens"
            found.append((name, Place(path, index, shape[::-1] if transposed else shape, transposed)))
    return dict(sorted(found, key=lambda pair: _order(pair[0])))


def copies(config: ModelConfig) -> dict[str, str]:
    """Published names of tensors that repeat another one, with the name of the original."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    found = {"lm_head.weight": head} if config.tie_word_embeddings else {}
    if config.num_nextn_predict_layers:
        layer = f"model.layers.{config.num_hidden_layers}."
        found[layer + "embed_tokens.weight"] = "model.embed_tokens.weight"
        found[layer + "shared_head.head.weight"] = head
    return found


def is_quantised(name: str) -> bool:
    """Whether DeepSeek publishes this tensor in FP8: the projections of attention and feed-forward layers.

    Embedding, head, norms, router and MTP's eh_proj stay in BF16, biases in FP32.
    """
    return name.endswith("_proj.weight") and "eh_proj" not in name or name.endswith("kv_a_proj_with_mqa.weight")


def flat(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by dotted path; block FP8 counts as one."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, Blocks))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def published(tree: Any, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Our arrays (parameters, gradients, routing biases) under published names and in the published layout."""
    arrays = {path: np.asarray(leaf) for path, leaf in flat(tree).items()}
    for name, place in places(tree, config).items():
        yield name, place.as_published(arrays[place.path][place.index])


def layer_of(name: str) -> int | None:
    """The number of the layer that a published tensor belongs to; None outside of layers."""
    parts = name.split(".")
    return int(parts[2]) if name.startswith("model.layers.") and parts[2].isdecimal() else None


def _names(path: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The published names that make up our array at `path`, each with its index in it."""
    if path in OUTSIDE:
        yield OUTSIDE[path], ()
        return
    stack, _, rest = path.partition(".")
    if stack == "mtp":
        layer = f"model.layers.{config.num_hidden_layers}."
        inside = rest.removeprefix("block.")
        yield from _in_layer(layer, inside if inside != rest else MTP.get(rest, rest), shape, ())
        return
    first = {"dense_layers": 0, "moe_layers": config.first_k_dense_replace}[stack]
    for index in range(shape[0]):
        yield from _in_layer(f"model.layers.{first + index}.", rest, shape[1:], (index,))


def _in_layer(layer: str, rest: str, shape: tuple[int, ...], index: tuple[int, ...]):
    if not rest.startswith(EXPERTS):
        yield layer + rest, index
        return
    for expert in range(shape[0]):
        yield f"{layer}{EXPERTS}{expert}.{rest.removeprefix(EXPERTS)}.weight", (*index, expert)


def _order(name: str) -> tuple[int, int]:
    """The embedding first, then layer by layer, the last norm and the head."""
    layer = layer_of(name)
    if layer is not None:
        return 1, layer
    return (0 if "embed_tokens" in name else 2), 0
