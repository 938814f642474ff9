"""Arrays as a published checkpoint: the same names, layouts and files, whole or not at all."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from dsjax.config import ConfigError
from dsjax.hub import names
from dsjax.hub.architecture import Quantization, published_config
from dsjax.hub.block_fp8 import E4M3, Blocks, dequantize_blocks, quantize_blocks, scale_shape
from dsjax.hub.names import SCALE, Place
from dsjax.hub.reading import BFLOAT16, FLOAT32, Loaded, as_kind, copy_numbers, is_finite
from dsjax.hub.safetensors import Writer

CONFIG = "config.json"
# What belongs to a model beside its weights, and is carried along as it is.
COMPANIONS = (
    "tokenizer*",
    "tokenization*.py",
    "configuration_*.py",
    "modeling_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "tiktoken.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
)
SHARD_BYTES = 4 << 30  # DeepSeek's shards have about as many
Plan = dict[str, tuple[np.dtype, tuple[int, ...]]]  # published name -> dtype and shape
SCALE_FORMATS = ("float32", "ue8m0")
V3_BLOCKS = Quantization((128, 128), "float32")


def save(
    path: str | Path,
    model: Loaded,
    dtype: Any = None,
    *,
    scale_format: str | None = None,
    companions: str | Path | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a directory that Hugging Face transformers loads, and `load` too.

    Args:
      path: a new or empty directory. It appears when everything is written, and not before.
      model: the architecture and its arrays.
      dtype: of the tensors: "float32", "bfloat16", or "float8_e4m3fn" for what DeepSeek publishes in block FP8, and
        BF16 for the rest; None writes each array as it is. Routing biases are FP32 always.
      scale_format: of block FP8: "float32" (V3), or "ue8m0", powers of two (V3.1); None: as the model was loaded, or
        "float32".
      companions: a directory whose tokenizer files are copied.
      bos_token_id, eos_token_id: for config.json.
      max_shard_bytes: of one file.

    The host holds a few tensors at a time. With several processes all must call it; the first one writes.

    Raises:
      ConfigError: the directory is in use or cannot be written, no published class has this architecture, or an array
        holds NaN or infinity.
    """
    path, kind = Path(path).expanduser(), as_kind(dtype)
    check_options(kind, scale_format, companions, max_shard_bytes)
    now = model.quantization or V3_BLOCKS
    form = Format(kind, Quantization(now.block, scale_format or now.scale_format) if kind else now)
    arrays = names.flat(model.params) | names.flat(model.router_bias)
    weights = {name: leaf.weight if isinstance(leaf, Blocks) else leaf for name, leaf in arrays.items()}
    places = names.places(weights, model.config)
    order = list(places) + [name for name in names.copies(model.config) if name != "lm_head.weight"]
    originals = names.copies(model.config)

    def fetched() -> Iterator[tuple[str, np.ndarray]]:
        for name in order:
            place = places[originals.get(name, name)]
            number, scale = _fetch(arrays[place.path], place)
            yield from form.encode(name, number, scale, model.quantization)

    plan: Plan = {}
    for name in order:
        place = places[originals.get(name, name)]
        plan |= form.plan(name, np.dtype(weights[place.path].dtype), place.shape)
    quantization = form.quantization if any(dtype == E4M3 for dtype, _ in plan.values()) else None
    main = next(dtype for name, (dtype, _) in plan.items() if name.endswith("embed_tokens.weight"))
    values = published_config(model.config, main.name, quantization, bos_token_id, eos_token_id)
    write(path, values, plan, fetched(), Path(companions) if companions else None, max_shard_bytes)


def check_options(
    kind: np.dtype | None, scale_format: str | None, companions: str | Path | None, max_shard_bytes: int
) -> None:
    """Raises ConfigError for options of `save` and `convert` that are wrong or would have no effect."""
    if scale_format not in (None, *SCALE_FORMATS):
        raise ConfigError(f"unknown scale format {scale_format!r}; valid are {', '.join(SCALE_FORMATS)}")
    if scale_format is not None and kind != E4M3:
        raise ConfigError(f"the scale format {scale_format} has no effect without FP8; ask for FP8, or leave it out")
    if companions is not None and not Path(companions).is_dir():
        raise ConfigError(f"there is no directory {companions} to copy tokenizer files from")
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes}, but must be at least 1")


