"""Which models load, and every field of their config.json: what it means here, what it must be, why it may be ignored.

Tables only; `hub/architecture.py` reads by them.
"""

import dataclasses
from typing import Any, NamedTuple

from dsjax.config import ModelConfig

# What transformers' classes take for fields that config.json leaves out. DeepSeek's own class for V3 says the same.
V3_DEFAULTS = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    # The classes say 1, but files without the field are older than MTP in transformers, which left its weights out.
    "num_nextn_predict_layers": 0,
}
V2_DEFAULTS = V3_DEFAULTS | {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "first_k_dense_replace": 0,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": None,  # the class has no default that works
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
GLM_DEFAULTS = V3_DEFAULTS | {
    "vocab_size": 154880,
    "hidden_size": 2048,
    "num_hidden_layers": 47,
    "first_k_dense_replace": 1,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.8,
    "num_attention_heads": 20,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
}
YOUTU_DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 32,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_theta": 10000.0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "num_nextn_predict_layers": 0,
}
ROUTING_FIELDS = frozenset(
    """first_k_dense_replace moe_intermediate_size n_routed_experts n_shared_experts num_experts_per_tok n_group
    topk_group topk_method scoring_func norm_topk_prob routed_scaling_factor num_nextn_predict_layers aux_loss_alpha
    mtp_hidden_state mlp_layer_types moe_layer_freq seq_aux num_local_experts num_experts num_mtp_layers""".split()
)

V3_ROUTING = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
V2_ROUTING = {
    "scoring_func": ("softmax",),
    "topk_method": ("greedy", "group_limited_greedy"),
    # transformers ignores true, and DeepSeek's code then leaves out routed_scaling_factor: there is no reference.
    "norm_topk_prob": (False,),
    "rope_interleave": (True,),
}


class Family(NamedTuple):
    """The published models that share a model_type."""

    architecture: str  # the class in transformers
    defaults: dict[str, Any]  # of that class, for fields that config.json leaves out
    supported: dict[str, tuple[Any, ...]]  # beside SUPPORTED
    routed: bool = True  # False: every layer is dense


FAMILIES = {
    "deepseek_v2": Family("DeepseekV2ForCausalLM", V2_DEFAULTS, V2_ROUTING),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", V3_DEFAULTS, V3_ROUTING),
    "kimi_k2": Family("DeepseekV3ForCausalLM", V3_DEFAULTS, V3_ROUTING),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", GLM_DEFAULTS, V3_ROUTING),
    "youtu": Family("YoutuForCausalLM", YOUTU_DEFAULTS, {}, routed=False),
}
# Models with latent attention that do not load, and why.
RELATIVES = {
    "deepseek_v32": "attends sparsely, through an indexer",
    "deepseek_v4": "has another attention, other residual streams and hashed routing",
    "glm_moe_dsa": "attends sparsely, through an indexer",
    "mistral_large4": "attends sparsely, through an indexer",
    "axk1": "normalises the output of its expert layers",
    "axk2": "attends sparsely and gates the output of attention",
    "mistral4": "scales queries with their position",
    "minicpm3": "scales embeddings, residuals and logits",
    "longcat_flash": "has two attentions a layer and experts that compute nothing",
    "kimi_linear": "has linear attention in most layers",
    "kimi_k25": "is a vision model around the language model",
    "bailing_hybrid": "has linear attention in most layers",
}

# Fields that only one value, or few, can be computed with.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "pretraining_tp": (1, None),
    "seq_aux": (True,),  # the balance loss is the sequence-wise one
    "partial_rotary_factor": (1,),
    "is_encoder_decoder": (False,),
}
# Fields that say again what follows from others, and the property of ModelConfig that they must equal.
DERIVED = {
    "num_key_value_heads": "num_attention_heads",
    "head_dim": "qk_rope_head_dim",  # as transformers means it: of what RoPE turns
    "qk_head_dim": "qk_head_dim",
}
ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}
# Fields without a meaning here, by the reason.
IGNORED = {
    "where it comes from": "_name_or_path name_or_path _commit_hash auto_map transformers_version unsloth_version "
    "unsloth_fixed",
    "special tokens belong to the tokenizer": "bos_token_id eos_token_id pad_token_id tokenizer_class",
    "how another program runs it": "use_cache ep_size _attn_implementation attn_implementation "
    "_attn_implementation_autoset _experts_implementation experts_implementation chunk_size_feed_forward",
    "what another program returns": "return_dict output_attentions output_hidden_states output_router_logits "
    "tie_last_hidden_states",
    "of classifiers": "id2label label2id num_labels problem_type",
    "only for drawing new weights": "embedding_initializer_range",
}
# Fields that are read in a way of their own.
STRUCTURED = frozenset(
    "model_type architectures rope_theta rope_scaling rope_parameters mlp_layer_types dtype torch_dtype "
    "quantization_config".split()
)
MODEL_FIELDS = frozenset(field.name for field in dataclasses.fields(ModelConfig))
KNOWN = (
    MODEL_FIELDS
    | SUPPORTED.keys()
    | DERIVED.keys()
    | ALIASES.keys()
    | STRUCTURED
    | {name for names in IGNORED.values() for name in names.split()}
)

NULL_MEANS = {"n_group": 1, "topk_group": 1}
ROPE_SUPPORTED = {"partial_rotary_factor": (1,), "truncate": (True,)}
YARN_FIELDS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
DTYPES = ("bfloat16", "float16", "float32")
QUANTIZATION_SUPPORTED = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "activation_scheme": ("dynamic",),
    "scale_fmt": ("ue8m0", "float", None),
    "dequantize": (False,),
}
# Which tensors are in FP8, the tensors themselves show.
QUANTIZATION_KNOWN = frozenset(["weight_block_size", "modules_to_not_convert", "ignored_layers"])
