"""The batches of a run in their order, each read while the one before is used."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh

from dsjax.config import Config
from dsjax.data.loader import Loader
from dsjax.training.divergence import place
from dsjax.training.resume import Position
from dsjax.training.schedule import Schedule
from dsjax.training.step import place_batch


def batches(
    config: Config, mesh: Mesh, loader: Loader, schedule: Schedule, start: Position
) -> Iterator[tuple[jax.Array, int]]:
    """The batches from `start` to the end of the run, each with its number of sequences.

    The next one is read and placed in a thread while the current one is used. A batch has the shape of the largest;
    what a smaller one leaves over is zero and not read.
    """
    shape = batch_shape(config)

    def load(sequences: int, size: int) -> jax.Array:
        def rows(indices: range) -> np.ndarray:
            chosen = [place(sequences + index, start.skips) for index in indices if index < size]
            found = loader.rows(chosen)
            return np.pad(found, ((0, len(indices) - len(found)), (0, 0)))

        return place_batch(rows, shape, mesh)

    sequences, size = start.sequences, schedule.batch_size(start.sequences)
    with ThreadPoolExecutor(1, "batches") as thread:
        following = thread.submit(load, sequences, size)
        for _ in range(start.step, config.training.total_steps):
            tokens, tokens_size = following.result(), size
            sequences += size
            size = schedule.batch_size(sequences)
            following = thread.submit(load, sequences, size)
            yield tokens, tokens_size


def batch_shape(config: Config) -> tuple[int, int, int]:
    """[microbatches, sequences, tokens] of the largest batch."""
    size = config.training.sequences_per_microbatch
    return config.training.batch_size // size, size, config.data.sequence_length + 1
