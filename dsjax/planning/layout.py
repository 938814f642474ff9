"""Fills in what a configuration leaves open: the sizes of the mesh and the form of dispatch, by bytes moved. No JAX."""

import dataclasses
import math
from collections.abc import Mapping

from dsjax.checks import not_local, uneven
from dsjax.config import Config, DispatchConfig, MeshConfig, ModelConfig
from dsjax.planning.collectives import flows
from dsjax.planning.placement import AXES
from dsjax.planning.traffic import Copies, copies
from dsjax.sections import ConfigError

# all_to_all has more to do on each side than all_gather: where it saves less than this, it is not worth it.
LEAST_SAVING = 0.1


def resolve(config: Config, devices: int) -> Config:
    """`config` with nothing left open for `devices` devices.

    `mesh.expert = -1` becomes the size that moves the fewest bytes in a step, of those that divide the experts, the
    devices and the weights; over nodes, the fewest between them. `mesh.fsdp = -1` becomes what is left, as far as the
    weights divide; `mesh.data = -1` takes the rest. `dispatch.form = "auto"` becomes what moves the fewest bytes.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or no size divides all that it must.
    """
    sizes = fill(config.mesh, config, devices)
    form = dispatch_form(config.model, config.dispatch, sizes["expert"])
    return dataclasses.replace(
        config, mesh=MeshConfig(**sizes), dispatch=dataclasses.replace(config.dispatch, form=form)
    )


def explain(config: Config, resolved: Config) -> str:
    """What `resolve` made of `config`, and why, in a sentence; empty where nothing was left open."""
    parts = []
    if config.mesh.expert == -1:
        moved = moved_bytes(config, _sizes(resolved.mesh), resolved.dispatch.form)
        between, all_of_it = (f"{size / 1e9:.3g} GB" for size in moved)
        told = all_of_it if moved[0] == 0 else f"{between} between nodes"
        parts.append(f"mesh.expert = {resolved.mesh.expert} moves the fewest bytes, {told} a device and step")
    if config.mesh.fsdp == -1:
        parts.append(f"mesh.fsdp = {resolved.mesh.fsdp} is as far as devices and weights divide")
    if config.dispatch.form == "auto" and has_experts(config.model):
        parts.append(_why(resolved.model, resolved.dispatch, resolved.mesh.expert))
    return "; ".join(parts)


