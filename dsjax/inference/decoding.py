"""What runs on the devices: prefill, entering the batch, and many decoding steps in one call.

`programs` compiles them for one network; each compiles again only for another bucket of the cache's length or another
number of rows. Buffers that go in and come out again are donated: the cache is updated in place.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding

from dsjax.config import Config
from dsjax.inference import sampling
from dsjax.inference.sampling import Draws
from dsjax.model import cache as caches
from dsjax.model.cache import LatentCache
from dsjax.model.moe import Execution
from dsjax.model.transformer import Network, network, unstack
from dsjax.numerics.recipe import recipe
from dsjax.sharding import BATCH

SMALLEST_BUCKET = 64
UNROLLED_LAYERS = 32  # at most so many layers are unrolled: compile time grows with them
STEPS = 32  # decoding steps of one call, at most
LOGIT_POSITIONS = 128  # of each sequence that is scored, whose logits exist at once


class State(NamedTuple):
    """The batch that is being decoded; B slots, each a request or empty."""

    cache: LatentCache
    last_B: jax.Array  # the newest token, not in the cache yet
    length_B: jax.Array  # tokens in the cache: the newest one's position
    limit_B: jax.Array  # tokens after which a request ends, its prompt included
    active_B: jax.Array
    draws: Draws
    stops_BX: jax.Array  # tokens that end a request; -1: none
    draft_BV: jax.Array | None  # with speculation: MTP's logits of the token after the newest


class Emitted(NamedTuple):
    """What a call of `decode` gives a slot: its first `count` tokens of the rows."""

    tokens_BT: jax.Array
    log_probs_BT: jax.Array
    count_B: jax.Array
    drafted_B: jax.Array  # tokens proposed by MTP, and those of them that were taken
    accepted_B: jax.Array
    routes_BTLK: jax.Array | None = None  # where they are told: the experts of the token before each


class Prompts(NamedTuple):
    """Rows whose prompts are in a cache of their own."""

    cache: LatentCache
    hidden_RD: jax.Array  # of each prompt's last token, ready for the output head
    mtp_input_RD: jax.Array
    routes_LRTK: jax.Array | None = None  # where they are told: the experts of the newest piece's tokens


class Programs(NamedTuple):
    """The compiled functions of a network; `speculates`: with its MTP module."""

    net: Network
    speculates: bool
    storage: str
    prepare: Callable[..., Any]  # (params, bias) -> as the others take them
    empty_cache: Callable[[int, int], LatentCache]  # (rows, length)
    empty_state: Callable[[int, int], State]
    prefill: Callable[..., Prompts]
    repeat: Callable[..., Prompts]  # (prompts, index_R): rows for requests that ask the same
    admit: Callable[..., tuple[State, jax.Array, jax.Array]]
    decode: Callable[..., tuple[State, Emitted]]
    resize: Callable[..., LatentCache]  # (cache, length=)
    score: Callable[..., Any]


def bucket(length: int) -> int:
    """The cache's length for so many tokens: 64 times a power of two."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return size


@functools.lru_cache(maxsize=16)
def programs(
    config: Config, mesh: Mesh, storage: str | None = None, speculates: bool = False, tells_routes: bool = False
) -> Programs:
    """The programs of one configuration on one mesh.

    storage: of the cache; None: the compute dtype.
    speculates: decode by `speculative.decode`; the model has an MTP module.
    tells_routes: prefill and decode tell which experts each token went to; not with speculation.
    """
    how = recipe(config.precision, config.fp8.accumulation, mesh)
    layers = config.model.num_hidden_layers
    unrolled = mesh.devices.flat[0].platform == "cpu" and layers <= UNROLLED_LAYERS
    execution = Execution(
        mesh, how, _whole(config), "none", unrolled=unrolled, few_tokens=True, tells_routes=tells_routes
    )
    net, storage = network(config.model, execution), storage or how.compute_dtype

    @functools.lru_cache(maxsize=64)
    def maker(rows: int, length: int) -> Callable[[], LatentCache]:
        make = partial(caches.empty, config.model, rows, length, storage, unrolled=unrolled, mtp=speculates)
        return jax.jit(make, out_shardings=caches.cache_shardings(jax.eval_shape(make), mesh))

    def empty_cache(rows: int, length: int) -> LatentCache:
        return maker(rows, length)()

    if speculates:
        from dsjax.inference.speculative import decode
    else:
        decode = _decode
    return Programs(
        net,
        speculates,
        storage,
        jax.jit(partial(_prepare, net)),
        empty_cache,
        lambda slots, length: _empty_state(net, empty_cache(slots, length), slots, speculates),
        jax.jit(partial(_prefill, net, speculates), static_argnames="visible", donate_argnames="prompts"),
        jax.jit(partial(_repeat, mesh)),
        jax.jit(partial(_admit, net, speculates), donate_argnames="state"),
        jax.jit(partial(decode, net), donate_argnames="state"),
        jax.jit(partial(_resize, mesh), static_argnames="length"),
        jax.jit(partial(_score, net)),
    )


