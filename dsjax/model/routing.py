"""Which experts a token goes to [V2 §2.1.2; V3 §2.1.2], all of it in FP32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.config import ModelConfig

WEIGHT_SUM_GUARD = 1e-20  # under the sum that normalises the chosen weights, as in DeepSeek's code


class Choice(NamedTuple):
    """A router's decision for each token."""

    experts_BTK: jax.Array  # int32
    weights_BTK: jax.Array  # FP32, normalised and scaled
    scores_BTE: jax.Array  # FP32, unbiased


def route(
    logits_BTE: jax.Array, bias_E: jax.Array | None, config: ModelConfig, given_BTK: jax.Array | None = None
) -> Choice:
    """Chooses num_experts_per_tok experts for each token.

    Args:
      logits_BTE: FP32.
      bias_E: the load-balancing bias of "noaux_tc"; it takes part in choosing only, never in the weights.
      config: scoring_func, topk_method, groups, normalisation and scaling.
      given_BTK: experts that were chosen before and are kept, as those of a rollout [V3.2]; -1: choose. Their weights
        are what the scores are now.
    """
    sigmoid = config.scoring_func == "sigmoid"
    scores_BTE = jax.nn.sigmoid(logits_BTE) if sigmoid else jax.nn.softmax(logits_BTE, axis=-1)
    ranking_BTE = lax.stop_gradient(scores_BTE if bias_E is None else scores_BTE + bias_E[None, None])
    if config.topk_method != "greedy" and config.n_group > 1:
        ranking_BTE = _keep_best_groups(ranking_BTE, config)
    experts_BTK = lax.top_k(ranking_BTE, config.num_experts_per_tok)[1]
    if given_BTK is not None:
        experts_BTK = jnp.where(given_BTK >= 0, given_BTK, experts_BTK)
    weights_BTK = jnp.take_along_axis(scores_BTE, experts_BTK, axis=-1)
    if config.norm_topk_prob:
        weights_BTK = _normalised(weights_BTK)
    return Choice(experts_BTK, weights_BTK * config.routed_scaling_factor, scores_BTE)


def _normalised(scores: jax.Array) -> jax.Array:
    """Scores over their sum and the guard, along the last dimension.

    Brought near 1 first: the derivative squares the sum, which FP32 cannot hold below 1e-19.
    """
    top = lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), WEIGHT_SUM_GUARD))
    scores = scores / top
    return scores / (jnp.sum(scores, axis=-1, keepdims=True) + WEIGHT_SUM_GUARD / top)


def _keep_best_groups(ranking_BTE: jax.Array, config: ModelConfig) -> jax.Array:
    """Minus infinity outside each token's best groups: V3 ranks a group by its best two, V2 by its best."""
    grouped = ranking_BTE.reshape(*ranking_BTE.shape[:-1], config.n_group, -1)
    voters = 2 if config.topk_method == "noaux_tc" else 1
    group_scores_BTG = jnp.sum(lax.top_k(grouped, voters)[0], axis=-1)
    best_BTG = lax.top_k(group_scores_BTG, config.topk_group)[1]
    kept_BTG = jnp.any(jax.nn.one_hot(best_BTG, config.n_group, dtype=bool), axis=-2)
    return jnp.where(kept_BTG[..., None], grouped, -jnp.inf).reshape(ranking_BTE.shape)


def sequence_balance_loss(choice: Choice, config: ModelConfig) -> jax.Array:
    """The sequence-wise balance loss of each sequence, [B], times aux_loss_alpha [V3 eq. 17-20; V2 §2.2.3].

    It equals aux_loss_alpha at perfect balance. As in the reports, the frequency counts the experts that V2's tokens go
    to, and for V3 the top-K of the unbiased scores, so that neither routing bias nor groups hide an imbalance from it.
    """
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    scores_BTE, picked_BTK = choice.scores_BTE, choice.experts_BTK
    if config.topk_method == "noaux_tc":
        picked_BTK = lax.top_k(lax.stop_gradient(scores_BTE), chosen)[1]
    picks_BE = jnp.sum(jax.nn.one_hot(picked_BTK, experts), axis=(1, 2))
    frequency_BE = picks_BE * experts / (chosen * scores_BTE.shape[1])
    share_BE = jnp.mean(_normalised(scores_BTE), axis=1)
    return config.aux_loss_alpha * jnp.sum(frequency_BE * share_BE, axis=-1)


def update_bias(bias_LE: jax.Array, load_LE: jax.Array, speed: jax.Array) -> jax.Array:
    """The bias after a step: up for experts below the mean load, down for those above [V3 §2.1.2].

    Args:
      bias_LE: FP32.
      load_LE: assignments to each expert over the whole global batch.
      speed: gamma.
    """
    return bias_LE + speed * jnp.sign(jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE)
