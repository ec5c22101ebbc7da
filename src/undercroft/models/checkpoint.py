"""The tensors of a folder of safetensors files: which bytes of which file each is.

It reads headers, and bytes when asked; it knows no model. A header is another's text: every number in it is checked
against the file before it is believed. Invariant: a `StoredTensor` lies whole inside its file, and is as long as its
dtype and shape say.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from undercroft.errors import CorruptRecord, UnsupportedModel
from undercroft.models.tensor_files import LINE, StoredTensor, TensorFiles

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The element types of safetensors that torch has too, by the format's name."""
PHASES = "undercroft.phases"
"""What metadata calls a JSON object of phases by name, of tensors that PyTorch maps in another file than this one."""
_LONGEST_HEADER = 100_000_000  # the format's own limit
_INDEX = "model.safetensors.index.json"


class Checkpoint(TensorFiles):
    """A folder's tensors by name.

    Args:
        folder: it holds `model.safetensors.index.json` and the files that it names, or else `*.safetensors`.

    Attributes:
        paths: the files, in the order of their numbers.
        versions: what each was when it was opened.

    Raises:
        UnsupportedModel: there is no such file, or a tensor's type is unknown.
        CorruptRecord: a header contradicts itself or its file, or a tensor occurs twice.
        TransferFailed: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = [path.name for path in _files(folder)]
        super().__init__(
            [(folder / name).resolve() for name in self._names]
        )  # the hub's cache is made of links

    @property
    def files(self) -> list[Path]:
        """All files of weights, with the index where there is one."""
        index = [self._folder / _INDEX] if (self._folder / _INDEX).is_file() else []
        return [*(self._folder / path for path in self._names), *index]

    def _read_header(self, number: int) -> int:
        path, nbytes = self.paths[number], self.versions[number].nbytes
        (length,) = struct.unpack("<Q", self._bytes(number, 0, 8)) if nbytes >= 8 else (nbytes,)
        if length > min(_LONGEST_HEADER, nbytes - 8):
            raise CorruptRecord(f"{path} is no safetensors file: its header would be {length} bytes long")
        try:
            header: Any = json.loads(self._bytes(number, 8, length))
        except (ValueError, RecursionError) as error:
            raise CorruptRecord(f"{path} is no safetensors file: its header is no JSON") from error
        if not isinstance(header, dict):
            raise CorruptRecord(f"{path} is no safetensors file: its header is no object")
        start = 8 + length
        entries = cast("dict[str, Any]", header)
        phases = _phases(path, entries.pop("__metadata__", None))
        for name, entry in entries.items():
            if name in self._tensors:
                raise CorruptRecord(f"{path} has {name}, which another file has too")
            found = _tensor(path, name, entry, number, start, nbytes)
            self._tensors[name] = replace(found, phase=phases.get(name, found.phase))
        return start

    def _bytes(self, file: int, offset: int, nbytes: int) -> bytearray:
        content = bytearray(nbytes)
        self.read_into(file, offset, memoryview(content))
        return content


def _tensor(path: Path, name: str, entry: Any, file: int, start: int, nbytes: int) -> StoredTensor:
    try:
        kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sane = all(type(number) is int and 0 <= number < 2**63 for number in (*shape, first, last))
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptRecord(f"{path}: the header does not say where {name} is") from error
    if not sane or not isinstance(kind, str):
        raise CorruptRecord(f"{path}: the header does not say where {name} is")
    if kind not in DTYPES:
        raise UnsupportedModel(f"{path}: {name} is of type {kind}, which torch does not have")
    if start + last > nbytes or last - first != math.prod(shape) * DTYPES[kind].itemsize:
        raise CorruptRecord(f"{path}: {name} does not lie inside the file as its shape says")
    return StoredTensor(name, file, DTYPES[kind], shape, start + first, (start + first) % LINE)


def _phases(path: Path, metadata: Any) -> dict[str, int]:
    """The phases that a file's metadata names."""
    try:
        phases = (
            cast("dict[str, Any]", json.loads(metadata[PHASES])) if metadata and PHASES in metadata else {}
        )
        sane = all(type(phase) is int and 0 <= phase < LINE for phase in phases.values())
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptRecord(f"{path}: its metadata does not say where tensors begin") from error
    if not sane:
        raise CorruptRecord(f"{path}: its metadata does not say where tensors begin")
    return phases


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file():
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise UnsupportedModel(f"{folder} holds no weights: there is no *.safetensors in it")
        return found
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptRecord(f"{index} does not say which files hold the weights; fetch it again") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise CorruptRecord(f"{index} names {outside[0]!r}, which is no file of its own folder")
    return [folder / name for name in names]
