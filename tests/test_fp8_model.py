"""FP8 in the whole model: what is quantised and what stays high, what travels and what is kept, and that it learns."""

import dataclasses
import itertools
import math
import re
from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from small import assert_trees_close

from dsjax.checks import CHOICES
from dsjax.config import Config, ConfigError, DispatchConfig, FP8Config, check
from dsjax.model.causal import causal_attention
from dsjax.model.experts import ExpertWeights
from dsjax.model.losses import cross_entropy
from dsjax.model.moe import Execution, routed_experts
from dsjax.model.transformer import network
from dsjax.numerics import e5m6
from dsjax.numerics.linear import linear
from dsjax.numerics.recipe import RECIPES, recipe
from dsjax.planning.buffers import make_buffer
from dsjax.training.objective import language_model_loss
from dsjax.training.state import build_network, init_state
from dsjax.training.step import pretrain_step

FP8 = [name for name, how in RECIPES.items() if how.is_fp8]
MTP_WEIGHT = {"mtp_loss_weight": jnp.float32(0.3)}
SEQUENCES, LENGTH = 8, 9


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def loss_of(model, execution):
    """(network, (params, bias, tokens, hyperparameters) -> (loss, metrics))."""
    net = network(model, execution)
    return net, language_model_loss(net, small.config(model))


# --- what is quantised, and what is not ---


def on_the_grid(shapes):
    """Weights that E4M3 holds, as multiples of a power of two; in every block the largest is 448 times that."""

    def draw(path, leaf):
        if "norm" in jax.tree_util.keystr(path[-2:]):
            return leaf
        unit = 2.0**-11
        values = np.clip(leaf / unit, -448, 448).astype(jnp.float8_e4m3fn).astype(np.float32) * unit
        values[..., 0, 0] = 448 * unit  # no small matrix has a second block
        return values

    return jax.tree_util.tree_map_with_path(draw, small.weights_like(shapes))


def moved(leaf, by: float):
    """All numbers but the largest, by a share of them. 1/64 is less than half a step of E4M3, and two of BF16."""
    return np.where(np.abs(leaf) == np.abs(leaf).max(), leaf, leaf * np.float32(1 + by))


def test_exactly_projections_and_experts_are_quantised():
    net, loss_fn = loss_of(small.MODEL, Execution(small.mesh(), recipe("fp8_deepseek")))
    params = on_the_grid(net.shapes)
    bias = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), net.bias_shapes)
    compiled = jax.jit(lambda params: loss_fn(params, bias, small.tokens(SEQUENCES, LENGTH + 1), MTP_WEIGHT)[0])
    loss, (leaves, tree) = compiled(params), jax.tree.flatten(params)
    quantised = set()
    for place, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        losses = {}
        for by in (1 / 64, 1 / 4):
            changed = [*leaves[:place], moved(leaf, by), *leaves[place + 1 :]]
            losses[by] = compiled(jax.tree.unflatten(tree, changed))
        name = "/".join(str(key.key) for key in path).removesuffix("/weight")
        assert losses[1 / 4] != loss, f"{name} takes no part"
        if losses[1 / 64] == loss:
            quantised.add(name)
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    swiglu = ("gate_proj", "up_proj", "down_proj")
    routed = [f"mlp/{kind}/{name}" for kind in ("experts", "shared_experts") for name in swiglu]
    expected = {
        f"{block}/self_attn/{name}" for block in ("dense_layers", "moe_layers", "mtp/block") for name in attention
    }
    expected |= {f"{block}/{name}" for block in ("moe_layers", "mtp/block") for name in routed}
    expected |= {f"dense_layers/mlp/{name}" for name in swiglu}
    assert quantised == expected


@pytest.mark.parametrize("name", FP8)
def test_embedding_head_and_eh_proj_are_those_of_bf16(name):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(jnp.bfloat16)  # noqa: E731
    x, joined = draw(SEQUENCES, LENGTH, 32), draw(SEQUENCES, LENGTH, 64)
    tokens, weights = small.tokens(SEQUENCES, LENGTH), np.ones((SEQUENCES, LENGTH), np.float32)
    mesh = small.mesh()

    def parts(name):
        net = network(small.MODEL, Execution(mesh, recipe(name)))
        bias = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), net.bias_shapes)

        def run(params, x, joined):
            model = net.bind(params, bias)
            loss = cross_entropy(x, model.head_DV, tokens, weights, mesh, net.execution.recipe, 10)
            return model._embed(tokens), model.logits(x), loss, model.mtp.eh_proj(joined)

        @jax.jit
        def values_and_gradients(params, *inputs):
            values, pull = jax.vjp(run, params, *inputs)
            return values, pull(jax.tree.map(lambda a: (a * a).astype(a.dtype), values))

        return values_and_gradients(small.weights_like(net.shapes), x, joined)

    assert bits(parts(name)) == bits(parts("bf16"))


