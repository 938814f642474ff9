"""Where weights live: cut evenly or refused, and nothing large on every device."""

import dataclasses
import math
import random
import types

import jax
import pytest
import small
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dsjax import sharding
from dsjax.config import ConfigError, MeshConfig, OptimizerConfig, load
from dsjax.model.experts import ExpertWeights, expert_specs
from dsjax.model.moe import Execution
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
    assert dict(sharding.make_mesh(MeshConfig(2, -1, 2)).shape) == {"data": 2, "fsdp": 2, "expert": 2}
    assert set(sharding.make_mesh(MeshConfig()).axis_types) == {AxisType.Auto}
    for sizes in (MeshConfig(1, 1, 4), MeshConfig(-1, 3, 1), MeshConfig(2, 2, 4), MeshConfig(-1, 16, 1)):
        with pytest.raises(ConfigError, match=r"does not fit 8 device\(s\)"):
            sharding.make_mesh(sizes)
    for sizes, names in ((MeshConfig(-1, -1, 2), "mesh.data and mesh.fsdp"), (MeshConfig(2, 1, -1), "mesh.expert")):
        with pytest.raises(ConfigError, match=f"{names} = -1, but .* only mesh.data or mesh.fsdp is filled in"):
            sharding.make_mesh(sizes)


@dataclasses.dataclass(frozen=True)
class Device:
    """What JAX tells of a device that it has none of here."""

    id: int
    process_index: int
    slice_index: int = 0
    coords: tuple[int, int, int] | None = None
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5p"


def torus(x: int, y: int, z: int, slice_index: int = 0) -> list[Device]:
    """A slice of v5p, a host for each 2 x 2 x 1 chips, in the order of their hosts."""
    places = [(a, b, c) for c in range(z) for b in range(y) for a in range(x)]
    hosts = sorted({(a // 2, b // 2, c) for a, b, c in places})
    first = slice_index * len(hosts)
    found = [(first + hosts.index((a // 2, b // 2, c)), (a, b, c)) for a, b, c in places]
    return [
        Device(slice_index * len(places) + i, host, slice_index, place) for i, (host, place) in enumerate(sorted(found))
    ]


def gpus(nodes: int, each: int, processes_per_node: int = 1) -> list[Device]:
    per = each // processes_per_node
    return [
        Device(i, i // per, slice_index=i // each, platform="gpu", device_kind="NVIDIA H100")
        for i in range(nodes * each)
    ]


def steps(a: Device, b: Device, size: tuple[int, int, int]) -> int:
    """Links of the torus between two chips."""
    return sum(min((p - q) % n, (q - p) % n) for p, q, n in zip(a.coords, b.coords, size, strict=True))


@pytest.mark.parametrize("sizes", [(1, 4, 16), (4, 1, 16), (2, 2, 16), (1, 16, 4), (8, 1, 8)])
def test_neighbours_on_the_expert_axis_are_neighbours_in_the_torus(sizes):
    """Whatever order they come in, the ranks of an axis fill a box, which has links of its own."""
    devices = torus(4, 4, 4)
    random.Random(1).shuffle(devices)
    arranged = sharding.arrange(dict(zip(sharding.AXES, sizes, strict=True)), devices)
    assert arranged.shape == sizes and len({device.id for device in arranged.flat}) == 64
    for group in arranged.reshape(-1, sizes[2]):
        assert math.prod(len({device.coords[dim] for device in group}) for dim in range(3)) == sizes[2]


def test_an_axis_may_take_a_part_of_a_torus_axis():
    arranged = sharding.arrange({"data": 1, "fsdp": 16, "expert": 64}, torus(8, 8, 16))
    assert arranged.shape == (1, 16, 64) and len({device.id for device in arranged.flat}) == 1024
    arranged = sharding.arrange({"data": 1, "fsdp": 32, "expert": 2}, torus(4, 4, 4))
    assert all(steps(*pair, (4, 4, 4)) == 1 for pair in arranged.reshape(-1, 2))


def test_slices_divide_the_data_axis_alone():
    devices = [device for index in range(2) for device in torus(2, 2, 4, index)]
    arranged = sharding.arrange({"data": 4, "fsdp": 2, "expert": 4}, devices)
    of_slice = [[{device.slice_index for device in row.flat} for row in half] for half in (arranged[:2], arranged[2:])]
    assert of_slice == [[{0}, {0}], [{1}, {1}]]
    with pytest.raises(ConfigError, match="mesh.data = 1 does not divide over 2 TPU slices"):
        sharding.arrange({"data": 1, "fsdp": 8, "expert": 4}, devices)


def test_gpus_of_a_node_are_together_whatever_order_they_come_in():
    devices = gpus(4, 8)
    shuffled = devices[5:] + devices[:5]
    arranged = sharding.arrange({"data": 1, "fsdp": 4, "expert": 8}, shuffled)
    assert [{device.slice_index for device in row.flat} for row in arranged[0]] == [{0}, {1}, {2}, {3}]


def test_processes_must_have_equal_shares_over_which_experts_divide():
    sharding.check_processes({"data": 1, "fsdp": 2, "expert": 16}, gpus(4, 8))
    sharding.check_processes({"data": 8, "fsdp": 1, "expert": 4}, gpus(4, 8))
    with pytest.raises(ConfigError, match=r"process 4 has 4 device\(s\) and process 0 has 8"):
        sharding.check_processes(
            {"data": 1, "fsdp": 1, "expert": 36}, gpus(4, 8) + [Device(40 + i, 4) for i in range(4)]
        )
    with pytest.raises(ConfigError, match="mesh.expert = 12 does not divide over 3 processes of 8 devices each"):
        sharding.check_processes({"data": 2, "fsdp": 1, "expert": 12}, gpus(3, 8))


def test_ranks_of_a_node_are_checked_against_processes_and_nvlink():
    def check(ranks_per_node, devices, expert):
        shape = {"data": 1, "fsdp": len(devices) // expert, "expert": expert}
        arranged = sharding.arrange(shape, devices)
        mesh = types.SimpleNamespace(shape=shape, size=len(devices), devices=arranged)
        sharding.check_nodes(ranks_per_node, mesh)

    for fits in (None, 8, 4):
        check(fits, gpus(4, 8), 32)
        check(fits, gpus(4, 8, processes_per_node=8), 32)
    check(12, gpus(4, 8), 8)  # one level: nothing is taken for a node
    with pytest.raises(ConfigError, match="ranks_per_node = 12 does not fit processes of 8 devices each"):
        check(12, gpus(3, 8), 24)
    with pytest.raises(ConfigError, match="ranks_per_node = 16, but 8 GPUs share NVLink here"):
        check(16, gpus(4, 8), 32)
    with pytest.raises(ConfigError, match="ranks_per_node = 16, but 8 GPUs share NVLink here"):
        check(16, gpus(4, 8, processes_per_node=8), 32)
    check(2, [Device(i, i, platform="cpu", device_kind="cpu") for i in range(4)], 4)  # simulated nodes of two processes


def test_batch_must_spread_evenly():
    sharding.check_batch("training.microbatch_size", 16, small.mesh(2, 1, 4))
    with pytest.raises(ConfigError, match="training.microbatch_size = 12 .* make it 8 or 16"):
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
