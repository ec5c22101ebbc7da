"""A Mixture-of-Experts model of random weights, larger than the memory that it is to run in, as its sides read it.

It knows Qwen3-MoE's names and shapes, and streams: it holds one matrix at a time. Invariants: equal shapes give equal
bytes; the stacked copy has the checkpoint's numbers, bit for bit.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undercroft.errors import InvalidInput
from undercroft.models.checkpoint import Checkpoint

_MATRICES = ("gate_proj", "up_proj", "down_proj")
_SPREAD = 0.02
_HEAD = 128
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class PeerShape:
    """How large the model is. With random weights its routing is near-uniform: no cache can gain by it.

    Attributes:
        layers: each with experts.
        experts: in a layer.
        used: by a token.
        hidden: width, a multiple of 32, so that llama.cpp quantises it.
        intermediate: an expert's, likewise.
        heads: of attention, of 128 each.
        key_heads: of keys and values.
        vocabulary: different tokens.
        seed: of all weights.
    """

    layers: int = 4
    experts: int = 120
    used: int = 8
    hidden: int = 2048
    intermediate: int = 768
    heads: int = 8
    key_heads: int = 2
    vocabulary: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden % 32 or self.intermediate % 32:
            raise InvalidInput("an expert's sides must be multiples of 32, or no side can quantise them")

    @property
    def expert_elements(self) -> int:
        """Weights of one expert."""
        return len(_MATRICES) * self.hidden * self.intermediate

    @property
    def elements(self) -> int:
        """Weights of all experts."""
        return self.layers * self.experts * self.expert_elements

    def config(self) -> dict[str, Any]:
        """As transformers describes it."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "moe_intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": _HEAD,
            "num_experts": self.experts,
            "num_experts_per_tok": self.used,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "dtype": "bfloat16",
        }


@dataclass(frozen=True, slots=True)
class _Planned:
    """A tensor to write: what it is called, its shape, and what gives its bytes, piece by piece."""

    name: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]


def write_checkpoint(shape: PeerShape, folder: Path, on_layer: Callable[[int], None]) -> None:
    """Write the model as published ones are: three matrices of each expert, in shards of a layer.

    Args:
        shape: of the model.
        folder: to make.
        on_layer: told how many shards are written.
    """
    draw = torch.Generator().manual_seed(shape.seed)

    def planned(name: str, size: tuple[int, ...]) -> _Planned:
        spread = 1.0 if name.endswith("embed_tokens.weight") else _SPREAD
        return _Planned(name, size, lambda: iter([_drawn(size, spread, draw)]))

    plans = [[planned(*each) for each in _outer(shape)]]
    for layer in range(shape.layers):
        names = [*_dense(shape, layer), *_experts(shape, layer)]
        plans.append([planned(*each) for each in names])
    _write(shape, folder, plans, on_layer)


def write_stacked(shape: PeerShape, source: Path, folder: Path, on_layer: Callable[[int], None]) -> None:
    """Write the same model with its experts stacked as transformers computes with them.

    So `from_pretrained` maps the experts where they lie, and need not convert and write them again.

    Args:
        shape: of the model.
        source: where `write_checkpoint` wrote it.
        folder: to make.
        on_layer: told how many shards are written.

    Raises:
        CorruptRecord, UnsupportedModel, TransferFailed: see `Checkpoint`.
    """
    with Checkpoint(source) as checkpoint:

        def planned(name: str, size: tuple[int, ...], parts: Iterable[str]) -> _Planned:
            return _Planned(name, size, lambda: (checkpoint.read(checkpoint[part]) for part in parts))

        plans = [[planned(name, size, [name]) for name, size in _outer(shape)]]
        for layer in range(shape.layers):
            dense = [planned(name, size, [name]) for name, size in _dense(shape, layer)]
            stacks = [planned(*each) for each in _stacks(shape, layer)]
            plans.append([*dense, *stacks])
        _write(shape, folder, plans, on_layer)


def is_written(shape: PeerShape, folder: Path) -> bool:
    """Whether a folder holds a model of this shape, whole."""
    file = folder / _CONFIG
    return file.is_file() and json.loads(file.read_text())["undercroft_shape"] == repr(shape)


def _outer(shape: PeerShape) -> list[tuple[str, tuple[int, ...]]]:
    return [
        ("model.embed_tokens.weight", (shape.vocabulary, shape.hidden)),
        ("model.norm.weight", (shape.hidden,)),
        ("lm_head.weight", (shape.vocabulary, shape.hidden)),
    ]


def _dense(shape: PeerShape, layer: int) -> list[tuple[str, tuple[int, ...]]]:
    inner, keys = _HEAD * shape.heads, _HEAD * shape.key_heads
    sizes = {
        "input_layernorm": (shape.hidden,),
        "post_attention_layernorm": (shape.hidden,),
        "self_attn.q_norm": (_HEAD,),
        "self_attn.k_norm": (_HEAD,),
        "self_attn.q_proj": (inner, shape.hidden),
        "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.o_proj": (shape.hidden, inner),
        "mlp.gate": (shape.experts, shape.hidden),
    }
    return [(f"model.layers.{layer}.{name}.weight", size) for name, size in sizes.items()]


def _experts(shape: PeerShape, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for expert in range(shape.experts):
        for matrix in _MATRICES:
            size = (shape.intermediate, shape.hidden)
            yield _expert(layer, expert, matrix), size[::-1] if matrix == "down_proj" else size


def _stacks(shape: PeerShape, layer: int) -> Iterator[tuple[str, tuple[int, ...], list[str]]]:
    inner, experts = shape.intermediate, range(shape.experts)
    sizes = {"gate_up_proj": (2 * inner, shape.hidden), "down_proj": (shape.hidden, inner)}
    for name, size in sizes.items():
        matrices = _MATRICES[:2] if name == "gate_up_proj" else _MATRICES[2:]
        parts = [_expert(layer, expert, matrix) for expert in experts for matrix in matrices]
        yield f"model.layers.{layer}.mlp.experts.{name}", (shape.experts, *size), parts


def _expert(layer: int, expert: int, matrix: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"


def _drawn(size: tuple[int, ...], spread: float, draw: torch.Generator) -> Tensor:
    if len(size) == 1:  # a norm's
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size).normal_(0.0, spread, generator=draw).to(torch.bfloat16)


def _write(
    shape: PeerShape, folder: Path, plans: list[list[_Planned]], on_layer: Callable[[int], None]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    for number, plan in enumerate(plans):
        name = f"model-{number:05}.safetensors"
        _write_shard(folder / name, plan)
        places.update({each.name: name for each in plan})
        on_layer(number + 1)
    (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    described = {**shape.config(), "undercroft_shape": repr(shape)}
    (folder / _CONFIG).write_text(json.dumps(described))  # last: now it is whole


def _write_shard(path: Path, plan: list[_Planned]) -> None:
    header: dict[str, dict[str, object]] = {}
    end = 0
    for each in plan:
        begin, end = end, end + 2 * math.prod(each.shape)
        header[each.name] = {"dtype": "BF16", "shape": each.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for each in plan:
            for piece in each.pieces():
                piece.view(torch.int16).numpy().tofile(file)
