"""What makes a configuration impossible, told in sentences; everything that can be known without devices.

The sentences start with the field and end with what to do. `dsjax.config.check` raises the first one.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dsjax.sections import did_you_mean

if TYPE_CHECKING:
    from dsjax.config import (
        Config,
        DataConfig,
        GRPOConfig,
        MeshConfig,
        ModelConfig,
        OptimizerConfig,
        TaskConfig,
        TrainingConfig,
    )

# A field may be None where its type says so; then the rule does not apply.
POSITIVE = """
    model.vocab_size model.hidden_size model.num_hidden_layers model.intermediate_size model.moe_intermediate_size
    model.n_routed_experts model.num_experts_per_tok model.n_group model.topk_group
    model.routed_scaling_factor model.num_attention_heads model.q_lora_rank model.kv_lora_rank
    model.qk_nope_head_dim model.qk_rope_head_dim model.v_head_dim model.rope_theta
    model.max_position_embeddings model.rms_norm_eps model.initializer_range
    model.rope_scaling.original_max_position_embeddings model.rope_scaling.beta_fast model.rope_scaling.beta_slow
    dispatch.capacity_factor dispatch.ranks_per_node dispatch.chunks
    optimizer.learning_rate optimizer.eps optimizer.clip_norm
    training.total_steps training.batch_size training.microbatch_size training.initial_batch_size
    training.loss_chunk_size checkpoint.every_steps checkpoint.keep_last
    checkpoint.keep_every checkpoint.keep_best
    monitor.watchdog_seconds monitor.device_check_every_steps
    divergence.window divergence.spike_std divergence.skip_steps
    evaluation.every_steps evaluation.sequences monitor.expert_load_every_steps monitor.quantisation_every_steps
    hardware.peak_flops_per_second
    grpo.group_size grpo.minibatches grpo.clip_epsilon grpo.reference_every_steps grpo.max_new_tokens grpo.temperature
    grpo.top_p grpo.slots grpo.validation_samples
    task.steps task.steps_min task.largest task.limit task.timeout_seconds
""".split()

NOT_NEGATIVE = """
    model.n_shared_experts model.first_k_dense_replace model.aux_loss_alpha
    model.rope_scaling.mscale model.rope_scaling.mscale_all_dim
    optimizer.warmup_tokens optimizer.constant_tokens optimizer.decay_tokens optimizer.decay_learning_rate
    optimizer.hold_tokens optimizer.final_learning_rate optimizer.weight_decay
    training.seed training.batch_ramp_tokens training.mtp_loss_weight training.mtp_loss_weight_final
    training.mtp_switch_tokens training.bias_update_speed training.bias_update_tokens
    grpo.kl_coefficient grpo.off_policy_threshold
    hardware.price_per_chip_hour divergence.max_skipped divergence.spike_rise divergence.max_rollbacks
