"""Conversations to two streams of marked tokens: every answer a sample, every sample whole within a row."""

import datetime
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from dsjax.config import ConfigError, DataConfig
from dsjax.data.chat import Refusal, Template, answered, answers
from dsjax.data.marks import BEGINS, begins, is_answer, marked
from dsjax.data.packing import Packed, Stream, draws
from dsjax.data.sources import Document, Skipped
from dsjax.data.tokenizer import Tokenizer

OPEN_ROWS = 64  # rows that still take samples, of each split
NOW = datetime.datetime(2025, 1, 1)  # for templates that tell the date: the same data whenever it is prepared


@dataclass
class SampleStream(Stream):
    """One split on disk: rows of sequence_length tokens, each of whole samples and padding, and one token of padding.

    So a row of sequence_length + 1, which shares its last token with the next, ends in a token that begins a sample
    and is never trained. Padding is end-of-document tokens, each a sample without an answer. `bytes` is the UTF-8
    text of the answers.
    """

    answers: int = 0  # trained tokens, the end of each answer included
    samples: int = 0
    padding: int = 0  # tokens within rows

    def counts(self, sequence_length: int) -> dict[str, int]:
        own = {"answers": self.answers, "samples": self.samples, "padding": self.padding}
        return super().counts(sequence_length) | own


class Sample(NamedTuple):
    tokens: np.ndarray  # int32, marked
    bytes: int  # of the answer's text


def pack_samples(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    template: Template | None,
    data: DataConfig,
    folder: Path,
    skipped: Skipped,
) -> Packed:
    """Turns conversations into samples and packs them into two streams in `folder`.

    Each answer of the assistant is a sample, with all that was said before it as its prompt. Templates rewrite earlier
    turns (R1's drops their thoughts), so only the last one stands there as the model would have written it.

    All samples of a conversation go to the same split, chosen by the hash of its text. Where none falls into
    validation, the last rows of the training stream go there instead. Samples longer than a row are skipped.

    Raises ConfigError where the samples fill one row only though validation needs another.
    """
    template = template and replace(template, now=NOW)
    train, validation = (
        SampleStream(folder / f"{name}.tokens", np.dtype(np.int32)) for name in ("train", "validation")
    )
    content = hashlib.sha256()
    with open(train.path, "wb") as train_file, open(validation.path, "wb") as validation_file:
        pad = tokenizer.eos_id | BEGINS
        packers = [
            _Packer(stream, file, data.sequence_length, pad)
            for stream, file in ((train, train_file), (validation, validation_file))
        ]
        for document in documents:
            utf8 = document.text.encode()
            packer = packers[draws(utf8)[0] < data.validation_fraction]
            samples = list(_samples(document, tokenizer, template, data.sequence_length, skipped))
            for sample in samples:
                packer.add(sample)
            if samples:
                content.update(hashlib.sha256(utf8).digest())
                packer.stream.documents += 1
        for packer in packers:
            packer.finish()
    if not train.tokens:  # the only conversation may have fallen into validation
        train, validation = validation, train
    tail = bool(train.tokens) and data.validation_fraction > 0 and not validation.tokens
    if tail:
        _move_rows(train, validation, data, pad)
    return Packed(train, validation, tail, content.hexdigest())


def _samples(
    document: Document, tokenizer: Tokenizer, template: Template | None, length: int, skipped: Skipped
) -> Iterator[Sample]:
    """Those of a conversation that fit a row of `length`."""
    for number, (before, content) in enumerate(answers(json.loads(document.text)), start=1):
        name = f"{document.name}, answer {number}"
        try:
            prompt, answer, text = answered(tokenizer, before, content, template)
        except Refusal as error:
            skipped.add(name, " ".join(str(error).split())[:160])
            continue
        needed = len(prompt) + len(answer)
        if len(answer) == 1:
            skipped.add(name, "no token in the answer")
        elif needed > length:
            skipped.add(f"{name} ({needed} tokens)", f"longer than data.sequence_length = {length}")
        else:
            yield Sample(marked(prompt, answer), len(text.encode()))


@dataclass
class _Row:
    samples: list[np.ndarray] = field(default_factory=list)
    room: int = 0


class _Packer:
    """Rows of one split; a sample goes into the fullest open one that it fits, the oldest of several."""

    def __init__(self, stream: SampleStream, file: BinaryIO, length: int, pad: int):
        self.stream = stream
        self._file, self._length = file, length
        self._pad = pad
        self._open: list[_Row] = []

    def add(self, sample: Sample) -> None:
        size = len(sample.tokens)
        row = min((row for row in self._open if row.room >= size), key=lambda row: row.room, default=None)
        if row is None:
            if len(self._open) == OPEN_ROWS:
                self._write(min(self._open, key=lambda row: row.room))
            row = _Row(room=self._length)
            self._open.append(row)
        row.samples.append(sample.tokens)
        row.room -= size
        self.stream.samples += 1
        self.stream.bytes += sample.bytes
        self.stream.answers += int(is_answer(sample.tokens).sum())
        if not row.room:
            self._write(row)

    def finish(self) -> None:
        """Writes what is open, and the token that the last row shares with none."""
        for row in list(self._open):
            self._write(row)
        if self.stream.tokens:
            np.array([self._pad], np.int32).tofile(self._file)
            self.stream.tokens += 1

    def _write(self, row: _Row) -> None:
        np.concatenate([*row.samples, np.full(row.room, self._pad, np.int32)]).tofile(self._file)
        self.stream.tokens += self._length
        self.stream.padding += row.room
        self._open = [other for other in self._open if other is not row]


def _move_rows(train: SampleStream, validation: SampleStream, data: DataConfig, pad: int) -> None:
    """Moves the last `validation_fraction` of the rows to train on, at least one, to validation."""
    length = data.sequence_length
    rows = train.rows(length)
    if rows == 1:
        raise ConfigError(
            f"{train.samples} samples fill one row of {length} tokens, but one is needed to train on and one to"
            " validate on; give more conversations or a smaller --config.data.sequence_length"
        )
    kept = (rows - max(1, int(data.validation_fraction * rows))) * length
    moved = np.array(train.read()[kept:])
    moved.tofile(validation.path)
    with open(train.path, "r+b") as file:
        file.truncate(kept * train.dtype.itemsize)
        file.seek(0, 2)
        np.array([pad], np.int32).tofile(file)
    # A pad is followed by the beginning of another sample; no real sample has but one token.
    padding = int(((moved[:-1] == pad) & begins(moved[1:])).sum())
    answer_tokens = int(is_answer(moved).sum())
    part = {
        "tokens": len(moved) - 1,
        "bytes": round(train.bytes * answer_tokens / train.answers),
        "answers": answer_tokens,
        "samples": int(begins(moved[:-1]).sum()) - padding,
        "padding": padding,
    }
    for name, count in part.items():
        setattr(train, name, getattr(train, name) - count)
        setattr(validation, name, count)
    validation.tokens += 1  # each ends in a token of padding
