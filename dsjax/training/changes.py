"""What may change between two starts of a run, and what makes it another run. No JAX."""

from collections.abc import Mapping, Sequence
from typing import Any

from dsjax.config import Config, ConfigError, from_dict, to_dict
from dsjax.sections import paths, unknown

# What decides the arrays, their meaning, and the order of the data. Names that end in a dot are whole sections.
FIXED = ("model.", "data.", "task.", "training.seed", "optimizer.moment_dtype")
# What decides where and how fast it is computed, what is kept and told, and when it ends.
FREE = (
    *("mesh.", "dispatch.", "checkpoint.", "evaluation.", "divergence.", "hardware.", "monitor.", "init_from"),
    *("training.total_steps", "training.microbatch_size", "training.remat", "training.loss_chunk_size"),
    *(
        "grpo.slots",
        "grpo.validation_samples",
        "fp8.working_copy",
        "data.directory",
        "data.tokenizer",
        "model.initializer_range",
    ),
)
PLACES = ("data.directory", "data.tokenizer")  # where they lie; what they are, the fingerprint of the data tells


def check_allowed(names: Sequence[str]) -> None:
    """Raises ConfigError for what `--allow-change` cannot allow."""
    known = paths(Config)
    for name in names:
        if name not in known:
            raise ConfigError(f"--allow-change: {unknown(Config, name)}")
        if any(other.startswith(f"{name}.") for other in known):
            raise ConfigError(f"--allow-change: {name} is a section; name the field, as in optimizer.learning_rate")
        if _is_in(name, FIXED) and not _is_in(name, FREE):
            raise ConfigError(
                f"--allow-change: {name} decides the arrays or the data, and cannot change within a run; start a new"
                " one, if need be with --config.init_from"
            )


def check_same_run(meta: Mapping[str, Any], config: Config, fingerprint: str, allowed: Sequence[str] = ()) -> list[str]:
    """Whether the run saved with `meta` can go on under `config` and data of this fingerprint.

    Args:
      meta: what a checkpoint holds beside the arrays.
      config: the configuration to go on under.
      fingerprint: of the prepared data.
      allowed: fields that may change though they change the course of the run.

    Returns:
      What has changed and may change, one "name: old -> new" each.

    Raises:
      ConfigError: something else changed; lists every difference, and which of them could be allowed.
    """
    old, new = _fields(to_dict(from_dict(meta["config"]))), _fields(to_dict(config))
    changed = [name for name in old | new if old.get(name) != new.get(name)]
    told = {name: f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in changed}
    if "init_from" in told:
        told["init_from"] += " (without effect: the run goes on with its own weights)"
    refused = [name for name in changed if not _is_in(name, FREE) and name not in allowed]
    other_data = meta.get("data_fingerprint") != fingerprint
    differences = [told[name] for name in refused]
    if other_data and not any(name.startswith("data.") for name in refused):
        differences.append(f"the prepared data: fingerprint {meta.get('data_fingerprint')} -> {fingerprint}")
        differences += [told[name] for name in PLACES if name in told]
    if differences:
        raise ConfigError(
            f"this run was begun with something else and cannot go on ({'; '.join(differences)}); "
            f"{_remedy(meta, config, refused, other_data)}, or start a new run with another --workdir"
        )
    return list(told.values())


def _remedy(meta: Mapping[str, Any], config: Config, refused: list[str], other_data: bool) -> str:
    if not other_data and not any(_is_in(name, FIXED) for name in refused):
        return f"put it back as it was, or say {' '.join(f'--allow-change {name}' for name in refused)}"
    begun = meta["config"].get("init_from")
    return f"give --config.init_from={begun} again" if begun and not config.init_from else "put it back as it was"


def _is_in(name: str, names: Sequence[str]) -> bool:
    return any(name.startswith(other) if other.endswith(".") else name == other for other in names)


def _fields(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat |= _fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
