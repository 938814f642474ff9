"""Parity with the reference: runs a published checkpoint and compares every number that the reference left beside it.

    python tests/parity.py CASE_DIR [CASE_DIR ...] [--devices N] [--mesh data=1,fsdp=2,expert=4] [--tolerance KINDS]

A case is a directory with config.json, model.safetensors and golden.safetensors (and, if they are there, meta.json and
config.hub_style.json), as tests/make_parity_case.py writes it. Every tensor of the golden file has a counterpart here,
computed in FP32 by the modules that train; what has none is listed as not compared. The exit status is 0 where all
agree, 1 where a difference exceeds its tolerance, 2 for an unusable case or command.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding

from dsjax.__main__ import SIMULATED_FLAGS
from dsjax.config import Config, MeshConfig, ModelConfig, MonitorConfig, TrainingConfig
from dsjax.hub import load
from dsjax.hub.architecture import read_config
from dsjax.hub.names import copies, published
from dsjax.hub.safetensors import open_tensors
from dsjax.inference.generate import decode
from dsjax.model.layers import embed, rope_amplitude, rope_frequencies, rope_table, softmax_scale
from dsjax.model.losses import cross_entropy
from dsjax.model.moe import Execution
from dsjax.model.routing import route
from dsjax.model.transformer import Network, Spans, network
from dsjax.numerics.recipe import recipe
from dsjax.sections import ConfigError, build
from dsjax.sharding import BATCH, make_mesh
from dsjax.training.machine import use_compile_cache
from dsjax.training.objective import language_model_loss

IGNORED = -100  # the label that counts in no loss
LOGITS_AIM = 2e-5  # what FP32 logits should reach; the tolerance is what they must
# A tensor's gradient that stays below this, of the largest gradient of all, counts as 0: what is left where it must
# vanish, as the router's does with one expert per token and normalised weights.
ROUNDING = float(np.finfo(np.float32).eps)
MTP_WEIGHT = 0.3  # in `mtp.*.total_loss_lambda0.3`
INPUTS = ("input_ids", "labels", "generate.prompt")
NEEDS = {  # tensors that cannot be compared without another one
    "labels": r"loss(_bf16)?|grad\..*",
    "generate.prompt": r"generate\..*|mtp\.generate.*",
    "generate.ids": r"generate\.step_logits_.*|mtp\.generate.*",
}


@dataclass(frozen=True)
class Tolerances:
    """The largest differences that pass; those of routes, tokens and configurations are always 0."""

    activation: float = 5e-5  # absolute, logits included
    gradient: float = 1e-4  # of the largest number in the tensor; see also ROUNDING
    loss: float = 1e-5  # absolute, in nats
    constant: float = 1e-5  # of each number: RoPE's frequencies and scales
    bf16_loss: float = 0.2  # absolute: in BF16 the reference itself takes other routes than in FP32


class Kind(NamedTuple):
    """What is judged alike."""

    names: str  # of tensors, a regular expression
    tolerance: str | None  # field of Tolerances; "exact" for 0; None: told, not judged
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (ours, golden) -> differences


def _absolute(ours: np.ndarray, golden: np.ndarray) -> np.ndarray:
    return np.abs(ours - golden)


def _of_largest(ours: np.ndarray, golden: np.ndarray) -> np.ndarray:
    return np.abs(ours - golden) / max(np.max(np.abs(golden), initial=0), 1e-30)


def _of_each(ours: np.ndarray, golden: np.ndarray) -> np.ndarray:
    return np.abs(ours - golden) / np.maximum(np.abs(golden), 1e-30)


def _count(ours: np.ndarray, golden: np.ndarray) -> np.ndarray:
    return np.sum(ours != golden)


KINDS = (
    Kind(r"logits|generate\.step_logits_(first|last)|mtp\.\w+\.(hidden|logits)", "activation", _absolute),
    Kind(r"act\.(embed|final_norm)", "activation", _absolute),
    Kind(r"act\.layers\.\d+\.(attn_out|mlp_out|out|router_logits|topk_weight)", "activation", _absolute),
    Kind(r"act\.layers\.\d+\.(topk_idx_sorted|expert_load)", "exact", _count),
    Kind(r"(mtp\.\w+\.|)loss|mtp\.\w+\.total_loss_lambda0\.3", "loss", _absolute),
    Kind(r"grad\..+|mtp\.\w+\.grad\.(embed_tokens|lm_head|eh_proj)", "gradient", _of_largest),
    Kind(r"generate\.ids|mtp\.generate_use_mtp", "exact", _count),
    Kind(r"rope\.inv_freq|meta\.(attn_scaling|rope_cos_sin_scale)", "constant", _of_each),
    Kind(r"loss_bf16", "bf16_loss", _absolute),
    Kind(r"logits_bf16", None, _absolute),
)
ORDER = ("logits", "loss", "act", "grad", "generate", "mtp", "rope", "meta", "loss_bf16", "logits_bf16")  # of rows


class Row(NamedTuple):
    """One quantity of a case: tensors of the same meaning, of which the worst is told."""

    quantity: str
    tensors: int
    worst: float  # infinite where ours is missing, has another shape or is not a number
    tolerance: float | None  # None: told, not judged
    where: str  # the worst tensor or layer

    @property
    def ok(self) -> bool:
        return self.tolerance is None or self.worst <= self.tolerance


class Case(NamedTuple):
    """What a directory holds, and what follows from it on the host."""

    directory: Path
    model: ModelConfig
    values: dict[str, Any]  # of config.json
    params: Any
    router_bias: Any
    golden: dict[str, np.ndarray]


def compare(directory: str | Path, mesh: Mesh, tolerances: Tolerances = Tolerances()) -> list[Row]:
    """One row for each quantity that the case's golden file holds.

    directory: of the case.
    mesh: to run on; a batch that it does not divide is repeated until it does, and every copy is compared.
    Raises ConfigError for a case that cannot be read, or not be run on this mesh.
    """
    directory = Path(directory)
    golden = read_golden(directory)
    stored, loaded = read_config(directory), load(directory, mesh, "float32")
    case = Case(directory, loaded.config, stored.values, loaded.params, loaded.router_bias, golden)
    _check_inputs(case)
    ours, expected = _counterparts(case, mesh), _expected(case)
    told = _of_padding(ours, case)
    return judge(ours, expected, tolerances) + told + _hub_style(directory, stored.model)


def read_golden(directory: Path) -> dict[str, np.ndarray]:
    """The tensors of golden.safetensors, and the numbers of meta.json that have a counterpart as `meta.*`."""
    with open_tensors(directory / "golden.safetensors") as tensors:
        golden = {name: tensors.read(name) for name in tensors.entries}
    file = directory / "meta.json"
    if file.exists():
        try:
            meta = json.loads(file.read_text())
            for name in ("attn_scaling", "rope_cos_sin_scale"):
                if name in meta:
                    golden[f"meta.{name}"] = np.float64(meta[name])
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{file} is not a JSON object with numbers ({error}); write the case again") from error
    return golden


def not_compared(golden: Mapping[str, np.ndarray]) -> list[str]:
    """The tensors that have no counterpart here, or whose inputs the golden file lacks."""
    return [name for name in golden if name not in INPUTS and _kind(name, golden) is None]


def _kind(name: str, golden: Mapping[str, np.ndarray]) -> Kind | None:
    if any(re.fullmatch(names, name) and missing not in golden for missing, names in NEEDS.items()):
        return None
    return next((kind for kind in KINDS if re.fullmatch(kind.names, name)), None)


def _check_inputs(case: Case) -> None:
    """Raises ConfigError for tokens that cannot be fed."""
    file, golden, vocabulary = case.directory / "golden.safetensors", case.golden, case.model.vocab_size
    if "input_ids" not in golden or len(not_compared(golden)) + len(golden.keys() & set(INPUTS)) == len(golden):
        raise ConfigError(f"{file} must hold input_ids and what the reference made of them, such as logits")
    for name in (*INPUTS, "generate.ids"):
        if name not in golden:
            continue
        ids = golden[name]
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
            raise ConfigError(f"{file}: {name} must be whole numbers [sequences, tokens], not {ids.dtype} {ids.shape}")
        if name == "labels":
            ids = np.where(ids == IGNORED, 0, ids)
        if np.min(ids) < 0 or np.max(ids) >= vocabulary:
            raise ConfigError(f"{file}: {name} holds a token outside the vocabulary of {vocabulary}")
    if "labels" in golden and golden["labels"].shape != golden["input_ids"].shape:
        raise ConfigError(f"{file}: labels must have the shape of input_ids, for they are not shifted")
    texts = [golden[name] for name in ("generate.prompt", "generate.ids") if name in golden]
    if len({len(text) for text in texts}) > 1:
        raise ConfigError(f"{file}: generate.ids must continue each of generate.prompt, but their numbers differ")


# What the golden file implies beyond what it says.


def _expected(case: Case) -> dict[str, np.ndarray]:
    """The golden tensors, each layer's load that follows from its routes, and the loss from BF16 logits."""
    expected = dict(case.golden)
    for name, value in case.golden.items():
        if name.endswith(".topk_idx_sorted"):
            load = np.array([np.sum(value == expert) for expert in range(case.model.n_routed_experts)])
            expected[name.replace("topk_idx_sorted", "expert_load")] = load
    if "logits_bf16" in expected and "labels" in expected:
        expected["loss_bf16"] = _loss_of_logits(expected["logits_bf16"], expected["labels"])
    return expected


