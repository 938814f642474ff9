"""Training runs as they were published: hours, dollars, tokens, each with its status and source. No JAX.

"stated": by the maker, as a bill or a total; "measured": a rate or time that the maker measured; "estimated": by
others, or by the maker and called so. What follows from these by arithmetic is in cost.py.
"""

from dataclasses import dataclass

from dsjax.config import ModelConfig

V3_REPORT = "DeepSeek-V3 Technical Report, arXiv 2412.19437"
V2_REPORT = "DeepSeek-V2, arXiv 2405.04434"
R1_PAPER = "DeepSeek-R1, Nature 645 (2025), arXiv 2501.12948v2, training cost table (read in transcriptions)"
ISCA_PAPER = "Insights into DeepSeek-V3, arXiv 2505.09343, Table 4 (read in transcriptions)"
LLAMA_CARD = "Llama 3.1 model card, github.com/meta-llama/llama-models"
LLAMA_PAPER = "The Llama 3 Herd of Models, arXiv 2407.21783"
KIMI_REPORT = "Kimi K2, github.com/MoonshotAI/Kimi-K2 (README and technical report)"
KIMI_PRESS = "CNBC, November 2025, of K2 Thinking; called unofficial by Moonshot AI"
WIRED = "Wired, 17 April 2023: asked whether it cost 100 million dollars, Sam Altman said it was more than that"
EPOCH = "Epoch AI, data on notable AI models"
AI_INDEX = "Stanford AI Index 2024, after Epoch AI: cost of compute alone"


@dataclass(frozen=True)
class Published:
    """One figure of a run."""

    value: float
    status: str  # "stated", "measured" or "estimated"
    source: str


@dataclass(frozen=True)
class Stage:
    """A part of a run that has a bill of its own."""

    name: str
    chip_hours: Published
    dollars: Published


@dataclass(frozen=True)
class Run:
    """What is known of a run; None: not published."""

    name: str
    chip: str  # a row of hardware.py
    tokens: Published | None = None  # of pretraining
    chip_hours: Published | None = None  # of pretraining
    hours_per_trillion: Published | None = None  # where that is what was published
    dollars: Published | None = None  # where no hours were published
    at_least: Published | None = None  # dollars, where only so much was said
    flops: Published | None = None  # of pretraining
    mfu: Published | None = None  # as the maker counts it
    stages: tuple[Stage, ...] = ()
    model: ModelConfig | None = None  # for FLOPs in closed form; every one of them was pretrained at 4,096 tokens


V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)
V2 = ModelConfig(
    vocab_size=102400,
    hidden_size=5120,
    num_hidden_layers=60,
    first_k_dense_replace=1,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    n_group=8,
    topk_group=3,
    topk_method="group_limited_greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    num_nextn_predict_layers=0,
)
KIMI_K2 = ModelConfig(
    vocab_size=163840,
    hidden_size=7168,
    num_hidden_layers=61,
    first_k_dense_replace=1,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=384,
    n_shared_experts=1,
    num_experts_per_tok=8,
    routed_scaling_factor=2.827,
    num_attention_heads=64,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    num_nextn_predict_layers=0,
)


def _stated(value: float, source: str) -> Published:
    return Published(value, "stated", source)


def _stage(name: str, hours: float, dollars: float, source: str) -> Stage:
    return Stage(name, _stated(hours, source), _stated(dollars, source))


_V3_TABLE, _R1_TABLE = f"{V3_REPORT}, Table 1", R1_PAPER

DEEPSEEK_V3 = Run(
    name="DeepSeek-V3",
    chip="H800",
    tokens=_stated(14.8e12, f"{V3_REPORT}, abstract"),
    chip_hours=_stated(2_664_000, _V3_TABLE),
    stages=(
        _stage("pretraining", 2_664_000, 5_328_000, _V3_TABLE),
        _stage("context extension", 119_000, 238_000, _V3_TABLE),
        _stage("post-training", 5_000, 10_000, _V3_TABLE),
    ),
    model=V3,
)
V3_CLUSTER = _stated(2048, f"{V3_REPORT}, section 3.1")  # chips
V3_BATCH = _stated(15360, f"{V3_REPORT}, section 4.2")  # sequences of 4,096 tokens, after the ramp
V3_STEP_SECONDS = Published(19.926, "measured", ISCA_PAPER)

RUNS = (
    DEEPSEEK_V3,
    Run(
        name="DeepSeek-R1, on top of V3",
        chip="H800",
        stages=(
            _stage("R1-Zero", 101_000, 202_000, _R1_TABLE),
            _stage("SFT data", 5_000, 10_000, _R1_TABLE),
            _stage("R1", 41_000, 82_000, _R1_TABLE),
        ),
    ),
    Run(
        name="DeepSeek-V2",
        chip="H800",
        tokens=_stated(8.1e12, V2_REPORT),
        hours_per_trillion=_stated(172_800, f"{V2_REPORT}, section 3.2.3"),
        model=V2,
    ),
    Run(
        name="Llama-3.1-405B",
        chip="H100",
        tokens=_stated(15.6e12, LLAMA_PAPER),
        chip_hours=_stated(30_840_000, LLAMA_CARD),
        flops=_stated(3.8e25, LLAMA_PAPER),
        mfu=Published(0.41, "measured", f"{LLAMA_PAPER}, Table 4: 16,384 GPUs (8,192: 43%; 131,072 tokens: 38%)"),
    ),
    Run(
        name="Kimi-K2",
        chip="H800",
        tokens=_stated(15.5e12, KIMI_REPORT),
        dollars=Published(4_600_000, "estimated", KIMI_PRESS),
        model=KIMI_K2,
    ),
    Run(
        name="GPT-4",
        chip="A100",
        dollars=Published(78_000_000, "estimated", AI_INDEX),
        at_least=Published(100_000_000, "stated", WIRED),
        flops=Published(2.1e25, "estimated", EPOCH),
    ),
)
