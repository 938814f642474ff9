"""The product every Linear is made of, with its own backward pass."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsjax.config import ConfigError


@dataclass(frozen=True)
class Recipe:
    """How numbers are held and multiplied; `config.precision` names one."""

    name: str
    compute_dtype: str  # of activations and of the operands of matmuls; sums are FP32 always

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)

    @property
    def precision(self) -> lax.Precision:
        """FP32 means FP32: without this, TPUs and GPUs would multiply in BF16 or TF32."""
        return lax.Precision.HIGHEST if self.compute_dtype == "float32" else lax.Precision.DEFAULT


RECIPES = {name: Recipe(name, dtype) for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))}


def recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises ConfigError for an unknown one."""
    if name not in RECIPES:
        raise ConfigError(f"unknown precision {name!r}; known are {', '.join(RECIPES)}")
    return RECIPES[name]


def product(spec: str, a: jax.Array, b: jax.Array, recipe: Recipe, out_dtype: DTypeLike) -> jax.Array:
    """einsum of two operands cast to the compute dtype, summed in FP32, returned in `out_dtype`."""
    a, b = a.astype(recipe.dtype), b.astype(recipe.dtype)
    out = jnp.einsum(spec, a, b, precision=recipe.precision, preferred_element_type=jnp.float32)
    return out.astype(out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, w: jax.Array, recipe: Recipe) -> jax.Array:
    """x [..., D] times the FP32 master weight w [D, F]; the result has the compute dtype.

    The weight's gradient is FP32, straight from the FP32 sums.
    """
    return product("...d,df->...f", x, w, recipe, recipe.dtype)


def _linear_fwd(x: jax.Array, w: jax.Array, recipe: Recipe) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return linear(x, w, recipe), (x, w)


def _linear_bwd(recipe: Recipe, kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    dx = product("...f,df->...d", dy, w, recipe, x.dtype)
    # Autodiff would write this one as a transposed product, four times slower on XLA:CPU.
    x_MD, dy_MF = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return dx, product("md,mf->df", x_MD, dy_MF, recipe, w.dtype)


linear.defvjp(_linear_fwd, _linear_bwd)
