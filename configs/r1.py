"""DeepSeek-R1-Zero and DeepSeek-R1 at full size: the stages of arXiv 2501.12948 (v2, Nature 645), by their settings.

V3's architecture, as released: 671,026,419,200 parameters and 11,610,068,224 of multi-token prediction, which takes no
part in the reinforcement. The stages are forms, each begun with what another has left:

    dsjax grpo --config configs/r1.py:r1_zero       --workdir runs/r1/zero        # V3-Base, by rewards alone
    dsjax sft  --config configs/r1.py:r1_cold_start --workdir runs/r1/cold_start  # V3-Base, thousands of long answers
    dsjax grpo --config configs/r1.py:r1_rl         --workdir runs/r1/rl          # and a language to think in
    dsjax sft  --config configs/r1.py:r1_sft        --workdir runs/r1/sft         # V3-Base, 804,745 samples
    dsjax grpo --config configs/r1.py:r1_rl_final   --workdir runs/r1/rl_final

R1-Zero's samples may have 32,768 tokens, from step 8.2K on 65,536. The length of rows is fixed within a run, so that
this is a second one, with new moments, and 8,192 the nearest step that ends a rollout:

    dsjax grpo --config configs/r1.py:r1_zero --workdir runs/r1/zero --config.training.total_steps=8192
    dsjax grpo --config configs/r1.py:r1_zero --workdir runs/r1/zero_long --config.init_from=runs/r1/zero \\
        --config.data.sequence_length=65536 --config.grpo.max_new_tokens=65536 --config.training.total_steps=2208 \\
        --config.training.seed=1

Published: 101K H800 hours for R1-Zero (512 GPUs, 198 hours), 5K for the data of r1_sft, 41K for R1 (512 GPUs, 80
hours), $294K at $2 (`dsjax cost`). What it would be here: docs/planning.md, and

    dsjax plan --config configs/r1.py:r1_zero --hardware h200 --chips 512 --rl

Yours: the weights (DeepSeek-V3-Base beside where you run this, or --config.init_from), the problems and the answers,
data/r1/*.jsonl. Not in dsjax: judges of code and the two reward models; `task.rewards` takes a function of your own.
Nobody has trained with this file.
"""

import runpy
from pathlib import Path

from dsjax.config import ConfigError

BASE, RUNS, DATA = "DeepSeek-V3-Base", "runs/r1", "data/r1"
LENGTH = 32 * 1024
_v3 = runpy.run_path(str(Path(__file__).with_name("deepseek_v3.py")))["get_config"]


def get_config(form: str = "r1_zero"):
    if form not in FORMS:
        raise ConfigError(f'unknown form "{form}" of r1; valid are {", ".join(FORMS)}')
    config = _v3("released")
    config.data.sequence_length = LENGTH
    config.dispatch.chunks = 8
    # No report of the stages tells of routing biases and warmup: biases stay, and there is none.
    config.training.update(initial_batch_size=None, batch_ramp_tokens=0, bias_update_speed=0.0, bias_update_tokens=None)
    config.training.update(mtp_loss_weight_final=None, mtp_switch_tokens=None)
    config.optimizer.update(warmup_tokens=0, constant_tokens=0, hold_tokens=None, final_learning_rate=None)
    FORMS[form](config)
    return config


def r1_zero(config):
    """Stated: rate, KL, temperature, group, batch, minibatches, when the reference follows, steps, rewards, length.

    32 questions x 16 samples a step; a rollout of 8,192 samples for 16 steps, each taken once. Not stated, ours: the
    clipping, which is as printed for R1; AdamW but for its rate, as in pretraining; BF16, the mesh, slots and
    microbatch. The length counts the prompt here.
    """
    config.init_from = BASE
    config.task.update(name=f"jsonl:{DATA}/reasoning.jsonl", rewards=("accuracy", "format"))
    config.grpo.update(
        group_size=16,
        minibatches=16,
        clip_epsilon=10.0,
        kl_coefficient=0.001,
        reference_every_steps=400,
        max_new_tokens=LENGTH,
        temperature=1.0,
        slots=2048,
    )
    config.optimizer.update(learning_rate=3e-6, decay_tokens=None, decay_learning_rate=3e-6)
    config.training.update(total_steps=10_400, batch_size=512, microbatch_size=512, mtp_loss_weight=0.0)
    # In FP8 the engine would read its weights in FP32. Experts on as many ranks as possible, since what fsdp cuts is
    # gathered for every token step of a rollout.
    config.precision, config.fp8.working_copy = "bf16", False
    config.mesh.update(fsdp=2, expert=256)
    config.checkpoint.every_steps = 80
    config.evaluation.update(every_steps=400, sequences=512)


def r1_cold_start(config):
    """Stated: V3-Base, thousands of long chains of thought. Not stated, ours: all else, which is r1_sft's.

    3 epochs of 5,000 samples of 5,355 tokens are 20 steps; set training.total_steps for your own set.
    """
    r1_sft(config)
    config.data.sources = (f"chat:{DATA}/cold_start.jsonl",)
    config.training.total_steps = 20
    config.checkpoint.every_steps = 20


def r1_rl(config):
    """Stated: as R1-Zero, clipping at 10, and a reward for thinking in the language of the question.

    Not stated, ours: the steps. The 41K hours of both RL stages, at R1-Zero's 9.7 hours a step, are some 4,200 steps;
    the last stage has 1,700 of them. A task has one language, `task.language`.
    """
    r1_zero(config)
    config.init_from = f"{RUNS}/cold_start"
    config.task.rewards = ("accuracy", "format", "language_consistency")
    config.training.total_steps = 2_496


def r1_sft(config):
    """Stated: V3-Base; about 600K reasoning samples, of r1_rl's that were right, and 200K general ones, 804,745 in all,
    5,355 tokens each on average; 2 to 3 epochs, cosine, rows of 32,768, batch 128.

    Not stated, ours: 2 epochs, 2,055 steps if rows have no gaps; MTP and FP8 as at the end of pretraining. 128 rows
    keep 128 devices busy. The samples: `dsjax collect --checkpoint runs/r1/rl`, and your own.
    """
    config.init_from = BASE
    config.data.update(sources=(f"chat:{DATA}/sft.jsonl",), fim_rate=0.0)
    config.mesh.update(fsdp=2, expert=64)
    config.optimizer.update(learning_rate=5e-5, decay_tokens=None, decay_learning_rate=5e-6)
    config.training.update(total_steps=2_055, batch_size=128, microbatch_size=128, mtp_loss_weight=0.1)
    config.checkpoint.every_steps = 200
    config.evaluation.update(every_steps=200, sequences=128)


def r1_rl_final(config):
    """Stated: temperature 0.7; 1,700 steps, general problems and preference rewards in the last 400 of them alone.

    1,696 here, so that rollouts come out even. The problems of a run are fixed: for the last 400 end at
    training.total_steps=1296, and begin another run with these weights, `--config.init_from`, general problems, your
    reward model as task.rewards and training.total_steps=400. Not stated, ours: all else as in r1_rl.
    """
    r1_rl(config)
    config.init_from = f"{RUNS}/sft"
    config.grpo.temperature = 0.7
    config.training.total_steps = 1_696


FORMS = {one.__name__: one for one in (r1_zero, r1_cold_start, r1_rl, r1_sft, r1_rl_final)}
