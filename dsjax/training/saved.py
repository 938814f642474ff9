"""What the backward pass finds kept of the forward pass, in bytes, read from the program and without running it."""

import math
from collections import defaultdict
from typing import Any

import jax
from jax.sharding import Mesh

from dsjax.config import Config
from dsjax.model.layers import rope_table
from dsjax.model.transformer import Spans, scan_layers
from dsjax.training.state import build_network


def saved_bytes(config: Config, mesh: Mesh) -> dict[str, float]:
    """Bytes per token that the backward pass finds kept of one MoE layer; of a dense one where no other is.

    Read from the traced program of the layers, under config.training.remat and without allocating anything: what the
    scan over the layers hands on for its backward pass. Weights are not counted, nor what all layers share. The
    compiler may widen it: XLA:CPU makes FP32 of the BF16 of all layers at once before the backward pass.

    Returns:
      "total" and its parts: "layer_input", the names of `transformer.SAVED_NAMES` that there are, and "other".
    """
    net, length = build_network(config, mesh), config.data.sequence_length
    layers = "moe_layers" if config.model.num_moe_layers else "dense_layers"
    shape = (config.training.sequences_per_microbatch, length, config.model.hidden_size)

    def kept(params, bias, x_BTD):
        def run(params, x_BTD):
            stack = getattr(net.bind(params, bias), layers)
            return scan_layers(stack, x_BTD, Spans(rope_table(config.model, length), None), net.execution.remat)

        return jax.vjp(run, params, x_BTD)[1]

    x_BTD = jax.ShapeDtypeStruct(shape, net.execution.recipe.dtype)
    program = jax.make_jaxpr(kept)(net.shapes, net.bias_shapes, x_BTD).jaxpr
    [scan] = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
    body, per_token = _inner(scan), defaultdict[str, float](float)
    for outer, inner in zip(scan.outvars, body.outvars, strict=True):
        if outer in program.outvars:
            per_token[_kind(body, inner)] += inner.aval.size * inner.aval.dtype.itemsize / math.prod(shape[:2])
    return {"total": sum(per_token.values())} | per_token


def _inner(eqn: Any) -> Any:
    """The program inside a loop, a shard_map or a jit."""
    return getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])


def _kind(program: Any, variable: Any, outermost: bool = True) -> str:
    """What `checkpoint_name` calls a variable of the layer's program."""
    [eqn] = [eqn for eqn in program.eqns if variable in eqn.outvars] or [None]
    if eqn is None:
        return "layer_input" if outermost else "other"
    if eqn.primitive.name == "name":
        return eqn.params["name"]
    if eqn.primitive.name == "reduce_precision":  # JAX's, around what it saves
        return _kind(program, eqn.invars[0], outermost)
    if "jaxpr" in eqn.params:
        inner = _inner(eqn)
        return _kind(inner, inner.outvars[eqn.outvars.index(variable)], outermost=False)
    return "other"
