"""dsjax cache: what is ours is told and deleted, what is not is left alone."""

import os
import time

import pytest

from dsjax.__main__ import main
from dsjax.config import ConfigError
from dsjax.inference import kept


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Three directories with two entries each, the first of each used ten days ago; and things of others."""
    where = {kind: tmp_path / kind for kind in ("compiled", "data", "prefix")}
    monkeypatch.setattr(kept, "places", lambda: where)
    long_ago = time.time() - 10 * 86400

    def put(path, size, age):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
        os.utime(path, (age, age))

    for i, age in enumerate((long_ago, time.time())):
        put(where["compiled"] / f"jit_f{i}-cache", 1000, age)
        put(where["compiled"] / f"jit_f{i}-atime", 8, age)
        put(where["prefix"] / f"{i:064x}.latents", 500, age)
        for name, size in (("manifest.json", 100), ("rows", 1900)):
            put(where["data"] / f"text_files-{i}" / name, size, age)
    put(where["data"] / ".text_files-9-work" / "rows", 5, long_ago)
    put(where["data"] / "mine" / "notes.txt", 5, long_ago)
    put(where["compiled"] / "notes.txt", 5, long_ago)
    return where


def left(places):
    return sorted(path.name for place in places.values() for path in place.iterdir())


def test_list_and_size_tell_every_entry(places, capsys):
    assert main(["cache", "list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert main(["cache", "size"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["all", "6.8", "KiB", "6", "entries"]
    assert main(["cache", "list", "--kind", "data", "--directory", str(places["data"])]) == 0
    out = capsys.readouterr().out
    assert "text_files-0" in out and "10.0 days" in out and "mine" not in out and "work" not in out


def test_prune_by_age_by_size_and_of_everything(places, capsys):
    assert main(["cache", "prune", "--older-than", "5"]) == 0
    assert capsys.readouterr().out.startswith("deleted 3 of 6 entries, 3.4 KiB; 3.4 KiB are kept")
    assert (
        "jit_f0-cache" not in left(places) and "jit_f0-atime" not in left(places) and "text_files-0" not in left(places)
    )
    assert main(["cache", "prune", "--kind", "data", "--max-size", "2K"]) == 0
    assert "text_files-1" in left(places)
    assert main(["cache", "prune", "--kind", "data", "--max-size", "1.5K"]) == 0
    assert "text_files-1" not in left(places)
    assert main(["cache", "prune"]) == 0
    assert left(places) == [".text_files-9-work", "mine", "notes.txt"]


def test_newest_survive_a_limit(places):
    found = kept.entries("compiled")
    assert "deleted 1 of 2" in kept.prune(found, "1000", None)
    assert [entry.path.name for entry in kept.entries("compiled")] == ["jit_f1-cache"]


@pytest.mark.parametrize(
    "text, size", [("5", 5), ("1K", 1024), ("1.5M", 3 << 19), ("2GiB", 2 << 30), ("3 tb", 3 << 40)]
)
def test_sizes_are_read(text, size):
    assert kept.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "ten", "1X"])
def test_sizes_that_are_none_are_told(text):
    with pytest.raises(ConfigError, match="must be a size such as 500M or 10G"):
        kept.parse_size(text)


def test_flags_that_do_not_go_together_are_told(capsys):
    assert main(["cache", "prune", "--directory", "x"]) == 2
    assert "--directory needs --kind" in capsys.readouterr().err
    assert main(["cache", "list", "--max-size", "1G"]) == 2
    assert "are for prune, not for list" in capsys.readouterr().err
