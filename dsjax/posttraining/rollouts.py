"""Samples of a policy: drawn by the inference engine, judged, and laid out in rows for the train step."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.config import Config, ConfigError
from dsjax.data import marks
from dsjax.data.chat import THINK, Message, Template, conversation_tokens
from dsjax.data.tokenizer import Tokenizer
from dsjax.inference.decoding import LOGIT_POSITIONS
from dsjax.inference.engine import Engine
from dsjax.inference.sampling import Draws, Sampling, filtered
from dsjax.model.losses import pack_bits, token_log_probs
from dsjax.model.transformer import Network, Transformer
from dsjax.posttraining.grpo import Experience, by_layer
from dsjax.posttraining.tasks import Problem
from dsjax.sharding import AXES, BATCH
from dsjax.training.objective import read_targets

OPENING_TOKENS = 16  # at a prompt's end, among which there is a <think> if there is one


@dataclass(frozen=True)
class Sample:
    """One completion of one problem; tokens and log-probabilities are those of the completion."""

    problem: Problem
    prompt: list[int]
    tokens: list[int]
    log_probs: list[float]  # by the rollout, at temperature 1
    text: str  # what is judged: with the <think> that some templates end the prompt with
    is_truncated: bool  # at the length limit
    routes: np.ndarray | None = None  # as of inference.engine.Result

    @property
    def length(self) -> int:
        """Tokens, the prompt's included."""
        return len(self.prompt) + len(self.tokens)


def seed_of(seed: int, split: str, problem: int, number: int) -> int:
    """32 bits for the `number`-th sample of a problem: the same after any restart."""
    return int.from_bytes(hashlib.sha256(f"{seed} {split} {problem} {number}".encode()).digest()[:4])


def prompt_tokens(problem: Problem, config: Config, tokenizer: Tokenizer, template: Template | None) -> list[int]:
    """The problem as the user's turn, after the system message of the task if it has one.

    Raises ConfigError where it leaves no room for an answer.
    """
    system: list[Message] = []
    if config.task.system is not None:
        system.append({"role": "system", "content": config.task.system})
    tokens = conversation_tokens(tokenizer, [*system, {"role": "user", "content": problem.prompt}], template)
    if len(tokens) >= config.data.sequence_length:
        raise ConfigError(
            f"a prompt of {len(tokens)} tokens ({problem.prompt[:60]!r}) leaves no room for an answer within"
            f" data.sequence_length = {config.data.sequence_length}; raise it, or leave such problems out"
        )
    return tokens


