"""Where text comes from: the interpreter's standard library, files, conversations, a TFDS dataset; as documents.

Whatever cannot be read is skipped, named and counted, never fatal; only a source without any document is refused.
"""

import codecs
import glob
import gzip
import itertools
import json
import platform
import sysconfig
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import tensorflow_datasets as tfds

from dsjax.config import ConfigError
from dsjax.data.chat import messages_of

FOLDER_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")  # each also with .gz
CHAT_SUFFIXES = (".jsonl",)  # also with .gz
PIECE_BYTES = 1 << 20  # a plain file longer than this becomes several documents, cut at line ends
NAMED_SKIPS = 20  # skipped items kept by name for each reason; all are counted
NETWORK_TIMEOUT = 10.0  # seconds


class Document(NamedTuple):
    """A text, where it stood, and how much of the source (in its unit) had been read when it was complete."""

    name: str
    text: str
    done: int


@dataclass
class Skipped:
    """What was not used: how often for each reason, and the first names."""

    reasons: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        self.reasons[reason] += 1
        if self.reasons[reason] <= NAMED_SKIPS:
            self.named.setdefault(reason, []).append(name)

    def as_json(self) -> dict[str, dict[str, Any]]:
        """As in a manifest: for each reason, the most frequent first, `count` and the names of the `first`."""
        return {reason: {"count": count, "first": self.named[reason]} for reason, count in self.reasons.most_common()}


def told(skipped: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each reason of `Skipped.as_json`, with the first few names."""
    return [
        f"{item['count']:,} {reason}: {', '.join(item['first'][:3])}{', ...' * (item['count'] > 3)}"
        for reason, item in skipped.items()
    ]


# (path, its size, its name, skipped) to its documents; `done` counts the bytes of the file itself, packed or not.
FileReader = Callable[[Path, int, str, Skipped], Iterator[Document]]
# (open file, its name, skipped) to names and texts of documents
PartReader = Callable[[BufferedIOBase, str, Skipped], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class Source:
    """A source that exists. `identity` is cheap to get and changes when other documents might be read.

    `read(skipped)` yields the documents in a fixed order, one at a time. `size` is what `Document.done` reaches,
    in `unit`.
    """

    kind: str  # "python_stdlib", "text_files", "hosted_text" or "chat"
    title: str
    identity: str
    size: int
    unit: str
    read: Callable[[Skipped], Iterator[Document]]


def find(name: str, text_key: str) -> Source:
    """The source called `python_stdlib`, `text_files:PLACE`, `chat:PLACE` or `tfds:NAME[/CONFIG][:VERSION]`.

    PLACE is a folder, a file or a glob. `text_key` names the field with the text in jsonl, parquet and TFDS records. A
    document of `chat` is the JSON text of a conversation's messages: it is hashed and split by it, as texts are.
    Raises ConfigError when there is no such source or nothing in it.
    """
    kind, _, argument = name.partition(":")
    if kind == "python_stdlib" and not argument:
        return _python_stdlib()
    if kind == "text_files" and argument:
        return _text_files(argument, text_key)
    if kind == "tfds" and argument:
        return _hosted(argument, text_key)
    if kind == "chat" and argument:
        return _chat(argument)
    raise ConfigError(
        f"unknown data source {name!r}; --config.data.sources takes 'python_stdlib', 'text_files:FOLDER_OR_GLOB', "
        "'tfds:NAME' and 'chat:FOLDER_OR_GLOB'"
    )


def _python_stdlib() -> Source:
    """The running interpreter's standard library without its tests: about 12 MB of code, without a download."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        # _sysconfigdata holds the paths of the machine that built the interpreter.
        if not left_out & set(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    ]
    if not files:
        raise ConfigError(f"this interpreter has no .py files in {root}; use --config.data.sources=text_files:FOLDER")
    sizes = [path.stat().st_size for path in files]
    names = [path.relative_to(root).as_posix() for path in files]
    identity = repr(("python_stdlib", platform.python_version(), list(zip(names, sizes, strict=True))))
    return Source(
        kind="python_stdlib",
        title=f"standard library of Python {platform.python_version()}",
        identity=identity,
        size=sum(sizes),
        unit="B",
        read=lambda skipped: _read_files(files, sizes, names, _text_reader("text"), skipped),
    )


def _text_files(where: str, text_key: str) -> Source:
    """One file, the files a glob matches, or the known kinds of file below a folder, hidden ones left out.

    Kinds go by suffix: .jsonl and .parquet are records, anything else is plain text; .gz on top is unpacked.
    """
    return _files("text_files", where, FOLDER_SUFFIXES, _text_reader(text_key), text_key)


def _chat(where: str) -> Source:
    """Conversations in .jsonl files, one a line; found as text files are."""
    return _files("chat", where, CHAT_SUFFIXES, _read_chat)


def _files(kind: str, where: str, suffixes: tuple[str, ...], read: FileReader, *options: str) -> Source:
    """Those with one of `suffixes` below a folder, a file, or what a glob names; `options` also decide what is read."""
    root = Path(where).expanduser().resolve()
    if root.is_dir():
        files = [path for path in sorted(root.rglob("*")) if _belongs(path, root, suffixes)]
        if not files:
            raise ConfigError(
                f"there is no {', '.join(suffixes)} file (or .gz of one) below {root}; "
                f"name other files by a glob, as in {kind}:{root}/**/*.EXTENSION"
            )
    else:
        matches = [str(root)] if root.is_file() else glob.glob(str(Path(where).expanduser()), recursive=True)
        files = sorted(path for path in (Path(match).resolve() for match in matches) if path.is_file())
        if not files:
            raise ConfigError(f"{kind}:{where} is neither a folder nor a file, nor does it match any file as a glob")
    facts = [(path, path.stat()) for path in files if path.exists()]
    files, sizes = [path for path, _ in facts], [stat.st_size for _, stat in facts]
    stamps = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in facts]
    return Source(
        kind=kind,
        title=f"{kind}:{where}",
        identity=repr((kind, *options, stamps)),
        size=sum(sizes),
        unit="B",
        read=lambda skipped: _read_files(files, sizes, [str(path) for path in files], read, skipped),
    )


