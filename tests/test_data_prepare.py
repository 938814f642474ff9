"""Packing, splitting, reuse and safety of prepared data."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dsjax.config import ConfigError, DataConfig
from dsjax.data import packing, prepare, tokenizer
from dsjax.inference import kept

TEXTS = [f"document {i}: " + "wörd " * (i % 37) + chr(0x4E00 + i) for i in range(400)]


@pytest.fixture
def make(tmp_path):
    """make(texts, **options) -> (config, prepared) of a source of these texts."""

    def make(texts, **options):
        path = tmp_path / "texts.jsonl"
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        if not path.exists() or path.read_text() != content:
            path.write_text(content)
        config = DataConfig(sources=(f"text_files:{path}",), directory=str(tmp_path / "data"), sequence_length=32)
        config = DataConfig(**{**vars(config), **options})
        return config, prepare.prepare(config, progress=False)[0]

    return make


def stored_rows(prepared, split="train"):
    """The rows of a split in the order in which they were written."""
    records = tfds.builder_from_directory(prepared.directory).as_data_source(split=split)
    return np.stack([record["tokens"] for record in records])


def stream_of(rows):
    """The token stream that rows with an overlap of one token came from."""
    np.testing.assert_array_equal(rows[:-1, -1], rows[1:, 0])
    return np.concatenate([rows[:1, 0], *rows[:, 1:]])


def documents_of(stream):
    """Decoded documents between eos tokens, the last one possibly cut."""
    bytes_ = tokenizer.load("bytes")
    ends = np.flatnonzero(stream == bytes_.eos_id)
    return [bytes_.decode(part.tolist()) for part in np.split(stream, ends)][1:]


def test_every_token_is_predicted_once(make):
    _, prepared = make(TEXTS, fim_rate=0.0, validation_fraction=0.0)
    rows = stored_rows(prepared)
    bytes_ = tokenizer.load("bytes")
    expected = [bytes_.eos_id]
    for text in TEXTS:
        expected += [*bytes_.encode(text), bytes_.eos_id]
    labels = rows[:, 1:].reshape(-1)
    dropped = len(expected) - 1 - len(labels)
    assert 0 <= dropped < 32
    np.testing.assert_array_equal(labels, expected[1 : len(expected) - dropped])
    np.testing.assert_array_equal(stream_of(rows), expected[: len(expected) - dropped])
    assert prepared.manifest["splits"]["train"]["tokens"] == len(expected)
    assert rows.dtype == np.uint16


def test_manifest_counts_what_was_read(make):
    config, prepared = make([*TEXTS, ""])
    splits = prepared.manifest["splits"]
    assert sum(split["documents"] for split in splits.values()) == len(TEXTS)
    assert sum(split["bytes"] for split in splits.values()) == sum(len(text.encode()) for text in TEXTS)
    for name, split in splits.items():
        assert split["rows"] == (split["tokens"] - 1) // 32 == len(stored_rows(prepared, name))
    assert prepared.manifest["skipped"]["empty"]["count"] == 1
    assert prepared.manifest["options"]["tokenizer"] == tokenizer.load("bytes").fingerprint
    told = prepare.summary(prepared)
    assert "1 empty" in told and str(prepared.directory) in told


def test_fim_documents_can_be_reassembled(make):
    _, prepared = make(TEXTS, fim_rate=1.0, validation_fraction=0.0)
    begin, hole, end = tokenizer.load("bytes").fim_ids
    stream = stream_of(stored_rows(prepared))
    bytes_ = tokenizer.load("bytes")
    documents = np.split(stream, np.flatnonzero(stream == bytes_.eos_id) + 1)[1:-1]
    assert len(documents) > 0.9 * len(TEXTS)
    for ids, text in zip(documents, TEXTS, strict=False):
        first, second, third = (int(np.flatnonzero(ids == mark).item()) for mark in (begin, hole, end))
        assert first == 0 and second < third and ids[-1] == bytes_.eos_id
        prefix, suffix, middle = ids[1:second], ids[second + 1 : third], ids[third + 1 : -1]
        assert bytes_.decode([*prefix, *middle, *suffix]) == text


def test_fim_rate_is_kept_and_depends_on_the_text_alone(make):
    texts = [f"{i} some text" for i in range(3000)]
    shares = []
    for order in (texts, texts[::-1]):
        _, prepared = make(order, fim_rate=0.3, validation_fraction=0.0)
        stream = stream_of(stored_rows(prepared))
        shares.append(int(np.sum(stream == tokenizer.load("bytes").fim_ids[0])))
    assert abs(shares[0] / 3000 - 0.3) < 0.03
    assert abs(shares[0] - shares[1]) <= 3  # documents cut off at the end of the stream


def test_cuts_are_spread_over_the_document():
    starts, ends = [], []
    for i in range(2000):
        *_, a, b = packing.draws(f"document {i}".encode())
        prefix, suffix, middle = packing.fim_pieces("x" * 100, (a, b))
        assert len(prefix) + len(suffix) + len(middle) == 100
        starts.append(len(prefix))
        ends.append(len(prefix) + len(middle))
    assert min(starts) == 0 and max(ends) == 100
    assert abs(np.mean(starts) - 100 / 3) < 2 and abs(np.mean(ends) - 200 / 3) < 2


def test_split_is_by_text_whatever_stands_around_it(make):
    options = dict(fim_rate=0.0, validation_fraction=0.2)
    _, prepared = make(TEXTS, **options)
    held_out = set(documents_of(stream_of(stored_rows(prepared, "validation")))[:-2])
    assert abs(prepared.manifest["splits"]["validation"]["documents"] / len(TEXTS) - 0.2) < 0.06
    assert held_out <= set(TEXTS)
    kept = set(documents_of(stream_of(stored_rows(prepared, "train"))))
    assert held_out and not held_out & kept
    # Twice as many texts, in another order, every old one twice: all copies stay on their side.
    _, other = make([f"new {text}" for text in TEXTS] + TEXTS[::-1] + TEXTS, **options)
    assert held_out <= set(documents_of(stream_of(stored_rows(other, "validation"))))
    assert not held_out & set(documents_of(stream_of(stored_rows(other, "train"))))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_documents_still_give_both_splits(make, count):
    """A single long file, the commonest first try, must train and validate."""
    text = "all the text there is, " * 200
    _, prepared = make([f"{i} {text}" for i in range(count)], validation_fraction=0.05, fim_rate=0.0)
    splits = prepared.manifest["splits"]
    assert splits["train"]["rows"] > 0 and splits["validation"]["rows"] > 0
    assert sum(split["bytes"] for split in splits.values()) == sum(len(f"{i} {text}") for i in range(count))
    assert np.isclose(splits["validation"]["bytes"] / splits["validation"]["tokens"], 1, atol=0.01)


def test_single_document_is_used_even_when_it_hashes_into_validation(make):
    for salt in range(40):
        text = f"{salt} " + "text " * 300
        if packing.draws(text.encode())[0] < 0.1:
            break
    else:
        pytest.fail("no text hashes into validation")
    _, prepared = make([text], validation_fraction=0.1)
    assert prepared.manifest["validation_is_tail"]
    splits = prepared.manifest["splits"]
    assert splits["train"]["tokens"] > 8 * splits["validation"]["tokens"] > 0
    assert "end of the token stream" in prepare.summary(prepared)


def test_too_little_text_is_refused(make, tmp_path):
    with pytest.raises(ConfigError, match="sequence_length"):
        make(["short"])
    with pytest.raises(ConfigError, match="sequence_length"):
        make(["short"], validation_fraction=0.0)
    with pytest.raises(ConfigError, match="no document.*empty.*text_key"):
        make(["", " "])
    assert not list((tmp_path / "data").iterdir())


def test_vocabulary_above_16_bits_is_kept(make, tmp_path):
    import tokenizers

    words = {f"w{i}": i for i in range(70_000)}
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel({**words, "</s>": 70_000}, unk_token="w0"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    built.save(str(tmp_path / "tokenizer.json"))
    numbers = list(range(69_000, 70_000))
    text = " ".join(f"w{i}" for i in numbers)
    options = dict(tokenizer=str(tmp_path / "tokenizer.json"), validation_fraction=0.0)
    with pytest.raises(ConfigError, match="fim_rate=0"):
        make([text], **options)
    _, prepared = make([text], fim_rate=0.0, **options)
    stream = stream_of(stored_rows(prepared))
    assert stream.dtype == np.int32
    np.testing.assert_array_equal(stream, [70_000, *numbers][: len(stream)])


def test_large_sources_are_written_in_shards(make, monkeypatch):
    _, whole = make(TEXTS)
    monkeypatch.setattr(prepare, "SHARD_BYTES", 4096)
    _, sharded = make(TEXTS, directory=str(whole.directory.parent.parent / "other"))
    assert len(list(sharded.directory.glob("*train.array_record*"))) > 3
    np.testing.assert_array_equal(stored_rows(whole), stored_rows(sharded))
    assert whole.manifest["fingerprint"] == sharded.manifest["fingerprint"]


def test_batching_does_not_change_the_stream(make, monkeypatch):
    _, first = make(TEXTS)
    monkeypatch.setattr(packing, "BATCH_DOCUMENTS", 7)
    _, second = make(TEXTS, directory=str(first.directory.parent.parent / "other"))
    np.testing.assert_array_equal(stored_rows(first), stored_rows(second))


def test_prepared_data_is_reused_without_reading(make, monkeypatch):
    config, prepared = make(TEXTS)
    monkeypatch.setattr(prepare, "pack", lambda *_: pytest.fail("packed again"))
    assert prepare.prepare(config)[0] == prepared
    monkeypatch.undo()
    changes = [{"sequence_length": 16}, {"fim_rate": 0.5}, {"validation_fraction": 0.3}]
    directories = {make(TEXTS, **change)[1].directory for change in [{}, *changes]}
    assert len(directories) == 4 and prepared.directory in directories


def test_changed_files_are_prepared_anew(make):
    _, first = make(TEXTS)
    _, second = make([*TEXTS, "one more"])
    assert first.directory != second.directory
    assert first.manifest["fingerprint"] != second.manifest["fingerprint"]


def test_fingerprint_is_of_text_and_options_not_of_places(make, tmp_path):
    _, first = make(TEXTS)
    moved = tmp_path / "elsewhere.jsonl"
    (tmp_path / "texts.jsonl").rename(moved)
    config = DataConfig(sources=(f"text_files:{moved}",), directory=str(tmp_path / "b"), sequence_length=32)
    second = prepare.prepare(config, progress=False)[0]
    assert first.manifest["fingerprint"] == second.manifest["fingerprint"]


def test_two_prepares_at_once_both_succeed(make, monkeypatch, tmp_path):
    """Both reach the rename before either has renamed."""
    barrier = threading.Barrier(2, timeout=60)
    rename = os.rename

    def rename_together(source, target):
        if Path(target).parent == tmp_path / "data":
            barrier.wait()
        rename(source, target)

    monkeypatch.setattr(prepare.os, "rename", rename_together)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    with ThreadPoolExecutor(2) as pool:
        first, second = [future.result() for future in [pool.submit(make, TEXTS) for _ in range(2)]]
    assert barrier.n_waiting == 0
    assert first[1] == second[1]
    assert os.listdir(tmp_path / "data") == [first[1].directory.name]
    assert len(stored_rows(first[1])) == first[1].manifest["splits"]["train"]["rows"]


def test_killed_prepare_leaves_no_dataset(make, tmp_path):
    """Killed at the worst moment: everything is written, nothing renamed."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    code = f"""
