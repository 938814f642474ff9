"""A published checkpoint straight into sharded arrays: tensor by tensor, never the whole model on the host."""

import hashlib
import math
import mmap
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from dsjax.config import ConfigError, MeshConfig, ModelConfig
from dsjax.hub import names
from dsjax.hub.architecture import Published, Quantization, read_config
from dsjax.hub.block_fp8 import E4M3, E4M3_MAX, LARGEST_WEIGHT, Blocks, dequantize_blocks, scale_shape
from dsjax.hub.directory import without_missing_mtp
from dsjax.hub.names import SCALE, Place
from dsjax.hub.safetensors import Entry, Tensors, open_tensors
from dsjax.model.moe import Execution
from dsjax.model.transformer import network
from dsjax.numerics.recipe import recipe
from dsjax.sharding import make_mesh, replicated

FLOAT32, FLOAT16, BFLOAT16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
FLOATS = (FLOAT32, FLOAT16, BFLOAT16)
SCALES = (FLOAT32, BFLOAT16, np.dtype(ml_dtypes.float8_e8m0fnu))
KINDS = (FLOAT32, BFLOAT16, E4M3)  # of parameters, as asked for
READERS = 2  # tensors in flight; each holds one tensor's bytes, and its numbers where it is dequantised
BAND = 8  # rows of a published matrix turned at a time, so that they and the columns they become stay in cache
PAGE = 4096  # bytes


@dataclass(frozen=True)
class Loaded:
    """A model in arrays: what `model.transformer.Network.bind` takes."""

    config: ModelConfig
    params: Any = field(repr=False)
    router_bias: Any = field(repr=False)
    quantization: Quantization | None = None  # of the parameters kept in FP8


def load(path: str | Path, mesh: Mesh | None = None, dtype: Any = None, *, config: ModelConfig | None = None) -> Loaded:
    """Reads a directory as on the Hugging Face hub (config.json, safetensors) of the DeepSeek family.

    Args:
      path: the directory.
      mesh: where the arrays go, sharded as in training; None: the first device.
      dtype: of the parameters: "float32" or "bfloat16"; None keeps what is stored and turns block FP8 into BF16.
        "float8_e4m3fn" keeps block FP8, as `hub.block_fp8.Blocks`, and everything else as stored. Routing biases are
        FP32 always.
      config: an architecture to use instead of config.json's; it must fit the tensors. With
        num_nextn_predict_layers = 0, those of MTP are left out.

    Beside the arrays, the host holds a few tensors at a time. Of several processes, each reads what its own devices
    hold.

    Raises:
      ConfigError: a config or file that is damaged, incomplete or of another architecture, or a size that the mesh
        does not divide.
    """
    path, wanted = Path(path).expanduser(), as_kind(dtype)
    stored = read_config(path)
    with open_tensors(path) as tensors:
        model = config or without_missing_mtp(stored.model, tensors.entries)
        source = Source(path, tensors, model, stored, mesh or make_mesh(MeshConfig(), jax.devices()[:1]))
        check(source)
        targets = _targets(source, wanted)
        arrays = _fill(source, targets)
    params, bias = (_tree(shapes, arrays) for shapes in source.shapes)
    return Loaded(model, params, bias, stored.quantization if wanted == E4M3 else None)


class Source:
    """An open checkpoint, and what of it belongs where."""

    def __init__(self, path: Path, tensors: Tensors, model: ModelConfig, stored: Published, mesh: Mesh | None = None):
        self.path, self.tensors, self.model, self.stored = path, tensors, model, stored
        self._check_count()
        self.mesh = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
        self.net = network(model, Execution(self.mesh, recipe("fp32")))
        self.shapes = (self.net.shapes, self.net.bias_shapes)
        self.places = names.places(names.flat(self.net.shapes) | names.flat(self.net.bias_shapes), model)

    def _check_count(self) -> None:
        """Raises ConfigError where sizes in config.json are absurd, before they are taken for something to build."""
        least = self.model.num_hidden_layers + self.model.num_moe_layers * self.model.n_routed_experts
        if least > 100 * len(self.tensors.entries) + 1000:
            raise ConfigError(
                f"{self.path} holds {len(self.tensors.entries)} tensors, but its config.json asks for more than {least}"
            )

    def entry(self, name: str) -> Entry:
        return self.tensors.entries[name]

    def is_quantised(self, name: str) -> bool:
        return self.entry(name).dtype == E4M3

    def is_left_out(self, name: str) -> bool:
        """Whether a tensor belongs to the MTP module of the checkpoint, which the architecture asked for has not."""
        mtp = self.stored.model.num_nextn_predict_layers > self.model.num_nextn_predict_layers
        return mtp and names.layer_of(name) == self.model.num_hidden_layers

    @property
    def quantization(self) -> Quantization:
        assert self.stored.quantization is not None  # `check` has seen to it
        return self.stored.quantization


