"""Writes tiny GGUF files as llama.cpp's converter would: by gguf's own writer, quantiser and names."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

FAMILIES = {
    "qwen2_moe": ("qwen2moe", gguf.MODEL_ARCH.QWEN2MOE),
    "qwen3_moe": ("qwen3moe", gguf.MODEL_ARCH.QWEN3MOE),
}
Kind = gguf.GGMLQuantizationType
TOKENS = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "he", "ll", "hell", "<|end|>"]


def write_gguf(
    model: Any,
    path: Path,
    kind: str = "F32",
    *,
    kinds: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    tokenizer: bool = False,
    shards: int = 0,
) -> Path:
    """Write a model.

    Args:
        model: of transformers.
        path: of the file.
        kind: of its matrices.
        kinds: of other tensors, by what their names contain.
        settings: in place of what the model says, by names without the family's.
        without: settings and tensors that are left out.
        tokenizer: write one too.
        shards: tensors of a file, if there are to be several.
    """
    family = FAMILIES[model.config.model_type][0]
    options = {"split_max_tensors": shards} if shards else {}
    writer = gguf.GGUFWriter(path, family, **options)
    for name, value in {**said(model.config), **(settings or {})}.items():
        if name not in without:
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            (writer.add_string if isinstance(value, str) else add)(f"{family}.{name}", value)
    if tokenizer:
        _write_tokenizer(writer, model.config.vocab_size)
    for name, tensor in renamed(model):
        if name not in without:
            chosen = _kind(name, tensor, kind, kinds or {})
            writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def said(config: Any) -> dict[str, Any]:
    """The settings that llama.cpp's converter writes for a model."""
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }
    if getattr(config, "head_dim", None):
        found |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if getattr(config, "shared_expert_intermediate_size", None):
        found["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return found


def renamed(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights by llama.cpp's names."""
    names = gguf.get_tensor_name_map(FAMILIES[model.config.model_type][1], model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if leaf == "gate_up_proj":
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
                yield f"{names.get_name(f'{stem}.{part}')}.weight", half
        elif leaf == "down_proj":
            yield f"{names.get_name(name)}.weight", tensor
        else:
            squeezed = tensor[0] if stem.endswith("shared_expert_gate") else tensor
            yield f"{names.get_name(stem)}.{leaf}", squeezed


def rounded(model: Any, kind: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model with the weights that its GGUF file has, in place."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            chosen = _kind(name, weight, kind, {})
            blocks = gguf.quants.quantize(weight.float().numpy(), chosen)
            weight.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(blocks, chosen))))
    return model.to(dtype)


def _kind(name: str, tensor: torch.Tensor, kind: str, kinds: Mapping[str, str]) -> Kind:
    for part, other in kinds.items():
        if part in name:
            return Kind[other]
    small = (
        tensor.ndim == 1 or "ffn_gate_inp" in name or name.endswith(("mlp.gate.weight", "expert_gate.weight"))
    )
    return Kind["F32" if small else kind]


def _write_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    tokens = [*TOKENS, *(f"[PAD{number}]" for number in range(len(TOKENS), size))]
    kinds = [gguf.TokenType.NORMAL] * (len(TOKENS) - 1) + [gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * (size - len(TOKENS))])
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_eos_token_id(len(TOKENS) - 1)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
