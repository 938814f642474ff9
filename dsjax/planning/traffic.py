"""What travels between expert ranks, in closed form: copies of tokens, bytes, and the form of dispatch that needs the
fewest. Integers and dataclasses only, no JAX.

A token is sent once to each rank that owns one of its experts, however many live there [V3 §3.2.2].
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from dsjax.config import ModelConfig

# Values of a token, and of its gradient, that share a scale, a byte of exponent, where they travel in E4M3
# [V3 §3.3.3]; None and other precisions: they travel in the compute dtype. See numerics/recipe.py.
TILES = {
    "fp8_deepseek": (128, 128),
    "fp8_deepseek_ue8m0": (128, 128),
    "fp8_gradient_blocks": (128, None),
    "mxfp8": (32, 32),
}
ROUTE_BYTES = 4 + 4  # an expert's number (int32) and its weight (FP32)


@dataclass(frozen=True)
class Message:
    """Bytes of one copy of one token between two ranks, in one MoE layer."""

    out: int  # to the experts, with the numbers and weights of the token's experts
    back: int  # the sum of what they made of it
    gradient_out: int  # backward: the gradient of that sum, to the experts
    gradient_back: int  # and the gradients of the token and of its weights


def message(model: ModelConfig, precision: str) -> Message:
    """The bytes of a copy under a precision of dsjax/config.py."""
    hidden, choices = model.hidden_size, model.num_experts_per_tok
    plain = hidden * (4 if precision == "fp32" else 2)
    out, gradient_out = (plain if tile is None else hidden + math.ceil(hidden / tile) for tile in _tiles(precision))
    return Message(out + ROUTE_BYTES * choices, plain, gradient_out, plain + 4 * choices)


def _tiles(precision: str) -> tuple[int | None, int | None]:
    return TILES.get(precision, (None, None))


def journey_bytes(model: ModelConfig, precision: str, remat: str) -> int:
    """All bytes of a copy in a train step, in one MoE layer; where layers are computed again, it is sent again."""
    one = message(model, precision)
    return one.out * (1 if remat == "none" else 2) + one.back + one.gradient_out + one.gradient_back


def expected_destinations(model: ModelConfig, ranks: int) -> float:
    """Distinct ranks, of `ranks` that share the experts evenly, that one token's experts live on, on average.

    Every kept set of topk_group groups and every choice of experts in it is taken to be equally likely. A token's own
    rank counts like any other. Between 1 and num_experts_per_tok; for V3 on 8 nodes at most 4.
    """
    kept = model.topk_group * (model.n_routed_experts // model.n_group)
    missed = 0.0
    for shared, ranks_alike in Counter(_shared_with_groups(model, ranks)).items():
        untouched = model.n_group - len(shared)
        for (groups, own), ways in _kept_ways(shared).items():
            if groups <= model.topk_group <= groups + untouched:
                ways *= math.comb(untouched, model.topk_group - groups)
                missed += ranks_alike * ways * _chance_of_none(kept, own, model.num_experts_per_tok)
    return ranks - missed / math.comb(model.n_group, model.topk_group)


def _shared_with_groups(model: ModelConfig, ranks: int) -> Iterator[tuple[int, ...]]:
    """For each rank how many experts it has of each group that it has any of; groups and ranks need not nest."""
    per_rank, per_group = model.n_routed_experts // ranks, model.n_routed_experts // model.n_group
    for rank in range(ranks):
        counts = Counter(expert // per_group for expert in range(rank * per_rank, (rank + 1) * per_rank))
        yield tuple(sorted(counts.values()))


def _kept_ways(shared: tuple[int, ...]) -> Counter[tuple[int, int]]:
    """In how many ways so many of a rank's groups are kept, with so many of its experts."""
    ways = Counter({(0, 0): 1})
    for experts in shared:
        for (groups, own), count in list(ways.items()):
            ways[groups + 1, own + experts] += count
    return ways


@dataclass(frozen=True)
class Copies:
    """Copies of one token that leave its device in one MoE layer, on average."""

    slow: float  # between nodes
    fast: float  # within a node

    @property
    def total(self) -> float:
        return self.slow + self.fast


def copies(model: ModelConfig, form: str, ranks: int, node: int | None, *, two_level: bool) -> Copies:
    """What a form of dispatch sends over `ranks` expert ranks, of which `node` consecutive ones share a fast link.

    Args:
      model: its routing decides how many ranks a token's experts live on.
      form: "local", "all_gather" or "all_to_all".
      ranks: size of the expert axis.
      node: None where all ranks share the fast link.
      two_level: whether all_to_all goes once to each node and is fanned out there.
    """
    node = ranks if node is None else min(node, ranks)
    nodes = ranks / node
    if form == "local":
        return Copies(0, 0)
    if form == "all_gather":  # a token enters each other node once, and is passed on within it
        return Copies(nodes - 1, ranks - nodes)
    reached = expected_destinations(model, ranks)
    if two_level and nodes > 1:
        across = expected_destinations(model, round(nodes)) * (1 - 1 / nodes)
        return Copies(across, reached * (1 - 1 / node))
    return Copies(reached * (1 - 1 / nodes), reached * (node - 1) / ranks)


def _chance_of_none(experts: int, marked: int, choices: int) -> float:
    """That a choice of `choices` of `experts` has none of the `marked`."""
    return math.comb(experts - marked, choices) / math.comb(experts, choices)
