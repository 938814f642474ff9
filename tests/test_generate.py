"""Generation: the same tokens as the full forward pass, on any mesh; its mistakes are sentences."""

import dataclasses
import doctest
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from dsjax.config import Config, ConfigError, MeshConfig, to_dict
from dsjax.inference import engine, loading
from dsjax.inference.generate import decode, generate
from dsjax.inference.startup import Startup
from dsjax.training import checkpoint
from dsjax.training.state import build_network

PROMPT = [3, 1, 4, 1, 5]
NEW = 20
NO_TOKEN = None


def weights(config: Config):
    """(parameters, routing biases) whose text does not repeat itself."""
    net = build_network(config, small.mesh())
    params = small.weights_like(net.shapes, scale=0.5)
    return params, small.weights_like(net.bias_shapes, seed=1)


@pytest.fixture(scope="module")
def model():
    config = small.config()
    return config, *weights(config)


def continued(model, mesh=None, temperature=0.0, seed=0, eos_id=NO_TOKEN, new=NEW) -> list[int]:
    config, params, bias = model
    return decode(config, mesh or small.mesh(), params, bias, PROMPT, new, temperature, seed, eos_id)


def test_greedy_token_is_the_likeliest_of_the_full_forward_pass(model):
    new_ids = continued(model)
    assert len(new_ids) == NEW and len(set(new_ids)) > NEW // 4
    config, params, bias = model
    net = build_network(config, small.mesh())

    @jax.jit
    def likeliest(params, bias, tokens_BT):
        bound = net.bind(params, bias)
        return jnp.argmax(bound.logits(bound(tokens_BT).hidden_BTD), axis=-1)

    # A position sees only what is before it, so one pass over the text shows what every step should have chosen.
    tokens_BT = np.array([PROMPT + new_ids], np.int32)
    chosen = np.asarray(likeliest(params, bias, tokens_BT))[0]
    assert new_ids == chosen[len(PROMPT) - 1 : -1].tolist()


def test_text_is_the_same_on_a_mesh_of_eight(model):
    mesh = small.mesh(data=2, expert=4)
    assert continued(model, mesh) == continued(model)
    assert continued(model, mesh, temperature=1.0, seed=5) == continued(model, temperature=1.0, seed=5)


def test_seed_decides_what_is_drawn_and_nothing_at_temperature_zero(model):
    assert continued(model, seed=1) == continued(model, seed=2)
    drawn = {seed: continued(model, temperature=1.0, seed=seed) for seed in range(4)}
    assert drawn[3] == continued(model, temperature=1.0, seed=3)
    assert len({tuple(ids) for ids in drawn.values()}) == 4
    assert continued(model, temperature=1e-4, seed=7) == continued(model)


def test_end_of_document_ends_the_text_and_is_not_part_of_it(model):
    new_ids = continued(model)
    for eos_id in (new_ids[0], new_ids[-1]):
        assert continued(model, eos_id=eos_id) == new_ids[: new_ids.index(eos_id)]


def test_number_of_new_tokens_is_a_limit_and_a_prefix(model):
    assert continued(model, new=1) == continued(model)[:1]
    assert continued(model, new=64)[:NEW] == continued(model)  # in a larger buffer


def save_run(directory: Path, mesh: MeshConfig, form: str = "auto") -> Path:
    """A run directory that holds one checkpoint of a small model of bytes, at most 48 positions."""
    config = small.config(dataclasses.replace(small.MODEL, vocab_size=264, max_position_embeddings=48))
    config = dataclasses.replace(config, mesh=mesh, data=dataclasses.replace(config.data, sequence_length=16))
    config = dataclasses.replace(config, dispatch=dataclasses.replace(config.dispatch, form=form))
    params, bias = jax.device_put(weights(config))
    saver = checkpoint.Saver(directory / "checkpoints", keep_last=1)
    meta = {"step": 7, "sequences": 56, "config": to_dict(config), "data_fingerprint": "none"}
    assert saver.save({"params": params, "router_bias": bias}, meta) is None and saver.finish() is None
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"), MeshConfig(1, 1, 4))


def test_a_run_that_left_its_mesh_open_generates_the_same(run, tmp_path):
    open_mesh = save_run(tmp_path, MeshConfig(-1, -1, -1))
    assert generate(str(open_mesh), "abc", 12, 0.0, 0) == generate(str(run), "abc", 12, 0.0, 0)


def test_experts_stay_together_where_tokens_stay_at_home(tmp_path):
    directory = save_run(tmp_path, MeshConfig(1, -1, 1), form="local")
    ready = loading.read_weights(directory, 7, loading.read_config(directory, 7))
    assert ready.mesh.shape["expert"] == 1 and ready.mesh.shape["fsdp"] == 8


def test_examples_in_docstrings_do_what_they_say(run, model, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    config, params, bias = model
    given = {"config": config, "params": params, "router_bias": bias}
    for module, globs in ((loading, {}), (engine, given)):
        result = doctest.testmod(module, extraglobs=globs)
        assert result.failed == 0 and result.attempted >= 3, module.__name__


@pytest.mark.parametrize("prompt", ["", "abc", "日本 ü"])
def test_text_of_a_run_begins_with_the_prompt(run, prompt):
    text = generate(str(run), prompt, 12, 1.0, 3)
    assert text.startswith(prompt) and len(text) > len(prompt)
    assert text == generate(str(run), prompt, 12, 1.0, 3)


@pytest.mark.parametrize("hits, misses, kind", [(0, 2, "cold"), (3, 0, "warm"), (3, 1, "cold"), (0, 0, "not cached")])
def test_start_is_told_cold_or_warm(hits, misses, kind):
    startup = Startup()
    for event, count in (("cache_hits", hits), ("cache_misses", misses), ("task_disabled_cache", 1)):
        for _ in range(count):
            jax.monitoring.record_event(f"/jax/compilation_cache/{event}")
    told = rf"{kind} start: \d+\.\d s; {hits} programs from the compile cache, {misses} compiled"
    assert re.fullmatch(told, startup.told())


def test_run_of_a_larger_mesh_generates_on_fewer_devices(run, monkeypatch):
    expected = generate(str(run), "abc", 12, 0.0, 0)
    for count in (1, 3):
        devices = jax.devices()[:count]
        monkeypatch.setattr(jax, "devices", lambda devices=devices: devices)
        assert generate(str(run), "abc", 12, 0.0, 0) == expected
        monkeypatch.undo()


def test_prompt_and_continuation_may_fill_all_positions_and_no_more(run):
    assert generate(str(run), "a" * 40, 8, 1.0, 0).startswith("a" * 40)
    with pytest.raises(ConfigError, match="the prompt's 40 tokens and 9 new ones exceed max_position_embeddings = 48"):
        generate(str(run), "a" * 40, 9, 1.0, 0)


def test_directory_without_a_checkpoint_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("empty", "missing", "file"):
        with pytest.raises(
            ConfigError, match=f"{name} holds no checkpoint of a dsjax run, and no config.json of a published one; give"
        ):
            generate(str(tmp_path / name), "x", 1, 0.0, 0)
