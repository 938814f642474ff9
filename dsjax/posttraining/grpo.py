"""Group relative policy optimization: the objective [V3 §5.2.2, eq. 26-28], and the corrections of V3.2.

Several samples of one question are each other's baseline; there is no critic. Samples share rows as data/marks.py says;
a sample's completion is its answer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import Config, GRPOConfig
from dsjax.model.losses import token_log_probs
from dsjax.model.transformer import Network
from dsjax.training.objective import LossFn, Metrics, Targets, read_targets, routing_metrics


class Experience(NamedTuple):
    """Rows of samples and what was found of them, as a batch of the train step takes them; all FP32 but the rows."""

    rows_BT: Any  # int32 [B, T + 1], as of data/marks.py
    advantages_BT: Any  # of each label's sample
    old_BT: Any  # log-probability of each label by the policy that drew it
    reference_BT: Any  # and by the reference policy
    kept_BTW: Any = None  # what it was drawn from, as model/losses.py packs it; None: everything
    routes_BTLK: Any = None  # int32, the experts that each token goes to, -1: as its router chooses; None: all so


def advantages(rewards: Sequence[float]) -> tuple[np.ndarray, bool]:
    """(each sample's advantage over its group, whether rewards differ): (r - mean) / std [V3 eq. 28].

    The standard deviation is the population's. Where all rewards are equal there is nothing to prefer: all zero.
    """
    r = np.asarray(rewards, np.float64)
    # By range: the deviation of equal numbers may come out as rounding, and a quotient of that as 1.
    if r.max() - r.min() <= 1e-12 * max(1.0, np.abs(r).max()):
        return np.zeros(len(r), np.float32), False
    return ((r - r.mean()) / r.std()).astype(np.float32), True


def within_samples(values_BT: jax.Array, read: Targets) -> jax.Array:
    """At each label of an answer, the sum of `values` over that answer; 0 elsewhere."""
    assert read.first_BT is not None

    def one_row(values_T: jax.Array, first_T: jax.Array) -> jax.Array:
        return jnp.zeros_like(values_T).at[first_T].add(values_T)[first_T]

    return read.weights_BT * jax.vmap(one_row)(read.weights_BT * values_BT, read.first_BT)


def objective(
    log_prob_BT: jax.Array, experience: Experience, read: Targets, config: GRPOConfig
) -> tuple[jax.Array, Metrics]:
    """(what is to be made small, metrics): minus the mean over samples of eq. 26's terms.

    With `ratio` "token" a sample's term is the mean over its tokens, of ratios of single tokens (as DeepSeekMath and
    V3.2 write it); with "sequence" it is that of the whole sample's ratio, as eq. 26 prints it.
    """
    is_answer_BT, zero = read.weights_BT > 0, jnp.float32(0)
    length_BT = jnp.maximum(within_samples(jnp.ones_like(log_prob_BT), read), 1)
    share_BT = read.weights_BT / length_BT  # sums to 1 over a sample
    count = jnp.sum(share_BT)
    # Elsewhere log-probabilities are of no sample; zeros keep their gradient finite.
    log_ratio_BT = jnp.where(is_answer_BT, log_prob_BT - experience.old_BT, zero)
    to_reference_BT = jnp.where(is_answer_BT, experience.reference_BT - log_prob_BT, zero)
    drift_BT = -within_samples(log_ratio_BT, read) / length_BT  # mean of log(old / new) over the sample
    if config.ratio == "sequence":
        log_ratio_BT, to_reference_BT = (within_samples(a, read) for a in (log_ratio_BT, to_reference_BT))
    ratio_BT = jnp.exp(log_ratio_BT)
    low, high = 1 - config.clip_epsilon, 1 + config.clip_epsilon
    gain_BT = ratio_BT * experience.advantages_BT
    clipped_BT = jnp.clip(ratio_BT, low, high) * experience.advantages_BT
    surrogate_BT = jnp.minimum(gain_BT, clipped_BT)
    masked_BT = jnp.zeros_like(is_answer_BT)
    if config.off_policy_threshold is not None:
        masked_BT = (experience.advantages_BT < 0) & (drift_BT > config.off_policy_threshold)
        surrogate_BT = jnp.where(masked_BT, zero, surrogate_BT)
    kl_BT = jnp.exp(to_reference_BT) - to_reference_BT - 1  # eq. 27
    if config.unbiased_kl:
        kl_BT *= ratio_BT

    def mean(values_BT: jax.Array) -> jax.Array:
        return jnp.sum(share_BT * values_BT) / jnp.maximum(count, 1)

    loss = -mean(surrogate_BT - config.kl_coefficient * kl_BT)
    metrics = {
        "loss": loss,
        "kl": mean(kl_BT),
        "clip_fraction": mean((clipped_BT < gain_BT).astype(jnp.float32)),
        "off_policy_fraction": mean(masked_BT.astype(jnp.float32)),
        "weight": count,
    }
    return loss, metrics


def by_layer(routes_BTLK: jax.Array | None) -> jax.Array | None:
    """[L, B, T, K], as the network takes them."""
    return None if routes_BTLK is None else jnp.moveaxis(routes_BTLK, 2, 0)


def grpo_loss(net: Network, config: Config) -> LossFn:
    """The loss of a microbatch that is an `Experience`; MTP, routing biases and balance take no part in it."""
    execution = net.execution

    def loss_fn(params, router_bias, experience, hyperparameters):
        model = net.bind(params, router_bias)
        read = read_targets(experience.rows_BT, True)
        out = model(read.inputs_BT, None, read.first_BT, by_layer(experience.routes_BTLK))
        found = token_log_probs(
            out.hidden_BTD,
            model.head_DV,
            read.labels_BT,
            execution.mesh,
            execution.recipe,
            config.training.loss_chunk_size,
            experience.kept_BTW,
        )
        loss, metrics = objective(found.log_prob_BT, experience, read, config.grpo)
        metrics["entropy"] = jnp.sum(read.weights_BT * found.entropy_BT) / jnp.maximum(read.total, 1)
        if out.stats_L is not None:
            metrics |= routing_metrics(out.stats_L, config, execution)
        return loss, metrics

    return loss_fn
