"""How many rows the buffers of the routed experts have. Integers only, no JAX; model/ allocates by these sizes."""

import math
from typing import NamedTuple

from dsjax.config import DispatchConfig, ModelConfig
from dsjax.planning.traffic import expected_destinations

ROW_BLOCK = 128  # tile edge of TPU and GPU kernels and of FP8 scales; on CPU large enough to run near dense speed


class Buffer(NamedTuple):
    """The static shape of a dispatch buffer."""

    experts: int  # local experts
    assignments: int  # real rows at most, in one round
    block: int  # groups begin at multiples of this

    @property
    def rows(self) -> int:
        """Rows with room for every group's alignment."""
        return (self.assignments // self.block + self.experts) * self.block


class Seats(NamedTuple):
    """One leg of an all-to-all: what each of `ranks`, `stride` apart, may send to each other in one round."""

    ranks: int
    stride: int  # ranks that each destination stands for: 1, or those of its node
    capacity: int  # rows

    @property
    def rows(self) -> int:
        """What arrives in one round, empty rows included."""
        return self.ranks * self.capacity


def row_block(rows: int, groups: int) -> int:
    """The alignment of groups for about `rows` rows: a power of two, at most ROW_BLOCK, that wastes little."""
    block = 8
    while block < ROW_BLOCK and block * groups < rows:
        block *= 2
    return block


def make_buffer(tokens: int, choices: int, experts: int, ranks: int, capacity_factor: float) -> Buffer:
    """A buffer for `capacity_factor` times the load of one of `ranks` ranks when all are equally loaded.

    Args:
      tokens: tokens that this rank sees.
      choices: experts per token.
      experts: experts of this rank.
      ranks: expert ranks; with one, every assignment is its own and the buffer holds them all.
      capacity_factor: room over the balanced load.
    """
    total = tokens * choices
    if ranks == 1:
        return Buffer(experts, total, row_block(total, experts))
    return buffer_for(capacity_factor * total / ranks, tokens, choices, experts)


def buffer_for(room: float, tokens: int, choices: int, experts: int) -> Buffer:
    """A buffer with room for `room` assignments, or for all that `tokens` can have with one rank's experts."""
    # A token counts once per local expert, so a rank with few experts cannot get more than this.
    rows = min(tokens * min(choices, experts), math.ceil(room))
    return Buffer(experts, rows, row_block(rows, experts))


def seats(model: ModelConfig, dispatch: DispatchConfig, ranks: int, tokens: int) -> tuple[Seats, ...]:
    """The legs for `tokens` of each of `ranks` ranks: one, or across nodes and within them.

    A leg has room for `capacity_factor` times the copies that are expected between two ranks, and never for more than
    there are tokens.
    """
    node, room = dispatch.ranks_per_node, dispatch.capacity_factor * tokens

    def leg(count: int, stride: int, tokens: int, rows: float) -> Seats:
        return Seats(count, stride, min(tokens, math.ceil(rows / count)))

    copies = room * expected_destinations(model, ranks)
    if node is None or node >= ranks:
        return (leg(ranks, 1, tokens, copies),)
    nodes = ranks // node
    across = leg(nodes, node, tokens, room * expected_destinations(model, nodes))
    return across, leg(node, 1, across.rows, copies)
