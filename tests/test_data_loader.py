"""The order of rows: infinite, shuffled, mixed, at random access."""

import dataclasses
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dsjax.config import ConfigError, DataConfig
from dsjax.data import prepare
from dsjax.data.loader import Loader


def write_source(path, letter, documents):
    """A jsonl file whose documents hold nothing but one letter and their own number."""
    with open(path, "w") as file:
        for i in range(documents):
            file.write(json.dumps({"text": f"{letter}{i:06d}" * 10}) + "\n")
    return f"text_files:{path}"


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """(config, prepared) of one source."""
    path = tmp_path_factory.mktemp("single")
    source = write_source(path / "a.jsonl", "a", 200)
    config = DataConfig(sources=(source,), directory=str(path / "data"), sequence_length=32, validation_fraction=0.2)
    return config, prepare.prepare(config, progress=False)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """(config, prepared) of two sources, the second three times as large, without FIM or validation."""
    path = tmp_path_factory.mktemp("mixture")
    config = DataConfig(
        sources=(write_source(path / "a.jsonl", "a", 100), write_source(path / "b.jsonl", "b", 300)),
        directory=str(path / "data"),
        sequence_length=32,
        validation_fraction=0.0,
        fim_rate=0.0,
    )
    return config, prepare.prepare(config, progress=False)


@pytest.fixture
def copied(single, tmp_path):
    """(config, prepared) like `single`, in files that a test may damage."""
    config = dataclasses.replace(single[0], directory=str(tmp_path))
    return config, prepare.prepare(config, progress=False)


def hashed(rows):
    return [row.tobytes() for row in rows]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_each_epoch_is_another_permutation_of_all_rows(single, split):
    config, prepared = single
    loader = Loader(prepared, config, seed=3, split=split)
    records = tfds.builder_from_directory(prepared[0].directory).as_data_source(split=split)
    stored = Counter(hashed(np.stack([record["tokens"] for record in records]).astype(np.int32)))
    assert loader.num_rows == len(records) > 20
    epochs = [hashed(loader.rows(range(e * loader.num_rows, (e + 1) * loader.num_rows))) for e in range(3)]
    assert all(Counter(epoch) == stored for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_rows_have_the_promised_shape_and_type(single):
    config, prepared = single
    loader = Loader(prepared, config, seed=0)
    assert loader.rows([5, 6, 7]).shape == (3, 33) and loader.rows([]).shape == (0, 33)
    assert loader.rows([5]).dtype == np.int32


def test_order_does_not_depend_on_the_access_pattern(mixture):
    config, prepared = mixture
    whole = Loader(prepared, config, seed=1).rows(range(300))
    for processes in (1, 2, 3, 4):
        parts = [Loader(prepared, config, seed=1).rows(range(p, 300, processes)) for p in range(processes)]
        again = np.empty_like(whole)
        for p, part in enumerate(parts):
            again[p::processes] = part
        np.testing.assert_array_equal(again, whole)
    backwards = Loader(prepared, config, seed=1).rows(range(299, -1, -1))
    np.testing.assert_array_equal(backwards[::-1], whole)
    loader = Loader(prepared, config, seed=1)
    np.testing.assert_array_equal(np.concatenate([loader.rows(np.array([i])) for i in range(300)]), whole)


def test_threads_read_the_same_rows(mixture):
    config, prepared = mixture
    loader = Loader(prepared, config, seed=1)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(loader.rows, [range(i, i + 20) for i in range(0, 400, 20)]))
    np.testing.assert_array_equal(np.concatenate(parts), Loader(prepared, config, seed=1).rows(range(400)))


def test_seeds_give_unrelated_orders(single):
    config, prepared = single
    n = Loader(prepared, config, seed=0).num_rows
    first = hashed(Loader(prepared, config, seed=0).rows(range(2 * n)))
    second = hashed(Loader(prepared, config, seed=1).rows(range(2 * n)))
    assert first == hashed(Loader(prepared, config, seed=0).rows(range(2 * n)))
    assert first[:n] != second[:n]
    assert first[n:] != second[:n], "one seed's second epoch is the next seed's first"


def test_seek_is_instant_at_huge_indices(mixture):
    config, prepared = mixture
    loader = Loader(prepared, config, seed=0)
    loader.rows([0])
    start = time.perf_counter()
    far = loader.rows(range(3_000_000_000, 3_000_000_032))
    assert time.perf_counter() - start < 1
    np.testing.assert_array_equal(Loader(prepared, config, seed=0).rows([3_000_000_031])[0], far[31])
    assert len(set(hashed(far))) > 25


