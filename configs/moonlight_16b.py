"""Moonlight-16B-A3B, 16B parameters of which 3B are active: V3's routing at V2-Lite's size ("Muon is Scalable for
LLM Training", arXiv 2502.16982).

15,960,110,208 parameters, of which 26 x 64 are routing biases. 5.7T tokens of 8K sequences.

    dsjax train --config configs/moonlight_16b.py --workdir RUN --distributed \\
        --config.data.sources=text_files:CORPUS --config.data.tokenizer=tokenizer.json

with a tokenizer.json of at most 163,840 tokens; without it the tokens are bytes.

Not the report's: AdamW in place of Muon, with BF16 moments; aux_loss_alpha, which is V3's; the last 0.5T tokens, a
cooldown that rises to 1e-4 and falls linearly to 0 there, stay at the cosine's floor here; the mesh and the microbatch.
"""

from dsjax.config import base_config

BILLION = 10**9


def get_config():
    config = base_config()
    config.model.update(
        vocab_size=163840,
        hidden_size=2048,
        num_hidden_layers=27,
        first_k_dense_replace=1,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.446,
        num_attention_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_theta=50000.0,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        num_nextn_predict_layers=0,
    )

    config.mesh.update(data=-1, fsdp=8, expert=8)  # 64 devices, or any power of two up to 2,048

    config.data.update(sequence_length=8192, fim_rate=0.0)

    warmup = 2000 * 2048 * 8192  # before the batch doubles
    config.optimizer.update(
        learning_rate=4.2e-4,
        warmup_tokens=warmup,
        decay_tokens=5200 * BILLION - warmup,
        decay_learning_rate=4.2e-5,
    )
    config.training.update(
        total_steps=175_834,  # 5.7T tokens: 11,921 steps of 16.8M tokens, then of 33.6M
        batch_size=4096,
        microbatch_size=2048,  # as large as the first batch, so that the ramp is one step, at its end
        initial_batch_size=2048,
        batch_ramp_tokens=200 * BILLION,
        bias_update_speed=0.001,
        bias_update_tokens=5200 * BILLION,
        remat="full",
    )
    config.checkpoint.every_steps = 500
    config.evaluation.update(every_steps=1000, sequences=2048)
    return config
