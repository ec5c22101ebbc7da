"""What transformers calls what a GGUF file holds: the configuration of its model, and the names of its tensors.

It knows the families that can be read, by llama.cpp's names and transformers'; not files, bytes or precisions. The
configuration is made here because transformers' own reader leaves out what these families need: the width of an
expert, for one, for which it takes a default. Invariant: no size of a configuration is larger than what the file's
tensors show, so that a model of it can be made without harm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from undercroft.errors import CorruptRecord, UnsupportedModel
from undercroft.models.gguf_header import Setting

FAMILIES = {
    "qwen2moe": {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]},
    "qwen3moe": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True},
}
"""The families that are read, by what `general.architecture` says, and what is true of each. A file does not say
whether the weights of the chosen experts are made to add up to one: in llama.cpp they are in qwen3moe only."""
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
}
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_STACKED = {
    "ffn_gate_exps": ("gate_proj",),
    "ffn_up_exps": ("up_proj",),
    "ffn_down_exps": ("down_proj",),
    "ffn_gate_up_exps": ("gate_proj", "up_proj"),
}
_IN_LAYER = re.compile(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", re.ASCII)
_OUTSIDE = re.compile(r"(\w+)\.(weight|bias)", re.ASCII)

Shape = tuple[int, ...]


def checkpoint_tensors(name: str, shape: Shape) -> list[tuple[str, Shape]]:
    """Names and shapes that a checkpoint of safetensors has for a GGUF file's tensor, whose parts they are, in order.

    Args:
        name: as llama.cpp calls it; one of `FAMILIES` has it.
        shape: row-major.

    Raises:
        UnsupportedModel: it is none of what these families are made of.
    """
    if (match := _IN_LAYER.fullmatch(name)) is not None:
        layer, what, leaf = match.groups()
        block = f"model.layers.{int(layer)}"
        if what in _STACKED and leaf == "weight" and len(shape) == 3:
            return list(_experts(f"{block}.mlp.experts", _STACKED[what], shape))
        if what in _LAYER:
            matrix = what == "ffn_gate_inp_shexp" and len(shape) == 1  # of one row, which converters drop
            return [(f"{block}.{_LAYER[what]}.{leaf}", (1, *shape) if matrix else shape)]
    elif (match := _OUTSIDE.fullmatch(name)) is not None and match[1] in _OUTER:
        return [(f"{_OUTER[match[1]]}.{match[2]}", shape)]
    raise UnsupportedModel(
        f"{name} of shape {list(shape)} is no part of a {' or '.join(FAMILIES)} that is known"
    )


def _experts(module: str, parts: tuple[str, ...], shape: Shape) -> Iterator[tuple[str, Shape]]:
    experts, rows, columns = shape
    if rows % len(parts):
        raise CorruptRecord(f"{module}: {rows} rows are not of {' and '.join(parts)} alike")
    for expert in range(experts):
        for part in parts:
            yield f"{module}.{expert}.{part}.weight", (rows // len(parts), columns)


def configuration(settings: Mapping[str, Setting], shapes: Mapping[str, Shape], path: str) -> dict[str, Any]:
    """The configuration of a model, but for its dtype, as `AutoConfig.for_model` takes it.

    Args:
        settings: of a GGUF file.
        shapes: of its tensors, by name.
        path: what errors call it.

    Raises:
        UnsupportedModel: it is of a family that is not read, or set to something that transformers would not compute.
        CorruptRecord: a setting is missing, or contradicts the tensors.
    """
    check_family(settings, path)
    return _Settings(settings, shapes, path).configuration()


def check_family(settings: Mapping[str, Setting], path: str) -> None:
    """Refuse a file whose family is not read.

    Raises:
        UnsupportedModel: it is not.
    """
    family = settings.get("general.architecture")
    if family not in FAMILIES:
        raise UnsupportedModel(
            f"{path} is of the family {family}; of GGUF files, those of {' and '.join(FAMILIES)} are read. "
            "Pack the checkpoint that it was made from"
        )


class _Settings:
    def __init__(self, settings: Mapping[str, Setting], shapes: Mapping[str, Shape], path: str) -> None:
        self._settings, self._shapes, self._path = settings, shapes, path
        self._family = str(settings.get("general.architecture"))
        self._most = max([len(shapes), *(size for shape in shapes.values() for size in shape)], default=0)

    def configuration(self) -> dict[str, Any]:
        self._refuse_other_rotations()
        sizes = {ours: self._size(theirs) for theirs, ours in _SIZES.items()}
        found: dict[str, Any] = {
            **FAMILIES[self._family],
            **sizes,
            **self._widths(),
            "max_position_embeddings": int(self._number("context_length")),
            "rms_norm_eps": float(self._number("attention.layer_norm_rms_epsilon")),
            "rope_parameters": {"rope_type": "default", "rope_theta": float(self._number("rope.freq_base"))},
            "tie_word_embeddings": "output.weight" not in self._shapes,
            "mlp_only_layers": [],
        }
        if self._family == "qwen3moe":
            found["head_dim"] = self._size("attention.key_length")
        found.update(self._tokens(found["vocab_size"]))
        self._check(found)
        return found

    def _widths(self) -> dict[str, int]:
        """What no setting need say, for the tensors do."""
        found = {
            "vocab_size": self._shape("token_embd.weight")[0],
            "moe_intermediate_size": self._shape("blk.0.ffn_down_exps.weight")[-1],
        }
        if self._family == "qwen2moe":
            found["shared_expert_intermediate_size"] = self._shape("blk.0.ffn_down_shexp.weight")[-1]
        return found

    def _tokens(self, vocabulary: int) -> dict[str, int | None]:
        """The tokens that mean something, where there are such."""
        return {
            ours: self._token(f"tokenizer.ggml.{theirs}_token_id", vocabulary)
            for ours, theirs in _TOKENS.items()
        }

    def _token(self, name: str, vocabulary: int) -> int | None:
        token = self._settings.get(name)
        if token is not None and (type(token) is not int or not 0 <= token < vocabulary):
            raise CorruptRecord(f"{self._path} says that {name} is {token}, and has {vocabulary} tokens")
        return token

    def _refuse_other_rotations(self) -> None:
        kind = self._settings.get(f"{self._family}.rope.scaling.type", "none")
        if kind != "none":
            raise UnsupportedModel(
                f"{self._path} scales its rotary embedding ({kind}), which is not read from GGUF files; "
                "pack the checkpoint that it was made from"
            )

    def _check(self, found: Mapping[str, Any]) -> None:
        heads, fewer = found["num_attention_heads"], found["num_key_value_heads"]
        width = found.get("head_dim") or found["hidden_size"] // heads
        if heads % fewer or width % 2 or found["num_experts_per_tok"] > found["num_experts"]:
            raise CorruptRecord(f"{self._path} describes no {self._family}: its sizes contradict each other")

    def _size(self, name: str) -> int:
        value = self._number(name)
        if type(value) is not int or value > self._most:
            raise CorruptRecord(
                f"{self._path} says that {name} is {value}, and its tensors show that it is not"
            )
        return value

    def _number(self, name: str) -> int | float:
        value = self._settings.get(f"{self._family}.{name}")
        if isinstance(value, str | bool | None) or not 0 < value < math.inf:
            raise CorruptRecord(
                f"{self._path} says that {self._family}.{name} is {value}, where it must say a number"
            )
        return value

    def _shape(self, name: str) -> Shape:
        if name not in self._shapes:
            raise CorruptRecord(f"{self._path} has no {name}, which every {self._family} has; fetch it again")
        return self._shapes[name]