import os, signal
from pathlib import Path
from dsjax.config import DataConfig
from dsjax.data import prepare
rename = os.rename
def kill(source, target):
    if Path(target).parent == Path({str(tmp_path / "data")!r}):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = kill
config = dict(sources=("text_files:{tmp_path}/texts.jsonl",), directory={str(tmp_path / "data")!r}, sequence_length=32)
prepare.prepare(DataConfig(**config))
"""
    root = Path(prepare.__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    left = os.listdir(tmp_path / "data")
    assert left and all(name.startswith(".") for name in left)
    _, prepared = make(TEXTS)
    assert prepared.directory.name in os.listdir(tmp_path / "data")
    assert len(stored_rows(prepared)) == prepared.manifest["splits"]["train"]["rows"]


def test_old_leftovers_are_removed_and_fresh_ones_kept(make, tmp_path):
    data = tmp_path / "data"
    digest, old = "0123456789abcdef", 2 * prepare.STALE_SECONDS
    ours = {f".text_files-{digest}-abc_12yz": old, f".chat-{digest}-deleted-417": old, f".chat-{digest}-zzzzzzzz": 0}
    others = {".vscode-server-insiders": old, ".my-old-notes": old, f".text_files-{digest}-notes": old}
    for name, age in {**ours, **others}.items():
        work = data / name
        work.mkdir(parents=True)
        (work / "train.tokens").write_bytes(b"1")
        for path in (work / "train.tokens", work):
            os.utime(path, (time.time() - age,) * 2)
    _, prepared = make(TEXTS)
    assert sorted(os.listdir(data)) == sorted([f".chat-{digest}-zzzzzzzz", *others, prepared.directory.name])


def test_leftovers_are_known_by_the_names_that_we_give(make, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as killed before
    make(TEXTS)
    kept.prune(kept.entries("data", str(tmp_path / "data")), None, None)
    left = os.listdir(tmp_path / "data")
    assert len(left) == 2 and all(prepare.LEFTOVER.fullmatch(name) for name in left)


def test_damaged_manifest_is_not_taken_for_complete(make):
    config, prepared = make(TEXTS)
    (prepared.directory / prepare.MANIFEST).write_text("{")
    with pytest.raises(ConfigError, match="not a complete prepared source; delete it"):
        prepare.prepare(config)


@pytest.mark.parametrize(
    "options",
    [
        {"sources": ()},
        {"weights": (1.0, 2.0)},
        {"weights": (0.0,)},
        {"weights": (float("nan"),)},
        {"fim_rate": 1.5},
        {"validation_fraction": 1.0},
        {"sequence_length": 0},
    ],
)
def test_impossible_options_are_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=f"^data.{next(iter(options))}"):
        prepare.prepare(DataConfig(directory=str(tmp_path), **options))


def test_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="config.data.directory"):
        prepare.prepare(DataConfig(directory=str(tmp_path / "file" / "data")))


@pytest.mark.parametrize("function", ["pack", "shown"])
@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("9 requested and 5 written"), "9 requested and 5 written"),
        (RuntimeError("write() failed: No space left on device; writing x"), "write.. failed: No space left on device"),
    ],
)
def test_full_disk_is_told_and_leaves_nothing(make, monkeypatch, tmp_path, function, error, reason):
    def fail(*args):
        raise error

    monkeypatch.setattr(prepare, function, fail)
    with pytest.raises(ConfigError, match=rf"cannot be prepared in .*data \({reason}\); look at the space"):
        make(TEXTS)
    assert not list((tmp_path / "data").iterdir())


def test_preparation_needs_neither_tensorflow_nor_jax():
    code = "import sys, dsjax.data.prepare; print([m for m in ('tensorflow', 'jax', 'grain') if m in sys.modules])"
    root = Path(prepare.__file__).parents[2]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "[]"


def test_nothing_is_left_in_the_temporary_directory(make, monkeypatch, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    make(TEXTS)
    assert not os.listdir(scratch)


def test_preparation_prints_nothing_when_quiet(make, capfd):
    make(TEXTS)
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def test_unreadable_documents_are_in_the_manifest(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("good text " * 100)
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff\xfe\xff")
    config = DataConfig(sources=(f"text_files:{tmp_path}/in",), directory=str(tmp_path / "out"), sequence_length=32)
    prepared = prepare.prepare(config, progress=False)[0]
    bad = str(tmp_path / "in" / "b.txt")
    assert prepared.manifest["skipped"] == {"not UTF-8": {"count": 1, "first": [bad]}}
    assert f"skipped 1 not UTF-8: {bad}" in prepare.summary(prepared)
