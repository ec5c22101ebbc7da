"""A folder of safetensors files as the names and places of its tensors."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from undercroft.errors import CorruptRecord, UnsupportedModel
from undercroft.models.checkpoint import PHASES, Checkpoint
from undercroft.models.tensor_files import LINE, StoredTensor

TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "a.weight": torch.randn(3, 5),
    "none": torch.empty(0, 4),
    "flag": torch.tensor([True, False, True]),
    "number": torch.tensor(7),
}


def write(path: Path, header: object, content: bytes = b"") -> None:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


def test_every_tensor_comes_back(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(TENSORS)
        for name, tensor in TENSORS.items():
            found = checkpoint.read(checkpoint[name])
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found, tensor)


@pytest.mark.parametrize("phase", range(0, LINE, 4))
def test_a_tensor_begins_at_its_phase(tmp_path: Path, phase: int) -> None:
    """That of its place in the file, or of the place that the metadata names."""
    write(tmp_path / "model.safetensors", entry(), bytes(16))
    with Checkpoint(tmp_path) as checkpoint:
        stored = checkpoint["x"]
        assert checkpoint.read(stored).data_ptr() % LINE == stored.phase == stored.offset % LINE
    write(
        tmp_path / "model.safetensors", {**entry(), "__metadata__": {PHASES: f'{{"x": {phase}}}'}}, bytes(16)
    )
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read(checkpoint["x"]).data_ptr() % LINE == checkpoint["x"].phase == phase


def test_shards_are_those_that_the_index_names(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    save_file({"c": torch.zeros(3)}, tmp_path / "stray.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == {"a", "b"}
        assert checkpoint["a"].file != checkpoint["b"].file


@pytest.mark.parametrize(
    ("header", "content"),
    [
        (b"", b""),
        (b"[]", b""),
        (b"{" * 100_000, b""),
        (b'{"x": 3}', b""),
        (entry(), bytes(15)),
        (entry(shape=[2, 3]), bytes(16)),
        (entry(shape=[-2, -2]), bytes(16)),
        (entry(shape=[2**40, 2**40]), bytes(16)),
        (entry(shape=[2.0, 2]), bytes(16)),
        (entry(shape=[True, 4]), bytes(16)),
        (entry(data_offsets=[-16, 0]), bytes(16)),
        (entry(data_offsets=[16, 0]), bytes(16)),
        (entry(data_offsets=[0]), bytes(16)),
        (entry(data_offsets=None), bytes(16)),
        (entry(dtype=["F32"]), bytes(16)),
        ({**entry(), "__metadata__": 7}, bytes(16)),
        ({**entry(), "__metadata__": {PHASES: 7}}, bytes(16)),
        ({**entry(), "__metadata__": {PHASES: "[8]"}}, bytes(16)),
        ({**entry(), "__metadata__": {PHASES: '{"x": 16}'}}, bytes(16)),
        ({**entry(), "__metadata__": {PHASES: '{"x": true}'}}, bytes(16)),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, header: object, content: bytes) -> None:
    write(tmp_path / "model.safetensors", header, content)
    with pytest.raises((CorruptRecord, UnsupportedModel)):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 99) + b"{}"]
)
def test_a_file_too_short_for_its_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptRecord, match="no safetensors file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", 7])
def test_an_index_names_no_file_elsewhere(tmp_path: Path, name: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CorruptRecord):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CorruptRecord, match="another file"):
        Checkpoint(tmp_path)


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", entry(dtype="F4"), bytes(16))
    with pytest.raises(UnsupportedModel, match="F4"):
        Checkpoint(tmp_path)


def test_a_change_and_a_cut_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.check_unchanged()
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(CorruptRecord, match="changed"):
            checkpoint.check_unchanged()
        last: StoredTensor = max(checkpoint.values(), key=lambda each: each.offset + each.nbytes)
        with pytest.raises(CorruptRecord, match="ends at byte"):
            checkpoint.read(last)
