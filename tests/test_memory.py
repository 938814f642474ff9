"""What a device holds of a run: its share of weights, optimizer state and gradients; and as many temporaries on a mesh
of many devices as on one."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import small
import weak_scaling
from jax.sharding import AbstractMesh

from dsjax.config import DispatchConfig, FP8Config, load
from dsjax.sharding import AXES
from dsjax.training.objective import language_model_loss
from dsjax.training.state import TrainState, abstract_state, build_network, init_state
from dsjax.training.step import make_gradients

V3_TRAINABLE = 671_026_419_200 - 58 * 256 + 11_610_068_224 - 256  # with MTP, without the routing biases
HYPERPARAMETERS = ("learning_rate", "bias_update_speed", "mtp_loss_weight")


def held(tree: Any) -> int:
    """Bytes of one device, by the shardings of a tree of (abstract) arrays."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def v3(repository):
    """In BF16: whether FP8 multiplies natively is asked of real devices, and changes no byte of the state."""
    config = load(str(repository / "configs" / "deepseek_v3.py"))
    return dataclasses.replace(config, precision="bf16", fp8=FP8Config())


def step_arguments(config, sequences: int, microbatches: int) -> tuple[Any, Any, Any]:
    tokens = jax.ShapeDtypeStruct((microbatches, sequences, config.data.sequence_length + 1), np.int32)
    return tokens, np.int32(microbatches), {name: np.float32(0.1) for name in HYPERPARAMETERS}


@pytest.mark.parametrize("sizes", [(1, 8, 64), (4, 8, 64), (2, 16, 32)])
def test_v3_state_is_divided_over_fsdp_and_expert(repository, sizes):
    """8 bytes a weight over 512 devices, whatever `data` is: FP32 masters, BF16 m and v."""
    config = v3(repository)
    state = abstract_state(config, AbstractMesh(sizes, AXES))
    share = V3_TRAINABLE / (sizes[1] * sizes[2])
    assert 4 * share <= held(state.params) < 4.004 * share
    moments = state.opt_state[0]
    assert 2 * share <= held(moments.mu) < 2.002 * share
    assert 2 * share <= held(moments.nu) < 2.002 * share
    assert held(state.router_bias) == 4 * 59 * 256  # on every device: 60 kB
    assert 8 * share <= held(state) < 8.008 * share


def constraints(jaxpr: Any) -> Iterator[Any]:
    """Every sharding_constraint of a program and the programs inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "sharding_constraint":
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from constraints(inner)


def test_v3_gradients_are_told_to_be_divided(repository):
    """Traced, not compiled, with the real loss at V3's widths: each weight's gradient is constrained to its share."""
    config = v3(repository)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_hidden_layers=4))
    mesh = small.mesh(fsdp=2, expert=4)
    state = abstract_state(config, mesh)
    gradients_of = make_gradients(language_model_loss(build_network(config, mesh), config), config, mesh)
    traced = jax.make_jaxpr(gradients_of)(state, *step_arguments(config, 8, 2))
    told = [(one.outvars[0].aval.shape, one.params["sharding"]) for one in constraints(traced.jaxpr)]
    wanted = [(weight.shape, weight.sharding) for weight in jax.tree.leaves(state.params)]
    assert len(wanted) > 30 and held(state.params) < 1.01 / 8 * sum(a.size * 4 for a in jax.tree.leaves(state.params))
    for weight in wanted:
        assert weight in told
        told.remove(weight)


@pytest.mark.parametrize(
    "axes, microbatches",
    [
        (dict(fsdp=2, expert=4), 2),
        pytest.param(dict(fsdp=2, expert=4), 1, marks=pytest.mark.slow),
        pytest.param(dict(data=2, fsdp=2, expert=2), 2, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_a_real_mesh_come_out_divided(axes, microbatches):
    """Compiled without out_shardings: what the partitioner makes of the program alone."""
    training = dict(batch_size=8 * microbatches, microbatch_size=8)
    config, mesh = small.config(dispatch=DispatchConfig(), **axes, **training), small.mesh(**axes)
    state = abstract_state(config, mesh)
    gradients_of = make_gradients(language_model_loss(build_network(config, mesh), config), config, mesh)
    compiled = (
        jax.jit(gradients_of).lower(state, *step_arguments(config, 8, microbatches)).compile(weak_scaling.QUICKLY)
    )
    came, _ = compiled.output_shardings
    for (path, weight), sharding in zip(
        jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(came), strict=True
    ):
        assert sharding.is_equivalent_to(weight.sharding, weight.ndim), jax.tree_util.keystr(path)


def test_the_state_of_a_real_mesh_takes_what_the_abstract_one_says():
    axes = dict(data=2, fsdp=2, expert=2)
    config, mesh = small.config(small.ONE_LAYER, **axes), small.mesh(**axes)
    state = init_state(config, mesh)
    promised = abstract_state(config, mesh)
    for device in mesh.devices.flat:
        bytes_here = sum(
            shard.data.nbytes
            for a in jax.tree.leaves(state)
            for shard in a.addressable_shards
            if shard.device == device
        )
        assert bytes_here == held(promised)
    whole = sum(a.nbytes for a in jax.tree.leaves(state))
    assert held(promised) < 0.3 * whole  # a quarter, and small vectors
    assert isinstance(promised, TrainState)


@pytest.mark.slow
@pytest.mark.parametrize("override", ["training.remat=full", "dispatch.chunks=4"])
def test_a_device_needs_no_more_temporaries_on_eight_than_alone(repository, override):
    """Weak scaling: tiny, its 1,024 tokens a device; alone, and on its own mesh of data 2 x expert 4."""
    config = load(str(repository / "configs" / "tiny.py"), [override])
    (alone, temporaries_alone), (among, temporaries) = (weak_scaling.memory(config, devices) for devices in (1, 8))
    assert temporaries < temporaries_alone * (1 + weak_scaling.ALLOWED_GROWTH)
    assert among < 0.3 * alone  # weights and moments over the expert axis
