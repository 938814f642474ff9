"""The file format of published weights: checked and read with pread, planned and written as a stream.

A safetensors file is 8 bytes that count the header's (little-endian), the header in JSON, and the data. This is a
reader and writer of our own because the library's interface to NumPy has no FP8 types, and because it maps whole files,
which a machine counts as memory of the process: what is read here goes into one buffer of the tensor's size.

Mistakes in what is read or written are ConfigErrors: one sentence that names the file, and the tensor where one is
to blame.
"""

import collections
import contextlib
import json
import math
import os
import shutil
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsjax.sections import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LENGTH = struct.Struct("<Q")  # of the header
LARGEST_HEADER = 100_000_000  # the library's limit
ALIGNMENT = 8  # of the data in the file, as the library writes it
LARGEST_RANK = 64  # NumPy's limit
LARGEST_SIZE = 1 << 56  # of anything; beyond it NumPy cannot count bytes

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# The dtype and shape of tensors, by name.
Plan = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


class Entry(NamedTuple):
    """A tensor and where it lies."""

    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int  # of its first byte in the file
    nbytes: int


class Tensors:
    """The tensors that `open_tensors` found. A context manager; without it, call `close`.

    entries: every tensor by name, file after file, in each in the order of the data.
    """

    def __init__(self, entries: Mapping[str, Entry], descriptors: Mapping[Path, int]):
        self.entries = entries
        # Open since the headers were read: a file that is replaced meanwhile cannot give another's bytes.
        self._descriptors = dict(descriptors)

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """The tensor, read into `out` if given: C-contiguous, of its dtype and shape. Any number of threads may read.

        Raises KeyError for an unknown name, ConfigError where the file is shorter now or does not read.
        """
        entry = self.entries[name]
        if out is None:
            out = np.empty(entry.nbytes, np.uint8).view(entry.dtype).reshape(entry.shape)
        if (out.dtype, out.shape) != (entry.dtype, entry.shape) or not out.flags.c_contiguous:
            raise ValueError(f"out must be a C-contiguous array of {entry.dtype} {entry.shape} for {name}")
        with _told(entry.file, "read"):
            done = _read_into(self._descriptors[entry.file], _bytes(out), entry.offset)
        if done < entry.nbytes:
            raise ConfigError(
                f"{entry.file} has become shorter since it was opened and has only {done} of the {entry.nbytes} bytes "
                f"of {name!r}; fetch the file again"
            )
        return out

    def close(self) -> None:
        """Closes the files; nothing can be read any more."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tensors(path: Path) -> Tensors:
    """The tensors of a directory, or of one file.

    A directory has an index that names its files, or a model.safetensors, or any files *.safetensors. All headers are
    read and checked against the index and the sizes of the files; no tensor is read.
    Raises ConfigError for a path without such files, and for whatever is cut, contradictory or not understood.
    """
    entries: dict[str, Entry] = {}
    descriptors: dict[Path, int] = {}
    try:
        for file, promised in _files(path).items():
            if file.exists() and not file.is_file():
                raise ConfigError(f"{file} is not a file; give a directory that holds safetensors files")
            with _told(file, "read"):
                descriptors[file] = os.open(file, os.O_RDONLY)
                found = _read_header(descriptors[file], file)
            _check_promise(file, promised, found)
            for name in sorted(entries.keys() & found.keys()):
                raise ConfigError(f"the tensor {name!r} is in {entries[name].file} and in {file}; delete one of them")
            entries |= found
    except BaseException:
        Tensors({}, descriptors).close()
        raise
    return Tensors(entries, descriptors)


def _files(path: Path) -> Mapping[Path, set[str] | None]:
    """The files to read, and the tensors that an index says are in each; None without an index."""
    with _told(path, "read"):
        if not path.exists():
            raise ConfigError(f"there is no {path}; give a directory that holds safetensors files")
        if not path.is_dir():
            return {path: None}
        present = {file.name for file in path.iterdir()}
    if INDEX in present:
        files = _read_index(path / INDEX)
        if SINGLE in present and path / SINGLE not in files:
            raise ConfigError(f"{path} holds {SINGLE} and an index that does not name it; delete what is out of date")
        return files
    if SINGLE in present:
        return {path / SINGLE: None}
    names = sorted(name for name in present if name.endswith(".safetensors"))
    if not names:
        pickled = sorted(name for name in present if name.endswith((".bin", ".pt", ".pth")))
        hint = f"; it holds {pickled[0]}, so convert it to safetensors first" if pickled else ""
        raise ConfigError(f"there are no safetensors files in {path}{hint}")
    return {path / name: None for name in names}


def _read_index(index: Path) -> dict[Path, set[str]]:
    with _told(index, "read"):
        content = index.read_bytes()
    value = _parse(content, str(index))
    places = value.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ConfigError(f"{index} has no weight_map that says which tensor is in which file; fetch it again")
    files: dict[Path, set[str]] = {}
    for tensor, name in places.items():
        if not _is_file_name(name):
            raise ConfigError(f"{index} says that {tensor!r} is in {name!r}, which names no safetensors file beside it")
        files.setdefault(index.parent / name, set()).add(tensor)
    for file in files:
        with _told(file, "read"):
            if not file.exists():
                raise ConfigError(f"{file} is missing, though {INDEX} names it; fetch the file")
    return dict(sorted(files.items()))


def _is_file_name(name: Any) -> bool:
    """Whether it can only be a file beside the index: nothing with folders, nothing that a system would not take."""
    return isinstance(name, str) and name.endswith(".safetensors") and name.isprintable() and not {*name} & {*"/\\"}


def _check_promise(file: Path, promised: set[str] | None, found: Mapping[str, Entry]) -> None:
    """Raises ConfigError unless the file holds just what the index says."""
    if promised is None:
        return
    for name in sorted(promised - found.keys()):
        raise ConfigError(f"{INDEX} says that the tensor {name!r} is in {file}, which does not hold it")
    for name in sorted(found.keys() - promised):
        raise ConfigError(f"{file} holds the tensor {name!r}, which {INDEX} does not say")


def _read_header(descriptor: int, file: Path) -> dict[str, Entry]:
    """The tensors of one file, checked, in the order of their data."""
    size = os.fstat(descriptor).st_size
    start = bytearray(LENGTH.size)
    if _read_into(descriptor, memoryview(start), 0) < len(start):
        raise ConfigError(f"{file} has {size} bytes, too few for a safetensors file; fetch it again")
    (length,) = LENGTH.unpack(start)
    if length > min(LARGEST_HEADER, size - len(start)):
        if start == b"version ":
            raise ConfigError(f"{file} is a pointer of Git LFS and not the file itself; run `git lfs pull` there")
        raise ConfigError(
            f"{file} has {size} bytes and says that {length} are its header, so it is cut short or of another format; "
            "fetch it again"
        )
    content = bytearray(length)
    if _read_into(descriptor, memoryview(content), len(start)) < length:
        raise ConfigError(f"{file} has become shorter while it was opened; fetch it again")
    header = _parse(bytes(content), f"the header of {file}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ConfigError(f"the header of {file} has a __metadata__ that does not map texts to texts")
    data = len(start) + length
    entries = {name: _entry(name, value, file, data) for name, value in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_layout(entries, file, data, size)
    return entries


def _parse(content: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no key is there twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, count in collections.Counter(key for key, _ in pairs).items():
            if count > 1:
                raise ValueError(f"the key {key!r} is there {count} times")
        return dict(pairs)

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not usable JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{what} must be a JSON object, but is a {type(value).__name__}; fetch the file again")
    return value


def _entry(name: str, value: Any, file: Path, data: int) -> Entry:
    """The tensor that a header describes by `value`; `data` is where offsets count from."""
    place = f"the tensor {name!r} in {file}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ConfigError(f"{place} must be described by dtype, shape and data_offsets, but is by {value!r:.200}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConfigError(f"{place} has the unknown dtype {dtype!r:.200}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > LARGEST_RANK or math.prod(filter(None, shape)) > LARGEST_SIZE:
        raise ConfigError(f"{place} must have a list of sizes as its shape, but has {shape!r:.200}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ConfigError(f"{place} must have two data_offsets, begin and end, but has {offsets!r:.200}")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise ConfigError(f"{place} has {end - begin} bytes, but {dtype} of its shape {shape!r:.200} needs {nbytes}")
    return Entry(DTYPES[dtype], tuple(shape), file, data + begin, nbytes)


def _are_sizes(values: Any) -> bool:
    """Whether it is a list of whole numbers that an array can have as sizes; JSON's true is none."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= LARGEST_SIZE for value in values)