def test_the_attention_core_is_that_of_bf16_and_its_result_is_rounded_to_what_is_kept():
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((2, 7, 3, 6)).astype(jnp.bfloat16) for _ in range(4))

    @partial(jax.jit, static_argnums=0)
    def run(keeps_e5m6):
        out, pull = jax.vjp(lambda *qkv: causal_attention(*qkv, 0.4, keeps_e5m6), q, k, v)
        return out, pull(dout)

    (out, (dq, dk, dv)), (exact, (exact_dq, exact_dk, exact_dv)) = run(True), run(False)
    rounded = e5m6.decode(*e5m6.encode(exact.reshape(2, 7, 18)), 18, exact.dtype)
    assert bits(out) == bits(rounded.reshape(exact.shape)) != bits(exact)
    assert bits(dv) == bits(exact_dv)  # alone in not depending on the result
    assert 0 < relative_error(dq, exact_dq) < 2e-2 and 0 < relative_error(dk, exact_dk) < 2e-2


# --- how it is run changes nothing ---


@cache
def gradients(
    name: str,
    sizes=(1, 1, 1),
    remat="none",
    capacity_factor=1.25,
    compute_dtype="bfloat16",
    accumulation="fp32",
):
    """((loss, metrics), gradients) of one MoE layer between embedding and head."""
    how = dataclasses.replace(recipe(name, accumulation), compute_dtype=compute_dtype)
    execution = Execution(small.mesh(*sizes), how, DispatchConfig(capacity_factor=capacity_factor), remat)
    net, loss_fn = loss_of(small.ONE_LAYER, execution)
    rng = np.random.default_rng(1)
    bias = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), net.bias_shapes)
    run = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    batch = small.weights_like(net.shapes), bias, small.tokens(SEQUENCES, LENGTH + 1)
    return jax.device_get(run(*batch, MTP_WEIGHT))


@pytest.mark.parametrize("remat", [pytest.param("deepseek", marks=pytest.mark.slow), "full"])
def test_remat_changes_neither_loss_nor_gradients(remat):
    (loss, metrics), ours = gradients("fp8_deepseek", remat=remat)
    (true_loss, true_metrics), expected = gradients("fp8_deepseek")
    assert loss == pytest.approx(true_loss, rel=1e-6)
    assert_trees_close(metrics, true_metrics, 1e-6)
    # What is computed again may have another last bit, and E4M3 another number: rarely.
    errors = jax.tree.map(relative_error, ours, expected)
    assert max(jax.tree.leaves(errors)) < 1e-2, errors


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 1, 4), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "name",
    ["fp8_deepseek", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp8_deepseek_ue8m0", "mxfp8"))],
)
def test_every_mesh_gives_what_one_device_gives(name, sizes):
    # In FP32 but for the operands of products: else sums of other order would have other BF16 numbers everywhere.
    (loss, metrics), ours = gradients(name, sizes, capacity_factor=0.5, compute_dtype="float32")
    (true_loss, true_metrics), expected = gradients(name, compute_dtype="float32")
    assert loss == pytest.approx(true_loss, rel=1e-5)
    assert metrics.pop("dispatch_rounds") > 1 == true_metrics["dispatch_rounds"]
    assert metrics.pop("dispatch_bytes") > 0 == true_metrics["dispatch_bytes"]
    assert_trees_close(metrics, {key: true_metrics[key] for key in metrics}, 1e-5)
    for (path, mine), theirs in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        # Tiles along an expert's rows hold what is there in one round; where scales are powers of two it matters not.
        is_tiled_anew = name == "fp8_deepseek" and "experts" in [key.key for key in path]
        # Usually 1e-6; but one sum of another order may have another last bit, and E4M3 another number.
        assert relative_error(mine, theirs) < (0.04 if is_tiled_anew else 0.01), path


# --- what travels ---

WIDE = dataclasses.replace(small.ONE_LAYER, hidden_size=160)  # more than one tile
RANKS = 4


