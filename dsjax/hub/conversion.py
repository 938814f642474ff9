"""One published checkpoint into another of a different precision, tensor by tensor."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.hub import names
from dsjax.hub.architecture import Quantization, quantization_config, read_config
from dsjax.hub.block_fp8 import E4M3
from dsjax.hub.directory import without_missing_mtp
from dsjax.hub.reading import Source, as_kind, check, check_copies, read_finite, read_scale
from dsjax.hub.safetensors import open_tensors
from dsjax.hub.writing import SHARD_BYTES, V3_BLOCKS, Format, Plan, check_options, write


def convert(
    source: str | Path,
    destination: str | Path,
    dtype: Any = "bfloat16",
    *,
    scale_format: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `source` in another precision; block FP8 to block FP8 with equal scales is copied bit for bit.

    Args:
      source: a directory that `load` reads.
      destination: a new or empty directory; it appears when everything is written.
      dtype: "bfloat16", "float32" or "float8_e4m3fn", as for `save`; None keeps each tensor as it is.
      scale_format: of block FP8: "float32" or "ue8m0"; None: as in the source, "float32" where it has none.
      max_shard_bytes: of one file.

    Raises:
      ConfigError: as `load` and `save` do.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    check_options(as_kind(dtype), scale_format, None, max_shard_bytes)
    stored = read_config(source)
    now = stored.quantization
    blocks = now or V3_BLOCKS
    form = Format(as_kind(dtype), Quantization(blocks.block, scale_format or blocks.scale_format))
    with open_tensors(source) as tensors:
        model = without_missing_mtp(stored.model, tensors.entries)
        opened = Source(source, tensors, model, stored)
        check(opened)
        check_copies(opened)
        repeated = [name for name in names.copies(model) if name in tensors.entries]
        order = [*opened.places, *repeated]
        plan: Plan = {}
        for name in order:
            plan |= form.plan(name, opened.entry(name).dtype, tuple(opened.entry(name).shape))

        def encoded() -> Iterator[tuple[str, np.ndarray]]:
            for name in order:
                scale = read_scale(opened, name) if opened.is_quantised(name) else None
                yield from form.encode(name, read_finite(opened, name), scale, now)

        is_fp8 = any(dtype == E4M3 for dtype, _ in plan.values())
        config = _config(stored.values, form, is_fp8, model.num_nextn_predict_layers)
        write(destination, config, plan, encoded(), source, max_shard_bytes)


def _config(values: dict[str, Any], form: Format, is_fp8: bool, mtp: int) -> dict[str, Any]:
    """The source's own config.json, with what has changed."""
    values = {name: value for name, value in values.items() if name != "quantization_config"}
    spelling = "dtype" if "dtype" in values else "torch_dtype"
    # DeepSeek's FP8 checkpoints say bfloat16 here: the dtype of what is not FP8, and of the arithmetic.
    if form.kind is not None:
        values[spelling] = "float32" if form.kind.name == "float32" else "bfloat16"
    values |= {name: mtp for name in ("num_nextn_predict_layers", "num_mtp_layers") if name in values}
    if is_fp8:
        values["quantization_config"] = quantization_config(form.quantization)
    return values
