"""Tiny random checkpoints of every family of transformers whose experts can be streamed: found, not listed."""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

SIZES: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16},
    **{"intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    **{"moe_shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "ffn_hidden_size": 64},
    **{"expert_ffn_hidden_size": 32, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8},
    **{"moe_num_experts": 8, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2},
    **{"n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "mlp_only_layers": []},
    **{"first_k_dense_replace": 1, "moe_layer_start_index": 0, "decoder_sparse_step": 1},
    **{"n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "v_head_dim": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4},
    **{"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "mamba_d_state": 16},
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_d_conv": 4},
    **{"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "attention_dropout": 0.0},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
"""What a configuration is told of these, if it knows the name."""

_LATENT = {"head_dim": 8, "num_key_value_heads": 4}  # latent attention turns only the heads' rotary part
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), _LATENT),
    "gemma4_text": {"enable_moe_block": True, "vocab_size_per_layer_input": 128},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron_h": {"layers_block_type": ["attention", "moe"]},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8},
        **{"indexer_compress_ratio": 2, "ple_embed_dim": 16, "ple_layer_ids": [1]},
        "ngram_vocab_size_base": 1000,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs besides."""

Family = tuple[type[PreTrainedConfig], type[PreTrainedModel]]


def decorated() -> Iterator[Family]:
    """Configuration and causal model of each family that has a class of decorated experts."""
    for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        classes = vars(importlib.import_module(model.__module__)).values()
        if any(
            inspect.isclass(each) and hasattr(each, "_apply_gate") and _is_wrapped(each) for each in classes
        ):
            yield config, model


def _is_wrapped(module: type) -> bool:
    return hasattr(getattr(module, "forward", None), "__wrapped__")


def tiny_config(config: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A configuration of a family with the sizes above."""
    default = config()
    known = {name: size for name, size in SIZES.items() if _knows(default, name)}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        given = inspect.signature(config.__init__).parameters
        types = getattr(default, name, None)
        if isinstance(types, list) and name in given:
            kinds = list(dict.fromkeys(types))
            known[name] = (kinds + types)[: SIZES["num_hidden_layers"]]
    known.pop("layer_types", None) if config.model_type == "jamba" else None
    return config(**{**known, **SPECIAL.get(config.model_type, {})})


def _knows(config: PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:
        return False


def fill(model: PreTrainedModel, seed: int) -> None:
    """Random weights that differ from what any initialisation would give, in buffers too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
