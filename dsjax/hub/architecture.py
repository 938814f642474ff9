"""A published config.json into a ModelConfig, and back.

Two dialects are read: the one of the published checkpoints (`rope_theta`, `rope_scaling`, `scoring_func`, ...) and the
one that transformers 5 writes (`rope_parameters`, `dtype`, `num_mtp_layers`, ...). Every field is a field of
ModelConfig, or one that needs a certain value, or one that cannot matter here; any other is refused by name.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsjax.checks import problems
from dsjax.config import Config, ModelConfig, RopeScaling
from dsjax.hub.families import (
    ALIASES,
    DERIVED,
    DTYPES,
    FAMILIES,
    KNOWN,
    MODEL_FIELDS,
    NULL_MEANS,
    QUANTIZATION_KNOWN,
    QUANTIZATION_SUPPORTED,
    RELATIVES,
    ROPE_SUPPORTED,
    ROUTING_FIELDS,
    SUPPORTED,
    V2_ROUTING,
    YARN_FIELDS,
    Family,
)
from dsjax.sections import ConfigError, build


@dataclass(frozen=True)
class Quantization:
    """Weights in E4M3 with one scale a block."""

    block: tuple[int, int] = (128, 128)  # rows and columns of the published matrix
    scale_format: str = "float32"  # "float32", or "ue8m0": powers of two


@dataclass(frozen=True)
class Published:
    """What a published config.json says."""

    model: ModelConfig
    model_type: str
    dtype: str | None  # "bfloat16", "float16" or "float32"
    quantization: Quantization | None
    values: dict[str, Any]  # the file as it is


def is_published(directory: Path) -> bool:
    """Whether a directory is meant to be a published checkpoint: its config.json names a model_type, which a run's does
    not, or there are safetensors in it."""
    try:
        return "model_type" in _read_json(Path(directory) / "config.json")
    except ConfigError:
        return any(Path(directory).glob("*.safetensors"))


def neither(path: Path) -> str:
    """The sentence for a path that is neither a published checkpoint nor a run."""
    if not path.exists():
        return f"there is no {path}; give the directory of a published checkpoint or of a run"
    return (
        f"{path} is neither a published checkpoint (config.json with a model_type, and safetensors) nor the directory"
        " of a run with checkpoints"
    )


def read_config(directory: Path) -> Published:
    """The architecture of a published checkpoint.

    Raises ConfigError, in one sentence, for a file that is none, another architecture, unknown or unsupported fields
    (all of them, by name), wrong types and impossible values.
    """
    path = Path(directory) / "config.json"
    values = _read_json(path)
    try:
        family = _family(values)
        wrong = [*_unknown(values, family), *_unsupported(values, SUPPORTED | family.supported)]
        if wrong:
            raise ConfigError("; ".join(wrong))
        model = _model(values, family)
        for field, derived in DERIVED.items():
            _require_equal(field, values.get(field), getattr(model, derived), derived)
        return Published(model, values["model_type"], _dtype(values), _quantization(values), values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def published_config(
    model: ModelConfig,
    dtype: str,
    quantization: Quantization | None,
    bos_token_id: int | None,
    eos_token_id: int | None,
) -> dict[str, Any]:
    """What config.json says of `model`, in the dialect of the published checkpoints; `read_config` is the way back.

    dtype: of the weights that are not quantised, as PyTorch calls it.
    Raises ConfigError where no published class computes this architecture.
    """
    model_type = _published_type(model)
    fields = dataclasses.asdict(model)
    if fields["mtp_hidden_state"] == ModelConfig().mtp_hidden_state:
        del fields["mtp_hidden_state"]  # ours alone: the published dialect has no word for it
    if model.rope_scaling is not None:
        absent = [name for name in ("mscale", "mscale_all_dim") if fields["rope_scaling"][name] == 0]
        fields["rope_scaling"] = {k: v for k, v in fields["rope_scaling"].items() if k not in absent}
    values = fields | {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "torch_dtype": dtype,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "num_key_value_heads": model.num_attention_heads,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "moe_layer_freq": 1,
        "seq_aux": True,
        "ep_size": 1,
        "pretraining_tp": 1,
        "use_cache": True,
    }
    if quantization is not None:
        values["quantization_config"] = quantization_config(quantization)
    return dict(sorted(values.items()))


def _published_type(model: ModelConfig) -> str:
    """The model_type whose published classes compute `model`."""
    scheme = model.scoring_func, model.topk_method
    if scheme == ("sigmoid", "noaux_tc"):
        return "deepseek_v3"
    if model.scoring_func != "softmax" or model.topk_method not in V2_ROUTING["topk_method"]:
        raise ConfigError(
            f'no published class routes with scoring_func "{scheme[0]}" and topk_method "{scheme[1]}"; DeepSeek-V3 '
            'has "sigmoid" with "noaux_tc", DeepSeek-V2 "softmax" with "greedy" or "group_limited_greedy"'
        )
    wrong = list(_unsupported(dataclasses.asdict(model), V2_ROUTING))
    if model.hidden_size % model.num_attention_heads:
        # Of no use to MLA, but transformers insists on it.
        wrong.append(f"hidden_size = {model.hidden_size} does not divide by {model.num_attention_heads} heads")
    if wrong:
        raise ConfigError(f"DeepSeek-V2, the published class with softmax routing, has no such model: {wrong[0]}")
    return "deepseek_v2"


def quantization_config(quantization: Quantization) -> dict[str, Any]:
    values = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(quantization.block),
    }
    return values | {"scale_fmt": "ue8m0"} if quantization.scale_format == "ue8m0" else values


def _read_json(path: Path) -> dict[str, Any]:
    try:
        # Whole numbers that no float can hold become infinite, which every field refuses.
        values = json.loads(path.read_text(encoding="utf-8"), parse_int=lambda t: int(t) if len(t) < 19 else float(t))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, but holds {_shown(values)}")
    return values


def _family(values: dict[str, Any]) -> Family:
    name = values.get("model_type")
    if name is None and {"model", "training"} <= values.keys():
        raise ConfigError("this is the configuration of a dsjax run, not of a published checkpoint")
    if not isinstance(name, str) or name not in FAMILIES:
        reason = f", which {RELATIVES[name]}" if isinstance(name, str) and name in RELATIVES else ""
        raise ConfigError(f"model_type is {_shown(name)}{reason}; those that load are {', '.join(FAMILIES)}")
    architectures = values.get("architectures") or [FAMILIES[name].architecture]
    if architectures != [FAMILIES[name].architecture]:
        raise ConfigError(
            f'architectures is {_shown(architectures)}, but of {name} only ["{FAMILIES[name].architecture}"] loads'
        )
    return FAMILIES[name]


def _unknown(values: dict[str, Any], family: Family) -> Iterator[str]:
    """One sentence about all fields that mean nothing to us."""
    known = KNOWN if family.routed else KNOWN - ROUTING_FIELDS
    found = []
    for name in values.keys() - known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        found.append(f"{name} (did you mean {near[0]}?)" if near else name)
    if found:
        yield f"unknown field{'s' * (len(found) > 1)} {', '.join(sorted(found))}"


def _unsupported(values: dict[str, Any], supported: dict[str, tuple[Any, ...]], prefix: str = "") -> Iterator[str]:
    """A sentence for every field with a value that is not supported."""
    for name, allowed in supported.items():
        if name in values and values[name] not in allowed:
            yield (
                f"{prefix}{name} is {_shown(values[name])}, but only "
                f"{' or '.join(_shown(value) for value in allowed if value is not None)} is supported"
            )


def _require_equal(name: str, value: Any, expected: Any, source: str) -> None:
    if value is not None and value != expected:
        raise ConfigError(f"{name} is {_shown(value)}, but only {_shown(expected)} ({source}) is supported")


def _shown(value: Any) -> str:
    """A value as JSON writes it, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _model(values: dict[str, Any], family: Family) -> ModelConfig:
    """The ModelConfig of known and supported fields."""
    given = dict(values)
    for alias, name in ALIASES.items():
        if alias in given:
            _require_equal(alias, given[alias], given.setdefault(name, given[alias]), name)
    merged = family.defaults | {name: value for name, value in given.items() if name in MODEL_FIELDS}
    merged |= {name: value for name, value in NULL_MEANS.items() if name in merged and merged[name] is None}
    if not family.routed:
        merged["first_k_dense_replace"] = merged["num_hidden_layers"]
    if given.get("mlp_layer_types") is not None:
        dense = _dense_layers(given["mlp_layer_types"], merged["num_hidden_layers"])
        _require_equal("first_k_dense_replace", given.get("first_k_dense_replace"), dense, "by mlp_layer_types")
        merged["first_k_dense_replace"] = dense
    merged["rope_theta"], merged["rope_scaling"] = _rope(values, merged)
    model = build(ModelConfig, merged)
    _check(model)
    _check_attention_factor(values, model.rope_scaling)
    return model


