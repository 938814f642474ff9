"""The prefix cache: what is found is what was kept, for the same model and asker only; files that lie are misses."""

import dataclasses
import os
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import small

from dsjax.config import ConfigError
from dsjax.inference.prefix import BLOCK, SUFFIX, PrefixCache, fingerprint, prune
from dsjax.model import cache as caches

KEY = ("model", "salt")
TOKENS = list(range(3 * BLOCK + 5))


def filled(seed=0, storage="float32"):
    """A cache of random latents, three rows of 256."""
    empty = caches.empty(small.MODEL, 3, 4 * BLOCK, storage, unrolled=True, mtp=True)
    rng = np.random.default_rng(seed)
    whole = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(a.dtype), empty)
    return jax.device_put(whole, caches.cache_shardings(whole, small.mesh()))


def kept(prefix, tokens=TOKENS, row=1, seed=0, key=KEY, storage="float32"):
    cache = filled(seed, storage)
    prefix.keep(key, tokens, 0, cache, row)
    return cache


def check(prefix, cache, row, count):
    """The first `count` blocks come back as they were in `row`."""
    blocks = prefix.find(KEY, TOKENS)
    assert len(blocks) == count
    back = prefix.filled(jax.tree.map(jax.numpy.zeros_like, cache), [[], [], blocks])
    for ours, theirs in zip(
        jax.tree.leaves(back._replace(mtp=())), jax.tree.leaves(cache._replace(mtp=())), strict=True
    ):
        np.testing.assert_array_equal(ours[:, 2, : BLOCK * count], theirs[:, row, : BLOCK * count])
        assert not np.any(np.asarray(ours, np.float32)[:, :2])


@pytest.mark.parametrize("storage", caches.STORAGE)
def test_blocks_come_back_bit_for_bit_from_memory_and_disk(tmp_path, storage):
    prefix = PrefixCache(directory=tmp_path)
    cache = kept(prefix, storage=storage)
    check(prefix, cache, 1, 3)
    prefix.flush()
    check(PrefixCache(directory=tmp_path), cache, 1, 3)
    assert not list(tmp_path.glob(".*")) and len(list(tmp_path.glob(f"*{SUFFIX}"))) == 3


def test_only_the_same_beginning_the_same_model_and_the_same_asker_find_it():
    prefix = PrefixCache()
    kept(prefix)
    finds = lambda tokens, key=KEY: len(prefix.find(key, tokens))  # noqa: E731
    assert finds(TOKENS) == 3
    assert finds(TOKENS[: 3 * BLOCK]) == 2  # the last token is always computed
    assert finds(TOKENS[: BLOCK + 1]) == 1 and finds(TOKENS[:BLOCK]) == 0 and finds([0]) == 0
    assert finds([*TOKENS[:100], 999, *TOKENS[101:]]) == 1
    assert finds([1, *TOKENS[1:]]) == 0 and finds(TOKENS[BLOCK:]) == 0
    assert (
        finds(TOKENS, ("model", "another")) == finds(TOKENS, ("other", "salt")) == finds(TOKENS, ("modelsalt", "")) == 0
    )
    assert prefix.hit_tokens == BLOCK * 7


def test_fingerprint_changes_with_every_weight_its_place_and_the_arithmetic():
    config = small.config()
    params = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(4, np.float32)}
    base = fingerprint(config, "float32", params, {})
    assert base == fingerprint(config, "float32", params, {})
    swapped = {**params, "a": params["a"][::-1].copy()}
    nudged = {**params, "b": np.array([0, 0, 0, 1e-30], np.float32)}
    assert len({base, *(fingerprint(config, "float32", p, {}) for p in (swapped, nudged))}) == 3
    assert fingerprint(config, "bfloat16", params, {}) != base
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, rope_theta=5e4))
    assert fingerprint(other, "float32", params, {}) != base
    assert fingerprint(dataclasses.replace(config, precision="bf16"), "float32", params, {}) != base


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_foreign(path: Path) -> None:
    other = PrefixCache(directory=path.parent)
    kept(other, [5] * (BLOCK + 1))
    other.flush()
    path.write_bytes((path.parent / f"{next(iter(other._blocks))}{SUFFIX}").read_bytes())  # whole, but another block's


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_empty, damage_foreign])
def test_file_that_is_not_what_it_says_is_a_miss_and_is_written_anew(tmp_path, damage):
    prefix = PrefixCache(directory=tmp_path)
    cache = kept(prefix)
    names = list(prefix._blocks)
    prefix.flush()
    damage(tmp_path / f"{names[1]}{SUFFIX}")
    check(PrefixCache(directory=tmp_path), cache, 1, 1)
    damage(tmp_path / f"{names[0]}{SUFFIX}")
    again = PrefixCache(directory=tmp_path)
    check(again, cache, 1, 0)
    kept(again)
    again.flush()
    check(PrefixCache(directory=tmp_path), cache, 1, 3)


def test_file_that_another_process_deletes_or_another_user_owns_is_no_error(tmp_path, monkeypatch):
    prefix = PrefixCache(directory=tmp_path)
    cache = kept(prefix)
    prefix.flush()
    touch, (gone, others) = os.utime, sorted(tmp_path.iterdir())[:2]

    def utime(path, *args):
        if path == others:
            raise PermissionError
        if path == gone and not deleted:
            deleted.append(path.unlink())
        return touch(path, *args)

    deleted: list[None] = []
    monkeypatch.setattr(os, "utime", utime)
    prefix.flush()
    check(PrefixCache(directory=tmp_path), cache, 1, 3)


def test_limits_are_kept_and_the_least_recently_used_goes_first(tmp_path):
    probe = PrefixCache()
    kept(probe)
    one = probe.memory_bytes // 3
    assert one == BLOCK * 3 * (small.MODEL.kv_lora_rank + small.MODEL.qk_rope_head_dim) * 4
    prefix = PrefixCache(memory_bytes=4 * one)
    kept(prefix)
    prefix.find(KEY, TOKENS[: BLOCK + 1])  # the first block was used last
    kept(prefix, [7] * 2 * BLOCK, key=("b", ""))
    assert prefix.memory_bytes == 4 * one
    assert len(prefix.find(KEY, TOKENS)) == 1 and len(prefix.find(("b", ""), [7] * 200)) == 2
    kept(PrefixCache(memory_bytes=0, directory=tmp_path, disk_bytes=10**9))
    files = sorted(tmp_path.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
    size = files[0].stat().st_size
    assert len(files) == 3 and prune(tmp_path, 2 * size) == size and not files[0].exists()
    kept(PrefixCache(memory_bytes=0, directory=tmp_path, disk_bytes=2 * size), [9] * 5 * BLOCK)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * size


def test_many_threads_find_whole_blocks_or_none(tmp_path):
    prefix = PrefixCache(memory_bytes=20_000, directory=tmp_path, disk_bytes=200_000)
    wrong: list[Exception] = []

    def work(seed: int) -> None:
        try:
            tokens, key = [seed % 3] * (3 * BLOCK + 1), ("m", str(seed % 3))
            cache = filled(seed % 3)
            for _ in range(10):
                prefix.keep(key, tokens, 0, cache, 1)
                for i, block in enumerate(prefix.find(key, tokens)):
                    some = jax.tree.leaves(cache._replace(mtp=()))
                    expected = [a[:, 1, BLOCK * i : BLOCK * (i + 1)] for a in some]
                    for ours, theirs in zip(block[: len(some)], expected, strict=True):
                        np.testing.assert_array_equal(ours, theirs)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and prefix.memory_bytes <= 20_000


def test_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        PrefixCache(directory=tmp_path / "file" / "below")
