"""Which attention layers do what Qwen3-MoE's, Qwen2-MoE's or Mixtral's does, instruction by instruction, as most do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.mixtral.modeling_mixtral import MixtralAttention
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeAttention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from undercroft.moe.alike import alike

LINEAR, NORMS = ("q_proj", "k_proj", "v_proj"), ("q_norm", "k_norm")
"""What such a layer calls what makes queries, keys and values, and the norms of the first two."""
_NORMED: Any = Qwen3MoeAttention.forward
_PLAIN: Any = (Qwen2MoeAttention.forward, MixtralAttention.forward)
_ROTARY: Any = modeling_llama.apply_rotary_pos_emb  # pyright: ignore


def norms_of(layer: nn.Module) -> list[nn.Module] | None:
    """Those of a layer's queries and keys, none where it has none; None where it is no such attention layer."""
    kind, module = type(layer), cast("Any", layer)
    forward: Callable[..., Any] = kind.forward
    has_norms = alike(forward, _NORMED)
    if not has_norms and not any(alike(forward, each) for each in _PLAIN):
        return None
    turns: Any = getattr(inspect.getmodule(kind), "apply_rotary_pos_emb", None)
    if turns is None or not alike(turns, _ROTARY):
        return None
    return [module.q_norm, module.k_norm] if has_norms else []


def is_rms_norm(norm: nn.Module) -> bool:
    """Whether a norm is, instruction by instruction, Llama's."""
    return alike(type(norm).forward, modeling_llama.LlamaRMSNorm.forward)
