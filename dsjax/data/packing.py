"""Documents to two streams of token ids: rearranged for fill-in-the-middle, split by hash, joined without masks."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsjax.config import ConfigError, DataConfig
from dsjax.data.sources import Document
from dsjax.data.tokenizer import Tokenizer

SALT = b"dsjax data 1"
BATCH_DOCUMENTS = 256  # encoded together
BATCH_CHARS = 1 << 20


@dataclass
class Stream:
    """One split on disk: `eos, document, eos, document, eos, ...` as raw integers in `path`.

    `bytes` is the UTF-8 text the tokens stand for.
    """

    path: Path
    dtype: np.dtype
    tokens: int = 0
    documents: int = 0
    bytes: int = 0

    def read(self) -> np.ndarray:
        """The tokens, mapped from disk, not loaded."""
        if not self.tokens:
            return np.zeros(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r", shape=(self.tokens,))

    def rows(self, sequence_length: int) -> int:
        """Rows of sequence_length + 1 tokens; the last token of one is the first of the next."""
        return max(0, self.tokens - 1) // sequence_length

    def counts(self, sequence_length: int) -> dict[str, int]:
        """What the manifest says of it; `answers` are the tokens whose prediction is trained, here all of them."""
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "answers": self.tokens,
            "rows": self.rows(sequence_length),
        }


@dataclass(frozen=True)
class Packed:
    """Both splits of a source, and the hash of everything that was read, in order."""

    train: Stream
    validation: Stream
    validation_is_tail: bool  # too few documents to hold out whole ones
    content: str


def draws(utf8: bytes) -> tuple[float, float, float, float]:
    """Four numbers in [0, 1), uniform over documents, that depend on nothing but the document's bytes.

    They decide its split, whether it is rearranged, and the two places where it is cut.
    """
    digest = hashlib.sha256(SALT + utf8).digest()
    first, second, third, fourth = (int.from_bytes(digest[i : i + 8]) >> 11 for i in range(0, 32, 8))
    return first * 2**-53, second * 2**-53, third * 2**-53, fourth * 2**-53


def fim_pieces(text: str, cut: tuple[float, float]) -> list[str]:
    """Prefix, suffix and middle: the order of prefix-suffix-middle (PSM), as DeepSeek-V3 uses it [V3 §4.1].

    The cuts fall between characters, not tokens, so that a span may begin inside a word.
    """
    start, end = sorted(int(c * (len(text) + 1)) for c in cut)
    return [text[:start], text[end:], text[start:end]]


def join(pieces: list[np.ndarray], tokenizer: Tokenizer, dtype: np.dtype) -> np.ndarray:
    """The ids of a document from its encoded pieces, one or three: `begin prefix hole suffix end middle eos`."""
    ends = [np.array([tokenizer.eos_id], dtype)]
    if len(pieces) == 1:
        return np.concatenate([pieces[0].astype(dtype), *ends])
    marks = [np.array([mark], dtype) for mark in tokenizer.fim_ids or ()]
    marked = [part.astype(dtype) for pair in zip(marks, pieces, strict=True) for part in pair]
    return np.concatenate(marked + ends)


def pack(documents: Iterable[Document], tokenizer: Tokenizer, data: DataConfig, folder: Path) -> Packed:
    """Encodes all documents into two streams in `folder`, holding one batch of them in memory.

    A document goes to validation when the hash of its text says so: the same text always does, and so do its copies.
    Only training documents are rearranged, so that validation loss stays that of plain text. When too few documents
    fall into validation for one row, the end of the training stream goes there instead (see `_move_tail`).
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    train = Stream(folder / "train.tokens", dtype)
    validation = Stream(folder / "validation.tokens", dtype)
    content = hashlib.sha256()
    with open(train.path, "wb") as train_file, open(validation.path, "wb") as validation_file:
        for batch in _batches(documents):
            utf8 = [document.text.encode() for document in batch]
            drawn = [draws(text) for text in utf8]
            held_out = [split < data.validation_fraction for split, *_ in drawn]
            pieces = [
                fim_pieces(document.text, (a, b)) if fim < data.fim_rate and not out else [document.text]
                for document, (_, fim, a, b), out in zip(batch, drawn, held_out, strict=True)
            ]
            ids = iter(tokenizer.encode_batch([piece for parts in pieces for piece in parts]))
            for text, parts, out in zip(utf8, pieces, held_out, strict=True):
                content.update(hashlib.sha256(text).digest())
                stream, file = (validation, validation_file) if out else (train, train_file)
                if not stream.documents:
                    np.array([tokenizer.eos_id], dtype).tofile(file)
                    stream.tokens = 1
                tokens = join([next(ids) for _ in parts], tokenizer, dtype)
                tokens.tofile(file)
                stream.tokens += len(tokens)
                stream.documents += 1
                stream.bytes += len(text)
    if validation.tokens > train.tokens and not train.rows(
        data.sequence_length
    ):  # the only document may have fallen into validation
        train, validation = validation, train
    tail = bool(train.documents) and data.validation_fraction > 0 and not validation.rows(data.sequence_length)
    if tail:
        _move_tail(train, validation, data)
    return Packed(train, validation, tail, content.hexdigest())


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _move_tail(train: Stream, validation: Stream, data: DataConfig) -> None:
    """Moves the last `validation_fraction` of the training stream, at least one row, to validation."""
    row = data.sequence_length + 1
    count = max(row, int(data.validation_fraction * train.tokens))
    if train.tokens < count + row:
        raise ConfigError(
            f"{train.tokens + validation.tokens} tokens are too few for a row of {row} to train on and one to validate "
            "on; give more text or a smaller --config.data.sequence_length"
        )
    with open(validation.path, "ab") as file:
        train.read()[-count:].tofile(file)
    with open(train.path, "r+b") as file:
        file.truncate((train.tokens - count) * train.dtype.itemsize)
    moved_bytes = round(train.bytes * count / train.tokens)
    train.tokens, validation.tokens = train.tokens - count, validation.tokens + count
    train.bytes, validation.bytes = train.bytes - moved_bytes, validation.bytes + moved_bytes