def letters(rows):
    """How often each source's letter leads among the letters of a row."""
    return Counter("a" if np.sum(row == ord("a")) > np.sum(row == ord("b")) else "b" for row in rows)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1), (3.0, 1.0)])
def test_mixture_keeps_its_weights(mixture, weights):
    config, prepared = mixture
    loader = Loader(prepared, dataclasses.replace(config, weights=weights), seed=0)
    for start in (0, 1_000_000_000):
        counts = letters(loader.rows(range(start, start + 2000)))
        assert abs(counts["a"] / 2000 - weights[0] / sum(weights)) < 0.01


def test_mixture_without_weights_is_by_size(mixture):
    config, prepared = mixture
    loader = Loader(prepared, config, seed=0)
    rows = [source.manifest["splits"]["train"]["rows"] for source in prepared]
    assert loader.num_rows == sum(rows)
    epoch = loader.rows(range(loader.num_rows))
    assert abs(letters(epoch)["a"] - rows[0]) <= 2
    assert len(set(hashed(epoch))) >= loader.num_rows - 4


def test_fingerprint_follows_data_weights_and_split(single, mixture):
    config, prepared = mixture
    fingerprints = [
        Loader(prepared, config, seed=0).fingerprint,
        Loader(prepared, dataclasses.replace(config, weights=(0.5, 0.5)), seed=0).fingerprint,
        Loader(prepared[:1], dataclasses.replace(config, sources=config.sources[:1]), seed=0).fingerprint,
        Loader(single[1], single[0], seed=0).fingerprint,
        Loader(single[1], single[0], seed=0, split="validation").fingerprint,
    ]
    assert len(set(fingerprints)) == 5
    assert fingerprints[0] == Loader(prepared, config, seed=7).fingerprint


def test_bytes_per_token_is_that_of_the_mixture(mixture):
    config, prepared = mixture
    documents, length = 400, 70
    expected = documents * length / (documents * (length + 1) + 2)
    assert np.isclose(Loader(prepared, config, seed=0).bytes_per_token, expected, rtol=1e-3)


def test_wide_characters_count_as_their_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("你好" * 500)
    config = DataConfig(sources=(f"text_files:{tmp_path}/a.txt",), directory=str(tmp_path), sequence_length=32)
    loader = Loader(prepare.prepare(config, progress=False), config, seed=0, split="validation")
    assert np.isclose(loader.bytes_per_token, 1, atol=0.01)


def test_missing_split_is_refused(mixture):
    config, prepared = mixture
    with pytest.raises(ConfigError, match="without a validation split; set --config.data.validation_fraction"):
        Loader(prepared, config, seed=0, split="validation")


def test_other_sequence_length_is_refused(single):
    config, prepared = single
    with pytest.raises(ConfigError, match="sequence_length of 32, not 64"):
        Loader(prepared, dataclasses.replace(config, sequence_length=64), seed=0)


def test_cut_and_missing_files_are_refused(copied):
    config, prepared = copied
    shard = next(prepared[0].directory.glob("*train.array_record*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ConfigError, match="manifest says .*delete"):
        Loader(prepared, config, seed=0)
    shard.unlink()
    with pytest.raises(ConfigError, match="is missing.*delete"):
        Loader(prepared, config, seed=0)


def test_row_count_that_differs_from_the_manifest_is_refused(copied):
    config, prepared = copied
    prepared[0].manifest["splits"]["train"]["rows"] += 1
    with pytest.raises(ConfigError, match="367 train rows where its manifest says 368"):
        Loader(prepared, config, seed=0)


def test_flipped_bit_is_not_read_silently(copied):
    config, prepared = copied
    shard = next(prepared[0].directory.glob("*train.array_record*"))
    content = shard.read_bytes()
    good = Loader(prepared, config, seed=0).rows(range(400))
    used = [place for place, byte in enumerate(content) if byte]
    refused = 0
    for place in used[100 :: len(used) // 10]:
        damaged = bytearray(content)
        damaged[place] ^= 4
        shard.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(Loader(prepared, config, seed=0).rows(range(400)), good)
        except ConfigError as error:
            assert "damaged: delete" in str(error)
            refused += 1
    assert refused >= 8