def _check_layout(entries: Mapping[str, Entry], file: Path, data: int, size: int) -> None:
    """Raises ConfigError unless the tensors, in the order of their data, fill the file without gap or overlap."""
    position, before = data, "the header"
    for name, entry in entries.items():
        if entry.offset != position:
            wrong = "overlaps" if entry.offset < position else "leaves a gap after"
            raise ConfigError(f"the tensor {name!r} in {file} {wrong} {before}; fetch the file again")
        position, before = entry.offset + entry.nbytes, f"the tensor {name!r}"
    if position > size:
        raise ConfigError(f"{file} is cut short, with {size} of {position} bytes; fetch it again")
    if position < size:
        raise ConfigError(f"{file} has {size - position} bytes after its last tensor; fetch it again")


def _read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Reads until the buffer is full or the file ends; returns the bytes read."""
    done = 0
    while done < len(buffer):  # the system may give less than asked for, and never more than 2 GB
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            break
        done += count
    return done


class Writer:
    """Writes planned tensors into the shards of a directory, each straight to its place: the memory of one tensor.

    directory: exists, without such files. A file gets its header when all of its tensors are there, and the index
      comes last, so that nothing unfinished can be read.
    plan: dtype and shape of every tensor, in the order in which they are dealt to shards. In a shard those of the
      widest dtype come first: so each is aligned, as the format asks.
    max_shard_bytes: of the tensors of one shard; a larger tensor has a shard of its own.
    metadata: of each header; transformers asks for the format.

    One shard is called model.safetensors, more are model-00001-of-0000N.safetensors with an index. A context manager:
    it ends with `close`, or after an exception leaves the directory unfinished.
    Raises ConfigError where the disk does not take it.
    """

    def __init__(
        self,
        directory: Path,
        plan: Plan,
        max_shard_bytes: int = 4 << 30,
        metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
    ):
        shards = _shards(plan, max_shard_bytes)
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        files = [directory / name for name in (names if len(shards) > 1 else [SINGLE])]
        self._directory = directory
        self._headers: dict[Path, bytes] = {}
        self._entries: dict[str, Entry] = {}
        for file, shard in zip(files, shards, strict=True):
            self._headers[file], entries = _layout(file, shard, metadata)
            self._entries |= entries
        self._to_add = dict(self._entries)
        self._to_write = collections.Counter(entry.file for entry in self._entries.values())
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._check_space()

    def add(self, name: str, array: np.ndarray) -> None:
        """Writes a planned tensor; in any order, from any thread, each once.

        Raises ValueError for a tensor that is not planned like this, or was added before.
        """
        with self._lock:
            entry = self._to_add.get(name)
            if entry is None:
                raise ValueError(f"the tensor {name!r} is not in the plan, or was added before")
            if (array.dtype, array.shape) != (entry.dtype, entry.shape):
                raise ValueError(f"{name!r} is planned as {entry.dtype} {entry.shape}, not {array.dtype} {array.shape}")
            del self._to_add[name]
        file = entry.file
        with _told(file, "written"):
            with self._lock:
                if file not in self._descriptors:
                    self._descriptors[file] = _create(file)
            _write(self._descriptors[file], _bytes(np.ascontiguousarray(array)), entry.offset)
            with self._lock:
                self._to_write[file] -= 1
                if self._to_write[file]:
                    return
                descriptor = self._descriptors.pop(file)
            _finish(descriptor, self._headers[file])

    def close(self) -> None:
        """Writes the index, after every planned tensor was added. Raises ValueError where one was not."""
        self._abandon()
        for name in self._to_add:
            raise ValueError(f"the tensor {name!r} is planned, but was not added")
        with _told(self._directory, "written"):
            if len(self._headers) > 1:
                _finish(_create(self._directory / INDEX), self._index())
            descriptor = os.open(self._directory, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # the names of the files
            finally:
                os.close(descriptor)

    def _index(self) -> bytes:
        places = {name: entry.file.name for name, entry in self._entries.items()}
        index = {"metadata": {"total_size": self._total_size()}, "weight_map": places}
        return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()

    def _total_size(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    def _check_space(self) -> None:
        """Raises ConfigError now, rather than after hours."""
        with _told(self._directory, "written"):
            free = shutil.disk_usage(self._directory).free
        if self._total_size() > free:
            raise ConfigError(
                f"{self._total_size() / 1e9:.1f} GB are to be written to {self._directory}, but its disk has only "
                f"{free / 1e9:.1f} GB free; make room or give another directory"
            )

    def _abandon(self) -> None:
        """Closes the files that are not complete."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()


