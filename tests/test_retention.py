"""Which checkpoints stay, and `dsjax checkpoint`, which lists, verifies and prunes them."""

import os
import subprocess
import sys

import pytest
from test_checkpoint import abstract, assert_same, make_state, mesh, meta
from test_integrity import files, flip

from dsjax.__main__ import main
from dsjax.config import CheckpointConfig, ConfigError
from dsjax.training import checkpoint, inventory, lock
from dsjax.training.retention import kept


@pytest.mark.parametrize(
    ("policy", "stay"),
    [
        ({"keep_last": 2}, {50, 60}),
        ({"keep_last": 1, "keep_every": 20}, {20, 40, 60}),
        ({"keep_last": 1, "keep_best": 2}, {20, 30, 60}),
        ({"keep_last": 1, "keep_best": 9}, {10, 20, 30, 50, 60}),  # 40 was not measured
        ({"keep_last": 9}, {10, 20, 30, 40, 50, 60}),
    ],
)
def test_what_stays(policy, stay):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 2.5, 60: 2.4}
    assert kept(list(losses), losses, **policy) == stay


def test_of_equal_ones_the_later_is_better():
    assert kept([1, 2, 3], {1: 1.0, 2: 1.0, 3: 5.0}, keep_last=1, keep_best=1) == {2, 3}


def fill(directory, losses, **policy):
    saver = checkpoint.Saver(directory, **({"keep_last": 99} | policy))
    for step, loss in losses.items():
        assert saver.save(make_state(mesh(1, 1, 1)), meta(step) | {"validation_loss": loss}) is None
    assert saver.finish() is None


def test_the_best_stay_also_those_of_before_a_restart(tmp_path):
    fill(tmp_path, {1: 0.5, 2: 3.0, 3: 2.0}, keep_last=1, keep_best=1)
    assert checkpoint.steps(tmp_path) == [1, 3]
    fill(tmp_path, {4: 1.0, 5: 0.7}, keep_last=1, keep_best=2)
    assert checkpoint.steps(tmp_path) == [1, 5]


@pytest.fixture
def run(tmp_path):
    """The directory of something like a run: four checkpoints, of which 30 is rotten and 20 has no digests."""
    directory = tmp_path / "run"
    fill(directory / "checkpoints", {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5})
    (directory / "checkpoints" / "20" / "SHA256SUMS").unlink()
    flip(files(directory / "checkpoints" / "30" / "state" / "d")[0], 20, 1)
    return directory


def test_list_tells_what_is_there(run, capsys):
    (run / "checkpoints" / "40" / "_CHECKPOINT_METADATA").write_text("{")
    assert main(["checkpoint", "list", str(run)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "tokens", "validation", "size", "written", "digests"]
    assert [line.split()[0] for line in lines] == ["10", "20", "30", "40"]
    assert "3.0000" in lines[0] and lines[0].endswith("yes") and lines[1].endswith("none")
    assert "yes" not in lines[3]


def test_verify_reads_everything_and_exits_1_for_a_rotten_one(run, capsys):
    assert main(["checkpoint", "verify", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 10: every file is as it was written"
    assert lines[1] == "step 20: readable, but written without digests"
    assert lines[2].startswith("step 30: damaged: state/d/")
    assert main(["checkpoint", "verify", str(run), "--step", "10"]) == 0
    assert main(["checkpoint", "verify", str(run), "--step", "30"]) == 1
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(run), "--step", "11"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("dsjax: there is no checkpoint of step 11 in ") and not told.out
    assert told.err.endswith("; there are [10, 20, 30, 40]\n")


def test_prune_lets_no_rotten_one_take_the_place_of_a_sound_one(run, capsys):
    flip(files(run / "checkpoints" / "40" / "state" / "d")[0], 20, 1)
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1"]) == 0
    assert checkpoint.steps(run / "checkpoints") == [20]
    assert capsys.readouterr().out.splitlines() == ["deleted: 10", "deleted: 30", "deleted: 40", "kept: 20"]
    assert_same(
        checkpoint.restore(run / "checkpoints", 20, abstract(make_state(mesh(2, 2, 2)))), make_state(mesh(1, 1, 1))
    )


def test_prune_deletes_nothing_where_nothing_is_sound(tmp_path):
    fill(tmp_path / "checkpoints", {1: None})
    flip(files(tmp_path / "checkpoints" / "1" / "state" / "d")[0], 20, 1)
    with pytest.raises(ConfigError, match="nothing was deleted"):
        inventory.prune_checkpoints(tmp_path, CheckpointConfig())
    assert checkpoint.steps(tmp_path / "checkpoints") == [1]


def test_prune_leaves_a_run_alone_that_is_in_use(run):
    with lock.lock(run), pytest.raises(ConfigError, match=rf"is in use by process {os.getpid()} on "):
        inventory.prune_checkpoints(run, CheckpointConfig(keep_last=1))
    assert len(checkpoint.steps(run / "checkpoints")) == 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("list", "the following arguments are required: RUN"),
        ("lst RUN", "invalid choice: 'lst'"),
        ("list RUN --step 3", "takes no --step"),
        ("list RUN there", "takes no DST"),
        ("verify RUN --keep-last 3", "takes no --keep-last"),
        ("prune RUN --keep-last 0", "--keep-last is 0, but must be at least 1"),
        ("export RUN", "needs a new directory"),
        ("list nowhere", "holds no checkpoint"),
    ],
)
def test_mistakes_are_told(run, capsys, words, told):
    assert main(["checkpoint", *(str(run) if word == "RUN" else word for word in words.split())]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


HOLD = "import sys, time; from dsjax.training.lock import lock\nwith lock(__import__('pathlib').Path(sys.argv[1])):\n"


def test_a_dead_process_holds_no_lock(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{HOLD} print('held', flush=True); time.sleep(60)", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"in use by process {holder.pid} on "), lock.lock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with lock.lock(tmp_path):
        pass
