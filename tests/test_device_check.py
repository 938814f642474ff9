"""A copy that differs by one bit is found and named, and so is arithmetic that is not what it was."""

import dataclasses

import jax
import numpy as np
import pytest
import small
from tiny_runs import STEPS, change, exact, quick_runs, tiny_run

from dsjax.sharding import replicated
from dsjax.training import checkpoint, loop
from dsjax.training.device_check import DeviceCheck, first_layers, odd_ones
from dsjax.training.loop import train
from dsjax.training.monitor import read_rows
from dsjax.training.workdir import CHECKPOINTS, METRICS

# Chunks that divide a microbatch's tokens need not divide those of the fixed batch.
CONFIG = small.config(data=4, expert=2, dispatch=dataclasses.replace(small.ROOMY, chunks=3))


@pytest.fixture(scope="module")
def mesh():
    return small.mesh(4, 1, 2)


@pytest.fixture(scope="module")
def check(mesh):
    return DeviceCheck(CONFIG, mesh)


@pytest.fixture
def state(mesh):
    return small.state(CONFIG, mesh)


def with_a_flipped_bit(array, device: int, place: int, bit: int):
    """`array` whose part on one device differs from what it was by one bit."""
    parts = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id == device:
            words = data.reshape(-1).view({2: np.uint16, 4: np.uint32}[data.itemsize])
            words[place % words.size] ^= words.dtype.type(1 << bit)
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def test_what_is_in_order_is_left_alone(check, state):
    assert check.problem(state) is None


@pytest.mark.parametrize(("device", "place", "bit"), [(0, 0, 0), (3, 17, 31), (7, 1000, 15)])
def test_one_flipped_bit_in_one_copy_is_found_wherever_it_is(check, state, device, place, bit):
    leaves, tree = jax.tree.flatten(state)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(state)]
    for index in range(0, len(leaves), 7):
        spoiled = with_a_flipped_bit(leaves[index], device, place, bit)
        problem = check.problem(jax.tree.unflatten(tree, [*leaves[:index], spoiled, *leaves[index + 1 :]]))
        if len({str(s.index) for s in leaves[index].addressable_shards}) == 8:
            continue  # every device has a part of its own, and nothing to compare it with
        assert problem and names[index] in problem and "differs from the others" in problem
        if leaves[index].sharding.is_equivalent_to(replicated(leaves[index].sharding.mesh), leaves[index].ndim):
            assert f"on {jax.devices()[device]} differs" in problem


def test_arithmetic_that_has_changed_is_found(check, state, monkeypatch):
    monkeypatch.setattr(check, "_first", np.nextafter(check._first, np.float32(0)))
    assert "a fixed batch has the loss" in check.problem(state)


@pytest.mark.parametrize(("dense", "routed"), [(0, True), (1, True), (3, True), (4, False)])
def test_a_few_layers_have_experts_where_the_model_has_them(dense, routed):
    model = dataclasses.replace(CONFIG.model, num_hidden_layers=4, first_k_dense_replace=dense)
    assert (first_layers(model).num_moe_layers > 0) == routed


def test_the_one_that_differs_is_odd():
    assert odd_ones([5, 5, 7, 5]) == [2]
    assert odd_ones([5, 5]) == odd_ones([3]) == []
    assert odd_ones([1, 2]) == [1]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = change(tiny_run(tmp_path_factory.mktemp("run")), "mesh", data=8, expert=1)
    config = change(config, "monitor", device_check_every_steps=2)
    return change(config, "checkpoint", every_steps=2)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_runs():
        yield


@pytest.mark.slow
def test_a_run_with_a_faulty_device_stops_before_it_saves(config, tmp_path, monkeypatch, capsys):
    whole = train(config, tmp_path / "whole")
    assert whole.exit_code == 0

    def compile_step(*arguments, original=loop.compile_step):
        compiled = original(*arguments)

        def step(state, *rest):
            state, metrics = compiled(state, *rest)
            if int(state.step) == 4:
                norm = state.params["final_norm"]["weight"] if "final_norm" in state.params else None
                name, leaf = ("step", state.step) if norm is None else ("params", norm)
                spoiled = with_a_flipped_bit(leaf, 5, 0, 3)
                if name == "step":
                    state = dataclasses.replace(state, step=spoiled)
                else:
                    state.params["final_norm"]["weight"] = spoiled
            return state, metrics

        return step

    with monkeypatch.context() as patch:
        patch.setattr(loop, "compile_step", compile_step)
        summary = train(config, tmp_path / "run")
    assert summary.exit_code == 1 and summary.step == 4
    told = capsys.readouterr().out
    assert "stopped: after step 4 the copy of " in told and "differs from the others: a device, or a link" in told
    assert checkpoint.steps(tmp_path / "run" / CHECKPOINTS) == [2]
    assert train(config, tmp_path / "run").step == STEPS
    assert exact(tmp_path / "run") == exact(tmp_path / "whole")
    assert len(read_rows(tmp_path / "run" / METRICS)) == STEPS
