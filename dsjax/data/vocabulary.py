"""Learning a tokenizer: byte-level BPE over the documents that a config trains on, by the `tokenizers` library."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dsjax.config import ConfigError, DataConfig
from dsjax.data import sources
from dsjax.data.packing import draws
from dsjax.data.prepare import check
from dsjax.data.progress import shown
from dsjax.data.sources import Skipped, told
from dsjax.data.tokenizer import EOS_NAMES, FIM_NAMES, NAMES, import_tokenizers

SPECIAL = (EOS_NAMES[0], *FIM_NAMES[0])  # DeepSeek's names
SMALLEST = 256 + len(SPECIAL)  # a token for each byte
LARGEST = 1 << 20  # the library takes memory for all of them at once, and ends the process where there is none


def learn(data: DataConfig, vocab_size: int, progress: bool = True) -> str:
    """Writes a tokenizer.json to `data.tokenizer`, learnt from the documents of `data.sources`, and tells about it.

    Documents held out for validation are not read: what is measured on them stays a measure of unseen text. Text is
    cut into words, numbers and runs of blanks as GPT-2 cuts it, and the pairs that stand together most often within
    these are merged until there are `vocab_size` tokens, special ones included, or nothing is left to merge.

    Raises:
      ConfigError: `data.tokenizer` is no new file that ends in .json, the sources hold conversations or no text, the
        vocabulary is too small for all bytes, or the package `tokenizers` is missing.
    """
    check(data)
    path = _place(data)
    if data.is_chat:
        raise ConfigError("a tokenizer is learnt from texts, not from conversations; set --config.data.sources")
    if not SMALLEST <= vocab_size <= LARGEST:
        raise ConfigError(
            f"model.vocab_size is {vocab_size}, but a tokenizer has {SMALLEST} (bytes and special tokens) to "
            f"{LARGEST:,} tokens; set --config.model.vocab_size=4096 for one"
        )
    library = import_tokenizers()
    learnt = library.Tokenizer(library.models.BPE())
    learnt.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress and sys.stderr.isatty(),
    )
    read = _Read()
    found = [sources.find(name, data.text_key) for name in data.sources]
    learnt.train_from_iterator(_texts(found, data, read, progress), trainer)
    lines = [f"skipped {line}" for line in told(read.skipped.as_json())]
    if not read.documents:
        raise ConfigError(
            f"{', '.join(data.sources)}: no text to learn from{''.join(f', {line}' for line in lines)}; look at the "
            "files, and at --config.data.text_key for records"
        )
    _write(learnt, path)
    size = learnt.get_vocab_size()
    fewer = f" and no more pairs to merge for {vocab_size:,}" if size < vocab_size else ""
    summary = f"{path}: {size:,} tokens{fewer}, documents: {read.documents:,}, bytes: {read.bytes:,}"
    return "\n  ".join([summary, *lines])


@dataclass
class _Read:
    """What was learnt from, and what was not."""

    documents: int = 0
    bytes: int = 0
    skipped: Skipped = field(default_factory=Skipped)


def _place(data: DataConfig) -> Path:
    """Where the tokenizer goes; a file that is there is never written over, since runs may depend on it."""
    path = Path(data.tokenizer).expanduser()
    if data.tokenizer in NAMES or path.suffix != ".json":
        raise ConfigError(
            f"data.tokenizer is {data.tokenizer!r}, but must say where the new tokenizer goes; set "
            "--config.data.tokenizer=tokenizer.json for one"
        )
    if path.exists():
        raise ConfigError(f"{path} exists; delete it, or name another file by --config.data.tokenizer")
    return path


def _texts(found: list[sources.Source], data: DataConfig, read: _Read, progress: bool) -> Iterator[str]:
    """The texts to learn from, counted."""
    for source in found:
        documents = source.read(read.skipped)
        for document in shown(documents, lambda one: one.done, source.size, source.unit, source.title, progress):
            utf8 = document.text.encode()
            if draws(utf8)[0] >= data.validation_fraction:
                read.documents += 1
                read.bytes += len(utf8)
                yield document.text


def _write(learnt, path: Path) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(learnt.to_str(pretty=True), encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); name another file by --config.data.tokenizer"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
