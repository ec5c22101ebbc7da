"""A GGUF file as the checkpoint of safetensors that it stands for: the same names, one tensor for each expert's matrix.

It knows which bytes of the file are which tensor, and turns quantised weights into numbers, a piece at a time, with
llama.cpp's own package `gguf`; what families call what is in `gguf_config`. Invariants: a tensor that is listed lies
whole inside its file, and can be read; F32, F16 and BF16 are given bit for bit, all else rounded to bfloat16.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from undercroft.errors import CorruptRecord, InvalidInput, MissingExtra, TransferFailed, UnsupportedModel
from undercroft.models.gguf_config import check_family, checkpoint_tensors, configuration
from undercroft.models.gguf_header import GgufHeader, GgufTensor, Setting, read_header
from undercroft.models.tensor_files import StoredTensor, TensorFiles
from undercroft.units import MIB

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AT_ONCE = 1 << 20  # elements that are made numbers of together
_ONE_OF_MANY = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf", re.ASCII)


class GgufCheckpoint(TensorFiles):
    """The tensors of a GGUF file by their names in transformers; at phase 0, for nobody computes with them in the file.

    Args:
        path: the file; if it is one of several that llama-gguf-split made, all of them are opened.

    Attributes:
        has_tokenizer: the file brings one.

    Raises:
        MissingExtra: the package gguf is not installed.
        InvalidInput: others of the files are missing.
        UnsupportedModel: a family, or a type of weights, that cannot be read.
        CorruptRecord: the file contradicts itself, or was cut off.
        TransferFailed: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        _gguf()
        self._settings: dict[str, Setting] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[str, Any] = {}
        self.has_tokenizer = False
        super().__init__(list(_parts(path)))

    def configuration(self) -> dict[str, Any]:
        """The configuration of the model, as `AutoConfig.for_model` takes it; its dtype is that of the experts.

        Raises:
            UnsupportedModel, CorruptRecord: see `gguf_config.configuration`.
        """
        found = configuration(self._settings, self._shapes, str(self.paths[0]))
        dtypes = {tensor.dtype for name, tensor in self.items() if ".experts." in name}
        return {**found, "dtype": dtypes.pop() if len(dtypes) == 1 else torch.bfloat16}

    def read_run(self, tensor: StoredTensor, start: int, memory: memoryview) -> None:
        """Fill memory with a tensor's bytes from one of them on; both are whole elements.

        Raises:
            CorruptRecord, TransferFailed: see `read`.
        """
        kind = self._kinds[tensor.name]
        if kind.name in _PLAIN:
            super().read_run(tensor, start, memory)
            return
        width = tensor.dtype.itemsize
        first, last = start // width, (start + len(memory)) // width
        for one in range(first, last, _AT_ONCE):
            end = min(one + _AT_ONCE, last)
            into = memory[(one - first) * width : (end - first) * width]
            into[:] = self._numbers(tensor, kind, one, end).view(torch.uint8).numpy().data

    def _numbers(self, tensor: StoredTensor, kind: Any, first: int, last: int) -> torch.Tensor:
        """The elements [first, last) of a quantised tensor, rounded."""
        elements, nbytes = _gguf().GGML_QUANT_SIZES[kind]
        block, end = first // elements, -(-last // elements)
        content = bytearray((end - block) * nbytes)
        self.read_into(tensor.file, tensor.offset + block * nbytes, memoryview(content))
        with np.errstate(all="ignore"):  # a scale may be anything
            numbers = _gguf().quants.dequantize(np.frombuffer(content, np.uint8), kind)
        return torch.from_numpy(numbers[first - block * elements : last - block * elements]).to(tensor.dtype)

    def _read_header(self, number: int) -> int:
        path = self.paths[number]
        try:
            with open(self._fds[number], "rb", buffering=MIB, closefd=False) as file:
                header = read_header(file, path, self.versions[number].nbytes)
        except OSError as error:
            raise TransferFailed(f"{path}: {error.strerror}", errno=error.errno) from error
        self._check_parts(number, header)
        if number == 0:
            check_family(header.settings, str(path))
            self._settings = header.settings
            self.has_tokenizer = "tokenizer.ggml.tokens" in header.lengths
        for tensor in header.tensors:
            self._note(number, header, tensor)
        return header.nbytes

    def _check_parts(self, number: int, header: GgufHeader) -> None:
        count, place = (header.settings.get(f"split.{name}", 0) for name in ("count", "no"))
        if (count or 1, place) != (len(self.paths), number):
            raise CorruptRecord(
                f"{self.paths[number]} says that it is file {place} of {count}, counted from 0, and is taken for "
                f"file {number} of {len(self.paths)}; give the files the names that llama-gguf-split gave them"
            )

    def _note(self, number: int, header: GgufHeader, tensor: GgufTensor) -> None:
        """Believe an entry of a file's table of tensors once it was checked."""
        path = self.paths[number]
        kind = _kind(tensor, path)
        elements, nbytes = _gguf().GGML_QUANT_SIZES[kind]
        begin, size = header.nbytes + tensor.offset, math.prod(tensor.shape) // elements * nbytes
        if tensor.shape[-1] % elements or begin + size > self.versions[number].nbytes:
            raise CorruptRecord(
                f"{path}: {tensor.name} does not lie inside the file as its shape says; fetch it again"
            )
        if tensor.name in self._shapes:
            raise CorruptRecord(f"{path} has {tensor.name} twice")
        self._shapes[tensor.name] = tensor.shape
        dtype = _PLAIN.get(kind.name, torch.bfloat16)
        for name, shape in checkpoint_tensors(tensor.name, tensor.shape):
            self._tensors[name] = StoredTensor(name, number, dtype, shape, begin)
            self._kinds[name] = kind
            begin += math.prod(shape) // elements * nbytes


@cache
def _gguf() -> Any:
    """The package, which is an extra.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra("gguf", "packing a GGUF file") from error
    return gguf


def _parts(path: Path) -> Iterator[Path]:
    """All files of a model, if its name says that there are several."""
    match = _ONE_OF_MANY.fullmatch(path.name)
    count = int(match["count"]) if match else 1
    names = [f"{match['stem']}-{n + 1:05}-of-{count:05}.gguf" for n in range(count)] if match else [path.name]
    for name in names:
        if not (path.parent / name).is_file():
            raise InvalidInput(f"{path} is one of {count} files, and {name} is not beside it")
        yield (path.parent / name).resolve()  # the hub's cache is made of links


def _kind(tensor: GgufTensor, path: Path) -> Any:
    """Of ggml's types, that of a tensor.

    Raises:
        UnsupportedModel: it is one that gguf cannot make numbers of.
    """
    try:
        kind = _gguf().GGMLQuantizationType(tensor.kind)
    except ValueError:
        kind = None
    if kind is None or not _can_dequantise(kind):
        name = f"ggml's type {tensor.kind}" if kind is None else kind.name
        raise UnsupportedModel(
            f"{path}: {tensor.name} is of {name}, which the package gguf cannot turn into numbers; "
            "a newer one may, or pack the checkpoint that it was made from"
        )
    return kind


@cache
def _can_dequantise(kind: Any) -> bool:
    """Whether gguf has a way for a type: seen by trying it on one block."""
    nbytes = _gguf().GGML_QUANT_SIZES[kind][1]
    try:
        _gguf().quants.dequantize(np.zeros(nbytes, np.uint8), kind)
    except NotImplementedError:
        return False
    return True
