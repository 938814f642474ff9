"""dsjax bench --decode: tokens per second, what a token takes in the cache, what a cached prefix saves."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dsjax.config import Config, MeshConfig, ModelConfig
from dsjax.inference.decoding import STEPS, bucket, programs
from dsjax.inference.engine import Engine
from dsjax.inference.prefix import PrefixCache
from dsjax.inference.sampling import Sampling
from dsjax.planning.counts import kv_cache_bytes_per_token
from dsjax.sharding import make_mesh
from dsjax.training.bench import rounded
from dsjax.training.machine import use_compile_cache
from dsjax.training.state import build_network

PROMPT, NEW, BATCHES = 64, 128, (1, 8)
SHORT, LONG = 256, 4096  # cached tokens between which the time of a step is compared
PREFIX = 4096
REPEATS = 3
GQA_GROUPS = 8  # key-value heads of the grouped-query attention that MLA is held against


def cache_bytes(model: ModelConfig, bytes_per_number: int = 2) -> dict[str, int]:
    """Bytes of a token in all layers, closed form: MLA's latents; keys and values of every head; of 8 groups' heads."""
    pair = model.num_hidden_layers * (model.qk_head_dim + model.v_head_dim) * bytes_per_number
    return {
        "mla": kv_cache_bytes_per_token(model, bytes_per_number),
        "mha": model.num_attention_heads * pair,
        "gqa": min(GQA_GROUPS, model.num_attention_heads) * pair,
    }


def decode_bench(config: Config, batches: Sequence[int] = BATCHES, repeats: int = REPEATS) -> dict[str, Any]:
    """The figures, rounded; weights are random, decoding is greedy, one device. Times are the best of `repeats`.

    batches: requests that are decoded together, for each of which throughput is measured.
    """
    use_compile_cache(config.monitor.compile_cache)
    positions = max(config.model.max_position_embeddings, bucket(PREFIX + 2))
    model = dataclasses.replace(config.model, max_position_embeddings=positions, num_nextn_predict_layers=0)
    config = dataclasses.replace(config, model=model)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    params, bias = jax.jit(build_network(config, mesh).init)(jax.random.key(config.training.seed))
    figures: dict[str, Any] = {"prompt_tokens": PROMPT, "new_tokens": NEW, "precision": config.precision}
    figures |= {f"batch_{n}": _throughput(Engine(config, params, bias, mesh, slots=n), n, repeats) for n in batches}
    engine = Engine(config, params, bias, mesh, slots=1)
    width = 4 if engine.programs.storage == "float32" else 2
    return figures | {
        "cache_bytes_per_token": engine.cache_bytes_per_token,
        "cache_bytes_per_token_closed_form": cache_bytes(model, width),
        "step_milliseconds": _step_times(config, mesh, params, bias, repeats),
        f"prefill_{PREFIX}_tokens": _prefix(config, mesh, params, bias, repeats),
        "device_kind": jax.devices()[0].device_kind,
    }


def _prompts(model: ModelConfig, count: int, length: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(model.vocab_size, size=(count, length)).tolist()


def _best(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """(seconds, processor seconds) of the quickest run, after one that compiles."""
    run()
    times = []
    for _ in range(repeats):
        start, busy = time.perf_counter(), time.process_time()
        run()
        times.append((time.perf_counter() - start, time.process_time() - busy))
    return min(seconds for seconds, _ in times), min(busy for _, busy in times)


def _throughput(engine: Engine, batch: int, repeats: int) -> dict[str, float]:
    """New tokens per second of `batch` requests, prefill included."""
    prompts = _prompts(engine.config.model, batch, PROMPT)
    seconds, busy = _best(lambda: engine.generate(prompts, Sampling(NEW, 0.0)), repeats)
    return {
        "tokens_per_second": rounded(batch * NEW / seconds),
        "tokens_per_processor_second": rounded(batch * NEW / busy),
    }


def _step_times(config: Config, mesh: Any, params: Any, bias: Any, repeats: int) -> dict[str, dict[str, float]]:
    """Of a step at batch 1 with 256 and 4,096 tokens cached: in the same bucket, and the former in its own too."""
    ready = programs(config, mesh)
    weights = ready.prepare(params, bias)

    def milliseconds(cached: int, room: int) -> np.ndarray:
        empty = ready.empty_state(1, room)
        full = lambda value, dtype: jax.device_put(np.full(1, value, dtype))  # noqa: E731
        state = empty._replace(
            length_B=full(cached, np.int32), limit_B=full(room, np.int32), active_B=full(True, np.bool_)
        )

        def run() -> None:
            # The state is donated.
            fresh = jax.tree.map(lambda a: a.copy(), state)
            jax.block_until_ready(ready.decode(*weights, fresh, np.ones(1, bool), np.int32(STEPS)))

        return np.array([1000 * seconds / STEPS for seconds in _best(run, repeats)])

    room = bucket(LONG + STEPS)
    times = {f"{n}_cached": milliseconds(n, room) for n in (SHORT, LONG)}
    times["growth"] = times[f"{LONG}_cached"] / times[f"{SHORT}_cached"]
    times[f"{SHORT}_cached_in_its_own_bucket"] = milliseconds(SHORT, bucket(SHORT + STEPS))
    kinds = ("elapsed", "processor")
    return {kind: {name: rounded(pair[i]) for name, pair in times.items()} for i, kind in enumerate(kinds)}


def _prefix(config: Config, mesh: Any, params: Any, bias: Any, repeats: int) -> dict[str, float]:
    """Seconds to the first token of a prompt of 4,096 tokens and one more: nothing known of it, or all but the last."""
    engine = Engine(config, params, bias, mesh, slots=1, prefix_cache=PrefixCache())
    [prompt] = _prompts(config.model, 1, PREFIX + 1)
    salts = iter(range(1 + repeats))

    def ask(salt: str) -> None:
        engine.generate([prompt], Sampling(1, 0.0), salt=salt)

    cold, _ = _best(lambda: ask(f"cold {next(salts)}"), repeats)
    ask("known")
    hit, _ = _best(lambda: ask("known"), repeats)
    return {"cold_seconds": rounded(cold), "cached_seconds": rounded(hit), "times_faster": rounded(cold / hit)}