def _belongs(path: Path, root: Path, suffixes: tuple[str, ...]) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    packed_twice = path.name.lower().endswith(".parquet.gz")
    return not hidden and not packed_twice and path.is_file() and _kind(path) in suffixes


def _kind(path: Path) -> str:
    """The suffix below a .gz, in lower case."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _read_files(
    files: list[Path], sizes: list[int], names: list[str], read: FileReader, skipped: Skipped
) -> Iterator[Document]:
    read_bytes = 0
    for path, size, name in zip(files, sizes, names, strict=True):
        try:
            for document in read(path, size, name, skipped):
                yield document._replace(done=read_bytes + min(document.done, size))
        except FileNotFoundError:
            skipped.add(name, "vanished before it was read")
        except UnicodeDecodeError:
            skipped.add(name, "not UTF-8")
        except (gzip.BadGzipFile, zlib.error, EOFError):
            skipped.add(name, "broken gzip")
        except OSError as error:
            skipped.add(name, f"cannot be read ({error.strerror or type(error).__name__})")
        read_bytes += size


def _text_reader(text_key: str) -> FileReader:
    """What reads a file of texts, by its kind."""

    def read(path: Path, size: int, name: str, skipped: Skipped) -> Iterator[Document]:
        if _kind(path) == ".parquet":
            return _read_parquet(path, size, name, text_key, skipped)
        return _unpacked(path, name, skipped, _texts(text_key) if _kind(path) == ".jsonl" else _read_plain)

    return read


def _read_chat(path: Path, size: int, name: str, skipped: Skipped) -> Iterator[Document]:
    return _unpacked(path, name, skipped, _read_conversations)


def _unpacked(path: Path, name: str, skipped: Skipped, parts: PartReader) -> Iterator[Document]:
    with path.open("rb") as raw:
        unpacked: BufferedIOBase = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
        for label, text in parts(unpacked, name, skipped):
            yield Document(label, text, raw.tell())


def _read_plain(handle: BufferedIOBase, name: str, skipped: Skipped) -> Iterator[tuple[str, str]]:
    """A file as one document, or as pieces cut at line ends when it is long; ends where it stops being UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # a byte order mark is not text
    following = _piece(handle)
    for number in itertools.count():
        piece, following = following, _piece(handle)
        text = decoder.decode(piece, final=not following)
        if text.strip():
            yield name if number == 0 else f"{name}#{number}", text
        elif number == 0:
            skipped.add(name, "empty")
        if not following:
            return


def _piece(handle: BufferedIOBase) -> bytes:
    return handle.read(PIECE_BYTES) + handle.readline(PIECE_BYTES)


