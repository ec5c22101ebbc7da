"""The doubles are honest: real bytes in real files, and exactly the fault that was asked for."""

import ctypes
import errno
import os
import queue
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from undercroft.errors import InvalidInput
from undercroft.store.disk import Syscalls
from undercroft.testing import FlakyDisk, FullDisk, ManualClock, SlowDisk


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        yield file.fileno()


def memory(content: bytes) -> tuple[ctypes.Array, tuple[int, int]]:
    """Bytes at an address, and the iovec that names them."""
    buffer = ctypes.create_string_buffer(content, len(content))
    return buffer, (ctypes.addressof(buffer), len(content))


def write(disk: Syscalls, fd: int, content: bytes, offset: int = 0) -> int:
    keep, iovec = memory(content)
    moved = disk.pwritev(fd, [iovec], offset)
    del keep
    return moved


def read(disk: Syscalls, fd: int, nbytes: int, offset: int = 0) -> bytes:
    buffer, iovec = memory(bytes(nbytes))
    moved = disk.preadv(fd, [iovec], offset)
    return buffer.raw[:moved]


@pytest.mark.parametrize(
    "disk", [SlowDisk(1e12), FullDisk(2**40), FlakyDisk(at=1000)], ids=lambda d: type(d).__name__
)
def test_without_its_fault_a_double_moves_bytes_as_the_system_does(disk: Syscalls, fd: int) -> None:
    disk.fallocate(fd, 0, 8192)
    assert os.fstat(fd).st_size == 8192
    assert write(disk, fd, b"under", 4096) == 5
    disk.drop_cache(fd, 0, 8192)
    assert read(disk, fd, 5, 4096) == b"under"


def test_a_slow_disk_takes_the_time_of_all_transfers_one_after_another(fd: int) -> None:
    clock = ManualClock()
    disk = SlowDisk(bytes_per_second=10, latency=3, clock=clock, sleep=clock.sleep)
    finished: queue.SimpleQueue[float] = queue.SimpleQueue()

    def write_twenty_bytes() -> None:
        write(disk, fd, bytes(20))
        finished.put(clock())

    threads = [threading.Thread(target=write_twenty_bytes) for _ in range(2)]
    for thread in threads:
        thread.start()
    clock.wait_for_sleepers(2)
    clock.advance(5)  # two seconds for its own bytes, three of latency
    assert finished.get(timeout=30) == 5
    assert finished.empty()
    clock.advance(2)  # the other began when the first had moved its bytes
    assert finished.get(timeout=30) == 7
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(("rate", "latency"), [(0, 0), (-1, 0), (1, -1)])
def test_a_disk_that_cannot_be_is_refused(rate: float, latency: float) -> None:
    with pytest.raises(InvalidInput, match="no disk moves"):
        SlowDisk(rate, latency)


def test_a_full_disk_cuts_a_write_short_and_then_has_no_space(fd: int) -> None:
    disk = FullDisk(6)
    assert write(disk, fd, b"abcd") == 4
    assert write(disk, fd, b"efgh", 4) == 2
    with pytest.raises(OSError, match="No space left") as caught:
        write(disk, fd, b"gh", 6)
    assert caught.value.errno == errno.ENOSPC
    assert read(disk, fd, 9) == b"abcdef"
    assert write(disk, fd, b"ABCDEF") == 6, "bytes that it holds can be written again"


def test_a_full_disk_cuts_within_a_list_of_memory_ranges(fd: int) -> None:
    disk = FullDisk(5)
    (one, first), (two, second), (three, third) = memory(b"ab"), memory(b"cdef"), memory(b"gh")
    assert disk.pwritev(fd, [first, second, third], 0) == 5
    assert read(disk, fd, 9) == b"abcde"
    del one, two, three


def test_files_share_the_room_of_a_full_disk(fd: int, tmp_path: Path) -> None:
    disk = FullDisk(10)
    write(disk, fd, bytes(7))
    with tempfile.TemporaryFile(dir=tmp_path) as other:
        assert write(disk, other.fileno(), bytes(7)) == 3


def test_a_full_disk_reserves_all_or_nothing(fd: int) -> None:
    disk = FullDisk(8192)
    with pytest.raises(OSError, match="No space left"):
        disk.fallocate(fd, 0, 8193)
    assert os.fstat(fd).st_size == 0
    disk.fallocate(fd, 0, 8192)
    assert write(disk, fd, b"x", 8191) == 1


def test_a_flaky_disk_fails_the_calls_it_was_told_to_fail(fd: int) -> None:
    disk = FlakyDisk(errno.EIO, call="pwritev", at=2, times=2)
    outcomes = []
    for _ in range(5):
        try:
            outcomes.append(write(disk, fd, b"a"))
        except OSError as error:
            outcomes.append(errno.errorcode[error.errno])
    assert outcomes == [1, "EIO", "EIO", 1, 1]
    assert disk.failed == 2
    assert read(disk, fd, 1) == b"a", "other calls do not fail"


def test_a_flaky_disk_can_stay_broken(fd: int) -> None:
    disk = FlakyDisk(errno.EROFS, call="fallocate", times=None)
    for _ in range(3):
        with pytest.raises(OSError, match="Read-only"):
            disk.fallocate(fd, 0, 1)
    assert disk.failed == 3


def test_doubles_wrap_one_another(fd: int) -> None:
    disk = SlowDisk(1e12, inner=FullDisk(2, inner=FlakyDisk(call="pwritev")))
    with pytest.raises(OSError, match="Input/output"):
        write(disk, fd, b"abc")
    assert write(disk, fd, b"abc") == 2


@pytest.mark.usefixtures("nothing_left")
def test_a_manual_clock_wakes_a_sleeper_only_when_its_time_has_come() -> None:
    clock = ManualClock(100.0)
    woken = threading.Event()

    def sleep() -> None:
        clock.sleep(2.0)
        woken.set()

    thread = threading.Thread(target=sleep)
    thread.start()
    clock.wait_for_sleepers(1)
    clock.advance(1.5)
    assert not woken.wait(0.01)
    clock.advance(0.5)
    thread.join()
    assert woken.is_set()
    assert clock() == 102.0


def test_waiting_for_sleepers_that_never_come_ends() -> None:
    with pytest.raises(TimeoutError, match="0 of 1 threads"):
        ManualClock().wait_for_sleepers(1, patience=0.01)
