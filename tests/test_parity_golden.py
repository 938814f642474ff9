"""The network is DeepSeek's: small checkpoints run by Hugging Face transformers, reproduced from the same files.

The cases in tests/parity were written by transformers 5.23.0 (FP32, eager attention, random weights): a checkpoint in
published names, and logits, routing, losses and gradients computed from it. Their own noise is 1e-5 on logits of std 2.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from dsjax.config import Config, MeshConfig, ModelConfig, TrainingConfig
from dsjax.model.losses import cross_entropy
from dsjax.model.moe import Execution
from dsjax.model.routing import route
from dsjax.model.transformer import network
from dsjax.numerics.linear import recipe
from dsjax.sharding import make_mesh
from dsjax.training.step import language_model_loss

TOLERANCE = 5e-5
CASES = {  # and the mesh each is run on
    "v3_plain_interleaved": MeshConfig(),
    "v3_moonlight": MeshConfig(),
    "v3_yarn_groups": MeshConfig(expert=2),
    "v2_lite_greedy": MeshConfig(fsdp=2),
    "v3_mtp": MeshConfig(),
}


class Case(NamedTuple):
    config: ModelConfig
    net: Any
    params: Any
    bias: Any
    golden: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def case():
    """The case of a name, with the given fields of its configuration changed."""

    def read(name: str, **changes: Any) -> Case:
        folder = Path(__file__).parent / "parity" / name
        config = dataclasses.replace(published.read_config(folder / "config.json"), **changes)
        mesh_config = CASES[name]
        mesh = make_mesh(mesh_config, jax.devices()[: mesh_config.fsdp * mesh_config.expert])
        net = network(config, Execution(mesh, recipe("fp32")))
        tensors = published.read_safetensors(folder / "model.safetensors")
        params, bias = (published.load(tensors, shapes, config) for shapes in (net.shapes, net.bias_shapes))
        return Case(config, net, params, bias, published.read_safetensors(folder / "golden.safetensors"))

    return read


def mean_loss(model, hidden_BTD, labels_BT):
    """The mean over labels that are not -100; position i has the label of position i + 1."""
    kept_BT = (labels_BT != -100).astype(jnp.float32)
    weights_BT = kept_BT / jnp.sum(kept_BT)
    execution = model.execution
    labels_BT = jnp.maximum(labels_BT, 0)
    return cross_entropy(
        hidden_BTD, model.lm_head[...], labels_BT, weights_BT, execution.mesh, execution.recipe, chunk=10
    )


def shifted(labels_BT: np.ndarray) -> np.ndarray:
    return np.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-100)


def worst(ours: Any, golden: np.ndarray) -> float:
    assert np.shape(ours) == golden.shape
    return float(np.max(np.abs(np.asarray(ours, np.float64) - golden)))


def report(differences: dict[str, float]) -> None:
    """Fails when the largest difference is too large; with `pytest -s` it is seen either way."""
    top = max(differences, key=differences.__getitem__)
    print(f"largest difference: {top} {differences[top]:.1e}")
    assert differences[top] < TOLERANCE, top


@pytest.mark.parametrize("name", [name for name in CASES if name != "v3_mtp"])
def test_logits_loss_routing_and_gradients_equal_the_reference(case, name):
    config, net, params, bias, golden = case(name)

    @jax.jit
    def run(params, bias):
        def loss(params):
            model = net.bind(params, bias)
            out = model(golden["input_ids"].astype(np.int32))
            return mean_loss(model, out.hidden_BTD, shifted(golden["labels"])), (out, model.logits(out.hidden_BTD))

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (out, logits)), gradients = run(params, bias)
    differences = {
        "logits": worst(logits, golden["logits"]),
        "final_norm": worst(out.hidden_BTD, golden["act.final_norm"]),
        "loss": worst(loss, golden["loss"]),
    }
    ours = published.named(gradients, config)
    compared = {key.removeprefix("grad."): value for key, value in golden.items() if key.startswith("grad.")}
    assert len(compared) > 40
    for key, value in compared.items():
        differences[key] = worst(ours[key], value)
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        chosen = golden[f"act.layers.{layer}.topk_idx_sorted"]
        load = np.bincount(chosen.reshape(-1), minlength=config.n_routed_experts)
        assert np.array_equal(out.stats_L.load_E[layer - config.first_k_dense_replace], load)
    report(differences)


@pytest.mark.parametrize("name", CASES)
def test_router_choices_equal_the_reference(case, name):
    config, _, _, bias, golden = case(name)
    biases = published.named(bias, config)
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        key = f"act.layers.{layer}."
        bias_E = biases.get(f"model.layers.{layer}.mlp.gate.e_score_correction_bias")
        assert (bias_E is None) == (config.topk_method == "greedy")
        choice = route(golden[key + "router_logits"][None], bias_E, config)
        order = np.argsort(choice.experts_BTK[0], axis=-1)
        assert np.array_equal(np.take_along_axis(choice.experts_BTK[0], order, -1), golden[key + "topk_idx_sorted"])
        weights = np.take_along_axis(np.asarray(choice.weights_BTK[0]), order, -1)
        assert worst(weights, golden[key + "topk_weight"]) < 1e-6


@pytest.mark.parametrize("form", ["post_norm", "pre_norm"])
def test_mtp_and_the_loss_of_training_equal_the_reference(case, form):
    config, net, params, bias, golden = case("v3_mtp", mtp_hidden_state=form, aux_loss_alpha=0.0)
    key = f"mtp.{form.replace('_', '')}."
    tokens = golden["input_ids"].astype(np.int32)
    loss_fn = language_model_loss(net, Config(model=config, training=TrainingConfig(loss_chunk_size=10)))
    hyperparameters = {"mtp_loss_weight": jnp.float32(0.3)}
    run = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (total, metrics), gradients = run(params, bias, tokens, hyperparameters)
    compared = {
        "total": (total, golden[key + "total_loss_lambda0.3"]),
        "mtp_loss": (metrics["mtp_loss"], golden[key + "loss"]),
        "embed_tokens": (gradients["embed_tokens"], golden[key + "grad.embed_tokens"]),
        "lm_head": (gradients["lm_head"].T, golden[key + "grad.lm_head"]),
        "eh_proj": (gradients["mtp"]["eh_proj"]["weight"].T, golden[key + "grad.eh_proj"]),
    }
    report({what: worst(*pair) for what, pair in compared.items()})
