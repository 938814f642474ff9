"""Continues a prompt with a trained model: a plain decode that runs the whole sequence for every token."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dsjax.config import Config, ConfigError, MeshConfig, from_dict
from dsjax.data import tokenizer as tokenizers
from dsjax.sharding import make_mesh
from dsjax.training import checkpoint
from dsjax.training.machine import use_compile_cache
from dsjax.training.state import abstract_state, build_network

LENGTH_BUCKET = 64  # sequences are padded to a multiple, so that prompts of similar length share a program


def generate_from_run(run: str, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
    """The prompt and its continuation by the newest checkpoint of a run.

    Args:
      run: the run's directory.
      prompt: text; an empty one starts a new document.
      max_new_tokens: at most so many; the end of the document ends the text before.
      temperature: 0 takes the likeliest token; otherwise one is drawn from softmax(logits / temperature).
      seed: of the draws.

    Raises:
      ConfigError: there is no usable checkpoint, or prompt and continuation exceed max_position_embeddings.
    """
    directory = Path(run) / "checkpoints"
    step = checkpoint.latest(directory)
    if step is None:
        raise ConfigError(f"{run} holds no checkpoint of a dsjax run; give the --workdir of a run that saved one")
    config = from_dict(checkpoint.read_meta(directory, step)["config"])
    use_compile_cache(config.monitor.compile_cache)
    mesh = _mesh_for(config.mesh)
    text = tokenizers.load(config.data.tokenizer)
    ids = text.encode(prompt) or [text.eos_id]
    if len(ids) + max_new_tokens > config.model.max_position_embeddings:
        raise ConfigError(
            f"the prompt's {len(ids)} tokens and {max_new_tokens} new ones exceed max_position_embeddings ="
            f" {config.model.max_position_embeddings}; shorten the prompt or lower --max-new-tokens"
        )
    state = abstract_state(config, mesh)
    wanted = {"params": state.params, "router_bias": state.router_bias}
    loaded = checkpoint.restore(directory, step, wanted, part=True)
    new_ids = decode(
        config, mesh, loaded["params"], loaded["router_bias"], ids, max_new_tokens, temperature, seed, text.eos_id
    )
    return text.decode(ids if prompt else []) + text.decode(new_ids)


def _mesh_for(trained: MeshConfig) -> Mesh:
    """The run's own mesh without its data axis, which is of no use to one text; one device if there are too few."""
    devices = jax.devices()
    wanted = trained.fsdp * trained.expert
    if len(devices) < wanted:
        return make_mesh(MeshConfig(1, 1, 1), devices[:1])
    return make_mesh(MeshConfig(1, trained.fsdp, trained.expert), devices[:wanted])


def decode(
    config: Config,
    mesh: Mesh,
    params: Any,
    router_bias: Any,
    prompt_ids: list[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    eos_id: int | None,
) -> list[int]:
    """The tokens that follow `prompt_ids`, without the end-of-document token that may have ended them."""
    length = len(prompt_ids) + max_new_tokens
    padded = -(-length // LENGTH_BUCKET) * LENGTH_BUCKET
    buffer_BT = np.zeros((mesh.size, padded), np.int32)  # the same sequence on every device; the first is read
    buffer_BT[:, : len(prompt_ids)] = prompt_ids
    run = _decoder(config, mesh)
    tokens_BT, end = run(
        params,
        router_bias,
        buffer_BT,
        np.int32(len(prompt_ids)),
        np.int32(length),
        np.float32(temperature),
        jax.random.key(seed),
        np.int32(-1 if eos_id is None else eos_id),
    )
    return np.asarray(tokens_BT)[0, len(prompt_ids) : int(end)].tolist()


@functools.lru_cache(maxsize=8)
def _decoder(config: Config, mesh: Mesh):
    """The compiled loop of one configuration; it compiles once per padded length."""
    net = build_network(config, mesh)

    @jax.jit
    def run(params, router_bias, tokens_BT, start, stop, temperature, key, eos_id):
        model = net.bind(params, router_bias)

        def pick(tokens_BT, position):
            hidden_BTD = model(tokens_BT).hidden_BTD
            last_BD = lax.dynamic_index_in_dim(hidden_BTD, position - 1, axis=1, keepdims=False)
            logits_V = model.logits(last_BD)[0]
            drawn = jax.random.categorical(jax.random.fold_in(key, position), logits_V / jnp.maximum(temperature, 1e-6))
            return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V)).astype(jnp.int32)

        def add_token(carry):
            tokens_BT, position, _ = carry
            token = pick(tokens_BT, position)
            ended = token == eos_id
            column = jnp.full((tokens_BT.shape[0], 1), token)
            tokens_BT = lax.dynamic_update_slice(tokens_BT, column, (0, position))
            return tokens_BT, jnp.where(ended, position, position + 1), ended

        def unfinished(carry):
            _, position, ended = carry
            return (position < stop) & ~ended

        tokens_BT, end, _ = lax.while_loop(unfinished, add_token, (tokens_BT, start, jnp.bool_(False)))
        return tokens_BT, end

    return run
