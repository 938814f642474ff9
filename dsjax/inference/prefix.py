"""The prefix cache: latents of prompts in blocks of 64 tokens, so that requests which begin alike compute that once.

A block's key is a hash chain: of the model's fingerprint and the asker's salt, then of every token up to the block's
end. So a block is found only by the same tokens, from the first on, for the same weights and the same asker. Blocks
live in memory, the least recently used first to go, and from there to disk, each a file with its own digest; a file
that is truncated, changed or written for another key is a miss, and deleted, so that the block is written anew.

MTP's entry of a token depends on the token after it. So its part of a block is one position behind: what the block's
own tokens decide, and no token after them.
"""

import contextlib
import hashlib
import json
import os
import struct
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import Config, ConfigError, to_dict
from dsjax.model.cache import LatentCache, cache_shardings

BLOCK = 64
DIRECTORY = "~/.cache/dsjax/prefix"  # where blocks go that are kept between calls
MAGIC = b"dsjaxlat"  # of a file: MAGIC, SHA-256 of what follows, the key, the arrays' bytes
SUFFIX = ".latents"
Block = list[np.ndarray]  # a [layers, 64, ...] of each array of a cache


def fingerprint(config: Config, storage: str, params: Any, router_bias: Any, speculates: bool = False) -> str:
    """Changes with the architecture, the arithmetic, how latents are stored, MTP's among them or not, any weight."""
    sums = jax.device_get(_checksums((params, router_bias)))
    how = {"model": to_dict(config)["model"], "precision": config.precision, "storage": storage, "mtp": speculates}
    digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(sums):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


@jax.jit
def _checksums(tree: Any) -> Any:
    """Two 32-bit sums of every array: of its bits times an odd number that depends on the place, mixed."""

    def one(a: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(a, jnp.dtype(f"uint{8 * a.dtype.itemsize}")).astype(jnp.uint32).reshape(-1)
        place = jnp.arange(bits.size, dtype=jnp.uint32)
        mixed = (bits ^ (bits >> 15)) * (place * jnp.uint32(0x9E3779B1) | jnp.uint32(1))
        mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0x85EBCA6B)
        return jnp.stack([jnp.sum(mixed), jnp.sum((mixed ^ (mixed >> 16)) * (place | jnp.uint32(1)))])

    return jax.tree.map(one, tree)


