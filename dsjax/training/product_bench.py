"""How fast FP8 products are against BF16 ones here, at shapes of DeepSeek-V3 that DeepGEMM publishes rates of.

Every product is timed with its operands at hand, and from what training holds: BF16 activations and gradients, FP32
master weights. All take turns, so that a machine that slows down slows all of them.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.config import MeshConfig
from dsjax.numerics.contraction import quantized, quantized_weight, rows_times, weight_gradient
from dsjax.numerics.grouped_matmul import Groups
from dsjax.numerics.linear import TOKENS, WIDTH, linear
from dsjax.numerics.recipe import Recipe, recipe
from dsjax.planning.buffers import ROW_BLOCK
from dsjax.sharding import make_mesh
from dsjax.training.bench import rounded, what_multiplies
from dsjax.training.machine import seconds

PRECISIONS = {"bf16": "bf16", "fp8": "fp8_deepseek"}
DENSE = ((2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048))  # (N, K)
GROUPED = ((4096, 7168), (7168, 2048))  # gate and up side by side; down
EXPERTS = (4, 8)
PUBLISHED_TOKENS, FEW_TOKENS = (4096, 8192), (128,)
ROUNDS = 2  # of which, and of one call before, the best counts
MIN_SECONDS = 0.1  # a timing repeats its product for so long, so that starting it costs nothing
RATES = {
    "bf16": "BF16",
    "fp8": "FP8",
    "bf16_from_inputs": "BF16 with casts",
    "fp8_from_inputs": "FP8 with quantising",
}
RATIOS = {"fp8_over_bf16": "FP8 / BF16", "fp8_over_bf16_from_inputs": "FP8 / BF16, both with"}


def product_bench(tokens: Sequence[int] | None = None) -> dict[str, Any]:
    """Times Fprop and Wgrad, dense and grouped by expert, on one device.

    Args:
      tokens: rows of the dense products; the grouped ones have four times the largest in all, so with 8192 they are
        the published 4 x 8192 and 8 x 4096. Multiples of 16. None: 4096 and 8192, on a CPU 128.

    Returns:
      device_kind; rows, "as published" or not; products, what multiplies in either precision; and `shapes`, a
      list of: product, experts (None: dense), tokens (of each expert), n, k, TFLOP/s by the names of `RATES`, and FP8's
      over BF16's by those of `RATIOS`.
    """
    device = jax.devices()[0]
    tokens = tuple(tokens or (FEW_TOKENS if device.platform == "cpu" else PUBLISHED_TOKENS))
    mesh = make_mesh(MeshConfig(1, 1, 1), [device])
    recipes = {name: recipe(precision, mesh=mesh) for name, precision in PRECISIONS.items()}
    cases: list[tuple[int | None, int, int, int]] = [(None, count, n, k) for count in tokens for n, k in DENSE]
    cases += [(experts, 4 * max(tokens) // experts, n, k) for experts in EXPERTS for n, k in GROUPED]
    return {
        "device_kind": device.device_kind,
        "rows": "as published" if tokens == PUBLISHED_TOKENS else "not as published",
        "products": {name: what_multiplies(how) for name, how in recipes.items()},
        "shapes": [figures for case in cases for figures in _measured(recipes, *case)],
    }


def table(figures: Mapping[str, Any]) -> str:
    """`product_bench`'s figures as Markdown."""
    header = ["product", "experts", "tokens", "N", "K", *RATES.values(), *RATIOS.values()]
    rows = [header, ["---"] * len(header)]
    for one in figures["shapes"]:
        which = [one["product"], one["experts"] or "dense", one["tokens"], one["n"], one["k"]]
        rows.append([*which, *(one[name] for name in (*RATES, *RATIOS))])
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    how = "; ".join(f"{name} {what}" for name, what in figures["products"].items())
    return "\n".join([f"TFLOP/s on {figures['device_kind']}, rows {figures['rows']}; {how}.", "", *lines, ""])