def _texts(text_key: str) -> PartReader:
    """What reads the texts of a file of records."""

    def read(handle: BufferedIOBase, name: str, skipped: Skipped) -> Iterator[tuple[str, str]]:
        for label, record in _records(handle, name, skipped):
            text = record.get(text_key) if isinstance(record, dict) else None
            if _usable(text, label, text_key, skipped):
                yield label, text

    return read


def _read_conversations(handle: BufferedIOBase, name: str, skipped: Skipped) -> Iterator[tuple[str, str]]:
    for label, record in _records(handle, name, skipped):
        try:
            text = json.dumps(messages_of(record), ensure_ascii=False)
            text.encode()
        except UnicodeEncodeError:
            skipped.add(label, "not Unicode (a lone surrogate)")
        except ValueError as error:
            skipped.add(label, str(error))
        else:
            yield label, text


def _records(handle: BufferedIOBase, name: str, skipped: Skipped) -> Iterator[tuple[str, object]]:
    """The JSON values of a file of lines, each with its name."""
    for number, line in enumerate(handle, start=1):
        label = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            skipped.add(label, "not UTF-8")
        except (ValueError, RecursionError):
            skipped.add(label, "not JSON")
        else:
            yield label, record


def _read_parquet(path: Path, size: int, name: str, text_key: str, skipped: Skipped) -> Iterator[Document]:
    import pyarrow.parquet  # here, because few need it and it takes its time

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                skipped.add(name, f"no column {text_key!r}")
                return
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if _usable(text, f"{name}:{number}", text_key, skipped):
                        yield Document(f"{name}:{number}", text, size * number // file.metadata.num_rows)
    except pyarrow.ArrowException:
        skipped.add(name, "broken parquet")


def _usable(text: object, name: str, text_key: str, skipped: Skipped) -> TypeGuard[str]:
    """Whether a record's text can be a document; says why not."""
    if not isinstance(text, str):
        skipped.add(name, f"no text in {text_key!r}")
        return False
    if not text.strip():
        skipped.add(name, "empty")
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        skipped.add(name, "not Unicode (a lone surrogate)")
        return False
    return True


def _hosted(name: str, text_key: str) -> Source:
    """The train split of a TFDS dataset, read at random access; downloaded by TFDS when it is not on disk."""
    try:
        builder = tfds.builder(name)
    except tfds.core.DatasetNotFoundError as error:
        raise ConfigError(f"TFDS knows no dataset {name!r}, nor is one in {tfds.core.constants.DATA_DIR}") from error
    except Exception as error:  # a configuration or version that does not exist, each with its own type
        raise ConfigError(f"TFDS cannot open {name!r}: {_first_line(error)}") from error
    if not builder.data_path.exists():
        _download(builder, name)
    try:
        records = builder.as_data_source(split="train")
    except Exception as error:
        raise ConfigError(
            f"tfds:{name} in {builder.data_path} has no train split that can be read without TensorFlow "
            f"({_first_line(error)}); prepare it with file_format='array_record'"
        ) from error
    if text_key not in builder.info.features:
        raise ConfigError(
            f"tfds:{name} has no field {text_key!r}; set --config.data.text_key to one of "
            f"{', '.join(builder.info.features)}"
        )
    return Source(
        kind="hosted_text",
        title=f"tfds:{builder.info.full_name}",
        identity=repr(("tfds", builder.info.full_name, len(records), text_key)),
        size=len(records),
        unit=" documents",
        read=lambda skipped: _read_records(records, name, text_key, skipped),
    )


def _read_records(records, name: str, text_key: str, skipped: Skipped) -> Iterator[Document]:
    for number in range(len(records)):
        label = f"{name}:{number}"
        text = records[number][text_key]
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError:
                skipped.add(label, "not UTF-8")
                continue
        if _usable(text, label, text_key, skipped):
            yield Document(label, text, number + 1)


def _download(builder, name: str) -> None:
    """Lets TFDS download and generate `builder`, but not before one of its addresses has answered.

    Without that look TFDS retries for minutes on a machine without network.
    """
    for url in list(builder.url_infos or ())[:1]:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=NETWORK_TIMEOUT).close()
        except urllib.error.HTTPError:
            pass  # the server is there; what it thinks of HEAD does not matter
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"tfds:{name} is not in {builder.data_path} and cannot be downloaded, {url} does not answer "
                f"({_first_line(error)}); prepare it where there is a network, or set TFDS_DATA_DIR to where it lies"
            ) from error
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # whatever the dataset's own script raises
        raise ConfigError(
            f"tfds:{name} could not be downloaded and generated: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