class PrefixCache:
    """Blocks of latents, shared by any number of engines and threads."""

    block = BLOCK

    def __init__(
        self, memory_bytes: int = 1 << 30, directory: str | Path | None = None, disk_bytes: int = 10 << 30
    ) -> None:
        """Args:
          memory_bytes: what blocks may take in memory; what exceeds it is spilled.
          directory: where to; None: it is dropped. Several processes may share one.
          disk_bytes: what files may take there; the least recently used are deleted.

        Raises ConfigError where the directory cannot be made.
        """
        self._memory_bytes, self._disk_bytes = memory_bytes, disk_bytes
        self._blocks: OrderedDict[str, Block] = OrderedDict()
        self._bytes, self._lock = 0, threading.RLock()
        self.directory = None if directory is None else Path(directory).expanduser()
        self.hit_tokens = self.miss_tokens = 0
        if self.directory is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"the prefix cache {self.directory} cannot be made ({error.strerror}); choose another directory"
                ) from error

    @property
    def memory_bytes(self) -> int:
        """What blocks take in memory now."""
        return self._bytes

    def find(self, key: tuple[str, str], tokens: Sequence[int]) -> list[Block]:
        """The blocks that `tokens` begin with, as far as they are known; at least one token is left to compute.

        key: the model's fingerprint and the salt.
        """
        found: list[Block] = []
        for name in _names(key, tokens[: len(tokens) - 1]):
            block = self._get(name)
            if block is None:
                break
            found.append(block)
        with self._lock:
            self.hit_tokens += BLOCK * len(found)
            self.miss_tokens += len(tokens) - BLOCK * len(found)
        return found

    def keep(self, key: tuple[str, str], tokens: Sequence[int], known: int, cache: LatentCache, row: int) -> None:
        """Keeps the whole blocks of a prompt beyond its first `known` tokens, from its row of a cache."""
        names = list(_names(key, tokens))[known // BLOCK :]
        if not names:
            return
        rows = jax.device_get([_window(a, row, known - late, BLOCK * len(names)) for a, late in _leaves(cache)])
        for i, name in enumerate(names):
            self._put(name, [np.ascontiguousarray(a[:, BLOCK * i : BLOCK * (i + 1)]) for a in rows])

    def filled(self, cache: LatentCache, rows: Sequence[Sequence[Block]]) -> LatentCache:
        """`cache`, empty, with the blocks of each of its first rows."""
        wholes = []
        for number, (a, late) in enumerate(_leaves(cache)):
            whole = np.zeros(a.shape, a.dtype)
            for row, blocks in enumerate(rows):
                for i, block in enumerate(blocks):
                    start = BLOCK * i - late
                    whole[:, row, max(start, 0) : start + BLOCK] = block[number][:, max(-start, 0) :]
            wholes.append(whole)
        full = jax.tree.unflatten(jax.tree.structure(cache), wholes)
        return jax.device_put(full, cache_shardings(full, jax.tree.leaves(cache)[0].sharding.mesh))

    def flush(self) -> None:
        """Writes what memory holds to the directory, for the next process."""
        with self._lock:
            for name, block in self._blocks.items():
                self._spill(name, block)

    def _get(self, name: str) -> Block | None:
        with self._lock:
            if name in self._blocks:
                self._blocks.move_to_end(name)
                return self._blocks[name]
        block = None if self.directory is None else _read(self.directory / f"{name}{SUFFIX}", name)
        if block is not None:
            self._put(name, block)
        return block

    def _put(self, name: str, block: Block) -> None:
        with self._lock:
            if name in self._blocks:
                self._blocks.move_to_end(name)
                return
            self._blocks[name] = block
            self._bytes += _size(block)
            while self._bytes > self._memory_bytes:
                oldest, dropped = self._blocks.popitem(last=False)
                self._bytes -= _size(dropped)
                self._spill(oldest, dropped)

    def _spill(self, name: str, block: Block) -> None:
        if self.directory is None:
            return
        path = self.directory / f"{name}{SUFFIX}"
        try:
            os.utime(path)
        except FileNotFoundError:
            _write(path, name, block)
            prune(self.directory, self._disk_bytes)
        except OSError:  # another user's: it is there, and stays as old as it is
            pass


def prune(directory: Path, max_bytes: int) -> int:
    """Deletes the least recently used files until the rest takes `max_bytes` at most; returns the bytes freed."""
    entries = []
    for path in directory.glob(f"*{SUFFIX}"):
        try:
            status = path.stat()
        except OSError:  # another process was quicker
            continue
        entries.append((status.st_mtime_ns, status.st_size, path))
    total, freed = sum(size for _, size, _ in entries), 0
    for _, size, path in sorted(entries):
        if total - freed <= max_bytes:
            break
        path.unlink(missing_ok=True)
        freed += size
    return freed


def _names(key: tuple[str, str], tokens: Sequence[int]) -> Iterator[str]:
    """The name of each whole block, from the first."""
    parent = hashlib.sha256(json.dumps(key).encode()).digest()
    ids = np.asarray(tokens, "<i8")
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        parent = hashlib.sha256(parent + ids[start : start + BLOCK].tobytes()).digest()
        yield parent.hex()


def _leaves(cache: LatentCache) -> list[tuple[Any, int]]:
    """Each array, and by how many positions its part of a block is late."""
    return [(a, int(stacks is cache.mtp)) for stacks in cache for a in jax.tree.leaves(stacks)]


def _window(a: jax.Array, row: int, start: int, size: int) -> jax.Array:
    """`size` positions of a row, [layers, size, ...]; zeros for one before the first."""
    part = a[:, row, max(start, 0) : start + size]
    return jnp.pad(part, [(0, 0), (max(-start, 0), 0), *[(0, 0)] * (part.ndim - 2)])


def _size(block: Block) -> int:
    return sum(a.nbytes for a in block)


def _write(path: Path, name: str, block: Block) -> None:
    """Whole or not at all; a full disk keeps nothing."""
    header = json.dumps({"key": name, "arrays": [[a.dtype.name, list(a.shape)] for a in block]}).encode()
    body = struct.pack("<I", len(header)) + header + b"".join(a.tobytes() for a in block)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            temporary = file.name
            file.write(MAGIC + hashlib.sha256(body).digest() + body)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _read(path: Path, name: str) -> Block | None:
    """The block in a file, if it is whole and that of this key; deletes one that is not."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    block = _parsed(content, name)
    with contextlib.suppress(OSError):  # another process has deleted it, or it is another user's
        if block is None:
            path.unlink()
        else:
            os.utime(path)
    return block


def _parsed(content: bytes, name: str) -> Block | None:
    body = content[len(MAGIC) + 32 :]
    if content[: len(MAGIC)] != MAGIC or content[len(MAGIC) : len(MAGIC) + 32] != hashlib.sha256(body).digest():
        return None
    try:
        (size,) = struct.unpack_from("<I", body)
        header = json.loads(body[4 : 4 + size])
        if header["key"] != name:
            return None
        arrays, offset = [], 4 + size
        for dtype, shape in header["arrays"]:
            count = int(np.prod(shape))
            array = np.frombuffer(body, jnp.dtype(dtype), count, offset).reshape(shape)
            arrays.append(array)
            offset += array.nbytes
        return arrays if offset == len(body) else None
    except (ValueError, KeyError, TypeError, struct.error):
        return None
