"""Prepared rows in one infinite, shuffled, mixed order, any element at random access.

An element's row follows from its index, the seed and the prepared data alone, so the whole data state of a run is one
integer, for any number of processes.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from dsjax.config import ConfigError, DataConfig
from dsjax.data import prepare
from dsjax.data.prepare import Prepared

TFDS_FEATURES = "tensorflow_datasets.core.features."


class Loader:
    """Rows of `prepared`, mixed by `data.weights` (None: by size).

    Each source is shuffled anew in every epoch and loses no row within one; a source with a larger weight than its
    size simply starts its next epoch earlier.

    Attributes:
      num_rows: rows of all sources together, an epoch when mixed by size.
      bytes_per_token: UTF-8 bytes of text a trained token stands for, over the mixture; nats per token divided by
        it are nats per byte.
      fingerprint: changes when, for one seed, any element of the order changes.
    """

    def __init__(self, prepared: Sequence[Prepared], data: DataConfig, seed: int, split: str = "train"):
        """Raises ConfigError when files are missing, cut or of another length than the manifest says."""
        prepare.check(data)
        self._length = data.sequence_length
        self._directories = [source.directory for source in prepared]
        counts = [_split_counts(source, split) for source in prepared]
        self._records = [_open(source, split, data.sequence_length) for source in prepared]
        sizes = [count["rows"] for count in counts]
        weights = list(map(float, data.weights or sizes))
        fingerprints = [source.manifest["fingerprint"] for source in prepared]
        self._order = _order(sizes, weights, [_seed(seed, split, i, name) for i, name in enumerate(fingerprints)])
        self.num_rows = sum(sizes)
        densities = [count["bytes"] / count["answers"] for count in counts]
        # The share of a row's tokens that are trained: all of them in text, where the stream is longer than its rows.
        trained = [min(1.0, count["answers"] / (count["rows"] * self._length)) for count in counts]
        self.bytes_per_token = float(np.average(densities, weights=np.multiply(weights, trained)))
        self.fingerprint = hashlib.sha256(json.dumps([fingerprints, weights, split]).encode()).hexdigest()

    def rows(self, indices: Sequence[int]) -> np.ndarray:
        """Elements `indices` of the order, as int32 [len(indices), sequence_length + 1].

        Any index from 0 up, in any order; safe to call from several threads. Raises ConfigError for a damaged file.
        """
        picked = [self._order[int(index)] for index in indices]
        rows = np.empty((len(picked), self._length + 1), np.int32)
        for source, records in enumerate(self._records):
            places = [place for place, (origin, _) in enumerate(picked) if origin == source]
            # One call for all rows of a source: array_record reads them in parallel, outside the GIL.
            try:
                found = records.__getitems__([picked[place][1] for place in places])
                for place, record in zip(places, found, strict=True):
                    rows[place] = record["tokens"]
            except Exception as error:  # array_record and protobuf raise several types for damaged data
                raise ConfigError(
                    f"rows in {self._directories[source]} cannot be read ({error}); the files are damaged: delete that "
                    "directory and run `dsjax prepare` again"
                ) from error
        return rows


def _order(sizes: list[int], weights: list[float], seeds: list[int]):
    """The infinite order as a grain dataset of (source, row)."""
    orders = [
        grain.MapDataset.range(size).shuffle(seed=seed).repeat().map(lambda row, source=source: (source, row))
        for source, (size, seed) in enumerate(zip(sizes, seeds, strict=True))
    ]
    return grain.MapDataset.mix(orders, weights=weights) if len(orders) > 1 else orders[0]


def _seed(seed: int, split: str, place: int, fingerprint: str) -> int:
    """32 bits for grain, which adds the epoch to them: hashed, so that neighbouring seeds do not share epochs."""
    return int.from_bytes(hashlib.sha256(f"{seed} {split} {place} {fingerprint}".encode()).digest()[:4])


def _split_counts(source: Prepared, split: str) -> dict[str, int]:
    if split not in source.manifest["splits"]:
        raise ConfigError(
            f"{source.manifest['source']} was prepared without a {split} split; set --config.data.validation_fraction "
            "above 0"
        )
    return source.manifest["splits"][split]


def _open(source: Prepared, split: str, sequence_length: int):
    """The rows of one split as a TFDS data source, after comparing the files with the manifest."""
    remedy = f"delete {source.directory} and run `dsjax prepare` again"
    for name, size in source.manifest["files"].items():
        path = Path(source.directory, name)
        if not path.exists():
            raise ConfigError(f"{path} is missing; {remedy}")
        if path.stat().st_size != size:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes where its manifest says {size}; {remedy}")
    length = source.manifest["options"]["sequence_length"]
    if length != sequence_length:
        raise ConfigError(
            f"{source.directory} was prepared with a sequence_length of {length}, not {sequence_length}; "
            "run `dsjax prepare` with this configuration"
        )
    try:
        _check_classes(json.loads(Path(source.directory, "features.json").read_text(encoding="utf-8")))
        records = tfds.builder_from_directory(source.directory).as_data_source(split=split)
    except Exception as error:  # TFDS, protobuf and array_record raise many kinds
        told = " ".join(str(error).split())[:200]
        raise ConfigError(f"{source.directory} cannot be opened ({told}); {remedy}") from error
    rows = source.manifest["splits"][split]["rows"]
    if len(records) != rows:
        raise ConfigError(
            f"{source.directory} holds {len(records)} {split} rows where its manifest says {rows}; {remedy}"
        )
    return records


def _check_classes(features: Any) -> None:
    """Raises ValueError where features.json, of which TFDS imports what it names, names anything but TFDS' own."""
    for name, value in features.items() if isinstance(features, dict) else ():
        if name in ("pythonClassName", "python_class_name", "type") and not str(value).startswith(TFDS_FEATURES):
            raise ValueError(f"features.json names the class {value}")
        _check_classes(value)
