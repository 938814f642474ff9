"""The product that every Linear and every expert is made of, with its own backward pass.

Under an FP8 recipe it is the report's Figure 6: Fprop multiplies x in 1x128 tiles with w in 128x128 blocks; Dgrad dy in
1x128 tiles with the same w; Wgrad x and dy in tiles along the tokens, where x is what Fprop multiplied, kept in E4M3.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from dsjax.numerics import fp8
from dsjax.numerics.contraction import (
    Operand,
    Scaled,
    Weight,
    Working,
    quantized,
    quantized_weight,
    rows_times,
    weight_gradient,
)
from dsjax.numerics.grouped_matmul import Groups
from dsjax.numerics.recipe import Recipe, Scaling

TOKENS, WIDTH = -2, -1  # dimensions of activations and gradients

# Under a recipe that `measures`, the first numbers of a weight's gradient are, for each of these operands, the sums
# over its numbers of: 1, x not 0, x**2, error**2, x out of range, x not 0 but rounded to 0. The rest is 0.
CLASSES = ("activation", "weight", "gradient", "activation (Wgrad)", "gradient (Wgrad)")
STATISTICS = 6


def product(spec: str, a: jax.Array, b: jax.Array, recipe: Recipe, out_dtype: DTypeLike) -> jax.Array:
    """einsum of two operands cast to the compute dtype, never quantised; summed in FP32, returned in `out_dtype`."""
    a, b = a.astype(recipe.dtype), b.astype(recipe.dtype)
    out = jnp.einsum(spec, a, b, precision=recipe.high.precision, preferred_element_type=jnp.float32)
    return out.astype(out_dtype)


def linear(x: jax.Array, w: Weight, recipe: Recipe, groups: Groups | None = None) -> jax.Array:
    """x [..., tokens, D] times the FP32 master weight w [D, F], in the compute dtype.

    With `groups`, rows x [C, D] sorted by expert, each times its expert's matrix of w [E, D, F]; rows past the groups
    come out zero. The weight's gradient is FP32, straight from the FP32 sums.
    """
    return _linear(x.astype(recipe.dtype), w, groups, recipe)


def swiglu_linear(
    gate: jax.Array,
    up: jax.Array,
    w: Weight,
    recipe: Recipe,
    groups: Groups | None = None,
    row_weights: jax.Array | None = None,
) -> jax.Array:
    """`linear` of silu(gate) * up, times row_weights [rows] where given.

    Only `gate` and `up` are kept for the backward pass, named "gate_up", in E4M3 under an FP8 recipe; their product is
    computed again [V3 §3.3.3].
    """
    return _swiglu_linear(gate.astype(recipe.dtype), up.astype(recipe.dtype), row_weights, w, groups, recipe)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x: jax.Array, w: Weight, groups: Groups | None, recipe: Recipe) -> jax.Array:
    return _forward(x, w, groups, recipe)


def _forward(x: jax.Array, w: Weight, groups: Groups | None, recipe: Recipe) -> jax.Array:
    operand = quantized(x, recipe.activation, WIDTH, groups, recipe)
    return rows_times(operand, quantized_weight(w, recipe.weight, -2, recipe), groups, recipe, transposed=False)


def _backward(
    x: jax.Array, dy: jax.Array, w: Weight, groups: Groups | None, recipe: Recipe
) -> tuple[jax.Array, Weight]:
    """(dx, dw), x being what was kept of the input."""
    dy_rows = quantized(dy, recipe.gradient, WIDTH, groups, recipe)
    dx = rows_times(dy_rows, quantized_weight(w, recipe.weight, -1, recipe), groups, recipe, transposed=True)
    x_tokens = quantized(x, recipe.activation, TOKENS, groups, recipe)
    dy_tokens = quantized(dy, recipe.gradient, TOKENS, groups, recipe)
    return dx, _to_master(weight_gradient(x_tokens, dy_tokens, groups, recipe), w)


def _to_master(dw: jax.Array, w: Weight) -> Weight:
    return Working(dw, None, None) if isinstance(w, Working) else dw.astype(w.dtype)  # type: ignore[arg-type]


def _measurements(
    x: jax.Array, kept: jax.Array, dy: jax.Array, w: Any, groups: Groups | None, recipe: Recipe
) -> jax.Array:
    """What CLASSES says, in the shape of w; x is the input of Fprop, not rounded, `kept` what Wgrad has of it."""
    operands = (
        (x, quantized(x, recipe.activation, WIDTH, groups, recipe)),
        (w, quantized_weight(w, recipe.weight, -2, recipe)),
        (dy, quantized(dy, recipe.gradient, WIDTH, groups, recipe)),
        (x, quantized(kept, recipe.activation, TOKENS, groups, recipe)),
        (dy, quantized(dy, recipe.gradient, TOKENS, groups, recipe)),
    )
    sums = jnp.concatenate([_statistics(exact, operand) for exact, operand in operands])
    return jnp.pad(sums, (0, w.size - sums.size)).reshape(w.shape)


def _statistics(exact: jax.Array, rounded: Operand) -> jax.Array:
    assert not isinstance(rounded, Scaled)
    x, y = exact.astype(jnp.float32), rounded.astype(jnp.float32)
    lost = (x != 0) & (y == 0)
    kinds = (jnp.ones_like(x), x != 0, x * x, (x - y) ** 2, ~jnp.isfinite(y), lost)
    return jnp.stack([jnp.sum(kind, dtype=jnp.float32) for kind in kinds])


def _linear_fwd(x: jax.Array, w: Weight, groups: Groups | None, recipe: Recipe):
    kept = x if recipe.measures else _keep(x, recipe.cached)
    return _forward(x, w, groups, recipe), (kept, w, groups)


def _linear_bwd(recipe: Recipe, kept, dy: jax.Array):
    x, w, groups = kept
    if recipe.measures:
        kept = _kept(_keep(x, recipe.cached), recipe.cached, jnp.float32)
        return _backward(x, dy, w, groups, recipe)[0], _measurements(x, kept, dy, w, groups, recipe), None
    # Not rounded to the compute dtype in between.
    return *_backward(_kept(x, recipe.cached, jnp.float32), dy, w, groups, recipe), None


_linear.defvjp(_linear_fwd, _linear_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _swiglu_linear(gate, up, row_weights, w, groups: Groups | None, recipe: Recipe) -> jax.Array:
    return _forward(_swiglu(gate, up, row_weights), w, groups, recipe)


def _swiglu(gate: jax.Array, up: jax.Array, row_weights: jax.Array | None) -> jax.Array:
    hidden = jax.nn.silu(gate) * up
    return hidden if row_weights is None else hidden * row_weights[:, None].astype(hidden.dtype)


def _swiglu_linear_fwd(gate, up, row_weights, w, groups: Groups | None, recipe: Recipe):
    kept = [a if recipe.measures else _keep(a, recipe.cached) for a in (gate, up)]
    kept = jax.tree.map(partial(checkpoint_name, name="gate_up"), kept)
    return _forward(_swiglu(gate, up, row_weights), w, groups, recipe), (kept, row_weights, w, groups)


def _swiglu_linear_bwd(recipe: Recipe, kept, dy: jax.Array):
    inputs, row_weights, w, groups = kept
    if recipe.measures:
        exact = _swiglu(inputs[0], inputs[1], row_weights)
        inputs = [_keep(a, recipe.cached) for a in inputs]
    gate, up = (_kept(a, recipe.cached, recipe.dtype) for a in inputs)
    hidden, pull = jax.vjp(_swiglu, gate, up, row_weights)
    dhidden, dw = _backward(hidden, dy, w, groups, recipe)
    if recipe.measures:
        dw = _measurements(exact, hidden, dy, w, groups, recipe)
    return *pull(dhidden), dw, None


_swiglu_linear.defvjp(_swiglu_linear_fwd, _swiglu_linear_bwd)


def _keep(x: jax.Array, scaling: Scaling | None) -> Any:
    """x for the backward pass: as it is, or in E4M3, scales that are powers of two as their exponents."""
    if scaling is None:
        return x
    q, scale = fp8.quantize(x, _kept_tiles(x, scaling), scaling.scale_format)
    return q, fp8.exponents(scale) if scaling.scale_format == "ue8m0" else scale


def _kept(kept: Any, scaling: Scaling | None, dtype: DTypeLike) -> jax.Array:
    if scaling is None:
        return kept
    q, scale = kept
    if scaling.scale_format == "ue8m0":
        scale = fp8.from_exponents(scale)
    return fp8.apply_scales(q.astype(jnp.float32), scale, _kept_tiles(q, scaling)).astype(dtype)


def _kept_tiles(x: jax.Array, scaling: Scaling) -> list[int | None]:
    if scaling.free is None:
        return [None] * x.ndim
    return [1] * (x.ndim - 1) + [scaling.contracted]