def _next_labels(labels_BT: np.ndarray) -> np.ndarray:
    """Hugging Face's labels, which belong to the token itself, moved to the position that predicts it."""
    return np.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED).astype(np.int32)


def _loss_of_logits(logits: np.ndarray, labels_BT: np.ndarray) -> np.ndarray:
    """The mean loss on the host in FP64; logits [..., B, T, V], the result [...]."""
    logits = logits.astype(np.float64)
    labels_BT = _next_labels(labels_BT)
    top = np.max(logits, axis=-1, keepdims=True)
    logsum = np.log(np.sum(np.exp(logits - top), axis=-1)) + top[..., 0]
    chosen = np.maximum(labels_BT, 0)[..., None]
    of_label = np.take_along_axis(logits, np.broadcast_to(chosen, (*logits.shape[:-1], 1)), axis=-1)[..., 0]
    kept_BT = labels_BT != IGNORED
    return np.sum((logsum - of_label) * kept_BT, axis=(-2, -1)) / np.sum(kept_BT)


# Our side of each tensor, under the golden file's names. What has a batch comes as [copies, ...].


def _counterparts(case: Case, mesh: Mesh) -> dict[str, Any]:
    golden, model = case.golden, case.model
    net = network(model, Execution(mesh, recipe("fp32")))
    ours: dict[str, Any] = {
        "rope.inv_freq": rope_frequencies(model),
        "meta.attn_scaling": softmax_scale(model),
        "meta.rope_cos_sin_scale": rope_amplitude(model.rope_scaling),
    }
    ours |= _whole_model(case, net)
    if any(name.startswith("act.") for name in golden):
        ours |= _layer_by_layer(case, net)
    if "generate.prompt" in golden:
        ours |= _continuations(case, net)
    if any(name.startswith("mtp.") for name in golden) and model.num_nextn_predict_layers:
        ours |= _mtp(case, mesh, "post_norm") | _mtp(case, mesh, "pre_norm")
    if "logits_bf16" in golden:
        ours |= _in_bf16(case, mesh)
    return ours


