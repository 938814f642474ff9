"""The yardstick of `dsjax bench`: a small routed model, dropless, FP32, on one device.

10,214,320 parameters, 48 of them routing biases: 4 layers of which one is dense, 16 routed experts top-4 and a shared
one, no MTP. The same sizes can be built in other stacks, so that tokens per second can be compared.

    dsjax bench --config configs/bench.py --baseline dense
"""

from dsjax.config import base_config


def get_config():
    config = base_config()
    config.model.update(
        vocab_size=8192,
        hidden_size=256,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        intermediate_size=704,
        moe_intermediate_size=128,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        num_attention_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        num_nextn_predict_layers=0,
    )
    config.data.sequence_length = 256
    config.training.update(batch_size=8, remat="deepseek", loss_chunk_size=512)  # the quickest on CPUs
    config.evaluation.sequences = 8
    config.precision = "fp32"
    return config