""".split()

FP8_PRECISIONS = ("fp8_deepseek", "fp8_deepseek_ue8m0", "fp8_tensorwise", "fp8_gradient_blocks", "mxfp8")

CHOICES = {
    "precision": ("fp32", "bf16", *FP8_PRECISIONS),
    "fp8.accumulation": ("fp32", "fp22", "fp22_promote128"),
    "model.topk_method": ("noaux_tc", "greedy", "group_limited_greedy"),
    "model.scoring_func": ("sigmoid", "softmax"),
    "model.rope_scaling.type": ("yarn",),
    "model.mtp_hidden_state": ("post_norm", "pre_norm"),
    "dispatch.form": ("auto", "local", "all_gather", "all_to_all"),
    "optimizer.moment_dtype": ("bfloat16", "float32"),
    "training.remat": ("none", "deepseek", "full"),
    "grpo.ratio": ("token", "sequence"),
    "grpo.old_log_probs": ("trainer", "rollout"),
    "task.language": ("en", "zh"),
}

OPEN = {  # axes that may be left open, and what -1 then means
    "mesh.data": "what the other axes leave",
    "mesh.fsdp": "as far as devices and weights divide",
    "mesh.expert": "the size that moves the fewest bytes",
}

NOT_EMPTY = ("init_from", "data.directory", "data.text_key", "hardware.name", "monitor.compile_cache", "task.system")

SOURCES = ("python_stdlib", "text_files:FOLDER_OR_GLOB", "tfds:NAME", "chat:FOLDER_OR_GLOB")
TASKS = ("arithmetic", "countdown", "jsonl:FILE")
REWARDS = ("accuracy", "format", "language_consistency", "FILE.py:FUNCTION")

# What the checkers of answers read: numbers of so many digits, expressions of so many numbers, and no longer ones.
HIGHEST = 10**12
MOST_NUMBERS = 32


def problems(config: "Config") -> Iterator[str]:
    """Every reason why `config` cannot be trained, lazily: the relations between fields rely on sound single fields."""
    yield from _single_fields(config)
    yield from data_problems(config.data)
    yield from _routing(config.model)
    yield from _positions(config)
    yield from _mesh(config)
    yield from _batches(config.mesh, config.training)
    yield from _fp8(config)
    yield from _optimizer(config.optimizer)
    yield from _phases(config.training)
    yield from _checkpoints(config)
    yield from _grpo(config.grpo)
    yield from _task(config.task)


def _value(config: "Config", path: str) -> Any:
    """The value at a dotted path, None below a section that is None."""
    value: Any = config
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return value


def _single_fields(config: "Config") -> Iterator[str]:
    for path in POSITIVE:
        value = _value(config, path)
        if value is not None and value <= 0:
            yield f"{path} is {value}, but must be above 0"
    for path in NOT_NEGATIVE:
        value = _value(config, path)
        if value is not None and value < 0:
            yield f"{path} is {value}, but must not be negative"
    for path, names in CHOICES.items():
        value = _value(config, path)
        if value is not None and value not in names:
            yield f'unknown {path} "{value}"{did_you_mean(value, names)}'
    for path in NOT_EMPTY:
        if _value(config, path) == "":
            yield f"{path} is an empty text; give one, or leave the field as it is"
    if config.data.validation_fraction == 0:
        yield "data.validation_fraction is 0, but a run measures its validation loss; set it above 0"
    if config.model.num_nextn_predict_layers not in (0, 1):
        yield f"model.num_nextn_predict_layers is {config.model.num_nextn_predict_layers}, but must be 0 or 1"
    for name, meaning in OPEN.items():
        if _value(config, name) < 1 and _value(config, name) != -1:
            yield f"{name} is {_value(config, name)}, but must be above 0, or -1 for {meaning}"


def _routing(model: "ModelConfig") -> Iterator[str]:
    experts, groups, chosen = model.n_routed_experts, model.n_group, model.num_experts_per_tok
    if model.first_k_dense_replace > model.num_hidden_layers:
        yield (
            f"model.first_k_dense_replace is {model.first_k_dense_replace}, but there are only "
            f"{model.num_hidden_layers} layers (model.num_hidden_layers)"
        )
    if chosen > experts:
        yield (
            f"model.num_experts_per_tok is {chosen}, but there are only {experts} experts to choose from "
            "(model.n_routed_experts)"
        )
    if experts % groups:
        yield f"model.n_routed_experts = {experts} does not divide into model.n_group = {groups} groups"
        return
    if model.topk_group > groups:
        yield f"model.topk_group is {model.topk_group}, but there are only {groups} groups (model.n_group)"
    if groups > 1 and model.topk_method == "greedy":
        yield (
            f'model.topk_method "greedy" knows no groups, but model.n_group is {groups}; '
            'set it to 1 or choose "group_limited_greedy"'
        )
    kept = model.topk_group * experts // groups
    if chosen > kept:
        yield (
            f"model.num_experts_per_tok is {chosen}, but the model.topk_group = {model.topk_group} kept groups "
            f"hold only {kept} experts"
        )
    if groups > 1 and experts // groups < 2 and model.topk_method == "noaux_tc":
        yield (
            f'model.topk_method "noaux_tc" scores a group by its two best experts, but {experts} experts in '
            f"{groups} groups leave one each; lower model.n_group"
        )


def _positions(config: "Config") -> Iterator[str]:
    model, scaling = config.model, config.model.rope_scaling
    if model.qk_rope_head_dim % 2:
        yield f"model.qk_rope_head_dim is {model.qk_rope_head_dim}, but rotary dimensions come in pairs: make it even"
    if config.data.sequence_length > model.max_position_embeddings:
        yield (
            f"data.sequence_length is {config.data.sequence_length}, but the model ends at "
            f"model.max_position_embeddings = {model.max_position_embeddings}"
        )
    if scaling is None:
        return
    if scaling.factor < 1:
        yield f"model.rope_scaling.factor is {scaling.factor}, but YaRN stretches: it must be at least 1"
    if scaling.beta_fast < scaling.beta_slow:
        yield (
            f"model.rope_scaling.beta_fast = {scaling.beta_fast} is below beta_slow = {scaling.beta_slow}; "
            "the fast end has more rotations"
        )
    if config.data.sequence_length > scaling.factor * scaling.original_max_position_embeddings:
        yield (
            f"data.sequence_length is {config.data.sequence_length}, but YaRN reaches only "
            f"{scaling.factor:g} x {scaling.original_max_position_embeddings} positions; raise its factor"
        )


def _mesh(config: "Config") -> Iterator[str]:
    model, mesh = config.model, config.mesh
    has_experts = model.num_moe_layers > 0 or model.num_nextn_predict_layers > 0
    if has_experts and model.n_routed_experts % max(mesh.expert, 1):
        yield f"model.n_routed_experts = {model.n_routed_experts} cannot be divided over mesh.expert = {mesh.expert}"
    shards = max(mesh.fsdp, 1) * max(mesh.expert, 1)
    for name in ("hidden_size", "q_lora_rank", "kv_lora_rank"):
        size = getattr(model, name)
        if size is not None and size % shards:
            yield (
                f"model.{name} = {size} cannot be divided over mesh.fsdp x mesh.expert = {shards}; "
                "make them smaller and mesh.data larger"
            )
    node = config.dispatch.ranks_per_node
    if node is not None and mesh.expert > node and mesh.expert % node:
        yield (
            f"mesh.expert = {mesh.expert} is not a multiple of dispatch.ranks_per_node = {node}: nodes would share"
            " expert ranks"
        )
    if config.dispatch.form == "local" and mesh.expert > 1:
        yield not_local(mesh.expert)
    if config.evaluation.sequences % _known_devices(mesh):
        yield uneven("evaluation.sequences", config.evaluation.sequences, _known_devices(mesh), f"{_axes(mesh)} = ")


def not_local(ranks: int) -> str:
    """The sentence for experts that are spread over `ranks` where tokens stay at home."""
    return (
        f'dispatch.form "local" moves no tokens, but mesh.expert = {ranks} spreads the experts; '
        'use "all_gather" or "auto"'
    )


def uneven(name: str, sequences: int, devices: int, axes: str = "") -> str:
    """The sentence for `sequences` that do not spread over `devices`, with the nearest numbers that do."""
    below = sequences // devices * devices
    near = f"{below} or {below + devices}" if below else f"{devices}, or fewer devices"
    return f"{name} = {sequences} sequences cannot be divided over {axes}{devices} devices; make it {near}"


def _known_devices(mesh: "MeshConfig") -> int:
    """The devices that a batch is divided over; a factor of them while axes are still open."""
    return math.prod(max(size, 1) for size in (mesh.data, mesh.fsdp, mesh.expert))


def _axes(mesh: "MeshConfig") -> str:
    known = [f"mesh.{name}" for name in ("data", "fsdp", "expert") if getattr(mesh, name) != -1]
    return " x ".join(known)


def _batches(mesh: "MeshConfig", training: "TrainingConfig") -> Iterator[str]:
    micro, name = training.microbatch_size, "training.microbatch_size"
    if micro is None:
        micro, name = training.batch_size, "training.batch_size"
    devices = _known_devices(mesh)
    if micro % devices:
        yield uneven(name, micro, devices, f"{_axes(mesh)} = ")
    if training.batch_size % micro:
        yield f"training.batch_size = {training.batch_size} is not a multiple of training.microbatch_size = {micro}"
    start = training.initial_batch_size
    if (start is None) != (training.batch_ramp_tokens == 0):
        yield "a batch ramp needs both training.initial_batch_size and training.batch_ramp_tokens: set both or neither"
    if start is not None and start > training.batch_size:
        yield f"training.initial_batch_size = {start} is above training.batch_size = {training.batch_size}"
    if start is not None and start % micro:
        yield f"training.initial_batch_size = {start} is not a multiple of {name} = {micro}; set a smaller microbatch"


def data_problems(data: "DataConfig") -> Iterator[str]:
    """Every reason why `data` cannot be prepared; what of it exists, only preparing shows."""
    if not data.sources:
        yield f"data.sources is empty; name at least one of {', '.join(SOURCES)}"
    for source in data.sources:
        kind, colon, rest = source.partition(":")
        if source != "python_stdlib" and not (kind in ("text_files", "tfds", "chat") and colon and rest):
            yield f'unknown source "{source}" in data.sources{did_you_mean(source, SOURCES)}'
    kinds = [source.startswith("chat:") for source in data.sources]
    if any(kinds) and not all(kinds):
        yield (
            f"data.sources mixes conversations ({data.sources[kinds.index(True)]}) with plain text"
            f" ({data.sources[kinds.index(False)]}), whose losses are not alike; train on one after the other"
        )
    if data.weights is not None:
        if len(data.weights) != len(data.sources):
            yield f"data.weights has {len(data.weights)} numbers for {len(data.sources)} data.sources; give one each"
        for weight in data.weights:
            if not 0 < weight < math.inf:
                yield f"data.weights holds {weight}, but every weight must be above 0; leave the source out"
    if data.tokenizer not in ("bytes", "deepseek") and not data.tokenizer.endswith((".json", "tiktoken.model")):
        yield (
            f'unknown data.tokenizer "{data.tokenizer}"; valid are bytes, deepseek, or a path to a tokenizer.json or'
            " tiktoken.model"
        )
    if data.sequence_length < 1:
        yield f"data.sequence_length is {data.sequence_length}, but must be above 0"
    if not 0 <= data.fim_rate <= 1:
        yield f"data.fim_rate is {data.fim_rate}, but is a share of documents, from 0 to 1"
    if not 0 <= data.validation_fraction < 1:
        yield f"data.validation_fraction is {data.validation_fraction}, but is a share of documents, below 1"


def _fp8(config: "Config") -> Iterator[str]:
    if config.precision not in FP8_PRECISIONS:
        for path, off in (
            ("fp8.accumulation", "fp32"),
            ("fp8.working_copy", False),
            ("monitor.quantisation_every_steps", None),
        ):
            if _value(config, path) != off:
                yield (
                    f'{path} is {_value(config, path)}, but precision "{config.precision}" has no FP8; choose one of '
                    f"{', '.join(FP8_PRECISIONS)}, or set it to {off}"
                )
    elif config.fp8.accumulation != "fp32" and config.precision not in ("fp8_deepseek", "fp8_deepseek_ue8m0"):
        yield (
            f'fp8.accumulation "{config.fp8.accumulation}" needs tiles of 1x128, but precision "{config.precision}" has'
            ' others; choose fp8_deepseek, or set it to "fp32"'
        )
    elif config.fp8.working_copy and config.precision == "mxfp8":
        yield (
            'fp8.working_copy is True, but precision "mxfp8" scales weights along what is contracted, so that each'
            " product needs its own copy; set it to False"
        )


def _grpo(grpo: "GRPOConfig") -> Iterator[str]:
    if grpo.top_p > 1:
        yield f"grpo.top_p is {grpo.top_p}, but is a probability: at most 1"
    if grpo.group_size == 1:
        yield "grpo.group_size is 1, but a sample alone has no others to be compared with; take at least 2"
    if grpo.keep_sampling_mask and grpo.top_p == 1:
        yield "grpo.keep_sampling_mask is True, but with grpo.top_p = 1 nothing is left out; lower top_p or turn it off"
    if grpo.keep_sampling_mask and grpo.old_log_probs == "rollout":
        yield (
            "grpo.keep_sampling_mask needs the old policy's log-probabilities within the mask, which the rollout does"
            ' not give; set grpo.old_log_probs="trainer"'
        )


def _optimizer(optimizer: "OptimizerConfig") -> Iterator[str]:
    for name in ("b1", "b2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield f"optimizer.{name} is {getattr(optimizer, name)}, but must be at least 0 and below 1"
    # Each update keeps 1 - b2 of the new square; above 0.99 BF16 rounds the change away and v stays too high.
    if optimizer.moment_dtype == "bfloat16" and optimizer.b2 > 0.99:
        yield (
            f"optimizer.b2 = {optimizer.b2} moves v by less than BF16 can hold; lower it to 0.99 or less, "
            'or set optimizer.moment_dtype to "float32"'
        )
    if optimizer.hold_tokens is not None and optimizer.decay_tokens is None:
        yield "optimizer.hold_tokens follows the decay, which has no end; set optimizer.decay_tokens too"
    if optimizer.final_learning_rate is not None and optimizer.hold_tokens is None:
        yield "optimizer.final_learning_rate follows the hold, which has no end; set optimizer.hold_tokens too"


def _phases(training: "TrainingConfig") -> Iterator[str]:
    if (training.mtp_loss_weight_final is None) != (training.mtp_switch_tokens is None):
        yield (
            "a second MTP weight needs both training.mtp_loss_weight_final and training.mtp_switch_tokens: "
            "set both or neither"
        )
    if training.seed >= 2**32:
        yield f"training.seed is {training.seed}, but must be below {2**32}"


def _checkpoints(config: "Config") -> Iterator[str]:
    saved, measured = config.checkpoint.every_steps, config.evaluation.every_steps
    if config.checkpoint.keep_every is not None and (saved is None or config.checkpoint.keep_every % saved):
        yield (
            f"checkpoint.keep_every is {config.checkpoint.keep_every}, but checkpoints are written every"
            f" checkpoint.every_steps = {saved} steps; make it a multiple of them"
        )
    if config.checkpoint.keep_best is not None and (saved is None or measured is None or saved % measured):
        yield (
            f"checkpoint.keep_best needs a validation loss at every checkpoint, but evaluation.every_steps = {measured}"
            f" does not divide checkpoint.every_steps = {saved}; set both alike"
        )


def _task(task: "TaskConfig") -> Iterator[str]:
    kind, _, file = task.name.partition(":")
    if task.name not in TASKS[:2] and not (kind == "jsonl" and file):
        yield f'unknown task.name "{task.name}"{did_you_mean(task.name, TASKS)}'
    if task.steps_min is not None and task.steps_min > task.steps:
        yield f"task.steps_min is {task.steps_min}, but chains have at most task.steps = {task.steps}; lower it"
    for name in ("largest", "limit"):
        if getattr(task, name) > HIGHEST:
            yield f"task.{name} is {getattr(task, name)}, but must be at most {HIGHEST}"
    if not 2 <= task.numbers <= MOST_NUMBERS:
        yield f"task.numbers is {task.numbers}, but must be from 2 to {MOST_NUMBERS}"
    if not 0 <= task.validation_fraction < 1:
        yield f"task.validation_fraction is {task.validation_fraction}, but is a share of problems, below 1"
    if not task.rewards:
        yield f"task.rewards is empty; name at least one of {', '.join(REWARDS)}"
    for reward in task.rewards:
        file, _, function = reward.rpartition(":")
        if reward not in REWARDS[:3] and not (file.endswith(".py") and function.isidentifier()):
            yield f'unknown reward "{reward}" in task.rewards{did_you_mean(reward, REWARDS)}'
        if task.rewards.count(reward) > 1:
            yield f'task.rewards names "{reward}" twice; name it once, and set its task.weights'
    if task.weights is not None:
        if len(task.weights) != len(task.rewards):
            yield f"task.weights has {len(task.weights)} numbers for {len(task.rewards)} task.rewards; give one each"
        for weight in task.weights:
            if not math.isfinite(weight):
                yield f"task.weights holds {weight}, but every weight must be a finite number"