def check(source: Source) -> None:
    """Raises ConfigError unless the files hold exactly the tensors of the architecture, by name, shape and dtype."""
    found = list(problems(source))
    if found:
        more = f" ({len(found)} problems in all)" if len(found) > 1 else ""
        raise ConfigError(f"{source.path}: {found[0]}{more}")


def problems(source: Source) -> Iterator[str]:
    """What is wrong with the tensors of a checkpoint as their headers describe them, one clause each."""
    found = source.tensors.entries
    for name in source.places:
        if name not in found:
            yield f"{name} is missing, which the architecture asks for"
    copies = names.copies(source.model)
    for name in found:
        if name in copies or name.removesuffix(SCALE) in source.places:
            continue
        if not name.endswith(names.COMPUTED) and not source.is_left_out(name):
            yield f"{name} is there, but the architecture has no place for it"
    for name, place in source.places.items():
        if name in found:
            yield from _problem_of(source, name, place.shape)
    for name, of in copies.items():
        if name in found and of in found and found[name][:2] != found[of][:2]:
            yield f"{name} must repeat {of}, but has another shape or dtype"


def _problem_of(source: Source, name: str, expected: tuple[int, ...]) -> Iterator[str]:
    """What is wrong with one tensor, or with the scales beside it."""
    entry, scale = source.entry(name), source.tensors.entries.get(name + SCALE)
    if tuple(entry.shape) != expected:
        yield f"{name} has the shape {list(entry.shape)}, but the architecture asks for {list(expected)}"
    elif entry.dtype != E4M3:
        if entry.dtype not in FLOATS:
            yield f"{name} holds {entry.dtype}, but weights are FP32, BF16, FP16 or block FP8"
        if scale is not None:
            yield f"{name} holds {entry.dtype}, but has the scales of block FP8 beside it"
    elif not names.is_quantised(name):
        yield f"{name} is in FP8, but only projections can be"
    elif scale is None:
        yield f"{name} is in FP8, but its scales, {name + SCALE}, are missing"
    elif source.stored.quantization is None:
        yield f"{name} is in FP8, but config.json has no quantization_config that tells its blocks"
    elif tuple(scale.shape) != scale_shape(expected, source.quantization.block):
        blocks = " x ".join(map(str, source.quantization.block))
        shape = list(scale_shape(expected, source.quantization.block))
        yield f"{name + SCALE} has the shape {list(scale.shape)}, but blocks of {blocks} make it {shape}"
    elif scale.dtype not in SCALES:
        yield f"{name + SCALE} holds {scale.dtype}, but scales are FP32, BF16 or powers of two in one byte"


class Target(NamedTuple):
    """An array to be filled."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding


def _targets(source: Source, wanted: np.dtype | None) -> dict[str, Target]:
    """What to make, by the path of our array; the scales of kept FP8 under the path and SCALE."""
    (params, bias), mesh = source.shapes, source.mesh
    shardings = names.flat(source.net.param_shardings())
    stored: dict[str, set[np.dtype]] = {}
    for name, place in source.places.items():
        stored.setdefault(place.path, set()).add(source.entry(name).dtype)
    targets = {path: Target(leaf.shape, FLOAT32, replicated(mesh)) for path, leaf in names.flat(bias).items()}
    for path, leaf in names.flat(params).items():
        dtype = _dtype(path, stored[path], wanted)
        targets[path] = Target(leaf.shape, dtype, shardings[path])
        if dtype == E4M3:
            *stack, rows, columns = leaf.shape
            # As many dimensions as are cut; one block's scale is too small to be cut with its rows and columns.
            spec = (*shardings[path].spec, *[None] * len(leaf.shape))[: len(stack)]
            down, across = source.quantization.block  # of the published matrix, which ours is turned from
            scales = (*stack, -(-rows // across), -(-columns // down))
            targets[path + SCALE] = Target(scales, FLOAT32, NamedSharding(mesh, PartitionSpec(*spec)))
    return targets


def as_kind(dtype: Any) -> np.dtype | None:
    """The NumPy dtype of parameters that a user asks for. Raises ConfigError for one that they cannot have."""
    if dtype is None:
        return None
    try:
        kind = np.dtype(jnp.dtype(dtype))
    except TypeError:
        kind = None
    if kind not in KINDS:
        raise ConfigError(f"parameters cannot be {dtype!r}; valid are {', '.join(k.name for k in KINDS)}, or None")
    return kind


def _dtype(path: str, stored: set[np.dtype], wanted: np.dtype | None) -> np.dtype:
    """Of one of our arrays, all of whose published tensors have the dtypes `stored`."""
    if wanted == E4M3:
        if E4M3 in stored and len(stored) > 1:
            raise ConfigError(f"{path} is only partly in FP8, so it cannot be kept so; load it as bfloat16")
        wanted = None
    elif E4M3 in stored:
        stored = (stored - {E4M3}) | {BFLOAT16}
    if wanted is not None:
        return wanted
    return next(iter(stored)) if len(stored) == 1 else FLOAT32


class HostPart:
    """A part of an array in host memory, which CPU devices adopt as it is."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, devices: list[Any]):
        # Straight from the system: page-aligned, as adoption needs, and without the huge pages that NumPy asks for,
        # for which the system may have to move other memory first.
        size = math.prod(shape) * dtype.itemsize
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._array = np.frombuffer(memory, np.uint8, size).view(dtype).reshape(shape)
        self._devices = devices

    def put(self, index: tuple[int, ...], numbers: np.ndarray) -> None:
        out = self._array[index]
        # New memory is quick to come by in order, and not in the order in which a turned matrix is written.
        out.reshape(-1).view(np.uint8)[::PAGE] = 0
        copy_numbers(out, numbers)

    def arrays(self) -> list[jax.Array]:
        # A step that is given them copies before it writes: what the host shares is never donated.
        return [jax.device_put(self._array, device) for device in self._devices]


