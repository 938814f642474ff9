"""dsjax eval: the perplexity of a model on the documents of a dataset."""

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dsjax.config import ConfigError
from dsjax.data import sources
from dsjax.data.sources import Skipped
from dsjax.inference.engine import Engine
from dsjax.inference.loading import load
from dsjax.inference.scoring import score
from dsjax.training.workdir import has_checkpoint, read_config

PUBLISHED_LENGTH = 2048  # context where no training says how long
GROUP = 16  # batches whose documents are in memory at once


def evaluate(
    path: str,
    data: str,
    text_key: str = "text",
    documents: int | None = None,
    sequence_length: int | None = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Nats per token and per byte, and perplexity, of a run or a published checkpoint on a source.

    Args:
      path: the directory of either.
      data: a source as in config.data.sources.
      text_key: the field of records that holds the text.
      documents: the first so many; None: all.
      sequence_length: tokens that are predicted in one piece of a document; None: as in training.
      tokenizer: as in `load`.

    Raises ConfigError for a source or a checkpoint that cannot be used, and where there is nothing to score.
    """
    source = sources.find(data, text_key)
    if source.kind == "chat":
        raise ConfigError(f"{source.title} holds conversations, but --data scores texts; name a source of texts")
    engine = load(path, tokenizer=tokenizer)
    trained = read_config(Path(path)).data.sequence_length if has_checkpoint(Path(path)) else PUBLISHED_LENGTH
    length = sequence_length or min(trained, engine.config.model.max_position_embeddings)
    if length > engine.config.model.max_position_embeddings:
        raise ConfigError(
            f"--sequence-length is {length}, but the model has max_position_embeddings ="
            f" {engine.config.model.max_position_embeddings}"
        )
    texts = (document.text for document in source.read(Skipped()))
    figures = perplexity(engine, itertools.islice(texts, documents), length)
    if not figures["tokens"]:
        raise ConfigError(f"{source.title} has no document to score")
    return {"source": source.title, "sequence_length": length, **figures}


def perplexity(engine: Engine, texts: Iterable[str], length: int) -> dict[str, Any]:
    """The same of any texts.

    A document is predicted from an end-of-document token to the next one, in pieces of `length` tokens that do not see
    each other, as rows of training do not: the first tokens of a piece are predicted with little context.
    """
    assert engine.tokenizer is not None
    loss = tokens = size = documents = 0.0
    pieces = _pieces(engine, texts, length)
    while group := list(itertools.islice(pieces, GROUP * engine.slots)):
        for result in score(engine, [piece for piece, _, _ in group], [len(piece) - 1 for piece, _, _ in group]):
            loss -= float(result.log_probs.sum())
            tokens += len(result.log_probs)
        size += sum(text_bytes for _, text_bytes, _ in group)
        documents += sum(is_last for _, _, is_last in group)
    mean = loss / tokens if tokens else math.nan
    return {
        "documents": int(documents),
        "tokens": int(tokens),
        "bytes": int(size),
        "nats_per_token": mean,
        "nats_per_byte": loss / size if size else math.nan,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
    }


def _pieces(engine: Engine, texts: Iterable[str], length: int) -> Iterator[tuple[list[int], int, bool]]:
    """(tokens of a piece and the one before it, bytes of the document if the piece is its last, whether it is)."""
    assert engine.tokenizer is not None
    for text in texts:
        eos = engine.tokenizer.eos_id
        tokens = [eos, *engine.tokenizer.encode(text), eos]
        for start in range(0, len(tokens) - 1, length):
            is_last = start + length >= len(tokens) - 1
            yield tokens[start : start + length + 1], len(text.encode()) if is_last else 0, is_last