def _dense_layers(kinds: Any, layers: int) -> int:
    """The number of dense layers in front, of a list of "dense" and "sparse"."""
    dense = kinds.count("dense") if isinstance(kinds, list) else 0
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or kinds != ["dense"] * dense + ["sparse"] * (layers - dense)
    ):
        raise ConfigError(
            f'mlp_layer_types must name all {layers} layers, "dense" in front and "sparse" behind, '
            f"but is {_shown(kinds)}"
        )
    return dense


def _check(model: ModelConfig) -> None:
    """Raises ConfigError for the first reason why there can be no such model."""
    scaling = model.rope_scaling
    if scaling is not None and scaling.factor >= 1 and scaling.original_max_position_embeddings > 0:
        # Longer texts than YaRN was made for are bad to train on, but a file may allow them.
        reach = scaling.factor * scaling.original_max_position_embeddings
        model = dataclasses.replace(model, max_position_embeddings=int(min(model.max_position_embeddings, reach)))
    for problem in problems(Config(model=model)):
        if problem.startswith(("model.", "unknown model.")):
            raise ConfigError(problem.replace("model.", ""))


def _rope(values: dict[str, Any], merged: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """(rope_theta, fields of rope_scaling or None) from either dialect, or from both where they agree."""
    thetas = [("rope_theta", values["rope_theta"])] if "rope_theta" in values else []
    scalings = []
    for name in ("rope_parameters", "rope_scaling"):
        entry = values.get(name)
        if entry is not None and not isinstance(entry, dict):
            raise ConfigError(f"{name} must be an object or null, but is {_shown(entry)}")
        if entry:
            scalings.append((name, _yarn(name, entry, merged)))
            if "rope_theta" in entry:
                thetas.append((f"{name}.rope_theta", entry["rope_theta"]))
    for found in (thetas, scalings):
        for name, value in found[1:]:
            if value != found[0][1]:
                raise ConfigError(f"{name} and {found[0][0]} contradict each other; keep one of them")
    theta = thetas[0][1] if thetas else merged["rope_theta"]
    return theta, scalings[0][1] if scalings else None


def _yarn(name: str, entry: dict[str, Any], merged: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of RopeScaling from `rope_scaling` or `rope_parameters`; None for plain RoPE.

    A missing field means what transformers takes it for.
    """
    kinds = {entry[key] for key in ("type", "rope_type") if isinstance(entry.get(key), str)} or {"default"}
    if len(kinds) > 1 or not kinds <= {"default", "yarn"}:
        raise ConfigError(
            f'{name} has the type {" and ".join(map(_shown, sorted(kinds)))}, but only "yarn" or "default" is supported'
        )
    yarn = kinds == {"yarn"}
    known = {"type", "rope_type", "rope_theta", *ROPE_SUPPORTED, *((*YARN_FIELDS, "attention_factor") if yarn else ())}
    if unknown := sorted(entry.keys() - known):
        raise ConfigError(f"{name} of type {_shown(kinds.pop())} has unknown fields: {', '.join(unknown)}")
    for problem in _unsupported(entry, ROPE_SUPPORTED, f"{name}."):
        raise ConfigError(problem)
    if not yarn:
        return None
    if entry.get("factor") is None:
        raise ConfigError(f"{name} has no factor, but YaRN needs one")
    length = entry.get("original_max_position_embeddings", merged["max_position_embeddings"])
    fields = {
        "type": "yarn",
        "factor": entry["factor"],
        "original_max_position_embeddings": length,
        "beta_fast": entry.get("beta_fast") or 32,
        "beta_slow": entry.get("beta_slow") or 1,
        "mscale": entry.get("mscale") or 0,
        "mscale_all_dim": entry.get("mscale_all_dim") or 0,
    }
    return fields


def _check_attention_factor(values: dict[str, Any], scaling: RopeScaling | None) -> None:
    """Refuses an amplitude of cos and sin other than the one that follows from factor and mscale."""
    if scaling is None:
        return
    rise = 0.1 * math.log(scaling.factor)
    derived = 1 + rise
    if scaling.mscale and scaling.mscale_all_dim:
        derived = (1 + scaling.mscale * rise) / (1 + scaling.mscale_all_dim * rise)
    for name in ("rope_parameters", "rope_scaling"):
        given = (values.get(name) or {}).get("attention_factor")
        if given is not None and not (isinstance(given, (int, float)) and math.isclose(given, derived, rel_tol=1e-6)):
            raise ConfigError(
                f"{name}.attention_factor is {_shown(given)}, but only {derived:.6g} (from factor and mscale) "
                "is supported"
            )


def _dtype(values: dict[str, Any]) -> str | None:
    found = {name: values[name] for name in ("dtype", "torch_dtype") if values.get(name) is not None}
    for name, value in found.items():
        if value not in DTYPES:
            raise ConfigError(f"{name} is {_shown(value)}, but only {', '.join(DTYPES)} are supported")
    if len(set(found.values())) > 1:
        raise ConfigError("dtype and torch_dtype contradict each other; keep one of them")
    return next(iter(found.values()), None)


def _quantization(values: dict[str, Any]) -> Quantization | None:
    entry, name = values.get("quantization_config"), "quantization_config"
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise ConfigError(f"{name} must be an object or null, but is {_shown(entry)}")
    for problem in _unsupported({"quant_method": None} | entry, QUANTIZATION_SUPPORTED, f"{name}."):
        raise ConfigError(problem)
    if unknown := sorted(entry.keys() - QUANTIZATION_SUPPORTED.keys() - QUANTIZATION_KNOWN):
        raise ConfigError(f"{name} has unknown fields: {', '.join(unknown)}")
    block = entry.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise ConfigError(f"{name}.weight_block_size must be two whole numbers above 0, but is {_shown(block)}")
    return Quantization((block[0], block[1]), "ue8m0" if entry.get("scale_fmt") == "ue8m0" else "float32")