def collectives(name: str) -> Counter:
    """(kind, dtype, numbers that a rank sends or receives for a token) of what a layer and its gradients exchange."""
    execution = Execution(small.mesh(1, 1, RANKS), recipe(name), DispatchConfig("all_gather"))
    d, e, f = WIDE.hidden_size, WIDE.n_routed_experts, WIDE.moe_intermediate_size
    shapes = [(SEQUENCES, LENGTH, d), (d, e), (e, d, f), (e, d, f), (e, f, d)]
    dtypes = [execution.recipe.dtype] + [np.float32] * 4
    x, router, *weights = (jax.ShapeDtypeStruct(*a) for a in zip(shapes, dtypes, strict=True))

    def loss(x, router, weights):
        y, _ = routed_experts(x, router, jnp.zeros((e,)), weights, WIDE, execution)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = gradient.lower(x, router, ExpertWeights(*weights)).as_text()
    found = re.findall(
        r'"stablehlo\.(all_gather|reduce_scatter)".*?: \(tensor<(\S+?)>\) -> tensor<(\S+?)>', text, flags=re.DOTALL
    )
    tokens = SEQUENCES * LENGTH
    wholes = [(kind, of if kind == "reduce_scatter" else to) for kind, of, to in found]
    counted = Counter()
    for kind, whole in wholes:
        rows, width, dtype = re.fullmatch(r"(\d+)x(\d+)x(\w+)", whole).groups()
        assert int(rows) == tokens
        counted[kind, dtype, int(width)] += 1
    return counted


@pytest.mark.parametrize("name", ["bf16", *FP8])
def test_tokens_and_gradients_travel_to_experts_in_a_byte_a_number_and_back_in_bf16(name):
    found, d, k = collectives(name), WIDE.hidden_size, WIDE.num_experts_per_tok
    tile = {"bf16": None, "fp8_tensorwise": None, "mxfp8": 32}.get(name, 128)  # one scale for all cannot travel
    # Forward the tokens, backward the gradients of their sums; but fp8_gradient_blocks scales those by blocks.
    in_bytes = 0 if tile is None else 1 if name == "fp8_gradient_blocks" else 2
    expected = Counter({("reduce_scatter", "bf16", d): 2})
    expected["all_gather", "bf16", d] = 2 - in_bytes
    expected["all_gather", "ui8", d] = in_bytes
    if tile:
        expected["all_gather", "ui8", -(-d // tile)] = in_bytes
    # Who goes where and with what weight, and the gradients of those weights.
    expected["all_gather", "i32", k] = expected["all_gather", "f32", k] = expected["reduce_scatter", "f32", k] = 1
    assert found == expected


# --- what is kept ---


def kept_by_a_layer(name: str, stack: str, model) -> Counter:
    """(shape, dtype) of what each of three layers keeps for its backward pass under remat "deepseek"."""
    net, loss_fn = loss_of(model, Execution(small.mesh(), recipe(name), remat="deepseek"))
    bias = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), net.bias_shapes)
    loss = lambda params: loss_fn(params, bias, small.tokens(SEQUENCES, LENGTH + 1), MTP_WEIGHT)[0]  # noqa: E731
    kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(loss, params)[1], net.shapes))
    weights = {leaf.shape for leaf in jax.tree.leaves((net.shapes[stack], net.bias_shapes.get(stack)))}
    layers = [leaf for leaf in kept if leaf.shape[:1] == (3,) and leaf.shape not in weights]
    return Counter((leaf.shape[1:], leaf.dtype.name) for leaf in layers)


