"""`prepare`: tokenise and pack every source once, into array_record shards of rows with a manifest beside them.

DIRECTORY/KIND-DIGEST/   one prepared source; the digest is that of everything that decides what is in it
  manifest.json            what it is, where it came from, what was skipped
  dataset_info.json, features.json, KIND-train.array_record-00000-of-00001, ...   readable by TFDS itself
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dsjax.checks import data_problems
from dsjax.config import ConfigError, DataConfig
from dsjax.data import sources, tokenizer
from dsjax.data.chat import Template, find_template
from dsjax.data.packing import Packed, Stream, pack
from dsjax.data.progress import shown
from dsjax.data.samples import pack_samples
from dsjax.data.sources import Skipped, Source, told
from dsjax.data.tokenizer import Tokenizer

FORMAT = 1  # of the manifest and the rows; a change makes older directories unused
MANIFEST = "manifest.json"
SHARD_BYTES = 1 << 28
STALE_SECONDS = 86400.0  # an unfinished directory that nobody wrote to for so long is rubbish
DIGITS = 16  # of a digest, in a directory's name
DELETED = "-deleted-"  # then a process number: what `dsjax cache prune` calls a directory that it deletes


@dataclass(frozen=True)
class Prepared:
    """A source on disk, complete."""

    directory: Path
    manifest: dict[str, Any]


class _OwnInfo(tfds.core.DatasetInfo):
    """Of a dataset that is made here."""

    def initialize_from_bucket(self) -> None:
        """TFDS would look for it in its bucket, and leave an empty temporary directory behind."""


class PackedText(tfds.core.ShardBasedBuilder):
    """Rows of packed tokens as a TFDS dataset: one feature `tokens` [sequence_length + 1].

    Shard-based, because TFDS' shuffling writer needs TensorFlow above 1 GB and all rows in memory when the order is
    to be kept. Consecutive rows share one token, so that as inputs row[:-1] and labels row[1:] every token is
    predicted once; what is left at the end of a split is shorter than a row and dropped.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, streams: dict[str, Stream], sequence_length: int, progress: bool, data_dir: Path):
        self._streams = streams
        self._sequence_length = sequence_length
        self._progress = progress
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(
            shape=(self._sequence_length + 1,),
            dtype=next(iter(self._streams.values())).dtype,
            encoding=tfds.features.Encoding.BYTES,
        )
        features = tfds.features.FeaturesDict({"tokens": tokens})
        return _OwnInfo(builder=self, features=features, disable_shuffling=True)

    def _shard_iterators_per_split(self, dl_manager):
        return {split: self._shards(split, stream) for split, stream in self._streams.items()}

    def _shards(self, split: str, stream: Stream) -> list:
        tokens, rows = stream.read(), stream.rows(self._sequence_length)
        row_bytes = (self._sequence_length + 1) * stream.dtype.itemsize
        bounds = np.linspace(0, rows, 1 + max(1, rows * row_bytes // SHARD_BYTES)).astype(int).tolist()
        return [
            functools.partial(self._rows, tokens, start, stop, f"writing {split} {number}/{len(bounds) - 1}")
            for number, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True), start=1)
        ]

    def _rows(self, tokens: np.ndarray, start: int, stop: int, title: str) -> Iterator[tuple[int, dict]]:
        length = self._sequence_length
        rows = range(start, stop)
        for row in shown(rows, lambda row: row + 1 - start, len(rows), " rows", title, self._progress):
            yield row, {"tokens": tokens[row * length : (row + 1) * length + 1]}

    def _log_download_bytes(self) -> None:
        """Nothing is downloaded; TFDS prints here."""

    def _log_download_done(self) -> None:
        """TFDS would name the temporary directory here."""


class PythonStdlib(PackedText):
    """The dataset `python_stdlib`: the running interpreter's standard library, packed."""


class TextFiles(PackedText):
    """The dataset `text_files`: plain text, jsonl and parquet files, packed."""


class HostedText(PackedText):
    """The dataset `hosted_text`: the train split of any hosted TFDS dataset of texts, packed."""


class Chat(PackedText):
    """The dataset `chat`: samples of conversations, packed; tokens are marked as in dsjax.data.marks."""