def _shards(plan: Plan, max_bytes: int) -> Sequence[Plan]:
    """The plan cut into files, in its order, each as full as `max_bytes` allows."""
    shards: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, (dtype, shape) in plan.items():
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"{name!r} cannot be stored as {dtype}; known types are {', '.join(DTYPES)}")
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = dtype, shape
        filled += nbytes
    return shards


def _layout(file: Path, plan: Plan, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, Entry]]:
    """The start of a file, with the header's length before the header, and where its tensors go."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    entries, position = {}, 0
    for name, (dtype, shape) in sorted(plan.items(), key=lambda item: -item[1][0].itemsize):
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [position, end]}
        entries[name] = Entry(dtype, tuple(shape), file, position, end - position)
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    start = LENGTH.pack(len(text)) + text
    return start, {name: entry._replace(offset=len(start) + entry.offset) for name, entry in entries.items()}


def _create(file: Path) -> int:
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _finish(descriptor: int, start: bytes) -> None:
    """Writes the start of a file when all else of it is safe on the disk, and closes it."""
    try:
        os.fsync(descriptor)
        _write(descriptor, memoryview(start), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(descriptor: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):  # the system may take less than it is given
        done += os.pwrite(descriptor, buffer[done:], offset + done)


def _bytes(array: np.ndarray) -> memoryview:
    """The memory of a C-contiguous array, as bytes because Python's buffers know no BF16 and no FP8."""
    return array.reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def _told(path: Path, verb: str) -> Iterator[None]:
    """What the operating system refuses, as a sentence about `path`."""
    try:
        yield
    except OSError as error:
        remedy = "look at the file and its rights" if verb == "read" else "look at the space and rights there"
        raise ConfigError(f"{path} cannot be {verb} ({error.strerror or error}); {remedy}") from error
