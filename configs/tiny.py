"""The quickstart: DeepSeek-V3's architecture, routing and MTP at a size for a laptop, on 8 simulated devices.

Latent attention, 16 routed experts in 4 groups of which a token sees 2, one shared expert, the routing bias,
multi-token prediction. 1,648,112 parameters and 499,424 of MTP; bytes as tokens, the interpreter's own standard
library as text.

    dsjax train --config configs/tiny.py --devices 8 --workdir runs/tiny

`:extension` is the same with four times the context, by YaRN, for a while, as V3's is extended after pretraining:

    dsjax train --config configs/tiny.py:extension --devices 8 --workdir runs/tiny_1k --config.init_from=runs/tiny

Without --devices it runs on what there is, if that is a multiple of 4; on one device add --config.mesh.expert=1.
"""

from dsjax.config import ConfigError, base_config


def get_config(form: str = "pretraining"):
    if form not in ("pretraining", "extension"):
        raise ConfigError(f'unknown form "{form}" of tiny; valid are pretraining, extension')
    config = base_config()

    # The architecture is the base's; here only what makes the routing DeepSeek-V3's.
    config.model.update(n_group=4, topk_group=2, routed_scaling_factor=2.5)
    config.model.initializer_range = 0.02  # V3's 0.006 is for layers 56 times as wide

    config.mesh.expert = 4  # a group on each rank; mesh.data takes the rest

    config.optimizer.update(
        learning_rate=3e-3,
        warmup_tokens=20 * 32 * 256,
        decay_learning_rate=3e-4,
    )
    config.training.update(total_steps=200, batch_size=32)
    config.training.bias_update_speed = 0.02  # V3's 0.001 has 244,108 steps to balance the experts, this has 200
    config.evaluation.update(every_steps=50, sequences=64)

    config.precision = "fp32"  # CPUs are slow in BF16
    config.hardware.price_per_chip_hour = 0.08  # a small cloud machine; on a CPU the whole machine is the chip
    if form == "extension":
        config.data.sequence_length = 1024
        config.model.rope_scaling = {"factor": 4.0, "original_max_position_embeddings": 256}
        config.training.update(total_steps=20, batch_size=8, bias_update_speed=0.0)
        config.optimizer.update(learning_rate=3e-4, warmup_tokens=0)
        config.evaluation.update(every_steps=10, sequences=16)
    return config
