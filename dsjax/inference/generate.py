"""Continues a prompt with a trained model: a plain decode that runs the whole sequence for every token."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dsjax import hub
from dsjax.config import Config, ConfigError, MeshConfig, ModelConfig, from_dict
from dsjax.data import tokenizer as tokenizers
from dsjax.hub.architecture import is_published
from dsjax.hub.directory import read_architecture
from dsjax.sharding import make_mesh
from dsjax.training import checkpoint
from dsjax.training.machine import use_compile_cache
from dsjax.training.state import abstract_state, build_network
from dsjax.training.workdir import CHECKPOINTS, find_tokenizer

LENGTH_BUCKET = 64  # sequences are padded to a multiple, so that prompts of similar length share a program


class Ready(NamedTuple):
    """A model on its devices, ready to decode."""

    config: Config
    mesh: Mesh
    params: Any
    router_bias: Any


def generate(
    path: str, prompt: str, max_new_tokens: int, temperature: float, seed: int, tokenizer: str | None = None
) -> str:
    """The prompt and its continuation by the newest checkpoint of a run, or by a published checkpoint.

    Args:
      path: the directory of either.
      prompt: text; an empty one starts a new document.
      max_new_tokens: at most so many; the end of the document ends the text before.
      temperature: 0 takes the likeliest token; otherwise one is drawn from softmax(logits / temperature).
      seed: of the draws.
      tokenizer: as config.data.tokenizer; None: the run's, or the one beside the published weights.

    Raises:
      ConfigError: there is no usable checkpoint, or prompt and continuation exceed max_position_embeddings.
    """
    directory = Path(path)
    config = _published_config(directory, tokenizer) if is_published(directory) else _run_config(directory, tokenizer)
    text = tokenizers.load(config.data.tokenizer)
    ids = text.encode(prompt) or [text.eos_id]
    _check_fit(config.model, text.vocab_size, config.data.tokenizer, len(ids), max_new_tokens)
    use_compile_cache(config.monitor.compile_cache)
    model = _load_published(directory, config) if is_published(directory) else _load_run(directory, config)
    new_ids = decode(*model, ids, max_new_tokens, temperature, seed, text.eos_id)
    return text.decode(ids if prompt else []) + text.decode(new_ids)


def _check_fit(model: ModelConfig, vocab_size: int, tokenizer: str, prompt: int, new: int) -> None:
    if prompt + new > model.max_position_embeddings:
        raise ConfigError(
            f"the prompt's {prompt} tokens and {new} new ones exceed max_position_embeddings ="
            f" {model.max_position_embeddings}; shorten the prompt or lower --max-new-tokens"
        )
    if vocab_size > model.vocab_size:
        raise ConfigError(
            f"the tokenizer {tokenizer!r} has {vocab_size} tokens, but the model only {model.vocab_size}; give the"
            " model's own with --tokenizer"
        )


def _run_config(run: Path, tokenizer: str | None) -> Config:
    directory = run / CHECKPOINTS
    step = checkpoint.latest(directory)
    if step is None:
        raise ConfigError(
            f"{run} holds no checkpoint of a dsjax run, and no config.json of a published one; give the --workdir of a"
            " run that saved one, or a directory as on the Hugging Face hub"
        )
    config = from_dict(checkpoint.read_meta(directory, step)["config"])
    return _with_tokenizer(config, tokenizer or find_tokenizer(run, config.data.tokenizer))


def _published_config(directory: Path, tokenizer: str | None) -> Config:
    """What decoding needs of a Config: the architecture without MTP, BF16 arithmetic, the tokenizer beside it."""
    model = dataclasses.replace(read_architecture(directory), num_nextn_predict_layers=0)
    own = tokenizers.beside(directory)
    if tokenizer is None and own is None:
        files = " nor ".join(tokenizers.FILES)
        raise ConfigError(f"{directory} has no {files}; give a tokenizer with --tokenizer bytes|deepseek|FILE")
    return _with_tokenizer(Config(model=model), tokenizer or str(own))


def _with_tokenizer(config: Config, name: str) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=name))


def _load_run(run: Path, config: Config) -> Ready:
    mesh = _mesh_for(config.mesh)
    step = checkpoint.latest(run / CHECKPOINTS)
    assert step is not None
    state = abstract_state(config, mesh)
    wanted = {"params": state.params, "router_bias": state.router_bias}
    loaded = checkpoint.restore(run / CHECKPOINTS, step, wanted, part=True)
    return Ready(config, mesh, loaded["params"], loaded["router_bias"])


def _load_published(directory: Path, config: Config) -> Ready:
    """Weights as stored, over all devices: experts first, then fsdp, as far as the sizes divide."""
    count, model = len(jax.devices()), config.model
    cut = math.gcd(model.hidden_size, model.kv_lora_rank, model.q_lora_rank or 0)
    expert = math.gcd(model.n_routed_experts, count, cut)
    mesh = _mesh_for(MeshConfig(1, math.gcd(cut // expert, count // expert), expert))
    loaded = hub.load(directory, mesh, config=model)
    return Ready(config, mesh, loaded.params, loaded.router_bias)


def _mesh_for(trained: MeshConfig) -> Mesh:
    """A mesh without its data axis, which is of no use to one text; one device if there are too few."""
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
