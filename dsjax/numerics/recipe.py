"""Recipes: how numbers are held and multiplied. `config.precision` names one, and every matmul obeys it.

An FP8 recipe follows section 3.3 of DeepSeek-V3's report: E4M3 for both operands of all three products of a Linear
(Fprop, Dgrad, Wgrad), scales found online, sums in FP32. What the report keeps high stays high under every recipe:
embedding, output head, gate, norms, attention core, and MTP's eh_proj, which is published unquantised.
"""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from dsjax.config import ConfigError


@dataclass(frozen=True)
class Scaling:
    """Which values of an operand share a scale, by its dimensions in the product; None: all along that dimension."""

    free: int | None
    contracted: int | None
    scale_format: str = "float32"  # or "ue8m0": powers of two


TILES, BLOCKS = Scaling(1, 128), Scaling(128, 128)
TILES_UE8M0, BLOCKS_UE8M0 = Scaling(1, 128, "ue8m0"), Scaling(128, 128, "ue8m0")
TENSOR = Scaling(None, None)
MX = Scaling(1, 32, "ue8m0")


@dataclass(frozen=True)
class Recipe:
    """How numbers are held and multiplied. The Scalings are None together: then no operand is quantised."""

    name: str
    compute_dtype: str  # of activations, of results, and of the operands of matmuls that are not FP8; sums are FP32
    activation: Scaling | None = None
    weight: Scaling | None = None
    gradient: Scaling | None = None
    cached: Scaling | None = None  # the input of a Linear as kept for Wgrad, which tiles it anew; None: as it came
    accumulation: str = "fp32"  # "fp22", "fp22_promote128": the tensor core's narrow accumulator, emulated
    native: str | None = None  # the kernels that multiply; None: emulated by wider products
    # For what the partitioner cannot know: what multiplies, and weights to be gathered as bytes.
    mesh: Mesh | None = None
    measures: bool = False  # weights get statistics of the operands for gradients; see `linear.CLASSES`

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)

    @property
    def platform(self) -> str | None:
        """What multiplies: "cpu", "gpu", "tpu"; None where no mesh says it."""
        return None if self.mesh is None else self.mesh.devices.flat[0].platform

    @property
    def is_fp8(self) -> bool:
        return self.activation is not None

    @property
    def precision(self) -> lax.Precision:
        """FP32 means FP32: without this, TPUs and GPUs would multiply in BF16 or TF32."""
        return lax.Precision.HIGHEST if self.operand_dtype == jnp.float32 else lax.Precision.DEFAULT

    @property
    def operand_dtype(self) -> jnp.dtype:
        """What operands are multiplied in where no kernel does it; E4M3 times a power of two is exact in BF16."""
        if not self.is_fp8:
            return self.dtype
        formats = {scaling.scale_format for scaling in (self.activation, self.weight, self.gradient) if scaling}
        return jnp.dtype(jnp.bfloat16 if formats == {"ue8m0"} else jnp.float32)

    @property
    def high(self) -> "Recipe":
        """For what is not quantised under any recipe."""
        return Recipe(self.name, self.compute_dtype) if self.is_fp8 else self

    @property
    def input_as_is(self) -> "Recipe":
        """For a Linear whose input is kept in a format of its own."""
        return dataclasses.replace(self, cached=None)

    @property
    def after_dispatch(self) -> "Recipe":
        """For a product whose rows have travelled.

        Their scales are powers of two: so quantising them before they travel, and again where they are multiplied, is
        quantising once.
        """
        travelled = _power_of_two(self.activation)
        return dataclasses.replace(self, activation=travelled, cached=travelled)

    @property
    def before_combine(self) -> "Recipe":
        """For a product whose result will travel, and whose gradient therefore has."""
        return dataclasses.replace(self, gradient=_power_of_two(self.gradient))


def _power_of_two(scaling: Scaling | None) -> Scaling | None:
    return scaling and dataclasses.replace(scaling, scale_format="ue8m0")


def _fp8(name: str, activation: Scaling, weight: Scaling, gradient: Scaling) -> Recipe:
    return Recipe(name, "bfloat16", activation, weight, gradient, cached=activation)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", "float32"),
        Recipe("bf16", "bfloat16"),
        _fp8("fp8_deepseek", TILES, BLOCKS, TILES),  # V3
        _fp8("fp8_deepseek_ue8m0", TILES_UE8M0, BLOCKS_UE8M0, TILES_UE8M0),  # V3.1
        _fp8("fp8_tensorwise", TENSOR, TENSOR, TENSOR),
        _fp8("fp8_gradient_blocks", TILES, BLOCKS, BLOCKS),  # what diverged for DeepSeek [V3 App. B.2]
        _fp8("mxfp8", MX, MX, MX),
    )
}


def recipe(name: str, accumulation: str = "fp32", mesh: Mesh | None = None) -> Recipe:
    """The recipe called `name`, multiplied by native kernels where the devices of `mesh` have what they need.

    Raises ConfigError for an unknown name, and for a narrow accumulator without tiles of 128 to promote at.
    """
    if name not in RECIPES:
        raise ConfigError(f"unknown precision {name!r}; known are {', '.join(RECIPES)}")
    found = RECIPES[name]
    has_tiles = found.activation in (TILES, TILES_UE8M0) and found.gradient == found.activation
    if accumulation != "fp32" and not has_tiles:
        raise ConfigError(
            f'fp8.accumulation "{accumulation}" needs a precision with tiles of 1x128, such as fp8_deepseek, but'
            f' precision is "{name}"; choose one, or "fp32"'
        )
    native = None
    if mesh is not None and accumulation == "fp32" and has_tiles:
        if mesh.devices.flat[0].platform != "cpu":
            from dsjax.numerics.kernels import native_form  # Pallas takes a second to import

            native = native_form(mesh.devices.flat[0])
    return dataclasses.replace(found, accumulation=accumulation, native=native, mesh=mesh)