def draw_samples(
    engine: Engine,
    config: Config,
    template: Template | None,
    problems: Sequence[tuple[int, Problem]],
    count: int,
    split: str = "train",
    on_result: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """`count` samples of each problem, given with its index; those of one problem stand together.

    `on_result` is called as each is finished; what it raises ends the drawing.
    """
    assert engine.tokenizer is not None
    prompts, samplings, asked, openings = [], [], [], []
    for index, problem in problems:
        tokens = prompt_tokens(problem, config, engine.tokenizer, template)
        is_opened = engine.tokenizer.decode(tokens[-OPENING_TOKENS:]).rstrip().endswith(THINK)
        room = min(config.grpo.max_new_tokens, config.data.sequence_length - len(tokens))
        for number in range(count):
            seed = seed_of(config.training.seed, split, index, number)
            prompts.append(tokens)
            samplings.append(Sampling(room, config.grpo.temperature, top_p=config.grpo.top_p, seed=seed))
            asked.append(problem)
            openings.append(THINK if is_opened else "")
    results = engine.generate(prompts, samplings, on_result=lambda _, __: on_result())
    return [
        Sample(
            problem, r.prompt, r.tokens, r.log_probs, opening + (r.text or ""), r.finish_reason == "length", r.routes
        )
        for problem, opening, r in zip(asked, openings, results, strict=True)
    ]


class Rows(NamedTuple):
    """Samples in rows, and where each is."""

    marked_BT: np.ndarray  # int32 [B, T + 1], as of data/marks.py
    places: list[tuple[int, slice]]  # of each sample: its row, and the positions that predict its completion
    routes_BTLK: np.ndarray | None  # int32, -1 where a token's experts are not known; None: of no token

    def spread(self, values: Iterable[Any]) -> np.ndarray:
        """FP32 [B, T]: each sample's value, or one value a token, at the positions of its completion; else 0."""
        whole = np.zeros((len(self.marked_BT), self.marked_BT.shape[1] - 1), np.float32)
        for (row, positions), value in zip(self.places, values, strict=True):
            whole[row, positions] = value
        return whole


def lay_out(samples: Sequence[Sample], length: int, pad: int) -> Rows:
    """Every sample whole in a row of `length`, the longest first, each where it leaves the least room.

    What is left of a row, and the token after its last, is `pad`, each a sample of its own without an answer.
    """
    rooms: list[int] = []
    found: dict[int, tuple[int, int]] = {}
    for i in sorted(range(len(samples)), key=lambda i: (-samples[i].length, i)):
        size = samples[i].length
        fitting = [row for row, room in enumerate(rooms) if room >= size]
        if fitting:
            row = min(fitting, key=lambda row: rooms[row])
        else:
            row = len(rooms)
            rooms.append(length)
        found[i] = (row, length - rooms[row])
        rooms[row] -= size
    whole = np.full((len(rooms), length + 1), pad | marks.BEGINS, np.int32)
    places = []
    for i, sample in enumerate(samples):
        row, start = found[i]
        whole[row, start : start + sample.length] = marks.marked(sample.prompt, sample.tokens)
        before = start + len(sample.prompt) - 1
        places.append((row, slice(before, before + len(sample.tokens))))
    routes = None
    if samples and samples[0].routes is not None:
        routes = np.full((len(rooms), length, *samples[0].routes.shape[1:]), -1, np.int32)
        for i, sample in enumerate(samples):
            row, start = found[i]
            assert sample.routes is not None
            routes[row, start : start + len(sample.routes)] = sample.routes
    return Rows(whole, places, routes)


# Rows that fill a batch up. Their tokens go where the router sends them, as any token does: to different experts.
EMPTY = Experience(0, 0, 0, 0, kept_BTW=0, routes_BTLK=-1)

Scores = tuple[np.ndarray, np.ndarray | None]  # log-probabilities [B, T], and what there was to choose from


def make_scorer(config: Config, net: Network, mesh: Mesh) -> Callable[..., Scores]:
    """f(params, router_bias, rows [B, T + 1], routes, keeps_choice) -> the log-probability of every label, FP32 [B, T].

    `routes` as of Experience; `kept` is what there is to choose from, packed. With `keeps_choice` that is what top_p
    leaves of the vocabulary at each position, and given back; log-probabilities are those within it.
    """
    size = config.training.sequences_per_microbatch

    def score(params, router_bias, rows_BT, routes_BTLK, kept_BTW, keeps_choice):
        model = net.bind(params, router_bias)
        read = read_targets(rows_BT, True)
        hidden_BTD = model(read.inputs_BT, None, read.first_BT, by_layer(routes_BTLK)).hidden_BTD
        if keeps_choice:
            kept_BTW = _choices(model, hidden_BTD, config)
        execution, chunk = net.execution, config.training.loss_chunk_size
        found = token_log_probs(
            hidden_BTD, model.head_DV, read.labels_BT, execution.mesh, execution.recipe, chunk, kept_BTW
        )
        return jnp.where(read.weights_BT > 0, found.log_prob_BT, 0.0), kept_BTW

    compiled = jax.jit(score, static_argnums=5)

    def run(
        params: Any,
        router_bias: Any,
        rows_BT: np.ndarray,
        routes_BTLK: np.ndarray | None = None,
        keeps_choice: bool = False,
        kept_BTW: np.ndarray | None = None,
    ) -> Scores:
        parts = []
        for start in range(0, len(rows_BT), size):
            part = [
                a if a is None else _padded(a[start : start + size], size, fill)
                for a, fill in (
                    (rows_BT, EMPTY.rows_BT),
                    (routes_BTLK, EMPTY.routes_BTLK),
                    (kept_BTW, EMPTY.kept_BTW),
                )
            ]
            placed = jax.device_put(part, NamedSharding(mesh, BATCH))
            parts.append(jax.device_get(compiled(params, router_bias, *placed, keeps_choice)))
        log_probs, kept = zip(*parts, strict=True)
        cut = lambda arrays: np.concatenate(arrays)[: len(rows_BT)]  # noqa: E731
        return cut(log_probs), None if kept[0] is None else cut(kept)

    return run


def _choices(model: Transformer, hidden_BTD: jax.Array, config: Config) -> jax.Array:
    """What temperature and top_p leave of the vocabulary at each position, packed [B, T, W]."""
    batch, length, _ = hidden_BTD.shape
    size = max(n for n in range(1, min(LOGIT_POSITIONS, length) + 1) if length % n == 0)
    how = config.grpo

    def piece(hidden_BCD: jax.Array) -> jax.Array:
        logits = model.logits(hidden_BCD).reshape(batch * size, -1)
        full = lambda value, dtype: jnp.full((len(logits),), value, dtype)  # noqa: E731
        draws = Draws(
            full(how.temperature, jnp.float32),
            full(0, jnp.int32),
            full(how.top_p, jnp.float32),
            full(0, jnp.float32),
            full(0, jnp.uint32),
        )
        return pack_bits(filtered(logits, draws) > -jnp.inf).reshape(batch, size, -1)

    pieces = lax.map(piece, hidden_BTD.reshape(batch, length // size, size, -1).swapaxes(0, 1))
    return pieces.swapaxes(0, 1).reshape(batch, length, -1)


def as_batch(experience: Experience, config: Config, mesh: Mesh) -> tuple[Experience, int]:
    """The rows as the train step takes them, [microbatches, sequences, ...], and how many microbatches are used.

    As many as there could be if no two samples shared a row, so that the step compiles once.
    """
    size = config.training.sequences_per_microbatch
    most = config.training.batch_size // size
    used = -(-len(experience.rows_BT) // size)

    def place(array: np.ndarray | None, fill: int) -> jax.Array | None:
        if array is None:
            return None
        whole = _padded(array, most * size, fill).reshape(most, size, *array.shape[1:])
        return jax.device_put(whole, NamedSharding(mesh, PartitionSpec(None, AXES)))

    return Experience(*map(place, experience, EMPTY)), used


def _padded(array: np.ndarray, rows: int, fill: int) -> np.ndarray:
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1), constant_values=fill)