def _whole(config: Config) -> Any:
    """Dispatch without chunks: a step's tokens are few."""
    return dataclasses.replace(config.dispatch, chunks=1)


def _prepare(net: Network, params: Any, bias: Any) -> tuple[Any, Any]:
    """Parameters as they are multiplied: matrices in BF16 where the recipe is, unrolled where the network is."""
    how = net.execution.recipe

    def cast(path: Any, a: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        is_matrix = a.ndim - ("dense_layers" in names or "moe_layers" in names) >= 2 and "gate" not in names
        return a.astype(how.dtype) if is_matrix and not how.is_fp8 else a

    params = jax.tree_util.tree_map_with_path(cast, params)
    return (unstack(params), unstack(bias)) if net.execution.unrolled else (params, bias)


def _empty_state(net: Network, cache: LatentCache, slots: int, speculates: bool) -> State:
    zeros = lambda dtype=jnp.int32, *more: jnp.zeros((slots, *more), dtype)  # noqa: E731
    draws = Draws(zeros(jnp.float32), zeros(), zeros(jnp.float32) + 1, zeros(jnp.float32), zeros(jnp.uint32))
    draft = zeros(jnp.float32, net.config.vocab_size) if speculates else None
    rest = (zeros(), zeros(), zeros(), zeros(jnp.bool_), draws, zeros(jnp.int32, STOPS) - 1, draft)
    rest = jax.device_put(rest, NamedSharding(net.execution.mesh, BATCH))
    return State(cache, *rest)


STOPS = 8  # stop tokens of a request, at most


def placed(net: Network, state: State) -> State:
    """The state with its slots over the whole mesh, whatever the partitioner would choose."""
    mesh = net.execution.mesh
    rows = NamedSharding(mesh, BATCH)
    cache = jax.tree.map(lax.with_sharding_constraint, state.cache, caches.cache_shardings(state.cache, mesh))
    rest = jax.tree.map(lambda a: lax.with_sharding_constraint(a, rows), state._replace(cache=None))  # type: ignore[arg-type]
    return rest._replace(cache=cache)


def _prefill(
    net: Network,
    speculates: bool,
    params: Any,
    bias: Any,
    prompts: Prompts,
    tokens_RT: jax.Array,
    count_R: jax.Array,
    start_R: jax.Array,
    *,
    visible: int,
) -> Prompts:
    """The next piece of each prompt; rows are [tokens, the one after them], `count` of them (0: nothing left)."""
    model = net.bind(params, bias)
    size = tokens_RT.shape[1] - 1
    room = prompts.cache.length
    start_R = jnp.where(count_R > 0, start_R, room)
    out = model.extend(tokens_RT[:, :size], start_R, prompts.cache, absorbed=False, visible=visible)
    cache = out.cache
    if speculates:
        _, cache = model.extend_mtp(
            tokens_RT[:, 1:], out.mtp_input_BTD, start_R, cache, absorbed=False, visible=visible
        )

    def newest(before_RD: jax.Array, states_RTD: jax.Array) -> jax.Array:
        last_R11 = jnp.maximum(count_R - 1, 0)[:, None, None]
        last_RD = jnp.take_along_axis(states_RTD, last_R11, axis=1)[:, 0]
        return jnp.where((count_R > 0)[:, None], last_RD, before_RD)

    states = (newest(prompts.hidden_RD, out.hidden_BTD), newest(prompts.mtp_input_RD, out.mtp_input_BTD))
    return Prompts(cache, *states, out.routes_LBTK)


def _repeat(mesh: Mesh, prompts: Prompts, index_R: jax.Array) -> Prompts:
    """Row `index` of `prompts` in each row."""
    rows = NamedSharding(mesh, BATCH)
    cache = jax.tree.map(lambda a: a[:, index_R], prompts.cache)
    cache = jax.tree.map(lax.with_sharding_constraint, cache, caches.cache_shardings(cache, mesh))
    states = (lax.with_sharding_constraint(a[index_R], rows) for a in (prompts.hidden_RD, prompts.mtp_input_RD))
    return Prompts(cache, *states)


def _admit(
    net: Network,
    speculates: bool,
    params: Any,
    bias: Any,
    state: State,
    prompts: Prompts,
    slot_R: jax.Array,
    length_R: jax.Array,
    limit_R: jax.Array,
    draws: Draws,
    stops_RX: jax.Array,
) -> tuple[State, jax.Array, jax.Array]:
    """The rows in their slots (a slot that does not exist takes none), and the first token of each and its log-prob."""
    model = net.bind(params, bias)
    token_R, log_prob_R = sampling.draw(model.logits(prompts.hidden_RD), draws, length_R)
    cache, draft_RV = prompts.cache, None
    if speculates:
        mtp_R1D, cache = model.extend_mtp(
            token_R[:, None], prompts.mtp_input_RD[:, None], length_R - 1, cache, absorbed=True
        )
        draft_RV = model.logits(mtp_R1D[:, 0])
    active_R = (length_R + 1 < limit_R) & ~jnp.any(token_R[:, None] == stops_RX, axis=-1)
    rows = State(cache, token_R, length_R, limit_R, active_R, draws, stops_RX, draft_RV)
    rest = jax.tree.map(
        lambda whole, new: whole.at[slot_R].set(new.astype(whole.dtype), mode="drop"),
        state._replace(cache=None),  # type: ignore[arg-type]
        rows._replace(cache=None),  # type: ignore[arg-type]
    )
    put = lambda whole, new: whole.at[:, slot_R, : new.shape[2]].set(new, mode="drop")  # noqa: E731
    return placed(net, rest._replace(cache=jax.tree.map(put, state.cache, cache))), token_R, log_prob_R


def _resize(mesh: Mesh, cache: LatentCache, length: int) -> LatentCache:
    """The cache with room for `length` positions, fewer or more."""

    def one(a: jax.Array) -> jax.Array:
        if length <= a.shape[2]:
            return a[:, :, :length]
        return jnp.pad(a, [(0, 0), (0, 0), (0, length - a.shape[2]), *[(0, 0)] * (a.ndim - 3)])

    sized = jax.tree.map(one, cache)
    return jax.tree.map(lax.with_sharding_constraint, sized, caches.cache_shardings(sized, mesh))


def _decode(
    net: Network, params: Any, bias: Any, state: State, keep_B: jax.Array, steps: jax.Array
) -> tuple[State, Emitted]:
    """Up to `steps` tokens for every active slot; `keep` is false for slots that have been given up."""
    slots = len(keep_B)
    room = state.cache.length

    def step(carry):
        i, state, emitted = carry
        model = net.bind(params, bias)
        start_B = jnp.where(state.active_B, state.length_B, room)
        out = model.extend(state.last_B[:, None], start_B, state.cache, absorbed=True)
        token_B, log_prob_B = sampling.draw(model.logits(out.hidden_BTD[:, 0]), state.draws, state.length_B + 1)
        active_B = state.active_B
        put = lambda rows, new: rows.at[:, i].set(jnp.where(active_B, new, 0))  # noqa: E731
        emitted = emitted._replace(
            tokens_BT=put(emitted.tokens_BT, token_B),
            log_probs_BT=put(emitted.log_probs_BT, log_prob_B),
            count_B=emitted.count_B + active_B,
        )
        if emitted.routes_BTLK is not None and out.routes_LBTK is not None:
            routes_BLK = out.routes_LBTK[:, :, 0].swapaxes(0, 1)
            emitted = emitted._replace(routes_BTLK=emitted.routes_BTLK.at[:, i].set(routes_BLK))
        length_B = state.length_B + active_B
        goes_on_B = active_B & (length_B + 1 < state.limit_B) & ~jnp.any(token_B[:, None] == state.stops_BX, axis=-1)
        last_B = jnp.where(active_B, token_B, state.last_B)
        state = state._replace(cache=out.cache, last_B=last_B, length_B=length_B, active_B=goes_on_B)
        return i + 1, state, emitted

    def unfinished(carry):
        i, state, _ = carry
        return (i < steps) & jnp.any(state.active_B)

    state = state._replace(active_B=state.active_B & keep_B)
    nothing = nothing_emitted(slots, STEPS)
    if net.execution.tells_routes:
        shape = (slots, STEPS, net.config.num_moe_layers, net.config.num_experts_per_tok)
        nothing = nothing._replace(routes_BTLK=jnp.zeros(shape, jnp.int32))
    _, state, emitted = lax.while_loop(unfinished, step, (jnp.int32(0), state, nothing))
    return placed(net, state), emitted


def nothing_emitted(slots: int, room: int) -> Emitted:
    """Rows with room for `room` tokens."""
    counts = jnp.zeros((slots,), jnp.int32)
    return Emitted(jnp.zeros((slots, room), jnp.int32), jnp.zeros((slots, room), jnp.float32), counts, counts, counts)


def _score(net: Network, params: Any, bias: Any, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log-probability of each token after the first, whether it is the likeliest), [B, T - 1]."""
    model = net.bind(params, bias)
    hidden_BTD, next_BT = model(tokens_BT[:, :-1]).hidden_BTD, tokens_BT[:, 1:]
    batch, length = next_BT.shape
    size = min(LOGIT_POSITIONS, length)

    def piece(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_BCD, next_BC = inputs
        logits_BCV = model.logits(hidden_BCD)
        chosen_BC = jnp.take_along_axis(logits_BCV, next_BC[..., None], axis=-1)[..., 0]
        return chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1), jnp.argmax(logits_BCV, axis=-1) == next_BC

    cut = lambda a: a.reshape(batch, length // size, size, *a.shape[2:]).swapaxes(0, 1)  # noqa: E731
    pieces = lax.map(piece, (cut(hidden_BTD), cut(next_BT)))
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(batch, length), pieces)  # type: ignore[return-value]
