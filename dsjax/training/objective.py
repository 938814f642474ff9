"""What a step descends: next-token prediction with MTP and balance losses, on running text or on answers."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.config import Config
from dsjax.data import marks
from dsjax.model.losses import cross_entropy
from dsjax.model.moe import Execution, RoutingStats
from dsjax.model.transformer import Network
from dsjax.planning.traffic import journey_bytes

Metrics = dict[str, jax.Array]
# (params, router_bias, microbatch, hyperparameters) -> (loss to descend, metrics). Loss and metrics of a step are the
# means over its microbatches, each counted by its metric "weight" where there is one, as where microbatches have
# unequal numbers of answers; those in TOTALS are totals.
LossFn = Callable[[Any, Any, Any, Mapping[str, jax.Array]], tuple[jax.Array, Metrics]]
TOTALS = ("expert_load", "dropped_tokens", "dispatch_bytes", "dispatch_bytes_in_node", "weight")


class Targets(NamedTuple):
    """The rows of a batch as the loss takes them; labels are the tokens after each position."""

    inputs_BT: jax.Array
    labels_BT: jax.Array
    first_BT: jax.Array | None  # where each token's sample begins; None: where its row does
    weights_BT: jax.Array  # of each label: 1, or 0 where its prediction is not trained
    mtp_weights_BT: jax.Array  # of the label after it, which MTP predicts
    total: jax.Array | int  # sums of these weights
    mtp_total: jax.Array | int


def read_targets(rows_BT: jax.Array, has_samples: bool) -> Targets:
    """Rows [B, T + 1] of running text, or of samples with answers as data/marks.py writes them."""
    inputs_BT, labels_BT = rows_BT[:, :-1], rows_BT[:, 1:]
    if not has_samples:
        ones_BT = jnp.ones(labels_BT.shape, jnp.float32)
        rows, length = labels_BT.shape
        # Position i predicts token i + 2 by MTP; the last position has no such token.
        return Targets(
            inputs_BT, labels_BT, None, ones_BT, ones_BT.at[:, -1].set(0), rows * length, rows * max(length - 1, 1)
        )
    begins_BT = marks.begins(rows_BT)
    places_T = jnp.arange(inputs_BT.shape[1], dtype=jnp.int32)
    first_BT = lax.cummax(jnp.where(begins_BT[:, :-1], places_T, 0), axis=1)
    weights_BT = marks.is_answer(labels_BT).astype(jnp.float32)
    is_same_BT = ~begins_BT[:, 1:-1] & ~begins_BT[:, 2:]
    mtp_weights_BT = jnp.pad(weights_BT[:, 1:] * is_same_BT, ((0, 0), (0, 1)))
    tokens = (marks.token_of(inputs_BT), marks.token_of(labels_BT))
    return Targets(*tokens, first_BT, weights_BT, mtp_weights_BT, jnp.sum(weights_BT), jnp.sum(mtp_weights_BT))


def language_model_loss(net: Network, config: Config) -> LossFn:
    """Mean next-token loss + mtp_loss_weight * mean MTP loss + balance losses [V3 eq. 17, 24].

    Where rows hold samples, the means are over the tokens of answers. Several microbatches count by their answers, in
    MTP's mean too, which a sample's first answers have no part in.
    """
    chunk, execution, has_samples = config.training.loss_chunk_size, net.execution, config.data.is_chat

    def loss_fn(params, router_bias, rows_BT, hyperparameters):
        model = net.bind(params, router_bias)
        read = read_targets(rows_BT, has_samples)
        out = model(read.inputs_BT, read.labels_BT, read.first_BT)

        def mean_loss(hidden_BTD, labels_BT, weights_BT, total):
            weights_BT = weights_BT / jnp.maximum(total, 1)
            return cross_entropy(
                hidden_BTD, model.head_DV, labels_BT, weights_BT, execution.mesh, execution.recipe, chunk
            )

        with jax.named_scope("loss"):
            loss = mean_loss(out.hidden_BTD, read.labels_BT, read.weights_BT, read.total)
            mtp_loss = jnp.float32(0)
            if out.mtp_hidden_BTD is not None:
                second_BT = jnp.roll(read.labels_BT, -1, axis=1)
                mtp_loss = mean_loss(out.mtp_hidden_BTD, second_BT, read.mtp_weights_BT, read.mtp_total)
        whole = loss + hyperparameters["mtp_loss_weight"] * mtp_loss
        metrics = {"loss": loss, "mtp_loss": mtp_loss}
        if has_samples:
            metrics["weight"] = jnp.asarray(read.total)
        if out.stats_L is not None:
            whole += jnp.sum(out.stats_L.balance_loss)
            metrics |= routing_metrics(out.stats_L, config, execution)
        return whole, metrics

    return loss_fn


def routing_metrics(stats_L: RoutingStats, config: Config, execution: Execution) -> Metrics:
    """What the routers did in a microbatch."""
    journey = journey_bytes(config.model, config.precision, config.training.remat)
    bytes_per_copy = journey / execution.mesh.size  # of a device, on average
    return {
        "balance_loss": jnp.mean(stats_L.balance_loss),
        "expert_load": stats_L.load_E,
        "dropped_tokens": jnp.sum(stats_L.dropped),
        "dispatch_rounds": jnp.max(stats_L.rounds),
        "dispatch_bytes": jnp.sum(stats_L.far) * bytes_per_copy,
        "dispatch_bytes_in_node": jnp.sum(stats_L.near) * bytes_per_copy,
    }


def counted(result: tuple[jax.Array, Metrics]) -> tuple[jax.Array, Metrics]:
    """Loss and metrics of a microbatch, times its weight where it has one."""
    loss, metrics = result
    weight = metrics.get("weight")
    if weight is None:
        return result
    return loss * weight, {name: value if name in TOTALS else value * weight for name, value in metrics.items()}