class DevicePart:
    """A part of an array on an accelerator, which takes one tensor after the other."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, devices: list[Any]):
        self._arrays = [jax.device_put(jnp.zeros(shape, dtype, device=device), device) for device in devices]
        self._lock = threading.Lock()

    def put(self, index: tuple[int, ...], numbers: np.ndarray) -> None:
        whole = np.empty(numbers.shape, self._arrays[0].dtype)
        copy_numbers(whole, numbers)
        start = (*index, *[0] * numbers.ndim)
        with self._lock:
            for i, array in enumerate(self._arrays):
                piece = jax.device_put(whole, array.device)
                # Waited for, so that no more pieces are under way than there are readers.
                self._arrays[i] = jax.block_until_ready(_insert(array, piece, start))

    def arrays(self) -> list[jax.Array]:
        return self._arrays


@partial(jax.jit, donate_argnums=0)
def _insert(array: jax.Array, piece: jax.Array, start: tuple[int, ...]) -> jax.Array:
    return lax.dynamic_update_slice(array, piece.reshape((1,) * (array.ndim - piece.ndim) + piece.shape), start)


def copy_numbers(out: np.ndarray, numbers: np.ndarray) -> None:
    """out[...] = numbers, in `out`'s dtype, quick also where `numbers` is a turned matrix."""
    plain = out.view(f"u{out.itemsize}")  # NumPy moves numbers it knows faster
    band = BAND if numbers.ndim == 2 and numbers.strides[0] < numbers.strides[1] else max(numbers.shape[-1:], default=1)
    for start in range(0, max(numbers.shape[-1:], default=1), band):
        part = numbers[..., start : start + band] if numbers.ndim else numbers
        plain[..., start : start + band] = part.astype(out.dtype, copy=False).view(plain.dtype)


Spans = tuple[tuple[int, int], ...]  # start and end along each dimension


class Parts(NamedTuple):
    """One array in the making: its parts on this process's devices, by what they are of it."""

    target: Target
    by_spans: dict[Spans, HostPart | DevicePart]

    def put(self, index: tuple[int, ...], numbers: np.ndarray) -> None:
        """`numbers` at `index` of the array, wherever that is."""
        for spans, part in self.by_spans.items():
            local = _local(spans, index)
            if local is not None:
                part.put(local, numbers[tuple(slice(*span) for span in spans[len(index) :])])

    def holds(self, index: tuple[int, ...]) -> bool:
        return any(_local(spans, index) is not None for spans in self.by_spans)

    def array(self) -> jax.Array:
        pieces = [array for part in self.by_spans.values() for array in part.arrays()]
        return jax.make_array_from_single_device_arrays(self.target.shape, self.target.sharding, pieces)


def _local(spans: Spans, index: tuple[int, ...]) -> tuple[int, ...] | None:
    """`index` counted from where `spans` begin; None where it is outside of them."""
    if any(not start <= i < end for (start, end), i in zip(spans, index, strict=False)):
        return None
    return tuple(i - start for (start, _), i in zip(spans, index, strict=False))


def _parts(target: Target) -> Parts:
    devices: dict[Spans, list[Any]] = {}
    for device, slices in target.sharding.addressable_devices_indices_map(target.shape).items():
        spans = tuple(cut.indices(size)[:2] for cut, size in zip(slices or (), target.shape, strict=True))
        devices.setdefault(spans, []).append(device)
    kind = HostPart if target.sharding.mesh.devices.flat[0].platform == "cpu" else DevicePart
    shape = lambda spans: tuple(end - start for start, end in spans)  # noqa: E731
    return Parts(target, {spans: kind(shape(spans), target.dtype, where) for spans, where in devices.items()})