def _measured(
    recipes: Mapping[str, Recipe], experts: int | None, tokens: int, n: int, k: int
) -> Iterator[dict[str, Any]]:
    """The figures of Fprop, then those of Wgrad."""
    x, dy, w = _arrays(experts, tokens, n, k)
    groups = None
    if experts is not None:
        groups = Groups(jnp.full((experts,), tokens, jnp.int32), math.gcd(tokens, ROW_BLOCK))
    for product, prepare in (("Fprop", partial(_fprop, x, w)), ("Wgrad", partial(_wgrad, x, dy))):
        case = {"product": product, "experts": experts, "tokens": tokens, "n": n, "k": k}
        print(", ".join(f"{name} {value or 'none'}" for name, value in case.items()), file=sys.stderr, flush=True)
        runs: dict[str, Callable[[], jax.Array]] = {}
        for name, how in recipes.items():
            runs[name], runs[f"{name}_from_inputs"] = prepare(groups, how)
        flops = 2.0 * tokens * (experts or 1) * n * k
        rates = {name: flops / best / 1e12 for name, best in _best_seconds(runs).items()}
        rates["fp8_over_bf16"] = rates["fp8"] / rates["bf16"]
        rates["fp8_over_bf16_from_inputs"] = rates["fp8_from_inputs"] / rates["bf16_from_inputs"]
        yield case | {name: rounded(rate) for name, rate in rates.items()}


def _arrays(experts: int | None, tokens: int, n: int, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x, dy, w): one sequence, or all experts' rows; experts share their numbers, which changes no speed."""
    keys = jax.random.split(jax.random.key(0), 3)
    lead = (1, tokens) if experts is None else (experts * tokens,)
    x, dy = (jax.random.normal(key, (*lead, width), jnp.bfloat16) for key, width in zip(keys, (k, n), strict=False))
    w = jax.random.normal(keys[2], (k, n), jnp.float32)
    return x, dy, w if experts is None else jnp.tile(w[None], (experts, 1, 1))


Runs = tuple[Callable[[], jax.Array], Callable[[], jax.Array]]  # with the operands at hand; from the inputs


def _fprop(x: jax.Array, w: jax.Array, groups: Groups | None, how: Recipe) -> Runs:
    # Kernels read a weight along the contraction, as Dgrad has it; XLA:CPU is quicker the other way round.
    turned = how.native is not None
    contracted = WIDTH if turned else TOKENS

    @jax.jit
    def operands(x, w, groups):
        w = w.swapaxes(-1, -2) if turned else w
        return quantized(x, how.activation, WIDTH, groups, how), quantized_weight(w, how.weight, contracted, how)

    multiply = jax.jit(lambda x, w, groups: rows_times(x, w, groups, how, transposed=turned))
    whole = jax.jit(lambda x, w, groups: linear(x, w, how, groups))
    return partial(multiply, *operands(x, w, groups), groups), partial(whole, x, w, groups)


def _wgrad(x: jax.Array, dy: jax.Array, groups: Groups | None, how: Recipe) -> Runs:
    @jax.jit
    def operands(x, dy, groups):
        return quantized(x, how.activation, TOKENS, groups, how), quantized(dy, how.gradient, TOKENS, groups, how)

    @jax.jit
    def whole(x, dy, groups):
        x, dy = operands(x, dy, groups)
        return weight_gradient(x, dy, groups, how)

    multiply = jax.jit(lambda x, dy, groups: weight_gradient(x, dy, groups, how))
    return partial(multiply, *operands(x, dy, groups), groups), partial(whole, x, dy, groups)


def _best_seconds(runs: Mapping[str, Callable[[], jax.Array]]) -> dict[str, float]:
    """The seconds of one call of each."""
    best = {}
    for name, run in runs.items():
        _repeat(run, 1)  # compiles
        best[name] = seconds(partial(_repeat, run, 1))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            count = math.ceil(MIN_SECONDS / best[name])
            best[name] = min(best[name], seconds(partial(_repeat, run, count)) / count)
    return best


def _repeat(run: Callable[[], jax.Array], count: int) -> None:
    for _ in range(count):
        result = run()
    jax.block_until_ready(result)
