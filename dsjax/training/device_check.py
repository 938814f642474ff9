"""Errors of the hardware that nothing else tells: copies that differ, arithmetic that is not what it was."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dsjax.config import Config, ModelConfig
from dsjax.planning.layout import with_fitting_chunks
from dsjax.sharding import AXES, REPLICATED
from dsjax.training.objective import language_model_loss
from dsjax.training.state import TrainState, build_network, state_shardings
from dsjax.training.step import place_batch

LAYERS = 2  # of the model that computes the fixed batch


class HardwareFault(Exception):
    """Numbers that cannot be trusted any more, told in one clause."""


class DeviceCheck:
    """Compares what must be equal: the copies of each replicated array, and the loss of a fixed batch with its first.

    The fixed batch goes through the first layers of the model, with the weights that `training.seed` draws, over the
    whole mesh; nothing of it stays in memory.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self._mesh = mesh
        self._shardings = state_shardings(config, mesh)
        specs = jax.tree.map(lambda sharding: sharding.spec, self._shardings)
        self._sums = jax.jit(
            jax.shard_map(_checksums, mesh=mesh, in_specs=(specs,), out_specs=REPLICATED, check_vma=False)
        )
        self._fixed_loss = _fixed_loss(config, mesh)
        self._first = np.asarray(self._fixed_loss())

    def problem(self, state: TrainState) -> str | None:
        """A clause about what differs, the same in every process, or None; waits for `state`."""
        sums_DN = np.asarray(self._sums(state))
        devices = list(self._mesh.devices.flat)
        named = jax.tree_util.tree_leaves_with_path(state)
        for (path, leaf), sharding, sums_D in zip(named, jax.tree.leaves(self._shardings), sums_DN.T, strict=True):
            places = sharding.devices_indices_map(leaf.shape)
            copies: dict[str, list[int]] = {}
            for number, device in enumerate(devices):
                copies.setdefault(str(places[device]), []).append(number)
            for numbers in copies.values():
                if odd := odd_ones([int(sums_D[number]) for number in numbers]):
                    name = jax.tree_util.keystr(path, simple=True, separator=".")
                    told = ", ".join(str(devices[numbers[index]]) for index in odd)
                    return f"the copy of {name} on {told} differs from the others"
        now = np.asarray(self._fixed_loss())
        if now.tobytes() != self._first.tobytes():
            return f"a fixed batch has the loss {now!s}, and had {self._first!s} when the run was started"
        return None


def odd_ones(values: Sequence[int]) -> list[int]:
    """The indices of those that differ from the most frequent value; of equally frequent ones the first is right."""
    usual = max(values, key=lambda value: (values.count(value), -values.index(value)))
    return [index for index, value in enumerate(values) if value != usual]


def _checksums(state: Any) -> jax.Array:
    """Inside shard_map: [devices, arrays], the sum of the bits of every array's part on every device."""
    sums_N = jnp.stack([_bits(leaf) for leaf in jax.tree.leaves(state)])
    return lax.all_gather(sums_N, AXES)


def _bits(array: jax.Array) -> jax.Array:
    """The sum of the words of `array` modulo 2^32: any one flipped bit changes it."""
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    return jnp.sum(lax.bitcast_convert_type(array, word).astype(jnp.uint32), dtype=jnp.uint32)


def first_layers(model: ModelConfig) -> ModelConfig:
    """A few layers of each kind that `model` has, without MTP."""
    layers = min(LAYERS, model.num_hidden_layers)
    dense = min(model.first_k_dense_replace, layers - 1 if model.num_moe_layers else layers)
    return dataclasses.replace(model, num_hidden_layers=layers, first_k_dense_replace=dense, num_nextn_predict_layers=0)


def _fixed_loss(config: Config, mesh: Mesh) -> Any:
    """A function that computes the loss of a fixed batch anew, from nothing but the seed."""
    config = dataclasses.replace(config, model=first_layers(config.model))
    config = with_fitting_chunks(config, mesh.size, mesh.size)
    net = build_network(config, mesh)
    loss_fn = language_model_loss(net, config)

    @jax.jit
    def fixed_loss(key: jax.Array, tokens: jax.Array) -> jax.Array:
        params, bias = net.init(key)
        params = lax.with_sharding_constraint(params, net.param_shardings())
        return loss_fn(params, bias, tokens, {"mtp_loss_weight": jnp.float32(0)})[1]["loss"]

    shape = (mesh.size, config.data.sequence_length + 1)
    rows = np.random.default_rng(config.training.seed).integers(0, config.model.vocab_size, shape, np.int32)
    tokens = place_batch(lambda indices: rows[list(indices)], shape, mesh)
    return lambda: fixed_loss(jax.random.key(config.training.seed), tokens)
