"""Checkpoints: what is saved comes back bit for bit, on any mesh, or a sentence says why not."""

import contextlib
import dataclasses
import errno
import functools
import os
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.config import Config, ConfigError, to_dict
from dsjax.training import checkpoint


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params", "router_bias", "moments", "step"], meta_fields=[]
)
@dataclasses.dataclass
class State:
    params: dict
    router_bias: jax.Array
    moments: tuple
    step: jax.Array


def mesh(*shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("data", "fsdp", "expert"), axis_types=(AxisType.Auto,) * 3)


def make_state(on: jax.sharding.Mesh) -> State:
    put = lambda value, *spec: jax.device_put(value, NamedSharding(on, P(*spec)))  # noqa: E731
    return State(
        params={
            "w": put(jnp.arange(64 * 48, dtype=jnp.float32).reshape(64, 48) / 7, ("fsdp", "expert")),
            "norm": put(jnp.linspace(0.5, 1.5, 48)),
        },
        router_bias=put(jnp.full((3, 8), 1e-3)),
        moments=(put(jnp.ones((64, 48), jnp.bfloat16) / 3, "fsdp"), ()),
        step=put(jnp.zeros((), jnp.int32)),
    )


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def meta(step: int, config: Config | None = None) -> dict:
    return {
        "step": step,
        "sequences": 4 * step,
        "config": to_dict(config or Config()),
        "data_fingerprint": "abc",
        "rng": {"seed": 0},
    }


def host(tree):
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(host(got)), jax.tree.leaves(host(want)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def save(directory, step, state, config=None, keep_last=2):
    saver = checkpoint.Saver(directory, keep_last)
    assert saver.save(state, meta(step, config)) is None
    assert saver.finish() is None


@pytest.fixture
def state() -> State:
    return make_state(mesh(2, 2, 2))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 1, 4), (1, 2, 4)])
def test_restore_onto_another_mesh_is_bitwise(tmp_path, state, shape):
    save(tmp_path, 7, state)
    target = abstract(make_state(mesh(*shape)))
    got = checkpoint.restore(tmp_path, 7, target)
    assert_same(got, state)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(target), strict=True):
        assert a.sharding == b.sharding


@pytest.mark.parametrize("devices", [1, 8])
def test_donating_the_state_during_a_save_does_not_change_it(tmp_path, devices):
    on = NamedSharding(mesh(1, 1, 1) if devices == 1 else mesh(2, 2, 2), P(("fsdp", "expert")))
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 1.5 + 1, s), donate_argnums=0)
    now = {"w": jax.device_put(jnp.arange(2**22, dtype=jnp.float32), on), "step": jnp.zeros(())}
    saver = checkpoint.Saver(tmp_path, 5)
    saved = {}
    for step in range(3):
        saved[step] = host(now)
        assert saver.save(now, meta(step)) is None
        for _ in range(3):
            now = update(now)
    assert saver.finish() is None
    for step, want in saved.items():
        assert_same(checkpoint.restore(tmp_path, step, abstract(now)), want)


def test_meta_comes_back_as_it_was(tmp_path, state):
    save(tmp_path, 3, state)
    assert checkpoint.read_meta(tmp_path, 3) == meta(3)


def test_a_part_can_be_restored_alone(tmp_path, state):
    save(tmp_path, 1, state)
    part = {"params": abstract(state).params, "router_bias": abstract(state).router_bias}
    got = checkpoint.restore(tmp_path, 1, part, part=True)
    assert_same(got, {"params": state.params, "router_bias": state.router_bias})


def test_only_the_last_ones_are_kept_and_the_newest_is_latest(tmp_path, state):
    saver = checkpoint.Saver(tmp_path, 2)
    assert checkpoint.latest(tmp_path) is None
    for step in (2, 10, 9, 11):
        saver.save(state, meta(step))
    assert saver.finish() is None
    assert checkpoint.steps(tmp_path) == [10, 11]
    assert checkpoint.latest(tmp_path) == 11


def test_the_old_checkpoint_is_there_until_the_new_one_is_complete(tmp_path, state, monkeypatch):
    save(tmp_path, 1, state, keep_last=1)
    deletions = []
    delete = checkpoint.delete

    def record(directory, step):
        deletions.append((step, checkpoint.steps(directory), checkpoint.is_verifiable(directory, 2)))
        delete(directory, step)

    monkeypatch.setattr(checkpoint, "delete", record)
    save(tmp_path, 2, state, keep_last=1)
    assert deletions == [(1, [1, 2], True)]
    assert checkpoint.steps(tmp_path) == [2]