class Format(NamedTuple):
    """How tensors are written."""

    kind: np.dtype | None  # None: each as it is
    quantization: Quantization

    def dtype(self, name: str, stored: np.dtype) -> np.dtype:
        """Of the published tensor `name`, which is in `stored` now."""
        if name.endswith("e_score_correction_bias"):
            return FLOAT32
        if self.kind is None:
            return stored
        return BFLOAT16 if self.kind == E4M3 and not names.is_quantised(name) else self.kind

    def plan(self, name: str, stored: np.dtype, shape: tuple[int, ...]) -> Plan:
        """The tensors that `encode` will give for `name`: their dtypes and shapes."""
        dtype = self.dtype(name, stored)
        if dtype != E4M3:
            return {name: (dtype, shape)}
        return {name: (dtype, shape), name + SCALE: (FLOAT32, scale_shape(shape, self.quantization.block))}

    def encode(
        self, name: str, numbers: np.ndarray, scale: np.ndarray | None, now: Quantization | None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors to write for `name`.

        Args:
          name: published.
          numbers: in the published layout; E4M3 with their `scale`.
          scale: FP32, or None.
          now: the blocks of `scale`.

        Raises:
          ConfigError: there is NaN or infinity among them.
        """
        dtype = self.dtype(name, numbers.dtype)
        if scale is not None and (dtype != E4M3 or now != self.quantization):
            assert now is not None
            numbers, scale = dequantize_blocks(numbers, scale, now.block, np.float32), None
        if not is_finite(numbers):
            raise ConfigError(f"{name} holds NaN or infinity, so it is not written; go back to an earlier checkpoint")
        if dtype == E4M3 and scale is None:
            numbers, scale = _quantised(name, numbers, self.quantization)
        written = np.ascontiguousarray(_cast(numbers, dtype))
        if not is_finite(written):
            raise ConfigError(f"{name} holds a number too large for {dtype}; choose another dtype")
        yield name, written
        if scale is not None:
            yield name + SCALE, np.ascontiguousarray(scale, np.float32)


def _cast(numbers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        return numbers.astype(dtype, copy=False)


def _quantised(name: str, numbers: np.ndarray, quantization: Quantization) -> tuple[np.ndarray, np.ndarray]:
    try:
        return quantize_blocks(np.ascontiguousarray(numbers), quantization.block, quantization.scale_format)
    except ValueError as error:
        raise ConfigError(f"{name} cannot be written in FP8: {error}; choose another dtype") from error


def write(
    path: Path,
    config: Mapping[str, Any],
    plan: Plan,
    tensors: Iterable[tuple[str, np.ndarray]],
    companions: Path | None,
    max_shard_bytes: int,
) -> None:
    """Writes a whole directory: the planned tensors, config.json, the companion files of another directory."""
    total = sum(dtype.itemsize * math.prod(shape) for dtype, shape in plan.values())
    path = path.resolve()
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {path.name}", disable=None, delay=1)
    if jax.process_index() > 0:  # takes part in fetching
        for _ in tensors:
            pass
        return
    with bar, staged(path) as directory:
        with Writer(directory, plan, max_shard_bytes) as writer:
            for name, array in tensors:
                writer.add(name, array)
                bar.update(array.nbytes)
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in companion_files(companions) if companions else ():
            shutil.copyfile(file, directory / file.name)


def companion_files(directory: Path) -> list[Path]:
    """The files of a model's directory that belong to it beside config and weights."""
    return sorted({file for pattern in COMPANIONS for file in directory.glob(pattern) if file.is_file()})


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` at the end, and is removed where the end is not reached.

    Raises:
      ConfigError: `path` is in use, or the disk does not take what is written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"{path} exists already; give a new or empty directory")
    if path.is_mount():
        raise ConfigError(f"{path} is a mount point, which cannot be replaced when all is written; give a name in it")
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror or error}); nothing of it is left") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fetch(leaf: Any, place: Place) -> tuple[np.ndarray, np.ndarray | None]:
    """One published tensor from our array, with its scales where it has any."""
    if isinstance(leaf, Blocks):
        weight, scale = (_turned(_take(part, place.index), place) for part in leaf)
        return weight, scale
    return _turned(_take(leaf, place.index), place), None


def _turned(numbers: np.ndarray, place: Place) -> np.ndarray:
    """What lies in our array at `place`, in the published layout and order of memory."""
    published = place.as_published(numbers)
    if published.flags.c_contiguous:
        return published
    out = np.empty(published.shape, published.dtype)
    copy_numbers(out, published)
    return out


def _take(array: Any, index: tuple[int, ...]) -> np.ndarray:
    """array[index] on the host; of an array that is spread out, nothing else comes there."""
    if isinstance(array, np.ndarray):
        return array[index]
    if array.is_fully_addressable:
        return _from_shards(array, index)
    spec = (*array.sharding.spec, *[None] * len(index))
    is_cut = tuple(axes is not None for axes in spec[: len(index)])
    taken = _taker(array.sharding.mesh, is_cut)(array, tuple(map(np.int32, index)))
    return np.asarray(taken.addressable_data(0))


def _from_shards(array: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """array[index], put together on the host from the devices that hold it."""
    out = np.empty(array.shape[len(index) :], array.dtype)
    for shard in array.addressable_shards:
        starts = [cut.start or 0 for cut in shard.index[: len(index)]]
        local = tuple(i - start for i, start in zip(index, starts, strict=True))
        inside = all(0 <= i < size for i, size in zip(local, shard.data.shape, strict=False))
        if inside and shard.replica_id == 0:
            out[shard.index[len(index) :]] = _at(shard.data, local)
    return out


def _at(part: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    if next(iter(part.devices())).platform == "cpu":
        return np.asarray(part)[index]
    return np.asarray(_indexed(part, tuple(map(np.int32, index))))


@jax.jit
def _indexed(array: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    for i in index:
        array = lax.dynamic_index_in_dim(array, i, keepdims=False)
    return array


@lru_cache
def _taker(mesh: Mesh, is_cut: tuple[bool, ...]) -> Any:
    """array[index] of an array that several processes hold, for each of them.

    Along a dimension that is cut over the mesh, one of its elements is the sum over all of them with the others put to
    zero: the partitioner would gather them all to take one. Of bits, so that a negative zero stays one.
    """

    def take(array: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
        dtype, bits = array.dtype, jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        array = lax.bitcast_convert_type(array, bits)
        for i, cut in zip(index, is_cut, strict=True):
            if cut:
                here = jnp.arange(len(array)).reshape(-1, *[1] * (array.ndim - 1)) == i
                array = jnp.sum(jnp.where(here, array, 0), axis=0, dtype=jnp.uint32).astype(bits)
            else:
                array = lax.dynamic_index_in_dim(array, i, keepdims=False)
        return lax.bitcast_convert_type(array, dtype)

    return jax.jit(take, out_shardings=NamedSharding(mesh, PartitionSpec()))