def _fill(source: Source, targets: Mapping[str, Target]) -> dict[str, Any]:
    """The arrays by path, with everything in them."""
    parts = {path: _parts(target) for path, target in targets.items()}
    here = {name: place for name, place in source.places.items() if parts[place.path].holds(place.index)}
    total = sum(source.entry(name).nbytes for name in here)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"loading {source.path.name}", disable=None, delay=1)
    buffers = threading.local()

    def one(name: str) -> None:
        place_tensor(source, name, here[name], parts, buffers)
        bar.update(source.entry(name).nbytes)

    in_file_order = sorted(here, key=lambda name: (source.entry(name).file, source.entry(name).offset))
    with bar, ThreadPoolExecutor(READERS, "load") as threads:
        work = [threads.submit(one, name) for name in in_file_order]
        work.append(threads.submit(check_copies, source))
        try:
            for done in work:
                done.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return {path: part.array() for path, part in parts.items()}


def place_tensor(source: Source, name: str, place: Place, parts: Mapping[str, Parts], buffers: Any) -> None:
    """Reads one published tensor and puts it where it belongs."""
    target = parts[place.path]
    stored = read_finite(source, name, buffers)
    if not source.is_quantised(name):
        target.put(place.index, place.as_published(stored))
        return
    scale = read_scale(source, name)
    if target.target.dtype == E4M3:
        target.put(place.index, place.as_published(stored))
        parts[place.path + SCALE].put(place.index, place.as_published(scale))
    else:
        numbers = dequantize_blocks(stored, scale, source.quantization.block, target.target.dtype)
        target.put(place.index, place.as_published(numbers))


def read_finite(source: Source, name: str, buffers: Any = None) -> np.ndarray:
    """A tensor as stored, [out, in]. With `buffers`, a threading.local, in memory that the thread's next read reuses.

    Raises:
      ConfigError: it holds NaN or infinity.
    """
    entry, out = source.entry(name), None
    if buffers is not None:
        if getattr(buffers, "bytes", np.empty(0)).nbytes < entry.nbytes:
            buffers.bytes = np.empty(entry.nbytes, np.uint8)
        out = buffers.bytes[: entry.nbytes].view(entry.dtype).reshape(entry.shape)
    array = source.tensors.read(name, out)
    if not is_finite(array):
        raise ConfigError(f"{source.path}: {name} holds NaN or infinity; the checkpoint is of no use")
    return array


def read_scale(source: Source, name: str) -> np.ndarray:
    """The scales of a tensor in block FP8, FP32.

    Raises:
      ConfigError: one is not above 0, or so large that weights would overflow.
    """
    scale = source.tensors.read(name + SCALE).astype(np.float32)
    with np.errstate(over="ignore"):
        usable = (scale > 0) & (scale * E4M3_MAX <= LARGEST_WEIGHT)
    if not usable.all():
        raise ConfigError(f"{source.path}: {name + SCALE} holds a scale that is not above 0, not finite or too large")
    return scale


def is_finite(array: np.ndarray) -> bool:
    """Whether every number is; of bits, because NumPy has no quick way for the small formats."""
    if array.dtype == ml_dtypes.float8_e8m0fnu:
        return not (array.view(np.uint8) == 0xFF).any()
    infinity = {FLOAT32: 0x7F80_0000, BFLOAT16: 0x7F80, FLOAT16: 0x7C00, E4M3: 0x7F}.get(array.dtype)
    if infinity is None:
        return bool(np.isfinite(array).all())
    bits = array.view(f"u{array.itemsize}").reshape(-1)
    mask, step = bits.dtype.type(2 * (1 << (8 * array.itemsize - 2)) - 1), 1 << 18
    return all((bits[i : i + step] & mask).max() < infinity for i in range(0, bits.size, step))


def check_copies(source: Source) -> None:
    """Raises ConfigError unless tensors that repeat another one do: ours share one array."""
    for name, of in names.copies(source.model).items():
        if name not in source.tensors.entries:
            continue
        copy, original = (
            hashlib.sha256(source.tensors.read(each).reshape(-1).view(np.uint8).data).digest() for each in (name, of)
        )
        if copy != original:
            raise ConfigError(
                f"{source.path}: {name} differs from {of}, but MTP and tied embeddings share one array; only models"
                " where both are equal can be loaded"
            )


def _tree(shapes: Any, arrays: Mapping[str, Any]) -> Any:
    """A tree like `shapes`, of the arrays."""

    def leaf(path: Any, _: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        scale = arrays.get(name + SCALE)
        return arrays[name] if scale is None else Blocks(arrays[name], scale)

    return jax.tree_util.tree_map_with_path(leaf, shapes)