def _spread(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Rows repeated, all of them equally often, until they divide over the mesh: means over them stay what they are."""
    copies = math.lcm(len(rows), mesh.size) // len(rows)
    return jax.device_put(np.tile(rows.astype(np.int32), (copies, 1)), NamedSharding(mesh, BATCH))


def _by_copy(a: Any, rows: int) -> np.ndarray:
    """[copies * rows, ...] -> [copies, rows, ...] on the host."""
    a = np.asarray(a)
    return a.reshape(-1, rows, *a.shape[1:])


def _named(gradients: Any, model: ModelConfig) -> dict[str, np.ndarray]:
    """Gradients by published name; a tied head has the embedding's."""
    named = dict(published(gradients, model))
    return named | {name: named[of] for name, of in copies(model).items()}


def _forward(net: Network) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """The compiled model: (params, bias, tokens) -> logits."""

    @jax.jit
    def logits(params, bias, tokens_BT):
        model = net.bind(params, bias)
        return model.logits(model(tokens_BT).hidden_BTD)

    return logits


def _whole_model(case: Case, net: Network) -> dict[str, Any]:
    """Logits, loss and gradients of the model that trains, its layers scanned."""
    golden, mesh, chunk = case.golden, net.execution.mesh, TrainingConfig().loss_chunk_size
    tokens_BT = golden["input_ids"]
    labels_BT = _next_labels(golden["labels"]) if "labels" in golden else np.full_like(tokens_BT, IGNORED)

    @jax.jit
    def run(params, bias, tokens_BT, labels_BT):
        def mean_loss(params):
            model = net.bind(params, bias)
            out = model(tokens_BT)
            weights_BT = (labels_BT != IGNORED).astype(jnp.float32)
            weights_BT /= jnp.maximum(jnp.sum(weights_BT), 1)
            targets_BT, how = jnp.maximum(labels_BT, 0), net.execution.recipe
            loss = cross_entropy(out.hidden_BTD, model.head_DV, targets_BT, weights_BT, mesh, how, chunk)
            return loss, (out.hidden_BTD, model.logits(out.hidden_BTD), out.stats_L)

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    arguments = _spread(tokens_BT, mesh), _spread(labels_BT, mesh)
    (loss, (hidden_BTD, logits, stats_L)), gradients = run(case.params, case.router_bias, *arguments)
    rows = len(tokens_BT)
    ours = {"loss": loss, "logits": _by_copy(logits, rows), "act.final_norm": _by_copy(hidden_BTD, rows)}
    ours |= {f"grad.{name}": value for name, value in _named(gradients, case.model).items()}
    if stats_L is not None:
        for layer, load_E in enumerate(np.asarray(stats_L.load_E), case.model.first_k_dense_replace):
            ours[f"act.layers.{layer}.expert_load"] = load_E * rows / len(arguments[0])
    return ours


def _layer_by_layer(case: Case, net: Network) -> dict[str, Any]:
    """What the layers see and give, each run on its own on what the layers before it gave."""
    model, tokens_BT = case.model, case.golden["input_ids"]

    @jax.jit
    def embedded(params, bias, tokens_BT):
        table_VD = net.bind(params, bias).embed_tokens[...]
        return embed(table_VD, tokens_BT, net.execution.mesh, net.execution.recipe)

    x_BTD = embedded(case.params, case.router_bias, _spread(tokens_BT, net.execution.mesh))
    ours = {"act.embed": _by_copy(x_BTD, len(tokens_BT))}
    run = _one_layer(net)
    for layer in range(model.num_hidden_layers):
        index = layer - model.first_k_dense_replace
        stack, index = ("dense_layers", layer) if index < 0 else ("moe_layers", index)
        found = run(case.params, case.router_bias, x_BTD, index, stack)
        x_BTD = found["out"]
        for name, value in found.items():
            value = _by_copy(value, len(tokens_BT))
            if name in ("router_logits", "topk_idx_sorted", "topk_weight"):  # golden has sequences joined
                value = value.reshape(len(value), -1, value.shape[-1])
            ours[f"act.layers.{layer}.{name}"] = value
    return ours


def _one_layer(net: Network) -> Callable[..., dict[str, jax.Array]]:
    """The compiled (params, bias, x, index, stack) -> what one layer of a stack computes."""

    @partial(jax.jit, static_argnames="stack")
    def run(params, bias, x_BTD, index, stack):
        graphdef, layers = nnx.split(getattr(net.bind(params, bias), stack))
        block = nnx.merge(graphdef, jax.tree.map(lambda a: a[index], layers))
        rope_2TP = rope_table(net.config, x_BTD.shape[1])
        attention_BTD = block.self_attn(block.input_layernorm(x_BTD), rope_2TP)
        h_BTD = block.post_attention_layernorm(x_BTD + attention_BTD)
        found = {"attn_out": attention_BTD, "out": block(x_BTD, Spans(rope_2TP, None))[0]}
        if stack == "dense_layers":
            return found | {"mlp_out": block.mlp(h_BTD)}
        return found | {"mlp_out": block.mlp(h_BTD)[0]} | _routes(block.mlp.gate, h_BTD, net.config)

    return run


def _routes(gate: Any, h_BTD: jax.Array, config: ModelConfig) -> dict[str, jax.Array]:
    """The router's logits, and each token's experts in ascending order with their weights."""
    logits_BTE = jnp.einsum("btd,de->bte", h_BTD, gate.weight[...], precision=lax.Precision.HIGHEST)
    bias = gate.e_score_correction_bias
    choice = route(logits_BTE, None if bias is None else bias[...], config)
    order_BTK = jnp.argsort(choice.experts_BTK, axis=-1)
    experts_BTK, weights_BTK = (
        jnp.take_along_axis(a, order_BTK, axis=-1) for a in (choice.experts_BTK, choice.weights_BTK)
    )
    return {"router_logits": logits_BTE, "topk_idx_sorted": experts_BTK, "topk_weight": weights_BTK}


def _continuations(case: Case, net: Network) -> dict[str, Any]:
    """The greedy tokens after each prompt, and the logits that chose the first and the last of them."""
    golden, mesh = case.golden, net.execution.mesh
    prompt_BT = golden["generate.prompt"]
    if "generate.ids" not in golden:
        return {}
    ids_BT = golden["generate.ids"]
    config = Config(model=case.model, training=TrainingConfig(remat="none"), precision="fp32")
    found = [
        decode(config, mesh, case.params, case.router_bias, row.tolist(), ids_BT.shape[1], 0.0, 0, None)
        for row in prompt_BT
    ]
    tokens_BT = np.array([_ended(row, ids, case.values) for row, ids in zip(found, ids_BT, strict=True)])
    fed_BT = np.concatenate([prompt_BT, ids_BT[:, :-1]], axis=1)
    logits = _forward(net)(case.params, case.router_bias, _spread(fed_BT, mesh))
    logits = _by_copy(logits, len(prompt_BT))
    ours = {
        "generate.ids": tokens_BT,
        "generate.step_logits_first": logits[:, :, prompt_BT.shape[1] - 1],
        "generate.step_logits_last": logits[:, :, -1],
    }
    if "mtp.generate_use_mtp" in golden:
        texts = np.concatenate([prompt_BT, tokens_BT], axis=1)
        ours["mtp.generate_use_mtp"] = texts[: len(golden["mtp.generate_use_mtp"])]
    return ours


def _ended(ours: list[int], golden: np.ndarray, values: Mapping[str, Any]) -> list[int]:
    """Our tokens, padded as the reference pads a text that has ended."""
    eos, pad = values.get("eos_token_id"), values.get("pad_token_id")
    ends = [eos] if isinstance(eos, int) else eos or []
    length = next((i + 1 for i, token in enumerate(ours) if token in ends), len(ours))
    rest = set(golden[length:].tolist())
    return ours[:length] + golden[length:].tolist() if rest <= {pad, *ends} else ours


def _mtp(case: Case, mesh: Mesh, form: str) -> dict[str, Any]:
    """Multi-token prediction with one of the two hidden states, and the loss that trains with it."""
    model = dataclasses.replace(case.model, mtp_hidden_state=form, aux_loss_alpha=0.0)
    net = network(model, Execution(mesh, recipe("fp32")))
    loss_fn = language_model_loss(net, Config(model=model))

    @jax.jit
    def run(params, bias, tokens_BT):
        def total(params):
            total, metrics = loss_fn(params, bias, tokens_BT, {"mtp_loss_weight": jnp.float32(MTP_WEIGHT)})
            bound = net.bind(params, bias)
            hidden_BTD = bound(tokens_BT[:, :-1], tokens_BT[:, 1:]).mtp_hidden_BTD
            return total, (metrics["mtp_loss"], hidden_BTD, bound.logits(hidden_BTD))

        return jax.value_and_grad(total, has_aux=True)(params)

    tokens_BT = case.golden["input_ids"]
    (total, (loss, hidden_BTD, logits)), gradients = run(case.params, case.router_bias, _spread(tokens_BT, mesh))
    ours = {"loss": loss, f"total_loss_lambda{MTP_WEIGHT}": total}
    ours |= {"hidden": _by_copy(hidden_BTD, len(tokens_BT)), "logits": _by_copy(logits, len(tokens_BT))}
    named = _named(gradients, model)
    for name in ("model.embed_tokens", "lm_head", f"model.layers.{model.num_hidden_layers}.eh_proj"):
        ours["grad." + name.rpartition(".")[2]] = named[f"{name}.weight"]
    return {f"mtp.{form.replace('_', '')}.{name}": value for name, value in ours.items()}


def _in_bf16(case: Case, mesh: Mesh) -> dict[str, Any]:
    tokens_BT = case.golden["input_ids"]
    run = _forward(network(case.model, Execution(mesh, recipe("bf16"))))
    logits = _by_copy(run(case.params, case.router_bias, _spread(tokens_BT, mesh)), len(tokens_BT))
    ours: dict[str, Any] = {"logits_bf16": logits}
    if "labels" in case.golden:
        ours["loss_bf16"] = _loss_of_logits(logits, case.golden["labels"])
    return ours


# Judging.


def judge(ours: Mapping[str, Any], expected: Mapping[str, Any], tolerances: Tolerances) -> list[Row]:
    """One row for each quantity among `expected`, from tensors by their golden names."""
    limits = {None: None, "exact": 0.0} | dataclasses.asdict(tolerances)
    gradients = [np.max(np.abs(golden), initial=0) for name, golden in expected.items() if name.startswith("grad.")]
    rounding = ROUNDING * max(gradients, default=0)
    groups: dict[tuple[str, Kind], list[tuple[float, str]]] = {}
    for name, golden in expected.items():
        kind = _kind(name, expected)
        if kind is not None:
            quantity = "grad.*" if name.startswith("grad.") else re.sub(r"\.\d+\.", ".*.", name)
            groups.setdefault((quantity, kind), []).append(_difference(name, ours.get(name), golden, kind, rounding))
    rows = []
    for (quantity, kind), found in groups.items():
        worst, where = max(found, key=lambda pair: pair[0])
        rows.append(Row(quantity, len(found), worst, limits[kind.tolerance], where))
    return sorted(rows, key=lambda row: (ORDER.index(row.quantity.partition(".")[0]), row.quantity))


def _of_padding(ours: dict[str, Any], case: Case) -> list[Row]:
    """Takes the padding token's row out of the embedding's gradients: PyTorch leaves its own at 0. Tells the rows."""
    pad, rows = case.values.get("pad_token_id"), []
    if pad not in case.golden["input_ids"]:
        return []
    for name in ("grad.model.embed_tokens.weight", "mtp.postnorm.grad.embed_tokens", "mtp.prenorm.grad.embed_tokens"):
        golden = case.golden.get(name)
        if golden is not None and np.shape(ours.get(name)) == golden.shape:
            difference = float(np.max(np.abs(ours[name][pad] - golden[pad])))
            rows.append(Row(f"{name}[{pad}]", 1, difference, None, "the padding token, to which PyTorch gives none"))
            ours[name] = np.where(np.arange(len(golden))[:, None] == pad, golden, ours[name])
    return rows


def _difference(name: str, ours: Any, golden: np.ndarray, kind: Kind, rounding: float) -> tuple[float, str]:
    """(the largest difference, where it is)."""
    layer = re.match(r"act\.layers\.(\d+)\.", name)
    where = f"layer {layer[1]}" if layer else name.removeprefix("grad.") if name.startswith("grad.") else ""
    if ours is None:
        return math.inf, f"{name} has no counterpart in this model"
    ours, golden = np.asarray(ours, np.float64), np.asarray(golden, np.float64)
    if golden.shape not in (ours.shape, ours.shape[1:]):
        return math.inf, f"{name} has the shape {golden.shape}, ours {ours.shape}"
    if kind.measure is _of_largest and max(np.max(np.abs(a), initial=0) for a in (ours, golden)) <= rounding:
        return 0.0, where
    worst = float(np.max(kind.measure(ours, golden), initial=0))
    return (worst, where) if worst == worst else (math.inf, f"{name} is not a number")


def _hub_style(directory: Path, model: ModelConfig) -> list[Row]:
    """The other dialect of config.json must say the same; the balance loss is training's, and not in both."""
    file = directory / "config.hub_style.json"
    if not file.exists():
        return []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(file.read_bytes())
        try:
            other = dataclasses.asdict(read_config(Path(folder)).model)
        except ConfigError as error:
            return [Row(file.name, 1, math.inf, 0.0, str(error))]
    fields = dataclasses.asdict(model)
    different = [name for name in fields if fields[name] != other[name] and name != "aux_loss_alpha"]
    return [Row(file.name, 1, len(different), 0.0, ", ".join(different))]


# The command line.


def main(argv: list[str] | None = None) -> int:
    """Compares the cases one after another; returns the exit status."""
    try:
        args = _arguments().parse_args(argv)
        mesh, tolerances = _mesh(args), build(Tolerances, _pairs("--tolerance", args.tolerance), "--tolerance")
        return max(_run(directory, mesh, tolerances) for directory in args.case)
    except ConfigError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compares what dsjax computes from checkpoints with the reference.")
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument("case", nargs="+", metavar="CASE_DIR", help="holds a checkpoint and golden.safetensors")
    parser.add_argument("--devices", type=int, metavar="N", help="simulate N devices on the CPU")
    parser.add_argument("--mesh", default="", metavar="AXES", help="such as data=1,fsdp=2,expert=4; default: data=N")
    defaults = ",".join(f"{name}={value:g}" for name, value in dataclasses.asdict(Tolerances()).items())
    parser.add_argument("--tolerance", default="", metavar="KINDS", help=f"default: {defaults}")
    return parser


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; see --help")


def _pairs(flag: str, text: str) -> dict[str, float]:
    """`a=1,b=2` as a dict."""
    pairs = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            pairs[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(f'{flag} takes NAME=NUMBER,..., but got "{part}"') from None
    return pairs


def _mesh(args: argparse.Namespace) -> Mesh:
    """The mesh asked for, over simulated devices where those are asked for."""
    config = build(MeshConfig, _pairs("--mesh", args.mesh), "--mesh")
    if args.devices is not None and args.devices < 1:
        raise ConfigError(f"--devices is {args.devices}, but must be at least 1")
    if config.data < 1 and config.data != -1 or min(config.fsdp, config.expert) < 1:
        raise ConfigError(f"--mesh is {args.mesh}, but every axis must be at least 1")
    if args.devices is not None:
        # In time: JAX looks for its devices when first asked for them, not when imported.
        flags = SIMULATED_FLAGS.format(devices=args.devices)
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        jax.config.update("jax_platforms", "cpu")
    count = args.devices or max(config.data, 1) * config.fsdp * config.expert
    return make_mesh(config, jax.devices()[:count])


def _run(directory: str, mesh: Mesh, tolerances: Tolerances) -> int:
    """Compares one case and prints what was found; returns its exit status."""
    try:
        rows = compare(directory, mesh, tolerances)
        left = not_compared(read_golden(Path(directory)))
    except ConfigError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"\n{directory} on {mesh.size} device(s): {axes}\n")
    print(f"  {'quantity':34} {'tensors':>7}  {'worst':>8}  {'allowed':>8}")
    for row in rows:
        print(_line(row))
    if left:
        print(f"  not compared: {', '.join(left)}")
    failed = [row.quantity for row in rows if not row.ok]
    judged = sum(row.tensors for row in rows if row.tolerance is not None)
    print(f"{directory}: {'FAIL: ' + ', '.join(failed) if failed else 'ok'}; {judged} tensors judged")
    return 1 if failed else 0


def _line(row: Row) -> str:
    allowed = "-" if row.tolerance is None else f"{row.tolerance:.0e}" if row.tolerance else "0"
    verdict = "told" if row.tolerance is None else "ok" if row.ok else "FAIL"
    remark = row.where
    if row.quantity == "logits" and row.worst < math.inf:
        remark = f"{'within' if row.worst <= LOGITS_AIM else 'beyond'} the aim of {LOGITS_AIM:.0e}"
    return f"  {row.quantity:34} {row.tensors:7}  {row.worst:8.1e}  {allowed:>8}  {verdict:4}  {remark}".rstrip()


if __name__ == "__main__":
    use_compile_cache(MonitorConfig().compile_cache)
    sys.exit(main())
