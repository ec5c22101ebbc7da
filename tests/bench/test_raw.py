"""The yardstick moves every byte, and what a process holds is counted."""

import ctypes
import os
import tempfile
import threading
from pathlib import Path

import pytest

from undercroft.bench.process import holdings
from undercroft.bench.raw import RawLoop
from undercroft.bench.rig import set_up
from undercroft.errors import TransferFailed, UnsafeDirectory
from undercroft.store.slab import Slab
from undercroft.units import MIB

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_every_byte_moves_through_the_buffers(tmp_path: Path) -> None:
    slab = Slab(4 * MIB)
    buffers = [slab.lease(2 * MIB), slab.lease(2 * MIB)]
    for number, buffer in enumerate(buffers):
        ctypes.memset(buffer.address, ord("a") + number, 2 * MIB)
    with RawLoop(2) as raw, tempfile.TemporaryFile(dir=tmp_path) as file:
        raw.move("write", file.fileno(), 6 * MIB, MIB, buffers)
        assert os.pread(file.fileno(), 7 * MIB, 0) == (b"a" * 2 * MIB + b"b" * 2 * MIB + b"a" * 2 * MIB)
        os.pwrite(file.fileno(), b"c" * 4 * MIB, 0)
        raw.move("read", file.fileno(), 4 * MIB, MIB, buffers)
    assert all(ctypes.string_at(buffer.address, 2 * MIB) == b"c" * 2 * MIB for buffer in buffers)
    del buffers, buffer
    slab.close()


def test_a_file_that_ends_early_fails(tmp_path: Path) -> None:
    slab = Slab(2 * MIB)
    with RawLoop(1) as raw, tempfile.TemporaryFile(dir=tmp_path) as file:
        file.truncate(MIB // 2)
        with pytest.raises(TransferFailed, match="only a part"):
            raw.move("read", file.fileno(), MIB, MIB, [slab.lease(MIB)])
    slab.close()


def test_a_rig_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    with set_up(tmp_path, depth=1) as rig:
        (rig.place / "file").touch()
        assert sum(lease.nbytes for lease in rig.buffers(8 * MIB)) == rig.slab.capacity
    assert not list(tmp_path.iterdir())


def test_a_rig_needs_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UnsafeDirectory), set_up(tmp_path / "missing", depth=1):
        pass


def test_holdings_see_files_without_a_name_and_threads(tmp_path: Path) -> None:
    before, stop = holdings(), threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    with tempfile.TemporaryFile(dir=tmp_path) as file, (tmp_path / "named").open("w") as named:
        os.posix_fallocate(file.fileno(), 0, MIB)
        os.posix_fallocate(named.fileno(), 0, MIB)
        during = holdings()
    stop.set()
    thread.join()
    assert during.descriptors == before.descriptors + 2
    assert during.threads == before.threads + 1
    assert during.unnamed - before.unnamed == pytest.approx(MIB, abs=64 * 1024)
