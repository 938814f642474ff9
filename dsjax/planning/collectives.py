"""What the collectives of a train step move, in bytes that arrive at one device, by cause and link. No JAX.

A collective over several nodes is taken to cross the slow link as rarely as it can: what a node lacks enters it once,
each of its devices fetching a part, and the rest goes over the fast link. Weights are gathered anew for the forward and
the backward pass of each microbatch, gradients reduced at the end of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsjax.checks import FP8_PRECISIONS
from dsjax.config import Config
from dsjax.planning.placement import AXES
from dsjax.planning.traffic import copies, journey_bytes, message
from dsjax.planning.weights import Weight, weights

FP32 = 4


@dataclass(frozen=True)
class Flow:
    """Bytes that arrive at a device in one step."""

    cause: str
    collective: str
    slow: float  # over the link between nodes, or between slices
    fast: float  # over the link within one

    @property
    def total(self) -> float:
        return self.slow + self.fast


@dataclass(frozen=True)
class Group:
    """The devices of a collective."""

    size: int
    near: int  # those that share a fast link

    def gather(self, whole: float) -> tuple[float, float]:
        """(slow, fast) bytes at a device that ends up with `whole` bytes; a reduce-scatter of them moves as many."""
        slow = whole * (self.size - self.near) / (self.size * self.near)
        return slow, whole * (self.size - 1) / self.size - slow

    def reduce(self, whole: float) -> tuple[float, float]:
        """The same for an all-reduce: a reduce-scatter and an all-gather."""
        slow, fast = self.gather(whole)
        return 2 * slow, 2 * fast


def group(axes: Sequence[str], sizes: Mapping[str, int], node: int | None) -> Group:
    """The group of a collective over mesh `axes`, of which `node` consecutive devices share a fast link; None: all."""
    size, near, stride = 1, 1, 1
    for axis in reversed(AXES):
        if axis in axes:
            size *= sizes[axis]
            near *= sizes[axis] if node is None else max(1, min(sizes[axis], node // stride))
        stride *= sizes[axis]
    return Group(size, near)


def flows(config: Config, sizes: Mapping[str, int], form: str, node: int | None = None) -> tuple[Flow, ...]:
    """All collectives of a train step that move more than a few numbers.

    Args:
      config: of the run; its mesh may be open.
      sizes: devices along each mesh axis.
      form: the dispatch form in force.
      node: consecutive devices that share a fast link; None: all of them.
    """
    microbatches = config.training.batch_size // config.training.sequences_per_microbatch
    found = [
        *_weight_flows(config, sizes, node, microbatches),
        *_embedding_flows(config, sizes, node),
        *_token_flows(config, sizes, form, node),
    ]
    return tuple(flow for flow in found if flow.total)


def forward_flows(config: Config, sizes: Mapping[str, int], form: str, node: int | None = None) -> tuple[Flow, ...]:
    """Those of `flows` that a forward pass over the same tokens has."""
    weights_and_embedding = ("weights, forward", "head", "embedding, forward")
    one = message(config.model, config.precision)
    return (
        *(flow for flow in flows(config, sizes, form, node) if flow.cause in weights_and_embedding),
        *(flow for flow in _exchanges(config, sizes, form, node, one.out, one.back) if flow.total),
    )


def gathered_bytes(one: Weight, config: Config) -> int:
    """Bytes of a number of a weight where it travels."""
    if config.precision == "fp32" or one.part == "gate" or one.name.endswith("mlp.gate.weight"):
        return FP32
    if config.precision in FP8_PRECISIONS and one.is_quantised:
        return 1 if config.fp8.working_copy else FP32  # rounded where it is multiplied
    return 2


def tokens_per_device(config: Config, sizes: Mapping[str, int]) -> float:
    """Of a whole step."""
    devices = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    return config.training.batch_size * config.data.sequence_length / devices


def _weight_flows(config: Config, sizes: Mapping[str, int], node: int | None, microbatches: int) -> list[Flow]:
    data = group(("data",), sizes, node)
    gathered, again, head, reduced, head_reduced, across = ([0.0, 0.0] for _ in range(6))
    passes = 1 + config.model.num_nextn_predict_layers  # of the head, each of which gathers it
    for one in weights(config.model):
        is_head = one.name == ("embed_tokens" if config.model.tie_word_embeddings else "lm_head")
        cut = [axis for dim in one.placed(sizes) for axis in dim if not (one.is_expert and axis == "expert")]
        whole = one.size / (sizes["expert"] if one.is_expert else 1)  # what a device multiplies by
        ways = group(cut, sizes, node)
        everywhere = () if cut or one.is_expert else ("fsdp", "expert")  # norms: their gradients are summed as they are
        _add(across, data.reduce(FP32 * one.per_device(sizes)))
        _add(across, group(everywhere, sizes, node).reduce(FP32 * whole))
        if one.part == "embedding" and not is_head:
            continue
        moved = ways.gather(whole * gathered_bytes(one, config))
        _add(head if is_head else gathered, moved, passes if is_head else 1)
        if config.training.remat == "full" and _is_gathered_again(one):
            _add(again, moved)
        _add(head_reduced if is_head else reduced, ways.gather(FP32 * whole), passes if is_head else 1)
    found = [
        Flow("weights, forward", "all-gather", *gathered),
        Flow("weights, backward", "all-gather", *gathered),
        Flow("weights, computed again", "all-gather", *again),
        Flow("gradients, over fsdp and expert", "reduce-scatter", *reduced),
        Flow("gradients, over data", "all-reduce", *across),
        Flow("head", "all-gather", *head),
        Flow("gradient of the head", "reduce-scatter", *head_reduced),
    ]
    if config.training.remat == "none":  # gathered experts are kept for the backward pass
        experts = [one for one in weights(config.model) if one.is_expert]
        whole = sum(one.size * gathered_bytes(one, config) for one in experts) / sizes["expert"]
        slow, fast = group(("fsdp",), sizes, node).gather(whole)
        found[1] = Flow("weights, backward", "all-gather", gathered[0] - slow, gathered[1] - fast)
    return [Flow(one.cause, one.collective, microbatches * one.slow, microbatches * one.fast) for one in found]


def _is_gathered_again(one: Weight) -> bool:
    """Whether a layer that is computed anew gathers it once for that, and again for its backward pass, as compilers do.

    Experts are gathered once for both, inside shard_map; what a down projection gives is not needed again.
    """
    return not one.is_expert and one.part not in ("embedding", "head") and "down_proj" not in one.name


def _add(sums: list[float], bytes_: tuple[float, float], times: int = 1) -> None:
    sums[0] += times * bytes_[0]
    sums[1] += times * bytes_[1]


def _embedding_flows(config: Config, sizes: Mapping[str, int], node: int | None) -> list[Flow]:
    """Each device looks up its features of the tokens of all; MTP looks up the next tokens too."""
    passes = 1 + config.model.num_nextn_predict_layers
    width = config.model.hidden_size * (FP32 if config.precision == "fp32" else 2)
    rows = tokens_per_device(config, sizes) * passes * width
    ways = group(("fsdp", "expert"), sizes, node)
    # An all-to-all: every device has a part for every other, so that a far one crosses the slow link by itself.
    slow, fast = rows * (ways.size - ways.near) / ways.size, rows * (ways.near - 1) / ways.size
    return [Flow("embedding, forward", "all-to-all", slow, fast), Flow("embedding, backward", "all-to-all", slow, fast)]


def _token_flows(config: Config, sizes: Mapping[str, int], form: str, node: int | None) -> list[Flow]:
    one = message(config.model, config.precision)
    home = one.back + one.gradient_back
    away = journey_bytes(config.model, config.precision, config.training.remat) - home
    return _exchanges(config, sizes, form, node, away, home)


def _exchanges(
    config: Config, sizes: Mapping[str, int], form: str, node: int | None, away: int, home: int
) -> list[Flow]:
    """Copies of tokens to expert ranks and back, of `away` and `home` bytes each."""
    model = config.model
    layers = model.num_moe_layers + model.num_nextn_predict_layers
    node = config.dispatch.ranks_per_node if node is None else node
    two_level = config.dispatch.ranks_per_node is not None
    sent = copies(model, form, sizes["expert"], node, two_level=two_level)
    kinds = ("all-gather", "reduce-scatter") if form == "all_gather" else ("all-to-all", "all-to-all")
    tokens = tokens_per_device(config, sizes) * layers
    return [
        Flow(cause, kind, tokens * sent.slow * size, tokens * sent.fast * size)
        for cause, kind, size in (
            ("tokens to experts", kinds[0], away),
            ("sums from experts", kinds[1], home),
        )
    ]
