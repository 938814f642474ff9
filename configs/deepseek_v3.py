"""DeepSeek-V3, 671B parameters of which 37B are active: the recipe of its technical report (arXiv 2412.19437).

Architecture section 4.2 and config.json; schedules section 4.2; data section 4.1; FP8 section 3.3. 671,026,419,200
parameters, of which 58 x 256 are routing biases, and 11,610,068,224 of multi-token prediction. 14.8T tokens of 250.5
GFLOP each, 10.2 more for MTP, are 3.9e24 FLOP; the report's run took 2,664K H800 hours for them.

    dsjax train --config configs/deepseek_v3.py --workdir RUN --distributed --config.data.sources=text_files:CORPUS

Pretraining is plain RoPE at 4K. Afterwards the context is extended with YaRN in two phases (section 4.3), each begun
with the weights of the run before:

    dsjax train --config configs/deepseek_v3.py:extension_32k --config.init_from=RUN --workdir RUN_32K ...
    dsjax train --config configs/deepseek_v3.py:extension_128k --config.init_from=RUN_32K --workdir RUN_128K ...

`:released` is the architecture of the published checkpoint, which has been through both and needs YaRN for texts of any
length. To train that one further, `--config.init_from=DIRECTORY` with any config takes the architecture from it.

Not the report's: in the extension the routing bias and MTP's weight are as at the end of pretraining, which section
4.3 does not say; the mesh, the microbatch and what is recomputed (it pipelines over 16 stages).
Nobody has trained with this file. A sequence lives on one device, so that the extension's 480 sequences keep at most
480 devices busy, and 32 of them hold the weights. Which mesh, microbatch and recomputation fit a pod, how long the run
would take there and what it would cost:

    dsjax plan --config configs/deepseek_v3.py --hardware v5p --chips 1024 --search

Left out: the random splitting of tokens that join punctuation and a line break (section 4.1).
"""

from dsjax.config import ConfigError, base_config

BILLION, TRILLION = 10**9, 10**12
FORMS = ("pretraining", "extension_32k", "extension_128k", "released")


def get_config(form: str = "pretraining"):
    if form not in FORMS:
        raise ConfigError(f'unknown form "{form}" of deepseek_v3; valid are {", ".join(FORMS)}')
    config = base_config()
    config.model.update(
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
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_theta=10000.0,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        initializer_range=0.006,
        num_nextn_predict_layers=1,
        aux_loss_alpha=1e-4,
    )
    if form != "pretraining":
        config.model.max_position_embeddings = 163840
        config.model.rope_scaling = {
            "type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }

    config.precision = "fp8_deepseek"
    config.fp8.working_copy = True  # rounded once a step, after the update

    # 512 devices hold the weights once. 1,024 is the largest power of two that divides both 3,072 and 15,360.
    config.mesh.update(data=-1, fsdp=8, expert=64)

    config.data.update(tokenizer="deepseek", sequence_length=4096, fim_rate=0.1)

    # 2,000 steps of warmup end before the batch first grows: 2,000 x 3,072 x 4,096 tokens.
    warmup = 2000 * 3072 * 4096
    config.optimizer.update(
        learning_rate=2.2e-4,
        warmup_tokens=warmup,
        constant_tokens=10 * TRILLION - warmup,
        decay_tokens=4300 * BILLION,
        decay_learning_rate=2.2e-5,
        hold_tokens=333 * BILLION,
        final_learning_rate=7.3e-6,  # for the last 167 billion
        b1=0.9,
        b2=0.95,
        weight_decay=0.1,
        clip_norm=1.0,
        moment_dtype="bfloat16",
    )
    config.training.update(
        total_steps=244_108,  # 14.8T tokens: 16,323 steps of the ramp, then 62.9M tokens a step
        batch_size=15360,
        microbatch_size=1024,
        initial_batch_size=3072,
        batch_ramp_tokens=469 * BILLION,  # "gradually", taken as linear
        mtp_loss_weight=0.3,
        mtp_loss_weight_final=0.1,
        mtp_switch_tokens=10 * TRILLION,
        bias_update_speed=0.001,
        bias_update_tokens=14_300 * BILLION,
        remat="full",
    )
    config.checkpoint.every_steps = 500
    config.evaluation.update(every_steps=1000, sequences=1024)
    if form == "extension_32k":
        extend(config, sequence_length=32 * 1024, batch_size=1920, expert=64, fsdp=2)
    if form == "extension_128k":
        extend(config, sequence_length=128 * 1024, batch_size=480, expert=32, fsdp=1)
    return config


def extend(config, sequence_length, batch_size, expert, fsdp):
    """One of the two phases: 1,000 steps of 62.9M tokens at the last rate of pretraining."""
    config.data.sequence_length = sequence_length
    config.mesh.update(expert=expert, fsdp=fsdp)  # the batch is a multiple of their product
    config.optimizer.update(
        learning_rate=7.3e-6, warmup_tokens=0, constant_tokens=1000 * batch_size * sequence_length, decay_tokens=None
    )
    config.optimizer.update(decay_learning_rate=7.3e-6, hold_tokens=None, final_learning_rate=None)
    config.training.update(total_steps=1000, batch_size=batch_size, microbatch_size=batch_size)
    config.training.update(initial_batch_size=None, batch_ramp_tokens=0, bias_update_speed=0.0)
    config.training.update(bias_update_tokens=None, mtp_loss_weight=0.1, mtp_loss_weight_final=None)
    config.training.mtp_switch_tokens = None
    config.checkpoint.every_steps = 100
    config.evaluation.update(every_steps=100, sequences=expert * fsdp)
