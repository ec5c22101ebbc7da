"""What the tests of the store share: memory with an address, a directory that did not exist before."""

import ctypes
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BLOCK = 4096


class Memory:
    """Bytes at an address that lies `shift` bytes into a page, in pages of their own."""

    def __init__(self, content: bytes, shift: int = 0) -> None:
        self._map = mmap.mmap(-1, -(-(shift + len(content)) // BLOCK) * BLOCK or BLOCK)
        self._map[shift : shift + len(content)] = content
        self._shift = shift
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + shift
        self.nbytes = len(content)

    @property
    def iovec(self) -> tuple[int, int]:
        return self.address, self.nbytes

    @property
    def content(self) -> bytes:
        return self._map[self._shift : self._shift + self.nbytes]


@pytest.fixture
def memory() -> Iterator[Callable[..., Memory]]:
    """``memory(content, shift)`` makes a `Memory`; all stay mapped until the test ends."""
    made: list[Memory] = []

    def make(content: bytes, shift: int = 0) -> Memory:
        made.append(Memory(content, shift))
        return made[-1]

    yield make
    made.clear()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "spill"
