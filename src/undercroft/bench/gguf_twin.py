"""Writes a checkpoint of `peers_model` once more, as llama.cpp and its kin read it: one GGUF file.

Run as ``PYTHON gguf_twin.py CHECKPOINT FILE BF16|Q8_0|Q4_0``, by a Python that has the package gguf and nothing of
ours, one matrix at a time. Invariant: in BF16 every matrix has the checkpoint's numbers; else gguf's own quantiser
makes all of them but the routers', as llama.cpp would.
"""

from __future__ import annotations

import importlib
import json
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
}
_EXPERT = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}

KINDS = {"bf16": "BF16", "int8": "Q8_0"}
"""What llama.cpp calls as many bits as ours."""

Parts = dict[str, list[NDArray[np.uint16]]]


def main() -> None:
    """Write the file that the arguments ask for."""
    source, target, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    gguf: Any = importlib.import_module("gguf")
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    parts = _renamed(dict(_tensors(source)), config)
    unfinished = target.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "qwen3moe")
    _describe(writer, config)
    types = {name: _type(gguf, name, arrays[0], kind) for name, arrays in parts.items()}
    for name, arrays in parts.items():
        shape = arrays[0].shape if len(arrays) == 1 else (len(arrays), *arrays[0].shape)
        nbytes = _Stream(gguf, arrays, types[name]).nbytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, arrays in parts.items():
        writer.write_tensor_data(_Stream(gguf, arrays, types[name]))
    writer.close()
    unfinished.rename(target)


class _Stream:
    """Stands for a tensor's bytes in `GGUFWriter.write_tensor_data`, which asks where they are, and to be written."""

    def __init__(self, gguf: Any, arrays: list[NDArray[np.uint16]], kind: Any) -> None:
        self._gguf, self._arrays, self._kind = gguf, arrays, kind
        self.nbytes = sum(_nbytes(gguf, each, kind) for each in arrays)

    def tofile(self, file: Any) -> None:
        """Write them, matrix by matrix."""
        for each in self._arrays:
            if self._kind == self._gguf.GGMLQuantizationType.BF16:
                each.tofile(file)
            else:
                floats = (each.astype(np.uint32) << 16).view(np.float32)
                self._gguf.quants.quantize(floats, self._kind).tofile(file)


def _tensors(source: Path) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Every tensor of a folder, mapped: its bfloat16 as they are."""
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        for name, entry in header.items():
            shape = tuple(entry["shape"])
            offset = 8 + length + entry["data_offsets"][0]
            yield name, np.memmap(path, dtype=np.uint16, mode="r", offset=offset, shape=shape)


def _renamed(tensors: Mapping[str, NDArray[np.uint16]], config: Mapping[str, Any]) -> Parts:
    """By llama.cpp's names, the matrices of a layer's experts in one list."""
    found: Parts = {new: [tensors[old]] for old, new in _OUTER.items()}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for old, new in _LAYER.items():
            found[f"blk.{layer}.{new}.weight"] = [tensors[f"{block}.{old}.weight"]]
        for old, new in _EXPERT.items():
            names = [f"{block}.mlp.experts.{each}.{old}.weight" for each in range(config["num_experts"])]
            found[f"blk.{layer}.{new}.weight"] = [tensors[name] for name in names]
    return found


def _describe(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _type(gguf: Any, name: str, array: NDArray[np.uint16], kind: str) -> Any:
    is_small = array.ndim == 1 or re.search("ffn_gate_inp", name)
    return gguf.GGMLQuantizationType["F32" if is_small else kind]


def _nbytes(gguf: Any, array: NDArray[np.uint16], kind: Any) -> int:
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return array.size // block * nbytes


if __name__ == "__main__":
    main()
