"""Digests of checkpoints: every flipped bit is found, and a run goes on from the checkpoint before."""

import re
import subprocess

import numpy as np
import pytest
from test_checkpoint import abstract, assert_same, make_state, mesh, save

from dsjax.config import ConfigError
from dsjax.training import checkpoint, integrity


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with one checkpoint, of step 3, over 8 devices; tests leave it as it was."""
    directory = tmp_path_factory.mktemp("saved")
    save(directory, 3, make_state(mesh(2, 2, 2)))
    return directory


def flip(path, position, bit):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def files(directory):
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


def test_every_file_has_a_digest_that_coreutils_agree_with(saved):
    path = saved / "3"
    body = integrity.body(path)
    assert sorted(line.split("  ")[1] for line in body.splitlines()) == sorted(
        str(file.relative_to(path)) for file in files(path) if file.name != "SHA256SUMS"
    )
    told = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True)
    assert told.returncode == 0, told
    assert told.stdout.count(": OK") == len(files(path)) - 1


def test_any_flipped_bit_is_found_in_any_file(saved):
    path, rng = saved / "3", np.random.default_rng(0)
    tried = 0
    for file in files(path):
        size = file.stat().st_size
        if not size:
            continue
        positions = {0, size - 1, *rng.integers(size, size=25).tolist()}
        for position in positions:
            bit = int(rng.integers(8))
            flip(file, position, bit)
            found = checkpoint.damage(saved, 3)
            assert found and (file.name in found), (file, position, bit, found)
            flip(file, position, bit)
            tried += 1
    assert tried > 200
    assert checkpoint.damage(saved, 3) is None


def test_every_bit_of_the_digests_themselves_counts(saved):
    path = saved / "3" / "SHA256SUMS"
    for position in range(path.stat().st_size):
        for bit in range(8):
            flip(path, position, bit)
            assert integrity.body(path.parent) is None, (position, bit)
            flip(path, position, bit)
    assert integrity.body(path.parent) is not None


def test_a_file_that_is_gone_cut_or_longer_is_found(tmp_path):
    save(tmp_path, 3, make_state(mesh(1, 1, 1)))
    for file in files(tmp_path / "3"):
        was = file.read_bytes()
        for now in (None, was[:-1], was + b"\0", b""):
            if now == was:
                continue
            file.unlink() if now is None else file.write_bytes(now)
            if file.name == "SHA256SUMS" and now is None:
                assert not checkpoint.is_verifiable(tmp_path, 3)
            else:
                assert checkpoint.damage(tmp_path, 3), file
            file.write_bytes(was)
    assert checkpoint.damage(tmp_path, 3) is None


def test_processes_that_compare_a_part_each_miss_nothing(saved):
    path = saved / "3"
    file = max(files(path), key=lambda file: file.stat().st_size)
    flip(file, 100, 3)
    found = [integrity.damage(path, index, 3) for index in range(3)]
    flip(file, 100, 3)
    assert sum(one is not None for one in found) == 1
    assert [integrity.damage(path, index, 3) for index in range(3)] == [None] * 3


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "state/../../x", ""])
def test_digests_cannot_name_files_elsewhere(tmp_path, name):
    integrity.seal(tmp_path, f"{'0' * 64}  {name}\n")
    assert "outside the checkpoint" in integrity.damage(tmp_path)


def test_restore_refuses_what_has_changed_and_names_the_file(tmp_path):
    state = make_state(mesh(2, 2, 2))
    save(tmp_path, 3, state)
    file = max(files(tmp_path / "3"), key=lambda file: file.stat().st_size)
    flip(file, file.stat().st_size // 2, 0)
    with pytest.raises(ConfigError, match=f"{file.name} has changed since it was written") as told:
        checkpoint.restore(tmp_path, 3, abstract(state))
    assert "\n" not in str(told.value)


def test_who_reads_passes_over_what_is_damaged_tells_it_and_renames_nothing(tmp_path):
    state = make_state(mesh(1, 1, 1))
    told = []
    assert checkpoint.newest_to_read(tmp_path, told.append) is None
    for step in (1, 2, 3):
        save(tmp_path, step, state, keep_last=3)
    assert checkpoint.newest_to_read(tmp_path, told.append) == 3 and not told
    for step in (3, 2):
        flip(max(files(tmp_path / str(step)), key=lambda file: file.stat().st_size), 100, 3)
    assert checkpoint.newest_to_read(tmp_path, told.append) == 1
    [sentence] = told
    assert re.fullmatch(
        r"the checkpoint of step 3 is damaged \(state/\S+ has changed since it was written\); "
        r"the checkpoint of step 2 is damaged \(state/\S+ has changed since it was written\); that of step 1 is taken",
        sentence,
    )
    assert checkpoint.steps(tmp_path) == [1, 2, 3]


def test_checkpoint_that_the_trainer_deletes_while_it_is_verified_is_not_damaged(tmp_path, monkeypatch):
    state, told = make_state(mesh(1, 1, 1)), []
    save(tmp_path, 1, state, keep_last=1)
    verified = checkpoint.damage

    def meanwhile(directory, step, *part):
        if step == 1:
            save(tmp_path, 2, state, keep_last=1)
            assert checkpoint.steps(tmp_path) == [2]
        return verified(directory, step, *part)

    monkeypatch.setattr(checkpoint, "damage", meanwhile)
    assert checkpoint.newest_to_read(tmp_path, told.append) == 2 and not told


def test_who_reads_is_told_where_no_checkpoint_is_sound(tmp_path):
    save(tmp_path, 3, make_state(mesh(1, 1, 1)))
    (tmp_path / "3" / "SHA256SUMS").write_text("nothing")
    with pytest.raises(ConfigError, match=r"holds no sound checkpoint; .*: .* step 3 is damaged \(SHA256SUMS is"):
        checkpoint.newest_to_read(tmp_path)
    checkpoint.set_aside(tmp_path, 3)
    with pytest.raises(ConfigError, match="holds no sound checkpoint; .*: 3.damaged was set aside"):
        checkpoint.newest_to_read(tmp_path)


def test_a_checkpoint_without_digests_can_still_be_read(tmp_path):
    state = make_state(mesh(2, 2, 2))
    save(tmp_path, 3, state)
    (tmp_path / "3" / "SHA256SUMS").unlink()
    assert_same(checkpoint.restore(tmp_path, 3, abstract(state)), state)
    assert checkpoint.damage(tmp_path, 3) is None and not checkpoint.is_verifiable(tmp_path, 3)
