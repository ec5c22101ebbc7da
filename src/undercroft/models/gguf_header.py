"""What a GGUF file says before its weights: its settings, and which bytes are which tensor.

It knows the format, version 2 and 3, and neither models nor ggml's types of weights. A header is another's text: every
count in it is checked against the file before it is believed, and nothing is kept of long lists, such as the tokens,
but their length. Invariant: reading ends, in little memory, whatever the file says.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from undercroft.errors import CorruptRecord, UnsupportedModel
from undercroft.store.ranges import round_up

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_TEXT, _LIST = 8, 9
_LONGEST_TEXT, _MOST_ENTRIES, _MOST_DIMENSIONS = 1 << 26, 1 << 20, 4

Setting = str | int | float | bool


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """An entry of the table of tensors.

    Attributes:
        name: as llama.cpp calls it.
        kind: the number of ggml's type.
        shape: row-major, each dimension at least 1.
        offset: of its first byte, from where the weights begin.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class GgufHeader:
    """The header of a GGUF file.

    Attributes:
        settings: texts and numbers by name.
        lengths: of the lists by name.
        tensors: in the file's order.
        nbytes: where the weights begin.
    """

    settings: dict[str, Setting] = field(default_factory=dict[str, Setting])
    lengths: dict[str, int] = field(default_factory=dict[str, int])
    tensors: list[GgufTensor] = field(default_factory=list[GgufTensor])
    nbytes: int = 0


def read_header(file: BinaryIO, path: Path, nbytes: int) -> GgufHeader:
    """The header of a file.

    Args:
        file: open, buffered, at its beginning.
        path: what errors call it.
        nbytes: its length.

    Raises:
        UnsupportedModel: it is of another version, or of the other byte order.
        CorruptRecord: it is no GGUF file, ends too early, or contradicts itself.
    """
    try:
        return _Reader(file, path, nbytes).header()
    except UnicodeDecodeError as error:
        raise CorruptRecord(f"{path} has names that are no text; fetch it again") from error


class _Reader:
    def __init__(self, file: BinaryIO, path: Path, nbytes: int) -> None:
        self._file, self._path, self._left = file, path, nbytes

    def header(self) -> GgufHeader:
        whole = self._left
        if self._left < 24 or self._bytes(4) != MAGIC:
            raise CorruptRecord(f"{self._path} is no GGUF file, or was cut off; fetch it again")
        version = self._number("I")
        if version not in _VERSIONS:
            raise UnsupportedModel(f"{self._path} is GGUF of version {version}; versions 2 and 3 are read")
        tensors, settings = self._count(least=24), self._count(least=13)
        if max(tensors, settings) > _MOST_ENTRIES:
            raise self._wrong(f"it announces {tensors} tensors and {settings} settings")
        found = GgufHeader()
        for _ in range(settings):
            self._read_setting(found)
        found.tensors.extend(self._tensor() for _ in range(tensors))
        align = found.settings.get("general.alignment", 32)
        if type(align) is not int or not 0 < align <= 1 << 20 or align & (align - 1):
            raise self._wrong(f"weights cannot be aligned to {align!r} bytes")
        found.nbytes = round_up(whole - self._left, align)
        return found

    def _read_setting(self, found: GgufHeader) -> None:
        name, kind = self._text(), self._number("I")
        if name in found.settings or name in found.lengths:
            raise self._wrong(f"{name} is said twice")
        if kind == _LIST:
            found.lengths[name] = self._skip_list(name)
        elif kind == _TEXT:
            found.settings[name] = self._text()
        elif kind in _SCALARS:
            found.settings[name] = self._number(_SCALARS[kind])
        else:
            raise self._wrong(f"{name} is of type {kind}, which GGUF does not have")

    def _skip_list(self, name: str) -> int:
        kind = self._number("I")
        if kind in _SCALARS:
            width = struct.calcsize(_SCALARS[kind])
            count = self._count(least=width)
            self._skip(count * width)
        elif kind == _TEXT:
            count = self._count(least=8)
            for _ in range(count):
                self._skip(self._number("Q"))
        else:
            raise self._wrong(f"{name} is a list of type {kind}, which GGUF does not have")
        return count

    def _tensor(self) -> GgufTensor:
        name, dimensions = self._text(), self._number("I")
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise self._wrong(f"{name} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise self._wrong(f"{name} has no elements")
        return GgufTensor(name, kind=self._number("I"), shape=shape, offset=self._number("Q"))

    def _count(self, *, least: int) -> int:
        """How many things follow that take at least so many bytes each."""
        count: int = self._number("Q")
        if count * least > self._left:
            raise self._wrong(f"it ends before the {count} things that it announces")
        return count

    def _text(self) -> str:
        nbytes: int = self._number("Q")
        if nbytes > _LONGEST_TEXT:
            raise self._wrong(f"a text would be {nbytes} bytes long")
        return self._bytes(nbytes).decode()

    def _number(self, kind: str) -> Any:
        (number,) = struct.unpack(f"<{kind}", self._bytes(struct.calcsize(kind)))
        return number

    def _bytes(self, nbytes: int) -> bytes:
        self._take(nbytes)
        content = self._file.read(nbytes)
        if len(content) < nbytes:
            raise CorruptRecord(f"{self._path} became shorter; fetch it again")
        return content

    def _skip(self, nbytes: int) -> None:
        self._take(nbytes)
        self._file.seek(nbytes, 1)

    def _take(self, nbytes: int) -> None:
        if nbytes > self._left:
            raise self._wrong("it ends within its header")
        self._left -= nbytes

    def _wrong(self, what: str) -> CorruptRecord:
        return CorruptRecord(f"{self._path} is no whole GGUF file: {what}; fetch it again")
