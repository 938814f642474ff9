"""DeepSeek-V2, 236B parameters of which 21B are active: the recipe of its technical report (arXiv 2405.04434).

Architecture and schedules section 3.1.2. 235,741,434,880 parameters. 8.1T tokens of 155.3 GFLOP each are 1.3e24
FLOP; the report names 172.8K H800 hours for a trillion tokens (section 3.2.3).

    dsjax train --config configs/deepseek_v2.py --workdir RUN --distributed --config.data.sources=text_files:CORPUS \\
        --config.data.tokenizer=tokenizer.json

with the tokenizer.json of the published checkpoint; without it the tokens are bytes.
`configs/deepseek_v2.py:released` is the architecture of the published checkpoint, extended with YaRN after
pretraining.

Not the report's: the mesh and the microbatch (it pipelines over 16 stages). Left out: the balance losses over
devices and communication (its alpha 2 and 3) and the dropping of tokens; here none is ever dropped.
"""

from dsjax.config import ConfigError, base_config

BILLION = 10**9


def get_config(form: str = "pretraining"):
    if form not in ("pretraining", "released"):
        raise ConfigError(f'unknown form "{form}" of deepseek_v2; valid are pretraining, released')
    config = base_config()
    config.model.update(
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
        rope_theta=10000.0,
        max_position_embeddings=4096,
        initializer_range=0.006,
        num_nextn_predict_layers=0,
        aux_loss_alpha=0.003,
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

    config.mesh.update(data=-1, fsdp=32, expert=8)  # 256 devices or 3 x 256

    config.data.update(sequence_length=4096, fim_rate=0.0)

    # 2,000 steps of warmup end before the batch first grows. The rate is multiplied by 0.316 after 60% of 8.1T
    # tokens and again after 90%: a decay without length, then a hold.
    warmup = 2000 * 2304 * 4096
    config.optimizer.update(
        learning_rate=2.4e-4,
        warmup_tokens=warmup,
        constant_tokens=4860 * BILLION - warmup,
        decay_tokens=0,
        decay_learning_rate=2.4e-4 * 0.316,
        hold_tokens=2430 * BILLION,
        final_learning_rate=2.4e-4 * 0.316**2,
    )
    config.training.update(
        total_steps=220_696,  # 8.1T tokens: 12,080 steps of the ramp, then 37.7M tokens a step
        batch_size=9216,
        microbatch_size=768,
        initial_batch_size=2304,
        batch_ramp_tokens=225 * BILLION,  # "gradually", taken as linear
        bias_update_speed=0.0,  # no bias: its routing is balanced by losses alone
        remat="full",
    )
    config.checkpoint.every_steps = 500
    config.evaluation.update(every_steps=1000, sequences=768)
    return config
