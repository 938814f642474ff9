"""The engine: requests in, texts out, as many at a time as there are slots.

A request enters as soon as another one leaves (continuous batching): its prompt is prefilled beside the batch, in
pieces, and put into the free slot. All slots decode together, some tens of tokens a call. Knows nothing of
checkpoints: it takes parameters as training holds them, and `update` gives it newer ones without compiling anew.

    >>> from dsjax.inference.engine import Engine, Sampling
    >>> engine = Engine(config, params, router_bias)
    >>> [result] = engine.generate([[3, 1, 4, 1, 5]], Sampling(max_new_tokens=4, temperature=0.0))
    >>> len(result.tokens), result.finish_reason
    (4, 'length')
"""

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsjax.config import Config, ConfigError, MeshConfig
from dsjax.data.tokenizer import Tokenizer
from dsjax.inference import decoding
from dsjax.inference.decoding import Prompts, State, bucket
from dsjax.inference.prefix import PrefixCache, fingerprint
from dsjax.inference.sampling import Draws, Sampling
from dsjax.model.cache import bytes_per_token
from dsjax.sharding import BATCH, make_mesh

PREFILL_CHUNK = 512  # tokens of a prompt in one piece, at most
SMALLEST_CHUNK = 16
WAITING_STEPS = 8  # decoding steps of a call while requests wait for a slot


@dataclass(frozen=True)
class Result:
    """What became of one request; lengths are tokens."""

    prompt: list[int]
    tokens: list[int]  # the stop token that ended it included
    log_probs: list[float]  # of each token by the model, at temperature 1, unfiltered
    finish_reason: str  # "stop": a stop token or string; "length": max_new_tokens
    text: str | None  # of the new tokens, cut before a stop string; None without a tokenizer
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int
    drafted_tokens: int  # proposed by MTP, and how many of them were taken
    accepted_tokens: int
    # The experts that the prompt's tokens and these, but for the last one, went to in every MoE layer: int32
    # [tokens, layers, choices], -1 for those found in a prefix cache. None unless the engine tells them.
    routes: np.ndarray | None = None


@dataclass
class _Request:
    """A request on its way; `told` is the text already given to a stream."""

    number: int
    prompt: list[int]
    sampling: Sampling
    salt: str
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    hits: int = 0
    drafted: int = 0
    accepted: int = 0
    finish_reason: str | None = None
    routes: np.ndarray | None = None  # of the prompt
    decoded_routes: list[np.ndarray] = field(default_factory=list)


