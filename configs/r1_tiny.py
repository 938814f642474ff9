"""R1's pipeline at a size for two cores: a model that learns to calculate by rewards alone.

Five forms, each beginning with what the one before has left; `./launch/r1_tiny.sh` runs them all:

    dsjax train --config configs/r1_tiny.py:base       --workdir runs/r1_tiny/base        # pretraining, on facts
    dsjax sft   --config configs/r1_tiny.py:cold_start --workdir runs/r1_tiny/cold_start  # a few worked examples
    dsjax grpo  --config configs/r1_tiny.py:rl         --workdir runs/r1_tiny/rl          # rewards by rule
    dsjax distill --config configs/r1_tiny.py:student --teacher runs/r1_tiny/rl --problems 2000 --workdir runs/...
    dsjax grpo  --config configs/r1_tiny.py:student_rl --workdir runs/r1_tiny/student_rl  # the same student, by rewards

The task is chained arithmetic: `7+5-3=?` is worked off from left to right. 0.6M parameters, bytes as tokens.
"""

from dsjax.config import ConfigError, base_config

FORMS = ("base", "cold_start", "rl", "student", "student_rl")
RUNS = "runs/r1_tiny"


def get_config(form: str = "rl"):
    if form not in FORMS:
        raise ConfigError(f'unknown form "{form}" of r1_tiny; valid are {", ".join(FORMS)}')
    config = base_config()
    config.model.update(
        hidden_size=128,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        intermediate_size=384,
        moe_intermediate_size=96,
        n_routed_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=4,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        num_nextn_predict_layers=0,
        initializer_range=0.02,
    )
    config.precision = "fp32"
    config.hardware.price_per_chip_hour = 0.08
    config.training.update(seed=0, mtp_loss_weight=0.0)
    config.task.update(name="arithmetic", steps=3, largest=9, limit=20)
    config.data.sequence_length = 256
    config.optimizer.clip_norm = 1.0
    {"base": _base, "cold_start": _cold_start, "rl": _rl, "student": _student, "student_rl": _student_rl}[form](config)
    return config


def _base(config):
    """Single facts, `7+5=12`, in any order: what a corpus says of numbers. No chain, no question, no format."""
    config.data.update(sources=(f"text_files:{RUNS}/facts.txt",), fim_rate=0.0, validation_fraction=0.05)
    config.training.update(total_steps=400, batch_size=32, bias_update_speed=0.01)
    config.optimizer.update(learning_rate=2e-3, warmup_tokens=20 * 32 * 256, decay_learning_rate=2e-4)
    config.evaluation.update(every_steps=100, sequences=64)


def _cold_start(config):
    config.init_from = f"{RUNS}/base"
    config.data.update(sources=(f"chat:{RUNS}/cold_start.jsonl",), validation_fraction=0.1)
    config.training.update(total_steps=60, batch_size=16, bias_update_speed=0.0)
    config.optimizer.update(learning_rate=5e-4, decay_learning_rate=5e-5, weight_decay=0.0)
    config.evaluation.update(every_steps=20, sequences=16)


def _rl(config):
    config.init_from = f"{RUNS}/cold_start"
    config.grpo.update(
        group_size=16,
        minibatches=1,
        clip_epsilon=0.2,
        kl_coefficient=0.001,
        reference_every_steps=None,
        max_new_tokens=64,
        slots=256,
    )
    config.training.update(total_steps=100, batch_size=512, microbatch_size=32, bias_update_speed=0.0)
    config.optimizer.update(learning_rate=1e-3, decay_learning_rate=1e-3, weight_decay=0.0)
    config.evaluation.update(every_steps=10, sequences=256)
    config.checkpoint.every_steps = 20


def _student(config):
    _cold_start(config)
    config.init_from = None


def _student_rl(config):
    _rl(config)
