"""The validation loss of a state, on rows that never change."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsjax.config import Config, ConfigError
from dsjax.data.loader import Loader
from dsjax.data.prepare import Prepared
from dsjax.planning.layout import with_fitting_chunks
from dsjax.training.state import TrainState
from dsjax.training.step import evaluate_step, place_batch


def make_validation(config: Config, mesh: Mesh, prepared: list[Prepared]) -> Callable[[TrainState], dict[str, float]]:
    """A function that measures a state on `evaluation.sequences` rows, the same ones whatever the training seed.

    Its result are fields of a row of metrics.jsonl: nats per token, and nats per byte of the text that a token stands
    for. Where the split has fewer rows, all of them are read, and as many twice as fill the last batch.
    """
    loader = Loader(prepared, config.data, seed=0, split="validation")
    size = math.gcd(config.evaluation.sequences, config.training.sequences_per_microbatch)
    evaluate = evaluate_step(with_fitting_chunks(config, size, mesh.size), mesh)

    def place(start: int) -> jax.Array:
        rows = lambda indices: loader.rows([start + index for index in indices])  # noqa: E731
        return place_batch(rows, (size, config.data.sequence_length + 1), mesh)

    sequences = min(config.evaluation.sequences, -(-loader.num_rows // size) * size)
    parts = [place(start) for start in range(0, sequences, size)]

    def validate(state: TrainState) -> dict[str, float]:
        # Each is waited for: on CPU, two programs in flight would wait for each other's processes.
        measured = [jax.device_get(evaluate(state, tokens)) for tokens in parts]
        weights = [float(one.get("weight", 1)) for one in measured]
        if not any(weights):
            raise ConfigError("the validation rows hold no answer; raise --config.evaluation.sequences")
        loss, mtp_loss = (
            float(np.average([one[name] for one in measured], weights=weights)) for name in ("loss", "mtp_loss")
        )
        row = {"validation_loss": loss, "validation_nats_per_byte": loss / loader.bytes_per_token}
        return row | ({"validation_mtp_loss": mtp_loss} if config.model.num_nextn_predict_layers else {})

    return validate


def validation_line(row: dict[str, Any]) -> str:
    return (
        f"validation loss {row['validation_loss']:.4f} nats per token, "
        f"{row['validation_nats_per_byte']:.4f} nats per byte"
    )