class Engine:
    """One model on one mesh, ready to generate. Its methods may be called by several threads, which take turns.

    A thread takes one turn at a time: `generate` or `stream` while it is in the middle of another is a RuntimeError.
    `programs` are the compiled functions, `weights` the (params, router_bias) that they take.
    """

    def __init__(
        self,
        config: Config,
        params: Any,
        router_bias: Any,
        mesh: Mesh | None = None,
        *,
        slots: int = 8,
        storage: str | None = None,
        tokenizer: Tokenizer | None = None,
        prefix_cache: PrefixCache | None = None,
        speculative: bool = False,
        tells_routes: bool = False,
        prefill_chunk: int = PREFILL_CHUNK,
    ):
        """Args:
          config: model, precision and dispatch are used.
          params, router_bias: as in a TrainState, on `mesh`.
          mesh: None: one device.
          slots: requests that are decoded together, rounded up to a multiple of the devices.
          storage: of the latent cache: "float32", "bfloat16", "float8_e4m3fn"; None: the compute dtype.
          tokenizer: for prompts and results that are texts; its end-of-document token ends every text.
          prefix_cache: where latents of prompts are kept for requests that begin alike.
          speculative: the MTP module proposes tokens, which the model accepts or replaces.
          tells_routes: results have the experts of every token; not with `speculative`.
          prefill_chunk: tokens of a prompt that are computed in one piece, at most.

        Raises ConfigError where the model has no MTP module to speculate with, or the storage does not exist.
        """
        if speculative and tells_routes:
            raise ConfigError("an engine that speculates cannot tell the experts of its tokens; choose one of the two")
        if speculative and not config.model.num_nextn_predict_layers:
            raise ConfigError("speculative decoding needs a model with an MTP module; this one has none")
        self.config, self.tokenizer, self.prefix_cache = config, tokenizer, prefix_cache
        self.mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]) if mesh is None else mesh
        self.slots = -(-slots // self.mesh.size) * self.mesh.size
        self.programs = decoding.programs(config, self.mesh, storage, speculative, tells_routes)
        self._tells_routes = tells_routes and config.model.num_moe_layers > 0
        self._chunk = prefill_chunk
        self._state: State = self.programs.empty_state(self.slots, decoding.SMALLEST_BUCKET)
        self._requests: list[_Request | None] = [None] * self.slots
        self._waiting: deque[_Request] = deque()
        self._number, self._lock, self._is_running = 0, threading.RLock(), False
        self.update(params, router_bias)

    def update(self, params: Any, router_bias: Any) -> None:
        """Other parameters from now on. Nothing compiles anew, and no prefix kept with the old ones is found."""
        with self._lock:
            if self._waiting or any(self._requests):
                raise RuntimeError("update() while requests are being decoded")
            self.weights: Any = self.programs.prepare(params, router_bias)
            self._fingerprint: str | None = None

    def release(self) -> None:
        """Lets go of the parameters, until `update` gives others, and of the cache: a train step needs the memory."""
        with self._lock:
            self.weights = None
            self._state = self.programs.empty_state(self.slots, decoding.SMALLEST_BUCKET)

    @property
    def cache_bytes_per_token(self) -> int:
        """What the latent cache takes for one token of one sequence."""
        return bytes_per_token(self._state.cache)

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008
        *,
        salt: str = "",
        on_result: Callable[[int, Result], None] | None = None,
    ) -> list[Result]:
        """The results of all prompts, in their order, however many there are.

        Args:
          prompts: texts (with a tokenizer) or tokens; an empty one starts a new document.
          sampling: one for all, or one for each.
          salt: who asks: prompts are found in the prefix cache only under the salt that they were kept under.
          on_result: called with (index, result) as each is finished, not in their order.

        Raises:
          ConfigError: a prompt and its continuation exceed max_position_embeddings, or a text needs a tokenizer.
          RuntimeError: this thread has not finished or closed a stream, or is in `on_result`.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(prompts):
            raise ConfigError(f"there are {len(prompts)} prompts, but {len(each)} samplings; give one, or one for each")
        with self._turn():
            requests = [self._request(prompt, one, salt) for prompt, one in zip(prompts, each, strict=True)]
            self._waiting.extend(requests)
            index = {request.number: i for i, request in enumerate(requests)}
            results: list[Result | None] = [None] * len(requests)
            for request in self._run():
                if request.finish_reason is not None:
                    result = results[index[request.number]] = self._result(request)
                    if on_result is not None:
                        on_result(index[request.number], result)
        return [result for result in results if result is not None]

    def stream(self, prompt: str | list[int], sampling: Sampling = Sampling(), *, salt: str = "") -> Iterator[str]:  # noqa: B008
        """The continuation's text, in pieces as it comes; needs a tokenizer. Closing the iterator ends the request.

        Until it is at its end or closed, other threads wait, and whatever else this one asks for is a RuntimeError.
        """
        with self._turn():
            request, told = self._request(prompt, sampling, salt), ""
            self._waiting.append(request)
            for _ in self._run(steps=WAITING_STEPS):
                text = self._text(request)
                # What may still become another character, or a stop string, waits.
                held = 0 if request.finish_reason else _held_back(text, sampling.stop)
                ready = text[: len(text) - held]
                if len(ready) > len(told):
                    yield ready[len(told) :]
                    told = ready

    def complete(self, prompt: str, **sampling: Any) -> str:
        """The continuation of one text; keywords are those of Sampling, greedy by default."""
        [result] = self.generate([prompt], Sampling(**{"temperature": 0.0, **sampling}))
        return result.text or ""

    def check(self, prompt: str | list[int], sampling: Sampling) -> None:
        """Raises ConfigError where `generate` would."""
        self._request(prompt, sampling, "")

    # --- one request -------------------------------------------------------------------------------------------------

    def _request(self, prompt: str | list[int], sampling: Sampling, salt: str) -> _Request:
        tokenizer, model = self.tokenizer, self.config.model
        if tokenizer is None and (isinstance(prompt, str) or sampling.stop):
            raise ConfigError("prompts that are texts, and stop strings, need an engine with a tokenizer")
        if isinstance(prompt, str):
            assert tokenizer is not None
            prompt = tokenizer.encode(prompt)
        if not prompt:
            if tokenizer is None:
                raise ConfigError("a prompt of no tokens needs an engine with a tokenizer, whose end of document it is")
            prompt = [tokenizer.eos_id]
        if not all(0 <= token < model.vocab_size for token in prompt):
            raise ConfigError(f"a prompt has tokens outside the model's vocabulary of {model.vocab_size}")
        if len(prompt) + sampling.max_new_tokens > model.max_position_embeddings:
            raise ConfigError(
                f"the prompt's {len(prompt)} tokens and {sampling.max_new_tokens} new ones exceed"
                f" max_position_embeddings = {model.max_position_embeddings}; shorten the prompt or lower"
                " --max-new-tokens"
            )
        stops = tuple(dict.fromkeys((*sampling.stop_tokens, *([tokenizer.eos_id] if tokenizer else []))))
        if len(stops) > decoding.STOPS:
            raise ConfigError(f"a request may have {decoding.STOPS} stop tokens, but has {len(stops)}")
        self._number += 1
        return _Request(self._number, list(prompt), dataclasses.replace(sampling, stop_tokens=stops), salt)

    def _take(self, request: _Request, tokens: list[int], log_probs: list[float]) -> None:
        """New tokens of a request; sets its finish_reason where they end it."""
        request.tokens += tokens
        request.log_probs += log_probs
        sampling = request.sampling
        if sampling.stop and self._cut_at_stop(request, len(request.tokens) - len(tokens)):
            request.finish_reason = "stop"
        elif request.tokens[-1] in sampling.stop_tokens:
            request.finish_reason = "stop"
        elif len(request.tokens) >= sampling.max_new_tokens:
            request.finish_reason = "length"

    def _cut_at_stop(self, request: _Request, before: int) -> bool:
        """Leaves no token after the one that completes a stop string."""
        assert self.tokenizer is not None
        if not any(stop in self.tokenizer.decode(request.tokens) for stop in request.sampling.stop):
            return False
        for count in range(before + 1, len(request.tokens) + 1):
            text = self.tokenizer.decode(request.tokens[:count])
            if any(stop in text for stop in request.sampling.stop):
                del request.tokens[count:], request.log_probs[count:]
                return True
        return False

    def _text(self, request: _Request) -> str:
        if self.tokenizer is None:
            raise ConfigError("a stream of text needs an engine with a tokenizer")
        stops, tokens = request.sampling.stop_tokens, request.tokens
        text = self.tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in stops else tokens)
        ends = [text.index(stop) for stop in request.sampling.stop if stop in text]
        return text[: min(ends)] if ends else text

    def _result(self, request: _Request) -> Result:
        assert request.finish_reason is not None
        text = None if self.tokenizer is None else self._text(request)
        misses = len(request.prompt) - request.hits
        counts = (request.hits, misses, request.drafted, request.accepted)
        routes = None
        if request.routes is not None:
            routes = np.concatenate([request.routes, *request.decoded_routes])
            routes = routes[: len(request.prompt) + len(request.tokens) - 1]
        return Result(request.prompt, request.tokens, request.log_probs, request.finish_reason, text, *counts, routes)

    # --- the batch ---------------------------------------------------------------------------------------------------

    def _run(self, steps: int = decoding.STEPS) -> Iterator[_Request]:
        """Works until nothing waits and no slot is busy; yields every request that got tokens, as it gets them."""
        while self._waiting or any(self._requests):
            free = [slot for slot, request in enumerate(self._requests) if request is None]
            if free and self._waiting:
                yield from self._admit([self._waiting.popleft() for _ in free[: len(self._waiting)]], free)
            if any(self._requests):
                yield from self._decode(min(steps, WAITING_STEPS) if self._waiting else steps)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """The slots are the caller's alone; what is still being decoded at the end is forgotten: its caller is gone."""
        with self._lock:
            if self._is_running:  # in this very thread: it is not kept out by the lock
                raise RuntimeError(
                    "this thread asks the engine for texts in the middle of another call; take that stream to its end"
                    " or close it first, or give generate() all prompts at once"
                )
            self._is_running = True
            try:
                yield
            finally:
                self._is_running = False
                self._waiting.clear()
                self._requests = [None] * self.slots

    def _admit(self, requests: list[_Request], free: list[int]) -> Iterator[_Request]:
        prompts, slots = self._prefill_each_once(requests), free[: len(requests)]
        rows = prompts.hidden_RD.shape[0]
        busy = [len(r.prompt) + len(r.tokens) for r in self._requests if r is not None]
        self._make_room(max([len(r.prompt) for r in requests] + busy) + decoding.STEPS)
        asked = [request.sampling for request in requests]

        def fill(values: Sequence[Any], dtype: Any, rest: float = 0) -> Any:
            return _rows(values, rows, dtype, rest)

        draws = Draws(
            fill([s.temperature for s in asked], np.float32),
            fill([min(s.top_k or 0, self.config.model.vocab_size) for s in asked], np.int32),
            fill([s.top_p for s in asked], np.float32, 1),
            fill([s.min_p for s in asked], np.float32),
            fill([s.seed for s in asked], np.uint32),
        )
        stops_RX = np.full((rows, decoding.STOPS), -1, np.int32)
        for row, s in enumerate(asked):
            stops_RX[row, : len(s.stop_tokens)] = s.stop_tokens
        lengths = fill([len(request.prompt) for request in requests], np.int32, 1)
        limits = fill([len(request.prompt) + request.sampling.max_new_tokens for request in requests], np.int32)
        places = fill(slots, np.int32, self.slots)  # rows without a request go nowhere
        self._state, tokens_R, log_probs_R = self.programs.admit(
            *self.weights, self._state, prompts, places, lengths, limits, draws, stops_RX
        )
        first = jax.device_get((tokens_R, log_probs_R))
        for row, (request, slot) in enumerate(zip(requests, slots, strict=True)):
            self._take(request, [int(first[0][row])], [float(first[1][row])])
            self._requests[slot] = request if request.finish_reason is None else None
            yield request

    def _decode(self, steps: int) -> Iterator[_Request]:
        busy = [request is not None for request in self._requests]
        longest = max(len(r.prompt) + len(r.tokens) for r in self._requests if r is not None)
        self._make_room(longest + (2 if self.programs.speculates else 1) * steps)
        keep = np.asarray(busy)
        self._state, emitted = self.programs.decode(*self.weights, self._state, keep, np.int32(steps))
        tokens, log_probs, count, drafted, accepted, routes = jax.device_get(emitted)
        for slot, request in enumerate(self._requests):
            if request is None:
                continue
            new = slice(0, int(count[slot]))
            request.drafted += int(drafted[slot])
            request.accepted += int(accepted[slot])
            if count[slot]:
                if routes is not None:
                    request.decoded_routes.append(routes[slot, new])
                self._take(request, tokens[slot, new].tolist(), log_probs[slot, new].tolist())
            if request.finish_reason is not None:
                self._requests[slot] = None
            yield request

    def _make_room(self, tokens: int) -> None:
        """A cache of the smallest bucket for sequences of `tokens`, never beyond what positions there are."""
        length = bucket(min(tokens, self.config.model.max_position_embeddings))
        if length != self._state.cache.length:
            self._state = self._state._replace(cache=self.programs.resize(self._state.cache, length=length))

    def _prefill_each_once(self, requests: list[_Request]) -> Prompts:
        """A row for each request; those that ask the same, as the samples of one question do, share the work."""
        first: dict[tuple[str, tuple[int, ...]], int] = {}
        places = [first.setdefault((request.salt, tuple(request.prompt)), len(first)) for request in requests]
        if len(first) == len(requests):
            return self._prefill(requests)
        asking: dict[int, _Request] = {}
        for place, request in zip(places, requests, strict=True):
            if asking.setdefault(place, request) is not request:
                request.hits = len(request.prompt)
        prompts = self._prefill(list(asking.values()))
        for place, request in zip(places, requests, strict=True):
            request.routes = asking[place].routes
        return self.programs.repeat(prompts, _rows(places, self._row_count(requests), np.int32))

    def _row_count(self, requests: list[_Request]) -> int:
        """Rows for so many: a power of two times the devices, so that few programs are compiled."""
        rows = self.mesh.size
        while rows < len(requests):
            rows *= 2
        return rows

    def _prefill(self, requests: list[_Request]) -> Prompts:
        rows = self._row_count(requests)
        length = bucket(max(len(request.prompt) for request in requests))
        start, prompts = self._from_prefix_cache(requests, rows, length)
        if self._tells_routes:
            shape = (self.config.model.num_moe_layers, self.config.model.num_experts_per_tok)
            for request in requests:
                request.routes = np.full((len(request.prompt), *shape), -1, np.int32)
        total = _rows([len(request.prompt) for request in requests], rows, np.int32)
        while np.any(start < total):
            size = SMALLEST_CHUNK
            while size < min(self._chunk, int(np.max(total - start))):
                size *= 2
            count = np.minimum(np.maximum(total - start, 0), size)
            tokens_RT = np.zeros((rows, size + 1), np.int32)
            for row, request in enumerate(requests):
                piece = request.prompt[start[row] : start[row] + size + 1]
                tokens_RT[row, : len(piece)] = piece
            visible = min(length, bucket(int(np.max(start + count))))
            prompts = self.programs.prefill(*self.weights, prompts, tokens_RT, count, start, visible=visible)
            if self._tells_routes:
                routes_RTLK = np.moveaxis(np.asarray(prompts.routes_LRTK), 0, 2)
                for row, request in enumerate(requests):
                    assert request.routes is not None
                    request.routes[start[row] : start[row] + count[row]] = routes_RTLK[row, : count[row]]
            prompts = prompts._replace(routes_LRTK=None)
            start = (start + count).astype(np.int32)
        self._to_prefix_cache(requests, prompts)
        return prompts

    def _from_prefix_cache(self, requests: list[_Request], rows: int, length: int) -> tuple[np.ndarray, Prompts]:
        """(tokens of each row that need not be computed, the rows with them)."""
        start = np.zeros(rows, np.int32)
        cache = self.programs.empty_cache(rows, length)
        states = jax.device_put(
            np.zeros((rows, self.config.model.hidden_size), self.programs.net.execution.recipe.dtype),
            NamedSharding(self.mesh, BATCH),
        )
        if self.prefix_cache is not None:
            blocks = [self.prefix_cache.find(self._key(request), request.prompt) for request in requests]
            if any(blocks):
                cache = self.prefix_cache.filled(cache, blocks)
            for row, (request, found) in enumerate(zip(requests, blocks, strict=True)):
                request.hits = self.prefix_cache.block * len(found)
                # MTP's entry of a token depends on the one after it: the last one's is computed again.
                start[row] = max(0, request.hits - self.programs.speculates)
        return start, Prompts(cache, states, states + 0)

    def _to_prefix_cache(self, requests: list[_Request], prompts: Prompts) -> None:
        if self.prefix_cache is None:
            return
        for row, request in enumerate(requests):
            self.prefix_cache.keep(self._key(request), request.prompt, request.hits, prompts.cache, row)

    def _key(self, request: _Request) -> tuple[str, str]:
        if self._fingerprint is None:
            how = (self.programs.storage, *self.weights, self.programs.speculates)
            self._fingerprint = fingerprint(self.config, *how)
        return self._fingerprint, request.salt


def _rows(values: Sequence[Any], rows: int, dtype: Any, rest: float = 0) -> np.ndarray:
    """`values` and then `rest`, [rows]."""
    return np.array([*values, *[rest] * (rows - len(values))], dtype)


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of a growing text that may yet change or turn out to begin a stop string."""
    longest = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return max(longest, len(text) - len(text.rstrip("\ufffd")))
