"""What the FP8 code costs a run that does not use it; a script.

    python tests/fp8_overhead.py [CONFIG] [--steps 30] [--config.section.field=value ...]

Times the train step of CONFIG (default: configs/bench.py) in BF16 and in FP32, in turns with the same step whose
Linears and experts know nothing of FP8: three products and their sums, stated below. Prints JSON: the median step
times, and the median of their ratio over the turns.
"""

import argparse
import dataclasses
import json
import os
import statistics
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsjax.config import load
from dsjax.numerics import grouped_matmul, linear
from dsjax.planning import layout
from dsjax.sharding import make_mesh
from dsjax.training.bench import WARM_UP_STEPS, Timed, rounded
from dsjax.training.machine import seconds


def multiply(x, w, groups, recipe, *, transposed):
    """x times w, dense or each row by its expert's matrix, in the compute dtype with sums in FP32."""
    x, w = x.astype(recipe.dtype), w.astype(recipe.dtype)
    if groups is not None:
        how = (recipe.precision, recipe.dtype, recipe.platform)
        return grouped_matmul.rows_times_weights(x, w, groups, *how, transposed=transposed)
    spec = "...f,df->...d" if transposed else "...d,df->...f"
    wide = jnp.einsum(spec, x, w, precision=recipe.precision, preferred_element_type=jnp.float32)
    return wide.astype(recipe.dtype)


def gradients(x, dy, w, groups, recipe):
    """(dx, dw) of `multiply`; dw is FP32."""
    dx = multiply(dy, w, groups, recipe, transposed=True)
    if groups is not None:
        return dx, grouped_matmul.weight_gradient(x, dy, groups, recipe.precision, recipe.platform)
    rows = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
    return dx, jnp.einsum("md,mf->df", *rows, precision=recipe.precision, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def plain_linear(x, w, groups, recipe):
    return multiply(x, w, groups, recipe, transposed=False)


plain_linear.defvjp(
    lambda x, w, groups, recipe: (plain_linear(x, w, groups, recipe), (x, w, groups)),
    lambda recipe, kept, dy: (*gradients(kept[0], dy, kept[1], kept[2], recipe), None),
)


def hidden(gate, up, row_weights):
    y = jax.nn.silu(gate) * up
    return y if row_weights is None else y * row_weights[:, None].astype(y.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def plain_swiglu_linear(gate, up, row_weights, w, groups, recipe):
    return multiply(hidden(gate, up, row_weights), w, groups, recipe, transposed=False)


def swiglu_fwd(gate, up, row_weights, w, groups, recipe):
    kept = [checkpoint_name(a, "gate_up") for a in (gate, up)]
    return plain_swiglu_linear(gate, up, row_weights, w, groups, recipe), (*kept, row_weights, w, groups)


def swiglu_bwd(recipe, kept, dy):
    *inputs, w, groups = kept
    y, pull = jax.vjp(hidden, *inputs)
    dhidden, dw = gradients(y, dy, w, groups, recipe)
    return *pull(dhidden), dw, None


plain_swiglu_linear.defvjp(swiglu_fwd, swiglu_bwd)


def overhead(config, steps: int) -> dict[str, float]:
    """How long a step of `config` takes beside its plain statement."""
    mesh = make_mesh(config.mesh)
    timed = [Timed(config, mesh)]
    ours = linear._linear, linear._swiglu_linear
    linear._linear, linear._swiglu_linear = plain_linear, plain_swiglu_linear
    try:
        timed.append(Timed(config, mesh))
    finally:
        linear._linear, linear._swiglu_linear = ours
    for turn in range(WARM_UP_STEPS + steps):
        for one in timed if turn % 2 else timed[::-1]:
            elapsed = seconds(one.step)
            if turn >= WARM_UP_STEPS:
                one.step_seconds.append(elapsed)
    step, plain = timed
    ratios = [a / b for a, b in zip(step.step_seconds, plain.step_seconds, strict=True)]
    figures = (step.median_seconds, plain.median_seconds, statistics.median(ratios))
    return dict(zip(("step_seconds", "plain_step_seconds", "ratio"), map(rounded, figures), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", nargs="?", default=str(Path(__file__).parents[1] / "configs" / "bench.py"))
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each, after a warm-up (default: 30)")
    args, overrides = parser.parse_known_args()
    config = load(args.config, [word.removeprefix("--config.") for word in overrides])
    config = layout.resolve(config, jax.device_count())
    found = {name: overhead(dataclasses.replace(config, precision=name), args.steps) for name in ("bf16", "fp32")}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