BUILDERS = {builder.name: builder for builder in (PythonStdlib, TextFiles, HostedText, Chat)}
# What a killed process leaves, with the eight characters of `tempfile`, and nothing else: others keep hidden
# directories too, and this one may be somebody's home.
LEFTOVER = re.compile(rf"\.({'|'.join(BUILDERS)})-[0-9a-f]{{{DIGITS}}}(-[a-z0-9_]{{8}}|{DELETED}\d+)")


def prepare(data: DataConfig, progress: bool = True) -> list[Prepared]:
    """One Prepared per source of `data`; what is on disk for these options and this text is reused.

    `progress` shows an updating line on a terminal and a line now and then elsewhere, on standard error. Any number
    of processes may prepare the same thing at once: each works in a directory of its own, the first to finish
    renames it into place, the others use that. Raises ConfigError where a source, the tokenizer or an option cannot
    be used.
    """
    check(data)
    tokens = tokenizer.load(data.tokenizer)
    if data.fim_rate > 0 and tokens.fim_ids is None and not data.is_chat:
        raise ConfigError(
            f"the tokenizer {data.tokenizer!r} has no fill-in-the-middle tokens; set --config.data.fim_rate=0"
        )
    root = Path(data.directory or "~/.cache/dsjax/data").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the data directory {root} cannot be made ({error.strerror}); set --config.data.directory"
        ) from error
    _remove_stale(root)
    template = find_template(data.tokenizer) if data.is_chat else None
    return [
        _prepare_source(sources.find(name, data.text_key), tokens, template, data, root, progress)
        for name in data.sources
    ]


def check(data: DataConfig) -> None:
    """Raises ConfigError for sources, weights, rates or a length that cannot be."""
    for problem in data_problems(data):
        raise ConfigError(problem)


def summary(prepared: Prepared) -> str:
    """What was prepared, for the console: sizes of both splits, place, and what was skipped."""
    manifest = prepared.manifest
    parts = [
        f"{split} {counts['tokens']:,} tokens in {counts['rows']:,} rows ({_inside(counts)})"
        for split, counts in manifest["splits"].items()
    ]
    lines = [f"{manifest['source']}: {'; '.join(parts)}", f"  in {prepared.directory}"]
    if manifest["validation_is_tail"]:
        lines.append("  too few documents to hold out whole ones: validation is the end of the token stream")
    lines += [f"  skipped {line}" for line in told(manifest["skipped"])]
    return "\n".join(lines)


def _inside(counts: dict[str, int]) -> str:
    """What the rows of a split hold, for the console."""
    documents = f"{counts['documents']:,} documents"
    if "samples" not in counts:
        return documents
    full = 1 - counts["padding"] / (counts["tokens"] - 1)
    return f"{documents}, {counts['samples']:,} samples, {counts['answers']:,} tokens of answers, {full:.1%} full"


