"""Reading and writing safetensors: against the library, and over mangled files."""

import collections
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from dsjax.hub.safetensors import DTYPES, INDEX, SINGLE, Writer, open_tensors
from dsjax.sections import ConfigError

BF16, E4M3 = DTYPES["BF16"], DTYPES["F8_E4M3"]
NUMPY_KNOWS = [name for name in DTYPES if name not in ("F8_E4M3", "F8_E5M2", "F8_E8M0", "BF16")]


def random_array(dtype, shape, seed=0):
    """Random bytes, except for booleans."""
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    return rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype).reshape(shape)


def of_all_types(names=DTYPES):
    """Odd sizes of every dtype, narrow ones first, a scalar and an empty tensor among them."""
    shapes = ((3, 5), (7,), (), (0, 4), (1, 2, 3))
    return {
        f"{name}.{number}": random_array(DTYPES[name], shape, number)
        for name in reversed(list(names))
        for number, shape in enumerate(shapes)
    }


def plan_of(arrays):
    return {name: (array.dtype, array.shape) for name, array in arrays.items()}


def write(directory, arrays, **options):
    directory.mkdir(exist_ok=True)
    with Writer(directory, plan_of(arrays), **options) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
    return directory


def read(path):
    with open_tensors(path) as tensors:
        return {name: tensors.read(name) for name in tensors.entries}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def file_of(header, data=b"", length=None):
    """A safetensors file of this header, as bytes or as JSON; `length` is what it says of itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin=0, end=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_what_is_written_is_read(tmp_path):
    arrays = of_all_types()
    assert_same(read(write(tmp_path, arrays)), arrays)


@pytest.mark.parametrize("max_shard_bytes", [1, 40, 200, 1 << 30])
def test_shards_hold_every_tensor_once_and_as_many_as_may_be(tmp_path, max_shard_bytes):
    arrays = of_all_types()
    write(tmp_path, arrays, max_shard_bytes=max_shard_bytes)
    assert_same(read(tmp_path), arrays)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if max_shard_bytes == 1 << 30:
        assert sorted(os.listdir(tmp_path)) == [SINGLE]
        return
    assert files == [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    for file in files:
        held = read(tmp_path / file)
        assert held.keys() == {name for name, place in index["weight_map"].items() if place == file}
        sizes = [array.nbytes for array in held.values() if array.nbytes]
        assert sum(sizes) <= max_shard_bytes or len(sizes) == 1
        following = next((name for name in arrays if index["weight_map"][name] > file), None)  # the first of the next
        assert following is None or sum(sizes) + arrays[following].nbytes > max_shard_bytes


def test_every_tensor_is_aligned_and_the_plan_keeps_its_order_within_a_width(tmp_path):
    arrays = of_all_types()
    with open_tensors(write(tmp_path, arrays)) as tensors:
        assert all(place.offset % place.dtype.itemsize == 0 for place in tensors.entries.values())
        assert min(place.offset for place in tensors.entries.values()) % 8 == 0
        for width in (1, 2, 4, 8):
            in_plan = [name for name, array in arrays.items() if array.itemsize == width and array.nbytes]
            assert [name for name in tensors.entries if name in in_plan] == in_plan


def test_numpy_reads_what_is_written(tmp_path):
    library = pytest.importorskip("safetensors")
    arrays = of_all_types(NUMPY_KNOWS)
    file = write(tmp_path, arrays) / SINGLE
    with library.safe_open(file, "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert_same({name: opened.get_tensor(name) for name in opened.keys()}, arrays)  # noqa: SIM118


def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    names = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
    arrays = of_all_types(names)
    found = load_file(write(tmp_path, arrays) / SINGLE)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        tensor = found[name]
        assert (tensor.dtype, tensor.shape) == (names[name.split(".")[0]], array.shape)
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()


def test_files_of_the_library_are_read(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    arrays = of_all_types(NUMPY_KNOWS)
    library.save_file(arrays, tmp_path / "any.safetensors", metadata={"format": "np"})
    assert_same(read(tmp_path), arrays)
    assert_same(read(tmp_path / "any.safetensors"), arrays)


def test_files_of_torch_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    arrays = {
        "b": random_array(BF16, (3, 5)),
        "q": random_array(E4M3, (7, 3)),
        "s": random_array(DTYPES["F8_E8M0"], (1, 3)),
        "f": random_array(DTYPES["F32"], (5,)),
    }
    kinds = {"b": torch.bfloat16, "q": torch.float8_e4m3fn, "s": torch.float8_e8m0fnu, "f": torch.float32}
    as_torch = {
        name: torch.from_numpy(array.view(np.uint8)).view(kinds[name]).reshape(array.shape)
        for name, array in arrays.items()
    }
    save_file(as_torch, tmp_path / SINGLE)
    assert_same(read(tmp_path), arrays)


def test_several_files_without_an_index_are_read_together(tmp_path):
    arrays = of_all_types()
    for number, name in enumerate(arrays):
        shutil.move(write(tmp_path / "one", {name: arrays[name]}) / SINGLE, tmp_path / f"{number}.safetensors")
    shutil.rmtree(tmp_path / "one")
    assert_same(read(tmp_path), arrays)


def test_threads_write_in_any_order_and_read_at_once(tmp_path):
    arrays = {f"t{i}": random_array(DTYPES["U8"], (1 + 977 * i,), i) for i in range(60)}
    order = np.random.default_rng(0).permutation(list(arrays))
    with ThreadPoolExecutor(8) as threads:
        with Writer(tmp_path, plan_of(arrays), max_shard_bytes=100_000) as writer:
            list(threads.map(lambda name: writer.add(str(name), arrays[name]), order))
        with open_tensors(tmp_path) as tensors:
            found = dict(zip(order, threads.map(tensors.read, order), strict=True))
    assert_same(found, arrays)


def test_partial_reads_and_writes_are_continued(tmp_path, monkeypatch):
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:7]], offset))
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:5], offset))
    arrays = of_all_types()
    assert_same(read(write(tmp_path, arrays)), arrays)


def test_tensors_are_read_into_a_given_array(tmp_path):
    arrays = {"a": random_array(BF16, (3, 4)), "s": random_array(DTYPES["F32"], ())}
    write(tmp_path, arrays)
    with open_tensors(tmp_path) as tensors:
        for name, array in arrays.items():
            out = np.zeros_like(array)
            assert tensors.read(name, out) is out
            assert out.tobytes() == array.tobytes()
        for out in (np.zeros((3, 4), np.uint16), np.zeros((4, 3), BF16), np.zeros((4, 3), BF16).T):
            with pytest.raises(ValueError, match="C-contiguous array of bfloat16"):
                tensors.read("a", out)


def test_arrays_of_any_strides_are_written(tmp_path):
    array = random_array(BF16, (6, 4))
    views = {"transposed": array.T, "strided": array[::2, 1:], "reversed": array[::-1]}
    assert_same(read(write(tmp_path, views)), views)


def test_reading_needs_the_memory_of_one_tensor(tmp_path):
    arrays = {f"t{i}": np.zeros(1 << 20, np.uint8) for i in range(8)}
    write(tmp_path, arrays, max_shard_bytes=3 << 20)
    with open_tensors(tmp_path) as tensors:
        array = tensors.read("t7")
    assert array.base is not None and array.base.nbytes == 1 << 20
    maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
    assert str(tmp_path) not in maps


# What is wrong with a file, and the part of the sentence that says so.
MANGLED = {
    "nothing in it": (b"", "has 0 bytes, too few"),
    "less than a length": (b"\x10\0\0", "has 3 bytes, too few"),
    "a header longer than the file": (file_of({}, length=3), "is cut short"),
    "a header of exabytes": (b"\xff" * 16, "is cut short or of another format"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    "an empty header": (file_of(b""), "not usable JSON"),
    "no JSON": (file_of(b"{]"), "not usable JSON"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "not usable JSON"),
    "deep JSON": (file_of(b"[" * 100_000), "not usable JSON"),
    "a list": (file_of([]), "must be a JSON object, but is a list"),
    "a name twice": (file_of(b'{"a": {}, "a": {}}'), "'a' is there 2 times"),
    "a field twice": (file_of(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "'dtype' is there 2 times"),
    "metadata of numbers": (file_of({"__metadata__": {"n": 1}}), "__metadata__"),
    "metadata in a list": (file_of({"__metadata__": []}), "__metadata__"),
    "a tensor of no fields": (file_of({"a": 3}), "must be described by dtype, shape and data_offsets"),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"8" * 8), "must be described"),
    "a field too many": (file_of({"a": entry() | {"x": 1}}, b"8" * 8), "must be described"),
    "an unknown dtype": (file_of({"a": entry(dtype="F4")}, b"8" * 8), "'a' .* unknown dtype 'F4'; known are F64, F32"),
    "a dtype of no text": (file_of({"a": entry(dtype=["F32"])}, b"8" * 8), "unknown dtype"),
    "a shape of no list": (file_of({"a": entry() | {"shape": 2}}, b"8" * 8), "list of sizes as its shape"),
    "a negative shape": (file_of({"a": entry(shape=(-2, -1))}, b"8" * 8), "list of sizes as its shape"),
    "a shape of floats": (file_of({"a": entry(shape=(2.0,))}, b"8" * 8), "list of sizes as its shape"),
    "a shape of booleans": (file_of({"a": entry(0, 4, shape=(True,))}, b"8" * 4), "list of sizes as its shape"),
    "an infinite shape": (
        file_of(b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}'),
        "sizes as its",
    ),
    "too many dimensions": (file_of({"a": entry(0, 4, shape=(1,) * 65)}, b"8" * 4), "list of sizes as its shape"),
    "too large for an array": (file_of({"a": entry(0, 0, shape=(0, 1 << 40, 1 << 40))}), "list of sizes as its shape"),
    "too large a size": (file_of({"a": entry(0, 0, shape=(1 << 70, 0))}), "list of sizes as its shape"),
    "another shape": (
        file_of({"a": entry(shape=(3,))}, b"8" * 8),
        r"'a' .* 8 bytes, but F32 of its shape \[3\] needs 12",
    ),
    "one offset": (file_of({"a": entry() | {"data_offsets": [0]}}, b"8" * 8), "two data_offsets"),
    "offsets backwards": (file_of({"a": entry(8, 0)}, b"8" * 8), "two data_offsets"),
    "negative offsets": (file_of({"a": entry(-8, 0)}, b"8" * 8), "two data_offsets"),
    "an overlap": (file_of({"a": entry(0, 8), "b": entry(4, 12)}, b"8" * 12), "'b' .* overlaps the tensor 'a'"),
    "the same place": (file_of({"a": entry(), "b": entry()}, b"8" * 8), "overlaps"),
    "a gap": (file_of({"a": entry(0, 8), "b": entry(12, 20)}, b"8" * 20), "'b' .* leaves a gap after the tensor 'a'"),
    "a gap in front": (file_of({"a": entry(8, 16)}, b"8" * 16), "leaves a gap after the header"),
    "data cut short": (file_of({"a": entry()}, b"8" * 7), r"is cut short, with \d+ of \d+ bytes"),
    "data too long": (file_of({"a": entry()}, b"8" * 9), "has 1 bytes after its last tensor"),
}


def assert_one_sentence(error, path):
    text = str(error.value)
    assert str(path) in text and "\n" not in text and ". " not in text


@pytest.mark.parametrize("mistake", MANGLED)
def test_a_mangled_file_is_refused_in_one_sentence(tmp_path, mistake):
    content, message = MANGLED[mistake]
    file = tmp_path / SINGLE
    file.write_bytes(content)
    for path in (tmp_path, file):
        with pytest.raises(ConfigError, match=message) as error:
            open_tensors(path)
        assert_one_sentence(error, file)


def test_the_example_that_the_mangled_files_vary_is_read(tmp_path):
    (tmp_path / SINGLE).write_bytes(
        file_of({"b": entry(8, 16), "a": entry(0, 8), "__metadata__": {"x": "y"}}, b"8" * 16)
    )
    assert list(read(tmp_path)) == ["a", "b"]


def sharded(path):
    """Two shards: a in the first, b in the second."""
    return write(path, {"a": np.arange(4, dtype=np.float32), "b": np.arange(3, dtype=np.int32)}, max_shard_bytes=16)


def with_index(value):
    return lambda path: (path / INDEX).write_text(value if isinstance(value, str) else json.dumps(value))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BOTH = {"a": FIRST, "b": SECOND}


def index_of(weight_map):
    return with_index({"metadata": {}, "weight_map": weight_map})


MANGLED_DIRECTORIES = {
    "index not JSON": (with_index("{"), "not usable JSON"),
    "index not an object": (with_index("[]"), "must be a JSON object"),
    "no weight_map": (with_index({"metadata": {}}), "no weight_map"),
    "empty weight_map": (index_of({}), "no weight_map"),
    "weight_map a list": (index_of(["a"]), "no weight_map"),
    "a name twice": (with_index(f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}'), "'a' is there 2 times"),
    "missing shard": (lambda path: (path / SECOND).unlink(), f"{SECOND} is missing, though {INDEX} names it"),
    "tensor not in its shard": (index_of(BOTH | {"c": FIRST}), f"says that the tensor 'c' is in .*{FIRST}, which does"),
    "tensor in another shard": (index_of({"a": SECOND, "b": FIRST}), "says that the tensor 'b' is in"),
    "tensor not in the index": (
        lambda path: (path / SECOND).write_bytes(file_of({"b": entry(), "c": entry(8, 16)}, b"8" * 16)),
        f"{SECOND} holds the tensor 'c', which {INDEX} does not say",
    ),
    "tensor in two shards": (lambda path: shutil.copy(path / FIRST, path / SECOND), "says that the tensor 'b' is in"),
    "two shards without index": (
        lambda path: ((path / INDEX).unlink(), shutil.copy(path / FIRST, path / SECOND)),
        "the tensor 'a' is in .* and in .*; delete one of them",
    ),
    "a single file too": (lambda path: shutil.copy(path / FIRST, path / SINGLE), "an index that does not name it"),
    "a shard is a directory": (
        lambda path: ((path / FIRST).unlink(), (path / FIRST).mkdir()),
        "is not a file",
    ),
    "nothing": (lambda path: [file.unlink() for file in path.iterdir()], "there are no safetensors files in"),
    "only pickles": (
        lambda path: ([file.unlink() for file in path.iterdir()], (path / "pytorch_model.bin").touch()),
        "pytorch_model.bin, so convert it to safetensors first",
    ),
} | {
    f"shard named {name!r}": (index_of(BOTH | {"b": name}), "names no safetensors file beside it")
    for name in (
        "../x.safetensors",
        "/x.safetensors",
        "a/../x.safetensors",
        "..",
        "",
        "x.bin",
        "x\0.safetensors",
        None,
        3,
    )
}


@pytest.mark.parametrize("mistake", MANGLED_DIRECTORIES)
def test_a_mangled_directory_is_refused_in_one_sentence(tmp_path, mistake):
    mangle, message = MANGLED_DIRECTORIES[mistake]
    mangle(sharded(tmp_path))
    before = open_files()
    with pytest.raises(ConfigError, match=message) as error:
        open_tensors(tmp_path)
    assert_one_sentence(error, tmp_path)
    assert open_files() == before


def open_files():
    """How many files this process has open, where the system tells."""
    return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0


def test_no_such_path_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="there is no .*nowhere; give a directory"):
        open_tensors(tmp_path / "nowhere")


@pytest.mark.parametrize("refused", [FIRST, INDEX])
def test_what_may_not_be_read_is_one_sentence(tmp_path, refused):
    sharded(tmp_path)
    (tmp_path / refused).chmod(0)
    if os.access(tmp_path / refused, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(ConfigError, match=f"{refused} cannot be read .Permission denied.") as error:
        open_tensors(tmp_path)
    assert_one_sentence(error, tmp_path)


@pytest.mark.parametrize("function", ["open", "preadv"])
def test_refusals_of_the_system_are_one_sentence(tmp_path, monkeypatch, function):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    sharded(tmp_path)
    monkeypatch.setattr(os, function, refuse)
    with pytest.raises(ConfigError, match=f"{FIRST} cannot be read .Permission denied.; look at") as error:
        open_tensors(tmp_path)
    assert_one_sentence(error, tmp_path)


def test_a_file_cut_after_it_was_opened_is_one_sentence(tmp_path):
    sharded(tmp_path)
    with open_tensors(tmp_path) as tensors:
        os.truncate(tmp_path / FIRST, (tmp_path / FIRST).stat().st_size - 1)
        with pytest.raises(ConfigError, match="has only 15 of the 16 bytes of 'a'") as error:
            tensors.read("a")
        assert_one_sentence(error, tmp_path / FIRST)
        np.testing.assert_array_equal(tensors.read("b"), np.arange(3))


def test_a_file_replaced_after_it_was_opened_does_not_matter(tmp_path):
    sharded(tmp_path / "one")
    with open_tensors(tmp_path / "one") as tensors:
        shutil.rmtree(tmp_path / "one")
        np.testing.assert_array_equal(tensors.read("a"), np.arange(4, dtype=np.float32))


def test_whatever_bytes_a_header_has_it_is_read_or_refused(tmp_path):
    arrays = {"a": np.arange(4, dtype=np.float32), "b": random_array(E4M3, (3, 5)), "c": random_array(BF16, (2, 2))}
    content = (write(tmp_path, arrays) / SINGLE).read_bytes()
    end = len(content) - sum(array.nbytes for array in arrays.values())
    rng = np.random.default_rng(0)
    outcomes = collections.Counter(read=0, refused=0)
    for trial in range(3000):
        mangled = bytearray(content)
        for place in rng.integers(0, end, 1 + trial % 3):
            mangled[place] = rng.integers(0, 256) if trial % 2 else rng.choice(mangled[8:end])
        if trial % 10 == 0:
            mangled = mangled[: rng.integers(0, len(content))]
        (tmp_path / SINGLE).write_bytes(mangled)
        try:
            found = read(tmp_path)
        except ConfigError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            header = 8 + int.from_bytes(mangled[:8], "little")
            assert header + sum(array.nbytes for array in found.values()) == len(mangled)
    assert min(outcomes.values()) > 20, outcomes


def test_unfinished_files_cannot_be_read(tmp_path):
    arrays = {"a": np.arange(4, dtype=np.float32), "b": np.arange(3, dtype=np.int32)}
    writer = Writer(tmp_path, plan_of(arrays))
    writer.add("b", arrays["b"])  # the file has its full size
    with pytest.raises(ConfigError):
        open_tensors(tmp_path)
    before = open_files()
    with pytest.raises(ValueError, match="'a' is planned, but was not added"):
        writer.close()
    assert open_files() <= before - 1 or before == 0
    with pytest.raises(ConfigError):
        open_tensors(tmp_path)


def test_an_exception_leaves_the_directory_unfinished_and_no_file_open(tmp_path):
    before = open_files()
    with pytest.raises(KeyError, match="stopped"):  # noqa: SIM117
        with Writer(tmp_path, {"a": (BF16, (1,)), "b": (BF16, (1,))}, max_shard_bytes=2) as writer:
            writer.add("a", np.zeros(1, BF16))
            raise KeyError("stopped")
    assert not (tmp_path / INDEX).exists() and open_files() == before


def test_only_the_plan_is_written(tmp_path):
    with pytest.raises(ValueError, match="cannot be stored as complex64"):
        Writer(tmp_path, {"a": (np.dtype(np.complex64), (1,))})
    with pytest.raises(ValueError, match="cannot be stored as >f4"):
        Writer(tmp_path, {"a": (np.dtype(">f4"), (1,))})
    writer = Writer(tmp_path, {"a": (BF16, (2,)), "b": (BF16, (1,))})
    for name, array in (("c", np.zeros(2, BF16)), ("a", np.zeros(2, np.float32)), ("a", np.zeros((2, 1), BF16))):
        with pytest.raises(ValueError, match="not in the plan|is planned as bfloat16"):
            writer.add(name, array)
    writer.add("a", np.zeros(2, BF16))
    with pytest.raises(ValueError, match="was added before"):
        writer.add("a", np.zeros(2, BF16))
    writer.add("b", np.zeros(1, BF16))
    writer.close()
    assert read(tmp_path).keys() == {"a", "b"}


def test_nothing_is_overwritten(tmp_path):
    sharded(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=f"{FIRST} cannot be written .File exists.; look at"):
        sharded(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**8))
    with pytest.raises(ConfigError, match="0.2 GB are to be written to .*, but its disk has only 0.1 GB free") as error:
        Writer(tmp_path, {"a": (BF16, (10**8,))})
    assert_one_sentence(error, tmp_path)
    writer = Writer(tmp_path, {"a": (BF16, (2,))})
    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(ConfigError, match=f"{SINGLE} cannot be written .No space left on device.") as error:
        writer.add("a", np.zeros(2, BF16))
    assert_one_sentence(error, tmp_path)


def test_a_missing_directory_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="nowhere cannot be written .No such file or directory.") as error:
        Writer(tmp_path / "nowhere", {"a": (BF16, (2,))})
    assert_one_sentence(error, tmp_path)
