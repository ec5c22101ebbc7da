"""What the tests of the store share: memory with an address, a disk with a gate, a store of all its parts."""

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from undercroft.store.disk import Iovec, Syscalls
from undercroft.store.scratch import Extent, Scratch
from undercroft.store.slab import Slab
from undercroft.store.transfer import Priority, TransferQueue
from undercroft.units import MIB

BLOCK = 4096
PATIENCE = 30.0  # seconds after which a test that hangs fails; nothing is measured


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


class GatedDisk(Syscalls):
    """Real calls that wait at a gate until they are let through; notes which ones began, in order."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._passes = 0.0
        self.began: list[tuple[str, int]] = []

    def preadv(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        self._pass("read", offset)
        return super().preadv(fd, iovecs, offset)

    def pwritev(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        self._pass("write", offset)
        return super().pwritev(fd, iovecs, offset)

    def let(self, calls: float = float("inf")) -> None:
        """Let so many calls through, or all from now on."""
        with self._changed:
            self._passes += calls
            self._changed.notify_all()

    def wait_for(self, began: int) -> list[tuple[str, int]]:
        """What began, once that many calls have."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.began) >= began, PATIENCE), self.began
            return list(self.began)

    def _pass(self, verb: str, offset: int) -> None:
        with self._changed:
            self.began.append((verb, offset))
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._passes > 0, PATIENCE)
            self._passes -= 1


@pytest.fixture
def gate() -> GatedDisk:
    return GatedDisk()


class Store:
    """A scratch with its slab and queue, and the calls a test makes of them."""

    def __init__(self, *directories: Path, slab: int = 64 * MIB, **options) -> None:
        self.slab = Slab(slab, page=BLOCK)
        self.queue = TransferQueue()
        try:
            self.scratch = Scratch(directories, buffers=self.slab, **options)
        except BaseException:
            self.queue.close()
            raise

    def spill(self, memory, **options) -> Extent:
        extent, transfer = self.scratch.spill(memory.address, memory.nbytes, keep=memory, **options)
        assert self.queue.submit(transfer, Priority.WRITE).wait(PATIENCE)
        return extent

    def fetch(self, extent: Extent) -> bytes:
        fetched = self.scratch.fetch(extent)
        assert fetched is not None
        lease, transfer = fetched
        assert self.queue.submit(transfer, Priority.DEMAND).wait(PATIENCE)
        return ctypes.string_at(lease.address + extent.head, extent.nbytes)

    def close(self) -> None:
        self.queue.close()
        self.scratch.close()
        self.slab.close()


@pytest.fixture
def store(directory: Path) -> Iterator[Callable[..., Store]]:
    """``store(*directories, **options)``, in one directory if none is given."""
    made: list[Store] = []

    def make(*directories: Path, **options) -> Store:
        made.append(Store(*(directories or (directory,)), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def open_spill_files(directory: Path) -> list[Path]:
    """The descriptors of this process that are open on nameless files below a directory."""
    found: list[Path] = []
    for link in Path("/proc/self/fd").iterdir():
        target = os.readlink(link) if link.is_symlink() else ""
        if target.startswith(f"{directory}/") and target.endswith("(deleted)"):
            found.append(link)
    return found


@pytest.fixture
def spill_files() -> Callable[[Path], list[Path]]:
    return open_spill_files


@pytest.fixture
def flip() -> Callable[[Path, int], None]:
    """``flip(directory, bit)`` flips a bit of the only spill file there, behind its owner's back."""

    def flip_one(directory: Path, bit: int) -> None:
        (file,) = open_spill_files(directory)
        fd = os.open(file, os.O_RDWR)
        byte = os.pread(fd, 1, bit // 8)
        os.pwrite(fd, bytes([byte[0] ^ 1 << bit % 8]), bit // 8)
        os.fsync(fd)
        os.close(fd)

    return flip_one
