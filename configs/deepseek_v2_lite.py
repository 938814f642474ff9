"""DeepSeek-V2-Lite, 15.7B parameters of which 2.4B are active: the recipe in appendix B of arXiv 2405.04434.

15,706,484,224 parameters. 5.7T tokens of 16.4 GFLOP each are 9.4e22 FLOP.

    dsjax train --config configs/deepseek_v2_lite.py --workdir RUN --distributed \\
        --config.data.sources=text_files:CORPUS --config.data.tokenizer=tokenizer.json

with the tokenizer.json of the published checkpoint; without it the tokens are bytes.
`configs/deepseek_v2_lite.py:released` is the architecture of the published checkpoint, extended with YaRN after
pretraining.

Not the report's: the mesh (it keeps the experts of a layer on one device and pipelines the layers) and the microbatch.
"""

from dsjax.config import ConfigError, base_config

BILLION = 10**9


def get_config(form: str = "pretraining"):
    if form not in ("pretraining", "released"):
        raise ConfigError(f'unknown form "{form}" of deepseek_v2_lite; valid are pretraining, released')
    config = base_config()
    config.model.update(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=27,
        first_k_dense_replace=1,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        topk_method="greedy",
        scoring_func="softmax",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        num_attention_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_theta=10000.0,
        max_position_embeddings=4096,
        initializer_range=0.006,
        num_nextn_predict_layers=0,
        aux_loss_alpha=0.001,
    )
    if form == "released":
        config.model.max_position_embeddings = 163840
        config.model.rope_scaling = {
            "type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        }

    config.mesh.update(data=-1, fsdp=8, expert=8)  # 64 devices, or any power of two up to 512

    config.data.update(sequence_length=4096, fim_rate=0.0)

    # The rate is multiplied by 0.316 after 80% of 5.7T tokens and again after 90%: a decay without length, then a hold.
    warmup = 2000 * 4608 * 4096
    config.optimizer.update(
        learning_rate=4.2e-4,
        warmup_tokens=warmup,
        constant_tokens=4560 * BILLION - warmup,
        decay_tokens=0,
        decay_learning_rate=4.2e-4 * 0.316,
        hold_tokens=570 * BILLION,
        final_learning_rate=4.2e-4 * 0.316**2,
    )
    config.training.update(
        total_steps=301_997,  # 5.7T tokens at 18.9M a step
        batch_size=4608,
        microbatch_size=512,
        bias_update_speed=0.0,  # no bias: its routing is balanced by a loss alone
        remat="full",
    )
    config.checkpoint.every_steps = 500
    config.evaluation.update(every_steps=1000, sequences=512)
    return config
