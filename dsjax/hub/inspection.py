"""What is in a published checkpoint: architecture, parameters by part, dtypes, sizes, and whether it is all there."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dsjax.config import ConfigError, ModelConfig
from dsjax.hub import names
from dsjax.hub.architecture import Published, read_config
from dsjax.hub.block_fp8 import dequantize_blocks
from dsjax.hub.directory import without_missing_mtp
from dsjax.hub.names import SCALE
from dsjax.hub.reading import Source, check_copies, problems, read_finite, read_scale
from dsjax.hub.safetensors import open_tensors

LISTED = 10  # missing or surplus tensors named before the rest is only counted

OTHER, REPEATED = "other", "repeated for MTP"
UNREAD = " (by the headers; --values reads the numbers, too)"
PARTS = {  # by what the published name contains; the first that fits
    "embedding": ("embed_tokens",),
    "head": ("lm_head", "shared_head.head"),
    "routed experts": (".mlp.experts.",),
    "shared experts": (".mlp.shared_experts.",),
    "router": (".mlp.gate.",),
    "dense feed-forward": (".mlp.",),
    "norms": ("input_layernorm", "post_attention_layernorm", "model.norm."),
    "attention": (".self_attn.",),
    REPEATED: (),
    "joining MTP": ("eh_proj", "enorm", "hnorm", "shared_head.norm"),
    OTHER: (),
}


@dataclass
class Part:
    """The tensors of one part of a model."""

    parameters: int = 0
    nbytes: int = 0  # with the scales of block FP8
    dtypes: Counter = field(default_factory=Counter)  # parameters by dtype
    largest: float | None = None  # magnitude, where values are read


def inspect(path: str | Path, values: bool = False) -> tuple[str, bool]:
    """(a text for people, whether `load` would find everything in order).

    Args:
      path: the directory of a published checkpoint.
      values: also reads all numbers, for the largest magnitude of each part and for NaN and infinity.

    Raises:
      ConfigError: config.json or a file's header cannot be read at all.
    """
    path = Path(path)
    stored = read_config(path)
    with open_tensors(path) as tensors:
        model = without_missing_mtp(stored.model, tensors.entries)
        source = Source(path, tensors, model, stored)
        wrong = list(problems(source))
        parts = by_part(_tensors(source, values and not wrong, wrong))
        if values and not wrong:
            with _noted(wrong):
                check_copies(source)
        size = sum(entry.nbytes for entry in tensors.entries.values())
        files = len({entry.file for entry in tensors.entries.values()})
    lines = [f"{path.name or path}: {stored.model_type}, {size / 1e9:,.2f} GB in {files} file{'s' * (files != 1)}"]
    lines += [f"  {name:<13} {text}" for name, text in describe(model, stored)]
    if stored.model != model:
        lines.append("  (config.json promises MTP, but no tensor of it is there)")
    lines += ["", *table(parts), ""]
    complete = "complete: every tensor of the architecture is there, and no other"
    lines += wrong[:LISTED] or [complete + ("" if values else UNREAD)]
    if len(wrong) > LISTED:
        lines.append(f"and {len(wrong) - LISTED} problems more")
    return "\n".join(lines), not wrong


def describe(model: ModelConfig, stored: Published | None = None) -> Iterator[tuple[str, str]]:
    """An architecture in a few lines of text, each with a heading."""
    dense = model.first_k_dense_replace
    yield "layers", f"{model.num_hidden_layers}, {dense} of them dense; hidden size {model.hidden_size:,}"
    query = f"query latent {model.q_lora_rank}" if model.q_lora_rank else "no query latent"
    heads = f"{model.qk_nope_head_dim}+{model.qk_rope_head_dim}, values {model.v_head_dim}"
    yield "attention", f"{model.num_attention_heads} heads of {heads}; key-value latent {model.kv_lora_rank}, {query}"
    if model.num_moe_layers:
        groups = f", {model.topk_group} of {model.n_group} groups" if model.n_group > 1 else ""
        yield (
            "experts",
            f"{model.num_experts_per_tok} of {model.n_routed_experts}{groups}, and {model.n_shared_experts} shared, of"
            f" {model.moe_intermediate_size:,}; {model.scoring_func}, {model.topk_method},"
            f" scaled by {model.routed_scaling_factor:g}",
        )
    scaling = model.rope_scaling
    yarn = f"; YaRN x{scaling.factor:g} from {scaling.original_max_position_embeddings:,}" if scaling else ""
    yield "positions", f"{model.max_position_embeddings:,}, RoPE base {model.rope_theta:,.0f}{yarn}"
    tied = ", head tied to the embedding" if model.tie_word_embeddings else ""
    yield "vocabulary", f"{model.vocab_size:,}{tied}"
    yield "MTP", f"{model.num_nextn_predict_layers} layer" if model.num_nextn_predict_layers else "none"
    if stored and stored.quantization:
        block = " x ".join(map(str, stored.quantization.block))
        yield "FP8", f"blocks of {block}, {stored.quantization.scale_format} scales"


def by_part(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...], float | None]]) -> dict[str, Part]:
    """Sums up (name, dtype, shape, largest magnitude) by part of the model, in the order of PARTS."""
    parts = {name: Part() for name in PARTS}
    for name, dtype, shape, largest in tensors:
        part, numbers = parts[part_of(name)], int(np.prod(shape))
        part.nbytes += numbers * dtype.itemsize
        if not name.endswith(SCALE):
            part.parameters += numbers
            part.dtypes[dtype.name] += numbers
        if largest is not None:
            part.largest = max(part.largest or 0.0, largest)
    return {name: part for name, part in parts.items() if part.nbytes}


def part_of(name: str) -> str:
    if names.layer_of(name) is not None and ("embed_tokens" in name or "shared_head.head" in name):
        return REPEATED
    return next((part for part, signs in PARTS.items() if any(sign in name for sign in signs)), OTHER)


def _tensors(source: Source, values: bool, wrong: list[str]) -> Iterator[tuple[str, np.dtype, tuple[int, ...], Any]]:
    """What `by_part` takes; where `values` are read, what is wrong with them goes to `wrong`."""
    entries = source.tensors.entries
    total = sum(entry.nbytes for entry in entries.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=None if values else True, delay=1) as bar:
        for name, entry in entries.items():
            largest = None
            if values and name in source.places:
                with _noted(wrong):
                    largest = _largest(source, name)
            bar.update(entry.nbytes)
            yield name, entry.dtype, entry.shape, largest


@contextlib.contextmanager
def _noted(wrong: list[str]) -> Iterator[None]:
    """Puts the sentence of a ConfigError into `wrong`."""
    try:
        yield
    except ConfigError as error:
        wrong.append(str(error))


def _largest(source: Source, name: str) -> float:
    numbers = read_finite(source, name)
    if source.is_quantised(name):
        numbers = dequantize_blocks(numbers, read_scale(source, name), source.quantization.block)
    return float(np.abs(numbers).max(initial=0))


def table(parts: dict[str, Part]) -> Iterator[str]:
    """The parts in columns, with their sum; the largest magnitudes where they are known."""
    values = any(part.largest is not None for part in parts.values())
    yield f"  {'part':<20}{'parameters':>18}{'share':>8}{'GB':>11}  {'largest  ' * values}dtype"
    total = sum(part.parameters for name, part in parts.items() if name != REPEATED)
    for name, part in parts.items():
        largest = f"{part.largest or 0:<9.3g}" * values
        share, size, kinds = part.parameters / max(total, 1), part.nbytes / 1e9, ", ".join(part.dtypes)
        yield f"  {name:<20}{part.parameters:>18,}{share:>8.1%}{size:>11,.3f}  {largest}{kinds}"
    yield f"  {'all':<20}{total:>18,}{'':>8}{sum(part.nbytes for part in parts.values()) / 1e9:>11,.3f}"
