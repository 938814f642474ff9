"""FP8 against BF16: one small model, trained on the same rows from the same weights under different recipes.

As in DeepSeek-V3's report, appendix B, at a size for a laptop: 3,604,040 parameters, 154 steps of 65,536 tokens of the
standard library, 10.1M together, of a vocabulary that is learnt from it. Every dimension that is contracted, but the
latents', holds one to four tiles of 128. The argument is a precision of dsjax/config.py, "bf16" without one:

    dsjax tokenizer --config configs/fp8_experiment.py
    dsjax train --config configs/fp8_experiment.py --workdir runs/fp8/bf16
    dsjax train --config configs/fp8_experiment.py:fp8_deepseek --workdir runs/fp8/fp8_deepseek
    dsjax report runs/fp8/fp8_deepseek --against runs/fp8/bf16

`launch/fp8_experiment.sh` does that for all of them; docs/fp8.md has the result.
"""

from dsjax.config import base_config


def get_config(precision: str = "bf16"):
    config = base_config()
    config.precision = precision
    config.data.tokenizer = "runs/fp8/tokenizer.json"
    config.model.update(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=2,
        intermediate_size=512,
        moe_intermediate_size=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        q_lora_rank=96,
        kv_lora_rank=64,
        num_nextn_predict_layers=0,
        initializer_range=0.02,
    )
    config.optimizer.update(learning_rate=4e-4, warmup_tokens=409_600, decay_learning_rate=4e-5)
    config.training.update(total_steps=154, batch_size=256, microbatch_size=32, bias_update_speed=0.01)
    config.checkpoint.every_steps = 50
    config.evaluation.update(every_steps=50, sequences=256)
    config.monitor.quantisation_every_steps = None if precision in ("fp32", "bf16") else 50
    return config