def _prepare_source(
    source: Source, tokens: Tokenizer, template: Template | None, data: DataConfig, root: Path, progress: bool
) -> Prepared:
    options = {
        "format": FORMAT,
        "tokenizer": tokens.fingerprint,
        "sequence_length": data.sequence_length,
        "validation_fraction": data.validation_fraction,
    }
    if data.is_chat:
        options["chat_template"] = template and {"source": template.source, **template.names}
    else:
        options["fim_rate"] = data.fim_rate
    digest = _digest(options, source.identity)
    directory = root / f"{source.kind}-{digest[:DIGITS]}"
    if directory.exists():
        return _existing(directory, digest)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=root))
    try:
        skipped = Skipped()
        documents = source.read(skipped)
        watched = shown(documents, lambda document: document.done, source.size, source.unit, source.title, progress)
        if data.is_chat:
            packed = pack_samples(watched, tokens, template, data, work, skipped)
        else:
            packed = pack(watched, tokens, data, work)
        splits = _usable_splits(packed, source, skipped, data)
        builder = BUILDERS[source.kind](splits, data.sequence_length, progress, work)
        builder.download_and_prepare()
        manifest = {
            "digest": digest,
            "fingerprint": _digest(options, packed.content),
            "source": source.title,
            "content": packed.content,
            "options": options,
            "vocab_size": tokens.vocab_size,
            "validation_is_tail": packed.validation_is_tail,
            "splits": {name: stream.counts(data.sequence_length) for name, stream in splits.items()},
            "skipped": skipped.as_json(),
            "files": {path.name: path.stat().st_size for path in sorted(Path(builder.data_path).iterdir())},
        }
        Path(builder.data_path, MANIFEST).write_text(json.dumps(manifest, indent=1))
        try:
            os.rename(builder.data_path, directory)
        except OSError:
            if not directory.exists():
                raise
            # Another process was first, and its result is the same.
        return _existing(directory, digest)
    except (OSError, RuntimeError) as error:  # on a full disk NumPy raises the former, array_record the latter
        reason = getattr(error, "strerror", None) or str(error).partition(";")[0]
        raise ConfigError(
            f"{source.title} cannot be prepared in {root} ({reason}); look at the space and rights there, or set "
            "--config.data.directory"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _existing(directory: Path, digest: str) -> Prepared:
    """The prepared source in `directory`, whose manifest is written last and renamed with it."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        for counts in manifest["splits"].values():
            counts.setdefault("answers", counts["tokens"])  # of text, written before there were samples
        if manifest["digest"] == digest and _is_whole(manifest):
            return Prepared(directory, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ConfigError(f"{directory} is not a complete prepared source; delete it and run `dsjax prepare` again")


def _is_whole(manifest: dict[str, Any]) -> bool:
    """Whether everything is there that is read of a manifest, and no file lies outside its directory.

    May raise KeyError, TypeError or AttributeError where it is not.
    """
    splits, skipped = manifest["splits"], manifest["skipped"]
    own = ("tokens", "documents", "bytes", "rows", "answers")
    counts = [count[name] for count in splits.values() for name in own]
    counts += [count[name] for count in splits.values() if "samples" in count for name in ("samples", "padding")]
    counts += [item["count"] for item in skipped.values()] + list(manifest["files"].values())
    counts += [manifest["vocab_size"], manifest["options"]["sequence_length"]]
    texts = [manifest["fingerprint"], manifest["source"], *(one for item in skipped.values() for one in item["first"])]
    return (
        "train" in splits
        and all(type(count) is int and count >= 0 for count in counts)
        and all(count["tokens"] > 1 and count["rows"] > 0 and count["answers"] > 0 for count in splits.values())
        and all(isinstance(text, str) for text in texts)
        and isinstance(manifest["validation_is_tail"], bool)
        and all(Path(name).name == name for name in manifest["files"])
    )


def _usable_splits(packed: Packed, source: Source, skipped: Skipped, data: DataConfig) -> dict[str, Stream]:
    """The splits that have rows; refuses a source without documents or without a row to train on."""
    if not packed.train.documents + packed.validation.documents:
        where = "data.sequence_length for long answers" if data.is_chat else "data.text_key for records"
        raise ConfigError(
            f"{source.title} has no document to train on, skipped {'; '.join(told(skipped.as_json()))}; "
            f"look at the files, and at --config.{where}"
        )
    if not packed.train.rows(data.sequence_length):
        raise ConfigError(
            f"{source.title} has {packed.train.tokens} tokens to train on, fewer than one row of "
            f"{data.sequence_length + 1}; give more text or a smaller --config.data.sequence_length"
        )
    both = {"train": packed.train, "validation": packed.validation}
    return {name: stream for name, stream in both.items() if stream.rows(data.sequence_length)}


def _digest(options: dict[str, Any], content: str) -> str:
    return hashlib.sha256(json.dumps([options, content], sort_keys=True).encode()).hexdigest()


def _remove_stale(root: Path) -> None:
    """Deletes what killed runs left behind: unfinished directories in which no file changed for a day."""
    for work in root.glob(".*-*-*"):
        if not LEFTOVER.fullmatch(work.name):
            continue
        with contextlib.suppress(OSError):  # its owner finished meanwhile
            changed = max(path.stat().st_mtime for path in (work, *work.rglob("*")))
            if time.time() - changed > STALE_SECONDS:
                shutil.rmtree(work, ignore_errors=True)