def test_unfinished_saves_are_ignored_and_cleared_away(tmp_path, state):
    save(tmp_path, 4, state)
    for name in ("9.unverified.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp", "8.unverified", "3.deleted"):
        shutil.copytree(tmp_path / "4", tmp_path / name)
    assert checkpoint.latest(tmp_path) == 4
    checkpoint.Saver(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4"]


def test_saving_the_same_step_again_keeps_the_first(tmp_path, state):
    save(tmp_path, 4, state)
    save(tmp_path, 4, jax.tree.map(jnp.zeros_like, state))
    assert_same(checkpoint.restore(tmp_path, 4, abstract(state)), state)


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_next_is_tried(tmp_path, state, capfd):
    directory = tmp_path / "checkpoints"
    save(directory, 1, state)
    saver = checkpoint.Saver(directory, 2)
    moved = directory.rename(tmp_path / "away")
    directory.write_text("in the way")
    threads = threading.active_count()
    problem = saver.save(state, meta(2))
    assert problem and "step 2 could not be written" in problem and "\n" not in problem
    assert threading.active_count() <= threads + 1
    directory.unlink()
    moved.rename(directory)
    assert saver.save(state, meta(3)) is None
    assert saver.finish() is None
    assert checkpoint.steps(directory) == [1, 3]
    assert "Traceback" not in capfd.readouterr().err


def test_a_failure_in_the_background_is_told_by_the_next_call(tmp_path, state, monkeypatch):
    class Failing:
        def result(self):
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']")

    save(tmp_path, 1, state)
    saver = checkpoint.Saver(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp, "save_async", lambda *_, **__: Failing())
        assert saver.save(state, meta(2)) is None
    problem = saver.save(state, meta(3))
    assert problem is not None
    assert "step 2" in problem and "no space left" in problem and "the one of step 1 is kept" in problem
    assert saver.finish() is None
    assert checkpoint.steps(tmp_path) == [1, 3]


@contextlib.contextmanager
def no_file_above(size):
    """As on a disk with a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_leaves_earlier_checkpoints_intact(tmp_path, state, capfd):
    save(tmp_path, 1, state, keep_last=1)
    saver = checkpoint.Saver(tmp_path, 1)
    with no_file_above(4000):
        problem = saver.save(state, meta(2)) or saver.finish()
    assert "the checkpoint of step 2 could not be written" in problem and "the one of step 1 is kept" in problem
    assert "\n" not in problem and "Traceback" not in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert_same(checkpoint.restore(tmp_path, 1, abstract(state)), state)
    assert saver.save(state, meta(3)) is None and saver.finish() is None
    assert checkpoint.steps(tmp_path) == [3]


def test_nothing_is_deleted_for_a_checkpoint_whose_digests_cannot_be_written(tmp_path, state, monkeypatch):
    save(tmp_path, 1, state, keep_last=1)
    saver = checkpoint.Saver(tmp_path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.integrity, "seal", full)
        assert saver.save(state, meta(2)) is None
        assert "no space left on the device); the one of step 1 is kept" in saver.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def change_shape(state: State) -> State:
    return dataclasses.replace(state, router_bias=jax.ShapeDtypeStruct((3, 16), jnp.float32))


def change_dtype(state: State) -> State:
    return dataclasses.replace(state, moments=(jax.ShapeDtypeStruct((64, 48), jnp.float32), ()))


def lack_one(state: State) -> State:
    return dataclasses.replace(state, params={"w": state.params["w"]})


def want_one_more(state: State) -> State:
    return dataclasses.replace(state, params=state.params | {"mtp": state.params["w"]})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_shape, "of another shape or dtype: router_bias (float32[3, 8] there, float32[3, 16] here)"),
        (change_dtype, "of another shape or dtype: moments.0 (bfloat16[64, 48] there, float32[64, 48] here)"),
        (lack_one, "unknown here: params.norm;"),
        (want_one_more, "missing there: params.mtp;"),
    ],
)
def test_another_architecture_is_refused_with_the_difference(tmp_path, state, change, told, capfd):
    save(tmp_path, 5, state)
    with pytest.raises(ConfigError) as error:
        checkpoint.restore(tmp_path, 5, change(abstract(state)))
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_missing_checkpoint_is_a_sentence(tmp_path, state):
    save(tmp_path, 1, state)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 9 in .*; there are \[1\]"):
        checkpoint.read_meta(tmp_path, 9)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # threads that orbax leaves behind
@pytest.mark.parametrize("damage", ["array data cut", "array data gone", "list of arrays gone", "meta cut"])
def test_a_damaged_checkpoint_is_a_sentence(tmp_path, state, damage):
    save(tmp_path, 1, state)
    save(tmp_path, 2, state)
    data = sorted((tmp_path / "2" / "state" / "ocdbt.process_0" / "d").iterdir())
    assert data
    if damage == "array data cut":
        data[0].write_bytes(data[0].read_bytes()[:100])
    elif damage == "array data gone":
        data[0].unlink()
    elif damage == "list of arrays gone":
        (tmp_path / "2" / "state" / "_METADATA").unlink()
    else:
        (tmp_path / "2" / "_CHECKPOINT_METADATA").write_text('{"custom_')
    with pytest.raises(ConfigError, match="cannot be read.*delete it to go on from step 1"):
        checkpoint.read_meta(tmp_path, 2)
        checkpoint.restore(tmp_path, 2, abstract(state))
