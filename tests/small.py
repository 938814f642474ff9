"""Small models, meshes and weights that tests share."""

import dataclasses
from typing import Any

import jax
import numpy as np
from weak_scaling import QUICKLY

from dsjax.config import Config, DispatchConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from dsjax.model.moe import Execution
from dsjax.numerics.recipe import recipe
from dsjax.sharding import make_mesh
from dsjax.training.objective import language_model_loss
from dsjax.training.state import TrainState, abstract_state, build_network, state_shardings

FP32 = recipe("fp32")

# Every part of DeepSeek-V3 once: a dense layer, a MoE layer, groups, bias, MTP.
MODEL = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    num_nextn_predict_layers=1,
    aux_loss_alpha=1e-2,
)

# One MoE layer, which has every kind of parameter, for tests of what is around the model: little to compile.
ONE_LAYER = dataclasses.replace(MODEL, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
DEEPER = dataclasses.replace(MODEL, num_hidden_layers=3)  # two MoE layers


def mesh(data: int = 1, fsdp: int = 1, expert: int = 1) -> jax.sharding.Mesh:
    """A mesh over the first of the simulated devices."""
    return make_mesh(MeshConfig(data, fsdp, expert), jax.devices()[: data * fsdp * expert])


def execution(on: jax.sharding.Mesh | None = None, remat: str = "none", **dispatch: Any) -> Execution:
    return Execution(on or mesh(), FP32, DispatchConfig(**dispatch), remat)


# Room for everything in one round. The code of further rounds, run or not, makes a step of eight devices twice as long
# to compile; tests of rounds ask for less room.
ROOMY = DispatchConfig(capacity_factor=8.0)


def config(
    model: ModelConfig = MODEL, *, data=1, fsdp=1, expert=1, dispatch: DispatchConfig = ROOMY, **training: Any
) -> Config:
    """A run of a small model in FP32, whole batches of 8 sequences."""
    values = {"batch_size": 8, "remat": "none", "loss_chunk_size": 10} | training
    # A large epsilon: a gradient of nothing but rounding shall not become a step of full size.
    return Config(
        model=model,
        mesh=MeshConfig(data, fsdp, expert),
        dispatch=dispatch,
        optimizer=OptimizerConfig(eps=1e-3, moment_dtype="float32"),
        training=TrainingConfig(**values),
        precision="fp32",
    )


def weights_like(shapes: Any, seed: int = 0, scale: float = 0.15) -> Any:
    """Random FP32 arrays; vectors (norms) lie around 1. Large enough that no part of the network is lost in noise."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        centre = "norm" in jax.tree_util.keystr(path[-2:])
        return (centre + scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def state(config: Config, on: jax.sharding.Mesh) -> TrainState:
    """A state with random weights, as `init_state` makes, without a program to compile for it."""
    abstract = abstract_state(config, on)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    return jax.device_put(dataclasses.replace(zeros, params=weights_like(abstract.params)), state_shardings(config, on))


def gradients(config: Config, on: jax.sharding.Mesh):
    """(network, compiled (params, bias, tokens, hyperparameters) -> (loss, metrics), gradients) of pretraining."""
    net = build_network(config, on)
    loss_fn = language_model_loss(net, config)
    return net, jax.jit(jax.value_and_grad(loss_fn, has_aux=True), compiler_options=QUICKLY)


def tokens(*shape: int, seed: int = 0, vocab_size: int = MODEL.vocab_size) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocab_size, size=shape, dtype=np.int32)


def assert_trees_close(ours: Any, expected: Any, tolerance: float) -> None:
    """Every array within `tolerance` of the largest number of the expected one; names the first that is not."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        b = np.asarray(b, np.float64)
        error = np.max(np.abs(np.asarray(a, np.float64) - b)) / max(np.max(np.abs(b)), 1e-30)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)} differs by {error:.1e} of its largest number"
