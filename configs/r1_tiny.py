"""R1's pipeline at a size for two cores: a model that learns to calculate by rewards alone.

The stages of configs/r1.py as forms, each beginning with what another has left; `./launch/r1_tiny.sh` runs them:

    dsjax train --config configs/r1_tiny.py:base       --workdir runs/r1_tiny/base        # pretraining: facts, copies
    dsjax sft   --config configs/r1_tiny.py:cold_start --workdir runs/r1_tiny/cold_start  # worked examples
    dsjax grpo  --config configs/r1_tiny.py:rl         --workdir runs/r1_tiny/rl          # rewards by rule
    dsjax sft   --config configs/r1_tiny.py:sft        --workdir runs/r1_tiny/sft         # its own right answers
    dsjax grpo  --config configs/r1_tiny.py:rl_final   --workdir runs/r1_tiny/rl_final    # and rewards again

`student` is what `dsjax distill` trains on the answers of rl, `student_rl` the same student and the same tokens by
rewards, and `zero` is R1-Zero: rewards from the base model on, without a cold start.

The task is chained arithmetic: `7+5-3*2=?` is worked off from left to right. 1,016,816 parameters, bytes as tokens, one
device.
"""

from dsjax.config import ConfigError, base_config

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
    config.data.sequence_length = 256
    config.task.update(name="arithmetic", steps=3, largest=9, limit=20)
    config.training.mtp_loss_weight = 0.0
    config.precision = "fp32"  # CPUs are slow in BF16
    config.hardware.price_per_chip_hour = 0.08
    FORMS[form](config)
    return config


def base(config):
    """Text that knows numbers but no questions: launch/arithmetic_facts.py."""
    config.data.update(sources=(f"text_files:{RUNS}/facts.txt",), fim_rate=0.0, validation_fraction=0.05)
    config.training.update(total_steps=600, batch_size=32, bias_update_speed=0.01)
    config.optimizer.update(learning_rate=3e-3, warmup_tokens=20 * 32 * 256, decay_learning_rate=2e-4)
    config.evaluation.update(every_steps=100, sequences=32)


def cold_start(config):
    """Thousands of solutions, as R1's, most of them the answer alone: it can think, and does so one time in three."""
    _fine_tune(config, f"{RUNS}/base", f"{RUNS}/cold_start.jsonl", steps=900)


def rl(config):
    """R1's first stage: rewards for the right answer and the form."""
    config.init_from = f"{RUNS}/cold_start"
    # KL, group and temperature are R1's; one step a rollout, and rates for a model of this size.
    config.grpo.update(
        group_size=16,
        minibatches=1,
        clip_epsilon=10.0,
        kl_coefficient=0.001,
        reference_every_steps=50,
        max_new_tokens=64,
        slots=256,
    )
    config.training.update(total_steps=100, batch_size=512, microbatch_size=32, bias_update_speed=0.0)
    config.optimizer.update(learning_rate=5e-5, decay_learning_rate=5e-5, weight_decay=0.0)
    config.evaluation.update(every_steps=10, sequences=256)
    config.checkpoint.every_steps = 10


def zero(config):
    """R1-Zero: no worked example. A base model of this size never writes an answer, so there is nothing to prefer."""
    rl(config)
    config.init_from = f"{RUNS}/base"
    config.training.total_steps = 10


def sft(config):
    """The base model again, on right answers of rl (rejection sampling), as R1's second fine-tuning."""
    _fine_tune(config, f"{RUNS}/base", f"{RUNS}/accepted.jsonl", steps=750)


def rl_final(config):
    """R1's last stage: at a temperature of 0.7."""
    rl(config)
    config.init_from = f"{RUNS}/sft"
    config.grpo.temperature = 0.7
    config.training.total_steps = 20


def student(config):
    """Trained by `dsjax distill`: 100 steps of 16 rows."""
    _fine_tune(config, f"{RUNS}/cold_start", f"{RUNS}/student.jsonl", steps=100)


def student_rl(config):
    """As many rows, some 1,600, by rewards alone."""
    rl(config)
    config.training.total_steps = 10


def _fine_tune(config, init_from: str, conversations: str, steps: int):
    config.init_from = init_from
    config.data.update(sources=(f"chat:{conversations}",), validation_fraction=0.05)
    config.training.update(total_steps=steps, batch_size=16, bias_update_speed=0.0)
    config.optimizer.update(learning_rate=1.5e-3, decay_learning_rate=3e-4, weight_decay=0.0)
    config.evaluation.update(every_steps=60, sequences=16)


FORMS = {form.__name__: form for form in (base, cold_start, rl, zero, sft, rl_final, student, student_rl)}
