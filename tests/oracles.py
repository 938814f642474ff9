"""The maths once more, written from the reports as plainly as possible and sharing nothing with the package."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import ModelConfig

# --- attention, NumPy in FP64 [V3 §2.1.1] ---


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def complex_rope(x: np.ndarray, position: int, frequencies: np.ndarray) -> np.ndarray:
    """One vector: neighbours (x[2i], x[2i+1]) are a complex number, turned by position * frequency."""
    turned = (x[0::2] + 1j * x[1::2]) * np.exp(1j * position * frequencies)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(-1)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def mla(x_TD: np.ndarray, w: dict[str, np.ndarray], config: ModelConfig, frequencies: np.ndarray, scale: float):
    """One sequence, one head and one query at a time; `w` maps published module names to [in, out] matrices."""
    heads, nope, rank = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
    if config.q_lora_rank is None:
        q = x_TD @ w["q_proj"]
    else:
        q = rms_norm(x_TD @ w["q_a_proj"], w["q_a_layernorm"], 1e-6) @ w["q_b_proj"]
    q = q.reshape(len(x_TD), heads, -1)
    a = x_TD @ w["kv_a_proj_with_mqa"]
    kv = (rms_norm(a[:, :rank], w["kv_a_layernorm"], 1e-6) @ w["kv_b_proj"]).reshape(len(x_TD), heads, -1)
    k_rope = [complex_rope(a[t, rank:], t, frequencies) for t in range(len(x_TD))]
    out = []
    for t in range(len(x_TD)):
        of_heads = []
        for h in range(heads):
            query = np.concatenate([q[t, h, :nope], complex_rope(q[t, h, nope:], t, frequencies)])
            scores = np.array([query @ np.concatenate([kv[s, h, :nope], k_rope[s]]) for s in range(t + 1)])
            of_heads.append(softmax(scores * scale) @ kv[: t + 1, h, nope:])
        out.append(np.concatenate(of_heads) @ w["o_proj"])
    return np.stack(out)


# --- routing, NumPy, one token [V3 eq. 12-16; V2 §2.1.2] ---


def route(logits_E: np.ndarray, bias_E: np.ndarray | None, config: ModelConfig) -> tuple[list[int], np.ndarray]:
    """(the chosen experts, best first; their weights)."""
    scores = 1 / (1 + np.exp(-logits_E)) if config.scoring_func == "sigmoid" else softmax(logits_E)
    ranking = scores if bias_E is None else scores + bias_E
    chosen = choose(ranking, config)
    weights = scores[chosen]
    if config.norm_topk_prob:
        weights = weights / (weights.sum() + 1e-20)
    return chosen, weights * config.routed_scaling_factor


def choose(ranking: np.ndarray, config: ModelConfig) -> list[int]:
    """The chosen experts, best first, of the best groups."""
    if config.n_group > 1:
        groups = ranking.reshape(config.n_group, -1)
        voters = 2 if config.topk_method == "noaux_tc" else 1
        group_scores = [sum(sorted(group, reverse=True)[:voters]) for group in groups]
        kept = best(group_scores, config.topk_group)
        ranking = np.where(np.isin(np.arange(config.n_group), kept)[:, None], groups, -np.inf).reshape(-1)
    return best(ranking, config.num_experts_per_tok)


def best(values: Any, count: int) -> list[int]:
    """Indices of the largest values, the lowest index first among equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def balance_loss(scores_TE: np.ndarray, config: ModelConfig) -> float:
    """One sequence: V3 counts the best scores [V3 eq. 17-20], V2 where the token goes [V2 section 2.2.3]."""
    length, experts = scores_TE.shape
    in_groups = config.topk_method == "group_limited_greedy"
    picks = [choose(scores, config) if in_groups else best(scores, config.num_experts_per_tok) for scores in scores_TE]
    total = 0.0
    for i in range(experts):
        hits = sum(i in pick for pick in picks)
        frequency = experts / (config.num_experts_per_tok * length) * hits
        share = np.mean([scores_TE[t, i] / scores_TE[t].sum() for t in range(length)])
        total += frequency * share
    return config.aux_loss_alpha * total


# --- mixture of experts, dense: every expert on every token, differentiable ---


def dense_experts(x_BTD, router_DE, bias_E, gate_EDF, up_EDF, down_EFD, config: ModelConfig):
    """(y, balance loss, load) without dispatch: what routed experts must equal, with every gradient."""
    logits = jnp.einsum("btd,de->bte", x_BTD, router_DE)
    scores = jax.nn.sigmoid(logits) if config.scoring_func == "sigmoid" else jax.nn.softmax(logits)
    ranking = scores if bias_E is None else scores + bias_E[None, None]
    if config.n_group > 1:
        grouped = ranking.reshape(*ranking.shape[:2], config.n_group, -1)
        top = jnp.sort(grouped, axis=-1)[..., ::-1]
        group_scores = top[..., :2].sum(-1) if config.topk_method == "noaux_tc" else top[..., 0]
        kept = among_best(group_scores, config.topk_group)
        ranking = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(ranking.shape)
    chosen = among_best(ranking, config.num_experts_per_tok)
    weights = jnp.where(chosen, scores, 0)
    if config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdims=True)
    weights = weights * config.routed_scaling_factor
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x_BTD, gate_EDF)) * jnp.einsum("btd,edf->btef", x_BTD, up_EDF)
    y = jnp.einsum("bte,btef,efd->btd", weights, hidden, down_EFD)
    picks = among_best(scores, config.num_experts_per_tok) if config.topk_method == "noaux_tc" else chosen
    frequency = picks.mean(1) * config.n_routed_experts / config.num_experts_per_tok
    share = (scores / scores.sum(-1, keepdims=True)).mean(1)
    return y, config.aux_loss_alpha * (frequency * share).sum(-1).mean(), chosen.sum((0, 1))


def among_best(values, count: int):
    """Whether each value is among the `count` largest of its row, the lower index first among equals."""
    order = jnp.argsort(-values, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < count


# --- optimizer, NumPy ---


def adamw(p, gradients: list, *, rate, b1, b2, eps, decay):
    """A parameter after one step for each of its gradients."""
    m = v = np.zeros_like(p)
    for step, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - rate * (m / (1 - b1**step) / (np.sqrt(v / (1 - b2**step)) + eps) + decay * p)
    return p
