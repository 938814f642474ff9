"""The configuration: frozen sections, read from `configs/*.py`, checked before anything is compiled.

Fields of `model` carry the names of Hugging Face's config.json; lengths of training are counted in
tokens, as the reports count them. `None` means "off" or "derived", and each field says which.
"""

import dataclasses
import json
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsjax.checks import problems
from dsjax.sections import ConfigError, build, fields, override, unknown

if TYPE_CHECKING:
    import ml_collections


@dataclass(frozen=True)
class RopeScaling:
    """YaRN, as in the `rope_scaling` entry of a published config.json."""

    type: str = "yarn"
    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0  # 0 in either of these two: not given, as Hugging Face reads a missing one
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The architecture; names and meanings as in DeepSeek's config.json."""

    vocab_size: int = 264
    hidden_size: int = 128
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1  # layers 0..k-1 have a dense feed-forward
    intermediate_size: int = 352  # of the dense layers
    moe_intermediate_size: int = 64  # of one routed expert
    n_routed_experts: int = 16
    n_shared_experts: int = 1  # one SwiGLU of n_shared_experts * moe_intermediate_size
    num_experts_per_tok: int = 4
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = "noaux_tc"  # "noaux_tc" (V3), "greedy" (V2-Lite), "group_limited_greedy" (V2)
    scoring_func: str = "sigmoid"  # "sigmoid" (V3) or "softmax" (V2)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_attention_heads: int = 4
    q_lora_rank: int | None = 48  # None: one plain q_proj
    kv_lora_rank: int = 32
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None  # None: plain RoPE
    rope_interleave: bool = True  # rotate neighbours (x0, x1), as DeepSeek does; False: (x0, x[d/2])
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False  # of q_a_proj, kv_a_proj_with_mqa and o_proj; DeepSeek has none
    tie_word_embeddings: bool = False  # the output head is the embedding, transposed
    initializer_range: float = 0.006
    num_nextn_predict_layers: int = 1  # depth of multi-token prediction: 0 or 1
    mtp_hidden_state: str = (
        "post_norm"  # what MTP receives: the hidden state "post_norm" or "pre_norm" of the last norm
    )
    aux_loss_alpha: float = 1e-4  # sequence-wise balance loss [V3 eq. 17]; 0 turns it off

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def shared_intermediate_size(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis, outer to inner; what is left open, planning/layout.py fills in."""

    data: int = -1  # -1: what the other axes leave
    fsdp: int = 1  # -1: as far as devices and weights divide
    expert: int = 1  # -1: the size that moves the fewest bytes, by the closed form of planning/collectives.py


@dataclass(frozen=True)
class DispatchConfig:
    """How tokens reach their experts. Nothing is ever dropped: what a buffer cannot hold goes in further rounds."""

    # "local" (one expert rank), "all_gather", "all_to_all", or "auto": what moves the fewest bytes.
    form: str = "auto"
    # Rows of a buffer, over the load expected when all experts are equally busy; a rank that owns all experts always
    # has room for everything.
    capacity_factor: float = 1.25
    # Consecutive expert ranks that share a fast link (8 GPUs of a node). Where the expert axis is longer, all_to_all
    # works in two levels: once to each node over the slow link, then fanned out. None: one level.
    ranks_per_node: int | None = None
    chunks: int = 1  # parts of a device's tokens, one after the other through the experts: buffers shrink, weights stay


@dataclass(frozen=True)
class DataConfig:
    """What is read. Sources: `python_stdlib`, `text_files:FOLDER_OR_GLOB`, `tfds:NAME`; or `chat:FOLDER_OR_GLOB` alone.

    A `chat` source holds conversations (.jsonl), whose answers are trained and whose prompts are not.
    """

    sources: tuple[str, ...] = ("python_stdlib",)
    weights: tuple[float, ...] | None = None  # mixture weights, one a source; None: by size
    tokenizer: str = "bytes"  # "bytes", "deepseek" (extra `tokenizer`), or a tokenizer.json or tiktoken.model
    sequence_length: int = 256  # predicted tokens in a packed row
    fim_rate: float = 0.1  # share of documents rearranged for fill-in-the-middle (PSM) [V3 §4.1]; chat: none
    validation_fraction: float = 0.01  # share of documents, chosen by hash
    directory: str | None = None  # prepared data; None: ~/.cache/dsjax/data
    text_key: str = "text"  # the field that holds the text in jsonl, parquet and TFDS records

    @property
    def is_chat(self) -> bool:
        """Whether rows hold samples, marked as in dsjax.data.marks, instead of plain text."""
        return any(source.startswith("chat:") for source in self.sources)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate: warmup, constant, cosine, constant, final constant [V3 §4.2].

    A phase longer than the run is cut by the run's end; `decay_tokens = None` stretches the cosine to the end.
    """

    learning_rate: float = 2.2e-4  # peak
    warmup_tokens: int = 0  # linear from 0
    constant_tokens: int = 0  # at the peak
    decay_tokens: int | None = None  # cosine from the peak to decay_learning_rate
    decay_learning_rate: float = 2.2e-5
    hold_tokens: int | None = None  # at decay_learning_rate; None: to the end
    final_learning_rate: float | None = None  # after the hold; None: decay_learning_rate
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float | None = 1.0  # of the global gradient
    moment_dtype: str = "bfloat16"  # of Adam's m and v: "bfloat16" or "float32"


@dataclass(frozen=True)
class TrainingConfig:
    """Length, batches and the weights of the losses beside the main one."""

    total_steps: int = 300
    seed: int = 0
    batch_size: int = 64  # sequences a step, over the whole mesh
    microbatch_size: int | None = None  # sequences a microbatch; None: batch_size
    initial_batch_size: int | None = None  # where the ramp starts; None: no ramp
    batch_ramp_tokens: int = 0  # tokens over which the batch grows to batch_size
    mtp_loss_weight: float = 0.3
    mtp_loss_weight_final: float | None = None  # after mtp_switch_tokens; None: mtp_loss_weight throughout
    mtp_switch_tokens: int | None = None
    bias_update_speed: float = 0.001  # gamma of the routing bias
    bias_update_tokens: int | None = None  # after these tokens the speed is 0; None: never
    remat: str = "deepseek"  # "none", "deepseek" (recompute norms and MLA up-projections), "full"
    loss_chunk_size: int = 2048  # tokens whose logits exist at once, per device

    @property
    def sequences_per_microbatch(self) -> int:
        return self.microbatch_size or self.batch_size


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run so that it can go on."""

    every_steps: int | None = 100  # None: only at the end and on interruption
    keep_last: int = 2
    keep_every: int | None = None  # steps that are multiples of it are kept for good; None: none of them
    keep_best: int | None = None  # as many with the lowest validation losses are kept; None: none
    verify: bool = True  # before a run goes on, compare the checkpoint's files with their digests


@dataclass(frozen=True)
class DivergenceConfig:
    """What a run does where its loss is no number or leaps up."""

    # A step whose loss or gradient is not finite leaves weights, moments and routing biases as they are.
    skip_nonfinite: bool = True
    max_skipped: int = 10  # such steps among the last `window`; one more ends the run
    window: int = 100  # steps that a loss is compared with; half of them must be there
    spike_std: float | None = 10.0  # a spike is so many standard deviations above their mean; None: nothing is one
    spike_rise: float = 1.0  # and at least so many nats above it
    skip_steps: int = 2  # batches left out after going back: the spike's and those before it
    max_rollbacks: int = 3  # to the same checkpoint; one more ends the run


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation during training."""

    every_steps: int | None = 100  # None: only at the end
    sequences: int = 64


@dataclass(frozen=True)
class HardwareConfig:
    """What the cost meter and MFU are computed from; None: from the hardware table, by detected device.

    A plan is for the chip that it is asked for, and takes the price alone.
    """

    name: str | None = None  # a row of dsjax/planning/hardware.py
    price_per_chip_hour: float | None = None  # US dollars
    peak_flops_per_second: float | None = None  # of one chip in the compute dtype


@dataclass(frozen=True)
class MonitorConfig:
    """What a run tells besides metrics.jsonl."""

    tensorboard: bool = False  # needs the extra `tensorboard`
    expert_load_every_steps: int | None = 10  # rows of expert_load.jsonl; None: none
    # Error, overflow and underflow of FP8 operands, by one more pass over a microbatch; None: not measured.
    quantisation_every_steps: int | None = None
    # How often to see whether replicated arrays are equal on all devices, and a fixed batch has the loss it began with.
    device_check_every_steps: int | None = None  # None: never
    # A run in which no step, checkpoint or validation ends for so long tells where it hangs, and exits. None: it waits.
    watchdog_seconds: float | None = 1800.0
    compile_cache: str | None = "~/.cache/dsjax/xla"  # XLA's persistent compile cache; None: off


@dataclass(frozen=True)
class FP8Config:
    """What a precision fp8_* or mxfp8 leaves open."""

    # Of the products: "fp32"; or the tensor core's narrow accumulator, emulated and slow: "fp22_promote128" (moved to
    # FP32 every 128, as DeepSeek does), "fp22" (never).
    accumulation: str = "fp32"
    # Each weight is rounded once a step, and gathered over the mesh in E4M3: a byte a weight more in memory, a quarter
    # of the bytes on the wire, the same numbers. False: rounded from the FP32 master wherever it is multiplied.
    working_copy: bool = False


@dataclass(frozen=True)
class TaskConfig:
    """Problems with checkable answers, and what a completion is rewarded for. See posttraining/tasks.py, rewards.py."""

    name: str = "arithmetic"  # "arithmetic", "countdown" or "jsonl:FILE"
    steps: int = 3  # arithmetic: operations of a chain, at most
    steps_min: int | None = None  # and at least; None: steps
    largest: int = 9  # arithmetic and countdown: numbers are from 1 to it
    limit: int = 99  # and no result on the way is above it
    numbers: int = 4  # countdown: how many are to be combined
    validation_fraction: float = 0.1  # share of problems, chosen by a hash of their text
    # "accuracy", "format", "language_consistency", or FILE.py:FUNCTION, called with (prompt, completion, answer).
    rewards: tuple[str, ...] = ("accuracy", "format")
    weights: tuple[float, ...] | None = None  # one a reward; None: 1 each
    language: str = "en"  # to think in: "en" or "zh"
    system: str | None = None  # a system message before each problem; None: no such message
    timeout_seconds: float = 5.0  # for each call of a reward from a file, which then counts as 0


@dataclass(frozen=True)
class GRPOConfig:
    """Reinforcement learning by `dsjax grpo`; a step's `training.batch_size` is its samples. Defaults: R1-Zero's."""

    group_size: int = 16  # samples of one question, each other's baseline
    minibatches: int = 16  # steps that are taken with the samples of one rollout
    clip_epsilon: float = 10.0  # ratios beyond 1 - epsilon and 1 + epsilon gain nothing more; as printed for R1
    kl_coefficient: float = 0.001  # beta; 0: no reference policy is kept
    reference_every_steps: int | None = 400  # the policy becomes the reference; None: the first one stays
    ratio: str = "token"  # of policies: of each "token", or of a whole "sequence", as V3's eq. 26 prints it
    max_new_tokens: int = 32768  # of a sample
    temperature: float = 1.0
    top_p: float = 1.0
    slots: int = 64  # samples that are decoded together
    # V3.2's corrections, all off: the KL estimate weighted by the ratio; samples with a negative advantage left out
    # where the mean of log(old / new) over their tokens exceeds the threshold; kept for the update, the choice that
    # top_p left, and the experts that tokens went to.
    unbiased_kl: bool = False
    off_policy_threshold: float | None = None
    keep_sampling_mask: bool = False
    keep_routes: bool = False
    old_log_probs: str = "trainer"  # whose log-probabilities are the old policy's: "trainer" or "rollout"
    validation_samples: int = 1  # of each held-out problem: pass@1 is their mean, and they vote


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    fp8: FP8Config = field(default_factory=FP8Config)
    task: TaskConfig = field(default_factory=TaskConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    # How matmuls multiply: "fp32", "bf16", or an FP8 recipe of numerics/recipe.py: "fp8_deepseek" (V3),
    # "fp8_deepseek_ue8m0" (V3.1), "fp8_tensorwise", "fp8_gradient_blocks", "mxfp8". Master weights are always FP32.
    precision: str = "bf16"
    # Weights to begin with: a published checkpoint's directory or a run's; None: random ones. See training/adoption.py.
    init_from: str | None = None


Adopt = Callable[[dict[str, Any], str], None]  # (values, init_from)


def load(path: str, overrides: Iterable[str] = (), adopt: Adopt | None = None) -> Config:
    """Reads a config file, applies overrides and checks the result; everything but JAX.

    path: a Python file with `get_config() -> ml_collections.ConfigDict`; `FILE.py:ARGUMENT` calls
        `get_config("ARGUMENT")`.
    overrides: `section.field=value`, later ones win; values are written as on the command line: `None`, `true`,
        `1_000`, `1e6`, tuples with commas.
    adopt: where the configuration has `init_from`, puts what that checkpoint decides into the file's values; overrides
        come after it.
    Raises ConfigError, in one sentence, for anything wrong in either.
    """
    values = _run_file(path)
    changes: dict[str, str] = {}
    for change in overrides:
        name, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"--config.{name} needs a value, as in --config.training.seed=1")
        changes.pop(name, None)
        changes[name] = text
    if "init_from" in changes:
        override(Config, values, "init_from", changes["init_from"])
    if adopt and values.get("init_from") and isinstance(values["init_from"], str) and "\0" not in values["init_from"]:
        adopt(values, values["init_from"])
    for name, text in changes.items():
        override(Config, values, name, text)
    return from_dict(values)


def base_config() -> "ml_collections.ConfigDict":
    """The defaults as a locked ConfigDict: what every `get_config()` starts from, setting only the differences.

    Types are checked afterwards, in `from_dict`, which knows optional fields for what they are.
    """
    import ml_collections

    return ml_collections.ConfigDict(dataclasses.asdict(Config()), type_safe=False).lock()


def to_dict(config: Config) -> dict[str, Any]:
    """`config` as JSON holds it (tuples become lists); `from_dict` is the way back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any]) -> Config:
    """A checked Config from nested dicts; what is missing keeps its default.

    Raises ConfigError for an unknown name, a wrong type or an impossible value.
    """
    config = build(Config, values)
    check(config)
    return config


def check(config: Config) -> None:
    """Raises ConfigError for the first reason why `config` cannot be trained, as far as it shows without devices."""
    for problem in problems(config):
        raise ConfigError(problem)


def _run_file(path: str) -> dict[str, Any]:
    """The values of `get_config()` in a config file, names checked, types not yet."""
    head, dot_py, argument = path.rpartition(".py:")
    file = head + ".py" if dot_py else path
    try:
        source = Path(file).read_text(encoding="utf-8")
        code = compile(source, file, "exec")
    except OSError as error:
        raise ConfigError(f"cannot read the config file {file}: {error.strerror}") from error
    except SyntaxError as error:
        raise ConfigError(f"{file}, line {error.lineno}, is not Python: {error.msg}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not a Python file: {error}") from error
    namespace: dict[str, Any] = {"__name__": "dsjax_config", "__file__": file}
    try:
        exec(code, namespace)
        if not callable(namespace.get("get_config")):
            raise ConfigError(f"{file} has no function get_config() that returns the configuration")
        result = namespace["get_config"](argument) if dot_py else namespace["get_config"]()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(_told(error, file, source)) from error
    if not callable(getattr(result, "to_dict", None)):
        raise ConfigError(f"get_config() of {file} must return base_config() with changes, but returned {result!r}")
    return result.to_dict()


def _told(error: BaseException, file: str, source: str) -> str:
    """One sentence about an exception that a config file raised, with the line of the file it came from."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file and frame.lineno
    ]
    where = f"{file}, line {lines[-1]}" if lines else file
    statement = source.splitlines()[lines[-1] - 1] if lines else ""
    # A locked ConfigDict names the key it does not know in quotes, but not the section it was looked for in.
    key = re.search(r"[\"'](\w+)\\?[\"']", str(error)) if isinstance(error, (AttributeError, KeyError)) else None
    if key and key[1] in statement:
        section = next((f"{name}." for name in fields(Config) if re.search(rf"\.{name}\b", statement)), "")
        return f"{where}: {unknown(Config, section + key[1])}"
    return f"{where}: {type(error).__name__}: {' '.join(str(error).split())}"
