"""Where weights live: cut evenly or refused, and nothing large on every device."""

import dataclasses
import math

import jax
import pytest
import small
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from dsjax import sharding
from dsjax.config import ConfigError, MeshConfig, OptimizerConfig, load
from dsjax.model.moe import Execution, ExpertWeights, expert_specs
from dsjax.model.transformer import network
from dsjax.numerics.recipe import recipe
from dsjax.training import optimizer

PODS = {"deepseek_v3": (1, 8, 64), "deepseek_v2": (1, 32, 8), "moonlight_16b": (2, 4, 8), "deepseek_v2_lite": (1, 8, 8)}


def pod(*sizes: int) -> AbstractMesh:
    return AbstractMesh(sizes, sharding.AXES)


@pytest.fixture
def published(repository):
    """(network on a pod, shardings of its weights) of a shipped configuration."""

    def build(name: str):
        net = network(
            load(str(repository / "configs" / f"{name}.py")).model, Execution(pod(*PODS[name]), recipe("bf16"))
        )
        return net, net.param_shardings()

    return build


def bytes_per_device(shapes, shardings) -> int:
    sizes = jax.tree.map(lambda leaf, s: math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(sizes))


@pytest.mark.parametrize("name", PODS)
def test_every_large_weight_is_cut_over_fsdp_and_expert(published, name):
    net, shardings = published(name)
    ways = math.prod(PODS[name][1:])
    large = 0
    for (path, leaf), one in zip(
        jax.tree_util.tree_leaves_with_path(net.shapes), jax.tree.leaves(shardings), strict=True
    ):
        if leaf.size > 1_000_000:
            large += 1
            assert math.prod(one.shard_shape(leaf.shape)) * ways == leaf.size, jax.tree_util.keystr(path)
    assert large > 15


def test_v3_takes_its_share_of_a_pod(published):
    """682,636,469,376 trainable numbers over 512 devices: FP32 weights and BF16 m and v are 5.3 GB each."""
    net, shardings = published("deepseek_v3")
    trainable = 671_026_419_200 - 58 * 256 + 11_610_068_224 - 256
    weights = bytes_per_device(net.shapes, shardings)
    assert 4 * trainable / 512 <= weights < 4 * trainable / 512 * 1.001
    transform = optimizer.adamw(OptimizerConfig())
    moments = optimizer.state_shardings(transform, net.shapes, shardings, pod(1, 8, 64))
    assert bytes_per_device(jax.eval_shape(transform.init, net.shapes), moments) == pytest.approx(weights, rel=1e-6)


def test_moments_live_where_their_weights_live(published):
    net, shardings = published("deepseek_v3")
    state = optimizer.state_shardings(optimizer.adamw(OptimizerConfig()), net.shapes, shardings, pod(1, 8, 64))
    adam = state[0]
    assert adam.mu == shardings and adam.nu == shardings
    assert adam.count.spec == PartitionSpec()


def test_experts_are_stored_as_they_are_used():
    net = network(small.MODEL, small.execution(small.mesh(1, 2, 4)))
    experts = net.param_shardings()["moe_layers"]["mlp"]["experts"]
    shapes = net.shapes["moe_layers"]["mlp"]["experts"]
    names = ("gate_proj", "up_proj", "down_proj")
    for name, spec in zip(names, expert_specs(ExpertWeights(*(shapes[name] for name in names))), strict=True):
        shape = shapes[name].shape
        used = NamedSharding(small.mesh(1, 2, 4), PartitionSpec(None, *spec))
        assert experts[name].is_equivalent_to(used, len(shape))


def test_an_axis_cuts_a_tensor_once():
    spec = sharding.partition(("expert", "embed", "mlp"), (8, 16, 4), pod(2, 2, 4))
    assert spec == PartitionSpec(("expert",), ("fsdp",), None)
    assert sharding.partition(("embed", "latent"), (16, 6), pod(2, 2, 4)) == PartitionSpec(("fsdp", "expert"), None)
    assert sharding.partition(("embed", "mlp"), (16, 6), pod(2, 1, 1)) == PartitionSpec(None, None)


def test_indivisible_dimension_names_tensor_size_and_axes():
    with pytest.raises(ConfigError, match=r"mtp\.eh_proj: its embed dimension of 12 .* 8 \(fsdp x expert\)"):
        sharding.partition(("concat", "embed"), (24, 12), pod(1, 2, 4), "mtp.eh_proj")
    model = dataclasses.replace(small.MODEL, kv_lora_rank=12)
    with pytest.raises(ConfigError, match=r"kv_b_proj\.weight: its latent dimension of 12 is not divisible by 8"):
        network(model, small.execution(small.mesh(1, 2, 4))).param_shardings()


def test_unknown_logical_axis_names_the_known_ones():
    with pytest.raises(ConfigError, match="w has the unknown logical axis 'emded'; known are .*embed"):
        sharding.partition(("emded",), (8,), pod(1, 1, 1), "w")


def test_mesh_takes_what_is_left_and_refuses_what_does_not_fit():
    assert dict(sharding.make_mesh(MeshConfig(-1, 1, 4)).shape) == {"data": 2, "fsdp": 1, "expert": 4}
    for sizes in (MeshConfig(1, 1, 4), MeshConfig(-1, 3, 1), MeshConfig(2, 2, 4), MeshConfig(-1, 16, 1)):
        with pytest.raises(ConfigError, match=r"does not fit 8 device\(s\)"):
            sharding.make_mesh(sizes)


def test_batch_must_spread_evenly():
    sharding.check_batch("training.microbatch_size", 16, small.mesh(2, 1, 4))
    with pytest.raises(ConfigError, match="training.microbatch_size = 12 .* multiple of 8"):
        sharding.check_batch("training.microbatch_size", 12, small.mesh(2, 1, 4))


def test_gather_leaves_axes_of_one_device_out():
    mesh = small.mesh(1, 1, 4)
    whole = lambda axes: jax.shard_map(  # noqa: E731
        lambda a: sharding.gather(a, axes, 0, mesh),
        mesh=mesh,
        in_specs=PartitionSpec("expert"),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    a = jax.numpy.arange(8.0)
    assert (whole(("fsdp", "expert"))(a) == a).all()
    assert "all_gather" in str(jax.make_jaxpr(whole(("fsdp", "expert")))(a))
    assert "all_gather" not in str(jax.make_jaxpr(whole(("fsdp",)))(a))