@pytest.mark.parametrize("stack", ["dense_layers", "moe_layers"])
@pytest.mark.parametrize("name", ["fp8_deepseek", "fp8_deepseek_ue8m0", "mxfp8"])
def test_a_layer_keeps_what_the_report_keeps_in_low_precision_and_nothing_else(name, stack):
    dense = 3 if stack == "dense_layers" else 0
    model = dataclasses.replace(
        small.ONE_LAYER,
        num_hidden_layers=3,
        first_k_dense_replace=dense,
        num_attention_heads=3,
        v_head_dim=50,  # two tiles of scales
        intermediate_size=136,
        moe_intermediate_size=132,
    )
    batch, heads, out = (SEQUENCES, LENGTH), model.num_attention_heads, model.num_attention_heads * model.v_head_dim
    expected = Counter(
        {
            ((*batch, model.hidden_size), "bfloat16"): 1,  # the layer's input
            ((*batch, model.q_lora_rank), "bfloat16"): 1,
            ((*batch, model.kv_lora_rank + model.qk_rope_head_dim), "bfloat16"): 1,
            ((*batch, out * 3 // 2), "uint8"): 1,  # E5M6, twelve bits a number
            ((*batch, math.ceil(out / 128)), "uint8"): 1,
            ((SEQUENCES, LENGTH, heads, 1), "float32"): 1,
        }
    )
    rows = make_buffer(SEQUENCES * LENGTH, model.num_experts_per_tok, model.n_routed_experts, 1, 1.25).rows
    width = model.intermediate_size if dense else model.moe_intermediate_size
    tile, scale = 32 if name == "mxfp8" else 128, "float32" if name == "fp8_deepseek" else "uint8"
    for lead in [batch] if dense else [batch, (rows,)]:  # gate and up, of the shared expert and the routed ones
        expected[(*lead, width), "float8_e4m3fn"] += 2
        expected[(*lead, math.ceil(width / tile)), scale] += 2
    if not dense:
        expected[(*batch, model.n_routed_experts), "float32"] += 1  # the router's logits
    assert kept_by_a_layer(name, stack, model) == expected


# --- that it learns ---


@cache
def losses(name: str, steps: int = 10) -> np.ndarray:
    """Of training on one batch, over and over."""
    config = dataclasses.replace(small.config(small.ONE_LAYER, remat="deepseek"), precision=name)
    mesh = small.mesh()
    state, step = init_state(config, mesh), pretrain_step(config, mesh)
    values = {"learning_rate": np.float32(1e-2), "bias_update_speed": np.float32(0), "mtp_loss_weight": np.float32(0)}
    found = []
    for _ in range(steps):
        state, metrics = step(state, small.tokens(1, SEQUENCES, LENGTH + 1), np.int32(1), values)
        found.append(float(metrics["loss"]))
    return np.array(found)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FP8 if name != "fp8_deepseek"]


@pytest.mark.parametrize("name", ["fp8_deepseek", *SLOW])
@pytest.mark.slow
def test_it_learns_as_bf16_does(name):
    ours, bf16 = losses(name), losses("bf16")
    assert bf16[-1] < 0.6 * bf16[0]
    assert np.all(np.abs(ours / bf16 - 1) < 0.01)
    assert np.any(ours != bf16)


# --- narrow accumulators ---


def test_narrow_accumulators_are_told_apart_and_promotion_helps():
    rng = np.random.default_rng(0)
    x, w = np.abs(rng.standard_normal((1, 16, 4096))).astype(jnp.bfloat16), rng.random((4096, 8), np.float32)
    product = {
        how: jax.jit(lambda x, w, how=how: linear(x, w, recipe("fp8_deepseek", how)))(x, w)
        for how in ("fp32", "fp22_promote128", "fp22")
    }
    narrow, promoted = (relative_error(product[how], product["fp32"]) for how in ("fp22", "fp22_promote128"))
    assert 0 < 4 * promoted < narrow < 0.1


@pytest.mark.parametrize("accumulation", ["fp22", "fp22_promote128"])
@pytest.mark.slow
def test_a_model_runs_on_a_narrow_accumulator(accumulation):
    config = dataclasses.replace(small.config(), precision="fp8_deepseek", fp8=FP8Config(accumulation=accumulation))
    assert build_network(config, small.mesh()).execution.recipe.accumulation == accumulation
    (narrow, _), ours = gradients("fp8_deepseek", compute_dtype="float32", accumulation=accumulation)
    (wide, _), expected = gradients("fp8_deepseek", compute_dtype="float32")
    assert 0 < abs(narrow / wide - 1) < 2e-3
    errors = jax.tree.leaves(jax.tree.map(relative_error, ours, expected))
    assert 0 < min(errors) and max(errors) < 0.2


def test_every_combination_is_refused_before_it_would_fail():
    """The checks are made without JAX, and so name the recipes once more."""
    assert CHOICES["precision"] == tuple(RECIPES)
    for name, accumulation in itertools.product(RECIPES, CHOICES["fp8.accumulation"]):
        config = dataclasses.replace(Config(), precision=name, fp8=FP8Config(accumulation=accumulation))
        if refuses(config):
            with pytest.raises(ConfigError, match=f'needs a precision with tiles of 1x128.* precision is "{name}"'):
                recipe(name, accumulation)
        else:
            assert recipe(name, accumulation).accumulation == accumulation


def refuses(config: Config) -> bool:
    try:
        check(config)
    except ConfigError:
        return True
    return False
