"""Weights begin where those of stock transformers do, modulo 16 bytes: the bits of a product may depend on it."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.moe.conftest import SMALL, mixtral, qwen, stock
from tests.moe.families import fill
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

from undercroft.models.tensor_files import LINE
from undercroft.moe.load import engine_of, load_moe
from undercroft.moe.pack import pack


def granite(seed: int) -> Any:
    """A family whose checkpoints hold experts stacked, as its models do."""
    model = GraniteMoeForCausalLM(GraniteMoeConfig(**SMALL, num_local_experts=16, intermediate_size=32))
    fill(model, seed)
    return model


def pad(folder: Path, nbytes: int) -> None:
    """Let all tensors of a checkpoint begin so much later."""
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = content[8 : 8 + length] + b" " * nbytes
        file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def phases(model: Any) -> dict[str, int]:
    """Of every weight that is there, and of the first and the last expert of those that are not."""
    found: dict[str, int] = {}
    for name, weight in model.named_parameters():
        if weight.device.type != "meta":
            found[name] = weight.data_ptr() % LINE
            if ".experts." in name:
                del found[name]
                for expert in (0, 15):
                    found[f"{name}.{expert}"] = weight[expert].data_ptr() % LINE
    return found


def streamed_phases(model: Any) -> dict[str, int]:
    engine, found = engine_of(model), phases(model)
    modules = [name for name, each in model.named_modules() if name.endswith(".experts")]
    for keys, module in zip(engine.stock.high_keys, modules, strict=True):
        for expert in (0, 15):
            for key, lease in engine.cache.fetch([keys[expert]]):
                for name, part in engine._source.parameters(key, lease).items():
                    found[f"{module}.{name}.{expert}"] = part.data_ptr() % LINE
    return found


@pytest.mark.parametrize("later", [0, 8])
@pytest.mark.parametrize("make", [qwen, mixtral, granite])
def test_every_weight_begins_where_a_stock_one_does(
    checkpoint: Callable[..., Path], make: Callable[[int], Any], later: int, tmp_path: Path
) -> None:
    folder = checkpoint(0, make)
    pad(folder, later)
    wanted = phases(stock(folder))
    assert streamed_phases(load_moe(folder, "1MiB")) == wanted
    pack(folder, tmp_path / "packed", high="keep", low="int4")
    assert streamed_phases(load_moe(tmp_path / "packed", "1MiB")) == wanted


def test_stock_weights_begin_at_different_places(checkpoint: Callable[..., Path]) -> None:
    """Or nothing is shown above: as many as the format lets them, of which only some are multiples."""
    folder, found = checkpoint(0, granite), set[int]()
    for _ in range(2):
        found |= set(phases(stock(folder)).values())
        pad(folder, 8)
    assert found >= {0, 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_another_dtype_is_copied_to_a_multiple(
    checkpoint: Callable[..., Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    other = torch.bfloat16 if dtype is torch.float32 else torch.float32
    stock(checkpoint(0, granite), other).save_pretrained(tmp_path / "other")
    pad(tmp_path / "other", 8)
    wanted = {
        name: phase
        for name, phase in phases(stock(tmp_path / "other", dtype)).items()
        if "experts" not in name
    }
    ours = phases(load_moe(tmp_path / "other", "1MiB", dtype=dtype))
    assert ours == wanted
