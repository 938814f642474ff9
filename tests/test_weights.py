"""The closed form's list of weights is the parameter tree, name by name, and is placed as the tree is."""

import dataclasses
from collections import defaultdict

import jax
import pytest
import small

from dsjax.config import load
from dsjax.model.transformer import is_quantised, network
from dsjax.planning.counts import parameters
from dsjax.planning.weights import weights
from dsjax.sharding import partition

BIASED = dataclasses.replace(small.DEEPER, attention_bias=True, tie_word_embeddings=True, num_nextn_predict_layers=0)
PLAIN = dataclasses.replace(small.MODEL, q_lora_rank=None, n_shared_experts=0, first_k_dense_replace=0)
DENSE = dataclasses.replace(small.MODEL, first_k_dense_replace=2, num_nextn_predict_layers=0)
NAMES = ("deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "moonlight_16b", "tiny")


@pytest.fixture
def models(repository):
    loaded = [load(str(repository / "configs" / f"{name}.py")).model for name in NAMES]
    return [*loaded, small.MODEL, BIASED, PLAIN, DENSE]


def dotted(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def test_names_shapes_axes_and_what_fp8_quantises_equal_the_abstract_tree(models):
    for model in models:
        net = network(model, small.execution())
        shapes = jax.tree_util.tree_leaves_with_path(net.shapes)
        axes = jax.tree.leaves(net.axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
        tree = {
            dotted(path): (leaf.shape, leaf_axes, is_quantised(path))
            for (path, leaf), leaf_axes in zip(shapes, axes, strict=True)
        }
        assert {one.name: (one.shape, one.axes, one.is_quantised) for one in weights(model)} == tree


def test_parts_equal_the_closed_form_counts(models):
    for model in models:
        sums = defaultdict(int)
        for one in weights(model):
            sums[one.part] += one.size
        counts = parameters(model)
        sums["mtp"] += model.num_nextn_predict_layers * counts.routing_bias // max(model.num_moe_layers, 1)
        for part in sums:
            assert sums[part] == getattr(counts, part), part
        assert sum(sums.values()) == counts.trainable + counts.mtp


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)])
def test_parts_of_a_device_equal_the_shardings(sizes):
    mesh = small.mesh(*sizes)
    for one in weights(small.MODEL):
        spec = partition(one.axes, one.shape, mesh, one.name)
        local = jax.sharding.NamedSharding(mesh, spec).shard_shape(one.shape)
        assert one.per_device(dict(mesh.shape)) == jax.numpy.prod(jax.numpy.array(local))
        assert one.ways({"data": 1, "fsdp": 1, "expert": 1}) == 1