def fill(mesh: MeshConfig, config: Config | None, devices: int) -> dict[str, int]:
    """The size of each mesh axis; without `config`, only one axis may be open, and not expert.

    Raises ConfigError as `resolve` does.
    """
    sizes = _sizes(mesh)
    still_open = [axis for axis, size in sizes.items() if size == -1]
    if config is not None and still_open not in ([], ["data"]):
        return _fill_open(config, devices)
    if still_open not in ([], ["data"], ["fsdp"]):
        names = " and ".join(f"mesh.{axis}" for axis in still_open)
        raise ConfigError(f"{names} = -1, but without a model only mesh.data or mesh.fsdp is filled in: set the others")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    filled = {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(filled.values()) != devices:
        asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ConfigError(
            f"the mesh ({asked}) does not fit {devices} device(s): make config.mesh multiply to that number (-1 leaves"
            " an axis open), or take more devices: --devices N simulates them on the CPU, --chips N plans with them"
        )
    return filled


def dispatch_form(model: ModelConfig, dispatch: DispatchConfig, ranks: int) -> str:
    """The form in force over `ranks` expert ranks: "auto" is what moves the fewest bytes.

    One rank is "local". all_to_all never sends more than all_gather, and is taken where it sends a tenth less; over
    nodes (`dispatch.ranks_per_node`), less between them.

    Raises ConfigError for "local" over several ranks: tokens for another rank's experts would be lost.
    """
    if dispatch.form == "local" and ranks > 1:
        raise ConfigError(not_local(ranks))
    if dispatch.form != "auto":
        return dispatch.form
    if ranks == 1:
        return "local"
    gathered, exchanged = (_compared(one) for one in _both(model, dispatch, ranks))
    return "all_to_all" if exchanged <= (1 - LEAST_SAVING) * gathered else "all_gather"


def check_batch(name: str, sequences: int, devices: int) -> None:
    """Raises ConfigError unless `sequences` spread evenly over `devices`; names the nearest numbers that do."""
    if sequences % devices:
        raise ConfigError(uneven(name, sequences, devices))


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def nearest_batch(sequences: int, devices: int) -> int:
    """The multiple of `devices` that is nearest to `sequences`, the smaller of two; at least one each."""
    below = max(devices, sequences // devices * devices)
    return below if sequences - below <= below + devices - sequences else below + devices


def with_even_batch(config: Config, devices: int) -> tuple[Config, str]:
    """`config` with the nearest batch and microbatch that spread over `devices`, and what was changed, in a sentence.

    For a plan: a run trains on the batch that it is given, or not at all.
    """
    training = config.training
    batch = nearest_batch(training.batch_size, devices)
    each = batch // devices
    asked = training.sequences_per_microbatch / devices
    micro = devices * min(divisors(each), key=lambda n: abs(n - asked))
    changed = {"batch_size": batch, "microbatch_size": micro}
    asked_for = {"batch_size": training.batch_size, "microbatch_size": training.sequences_per_microbatch}
    if changed == asked_for:
        return config, ""
    told = " and ".join(
        f"training.{name} = {size} instead of {asked_for[name]}"
        for name, size in changed.items()
        if size != asked_for[name]
    )
    config = dataclasses.replace(
        config, training=dataclasses.replace(training, batch_size=batch, microbatch_size=micro)
    )
    return config, f"planned with {told}, to spread over {devices} devices"


def with_fitting_chunks(config: Config, sequences: int, devices: int) -> Config:
    """`config` for batches of `sequences` other than a microbatch: as many of its chunks as divide a device's tokens.

    Chunks change no number.
    """
    tokens = sequences // devices * config.data.sequence_length
    chunks = math.gcd(config.dispatch.chunks, tokens)
    return dataclasses.replace(config, dispatch=dataclasses.replace(config.dispatch, chunks=chunks))


def has_experts(model: ModelConfig) -> bool:
    """Whether anything is routed."""
    return model.num_moe_layers + model.num_nextn_predict_layers > 0


def moved_bytes(config: Config, sizes: Mapping[str, int], form: str) -> tuple[float, float]:
    """What a device receives in a step: (from other nodes, in all)."""
    found = flows(config, sizes, form, config.dispatch.ranks_per_node)
    return sum(one.slow for one in found), sum(one.total for one in found)


def _fill_open(config: Config, devices: int) -> dict[str, int]:
    best: tuple[tuple[float, float], dict[str, int]] | None = None
    for expert in _expert_sizes(config, devices):
        sizes = _with_expert(config, devices, expert)
        if sizes is not None:
            form = dispatch_form(config.model, config.dispatch, expert)
            moved = moved_bytes(config, sizes, form)
            if best is None or moved < best[0]:
                best = moved, sizes
    if best is None:
        asked = " x ".join(f"{axis} {size}" for axis, size in _sizes(config.mesh).items())
        raise ConfigError(
            f"the mesh ({asked}) cannot be completed for {devices} device(s): no size divides the devices,"
            f" {config.model.n_routed_experts} experts and the weights ({_common(config.model)}); give mesh.data,"
            " mesh.fsdp and mesh.expert yourself"
        )
    return best[1]


def _expert_sizes(config: Config, devices: int) -> list[int]:
    if config.mesh.expert != -1:
        return [config.mesh.expert]
    if config.dispatch.form == "local":
        return [1]
    most = math.gcd(config.model.n_routed_experts, devices) if has_experts(config.model) else 1
    node = config.dispatch.ranks_per_node
    return [e for e in divisors(most) if node is None or e <= node or e % node == 0]


def _with_expert(config: Config, devices: int, expert: int) -> dict[str, int] | None:
    """The mesh with this expert axis; None where it does not come out even."""
    mesh, common = config.mesh, _common(config.model)
    if mesh.fsdp != -1:
        fsdp = mesh.fsdp
    elif devices % (expert * max(mesh.data, 1)) or common % expert:
        return None
    else:
        left = devices // (expert * max(mesh.data, 1))
        fsdp = left if mesh.data != -1 else math.gcd(left, common // expert)
    if common % (fsdp * expert) or devices % (fsdp * expert):
        return None
    data = devices // (fsdp * expert)
    return None if mesh.data not in (-1, data) else {"data": data, "fsdp": fsdp, "expert": expert}


def weights_divide(model: ModelConfig, shards: int) -> bool:
    """Whether fsdp x expert = `shards` divides every dimension of a weight that is cut over both."""
    return _common(model) % shards == 0


def _common(model: ModelConfig) -> int:
    """What fsdp x expert must divide: the dimensions of weights that are cut over both."""
    return math.gcd(model.hidden_size, model.kv_lora_rank, model.q_lora_rank or 0)


def _sizes(mesh: MeshConfig) -> dict[str, int]:
    return {axis: getattr(mesh, axis) for axis in AXES}


def _both(model: ModelConfig, dispatch: DispatchConfig, ranks: int) -> tuple[Copies, Copies]:
    node = dispatch.ranks_per_node
    gathered, exchanged = (
        copies(model, form, ranks, node, two_level=node is not None) for form in ("all_gather", "all_to_all")
    )
    return gathered, exchanged


def _compared(sent: Copies) -> float:
    return sent.slow or sent.fast


def _why(model: ModelConfig, dispatch: DispatchConfig, ranks: int) -> str:
    if ranks == 1:
        return 'dispatch.form is "local": one expert rank'
    gathered, exchanged = (_compared(one) for one in _both(model, dispatch, ranks))
    where = "to other nodes" if dispatch.ranks_per_node is not None and ranks > dispatch.ranks_per_node else "away"
    return (
        f'dispatch.form is "{dispatch.form}": a token is sent {where} {exchanged:.2f} times by all_to_all,'
        f" {gathered:.2f} by all_gather"
    )
