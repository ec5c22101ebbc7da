"""Bytes of any address and size go out and come back, in whatever room there is, and never more."""

import errno
import gc
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest

from undercroft.errors import (
    CorruptRecord,
    InvalidInput,
    SpillMisuse,
    TierFull,
    TransferFailed,
    UnsafeDirectory,
)
from undercroft.store.disk import Iovec, Syscalls
from undercroft.store.scratch import Extent, Scratch
from undercroft.store.slab import Slab
from undercroft.store.transfer import Cancelled, Priority
from undercroft.testing import FlakyDisk, FullDisk
from undercroft.units import KIB, MIB

pytestmark = pytest.mark.usefixtures("nothing_left")

BLOCK = 4096
PATIENCE = 30.0


def span(extent: Extent) -> list[tuple[int, int, int]]:
    return [(piece.file, piece.offset, piece.offset + piece.nbytes) for piece in extent.pieces]


@pytest.mark.parametrize("checksums", [False, True])
def test_bytes_of_any_address_and_size_come_back(memory, store, checksums: bool) -> None:
    one = store(chunk=16 * KIB, checksums=checksums)
    for shift, nbytes in product([0, 1, 64, 4095], [1, 63, 4095, 4096, 4097, 64 * KIB, 200_001]):
        content = memory(os.urandom(nbytes), shift)
        extent = one.spill(content)
        assert (extent.head, extent.nbytes) == (shift, nbytes)
        assert one.fetch(extent) == content.content
        assert one.fetch(extent) == content.content


def test_a_copy_keeps_the_alignment_of_the_original(memory, store) -> None:
    one = store()
    content = memory(os.urandom(1000), 192)
    extent = one.spill(content)
    lease, transfer = one.scratch.fetch(extent)
    one.queue.submit(transfer, Priority.DEMAND).settle()
    storage = lease.storage(extent.head, extent.nbytes)
    assert storage.data_ptr() % BLOCK == 192
    assert bytes(storage.tolist()) == content.content


def test_neighbours_in_the_first_and_last_block_are_left_alone(memory, store) -> None:
    one = store()
    page = memory(os.urandom(2 * BLOCK))
    before = page.content
    extent, transfer = one.scratch.spill(page.address + 100, 5000, keep=page)
    one.queue.submit(transfer, Priority.WRITE).wait(PATIENCE)
    assert page.content == before
    assert one.fetch(extent) == before[100:5100]


def test_extents_are_used_again_before_the_file_grows(memory, store) -> None:
    one = store()
    content = memory(os.urandom(MIB))
    first, second = one.spill(content), one.spill(content)
    size, place = one.scratch.file_nbytes, span(first)
    for _ in range(200):
        one.scratch.drop(first)
        first = one.spill(content)
        assert span(first) == place
    assert one.scratch.file_nbytes == size
    assert one.scratch.occupied == 2 * MIB
    assert one.fetch(second) == content.content


def test_a_write_is_counted_in_whole_blocks_and_uncounted_where_it_was_cancelled(memory, store) -> None:
    one = store()
    one.spill(memory(bytes(10), 4090))
    assert one.scratch.written == 2 * BLOCK
    _, transfer = one.scratch.spill(memory(bytes(BLOCK)).address, BLOCK, keep=None)
    assert one.scratch.written == 3 * BLOCK
    one.queue.cancel(transfer)
    one.queue.submit(transfer, Priority.WRITE).settle()
    assert one.scratch.written == 2 * BLOCK


def test_a_cancelled_write_returns_its_room_before_it_says_so(memory, store) -> None:
    one, seen = store(), []
    content = memory(bytes(MIB))
    done = lambda ended: seen.append((type(ended.error), one.scratch.occupied))  # noqa: E731
    _, transfer = one.scratch.spill(content.address, MIB, keep=content, on_done=done)
    assert one.scratch.occupied == MIB
    one.queue.cancel(transfer)
    one.queue.submit(transfer, Priority.WRITE)
    with pytest.raises(Cancelled):
        transfer.wait(PATIENCE)
    assert seen == [(Cancelled, 0)]
    assert one.scratch.writable


def test_no_room_in_the_slab_is_no_error(memory, store) -> None:
    one = store(slab=16 * BLOCK)
    extent = one.spill(memory(bytes(16 * BLOCK)))
    lease, transfer = one.scratch.fetch(extent)
    one.queue.submit(transfer, Priority.DEMAND).settle()
    assert one.scratch.fetch(extent) is None
    del lease
    assert one.fetch(extent) == bytes(16 * BLOCK)


def test_trimming_gives_the_free_end_back_to_the_disk(memory, store, directory: Path, spill_files) -> None:
    one = store()
    content = memory(os.urandom(40 * MIB))
    first, second = one.spill(content), one.spill(content)
    (file,) = spill_files(directory)
    grown = one.scratch.file_nbytes
    assert file.stat().st_blocks * 512 >= grown >= 80 * MIB
    one.scratch.drop(first)
    assert one.scratch.trim() == grown - 80 * MIB, "what is free below an extent in use stays"
    one.scratch.drop(second)
    assert one.scratch.trim() == 80 * MIB
    assert one.scratch.file_nbytes == 0
    assert file.stat().st_blocks == 0
    assert one.scratch.trim() == 0
    assert one.fetch(one.spill(content)) == content.content


def test_room_that_nothing_reached_for_a_while_goes_back(memory, store) -> None:
    one = store(slab=256 * MIB)
    small, large = memory(os.urandom(MIB)), memory(bytes(160 * MIB))
    one.scratch.drop(one.spill(large))
    assert one.scratch.trim_unreached() == 0, "all of it was needed a moment ago"
    kept = one.spill(small)
    assert one.scratch.trim_unreached() > 64 * MIB
    assert one.scratch.file_nbytes == MIB
    assert one.fetch(kept) == small.content
    again = one.spill(large)
    assert one.fetch(again) == large.content
    one.scratch.drop(again)
    one.scratch.trim_unreached()
    for _ in range(2):  # half the room is no reason to give the other half back
        one.scratch.drop(one.spill(memory(bytes(100 * MIB))))
        assert one.scratch.trim_unreached() == 0


def test_a_small_trim_leaves_what_lies_below_intact(memory, store) -> None:
    one = store()
    contents = [memory(os.urandom(5000 * n), n) for n in range(1, 6)]
    extents = [one.spill(content) for content in contents]
    one.scratch.drop(extents.pop())
    assert one.scratch.trim() > 0
    assert [one.fetch(extent) for extent in extents] == [content.content for content in contents[:4]]


def test_the_capacity_is_never_exceeded(memory, store, directory: Path) -> None:
    one = store(capacity=MIB + 1000)
    extents = [one.spill(memory(os.urandom(256 * KIB))) for _ in range(4)]
    with pytest.raises(TierFull, match=r"4 KiB more would exceed the 1.00 MiB of disk allowed"):
        one.spill(memory(b"x"))
    assert one.scratch.file_nbytes <= MIB + 1000
    assert one.scratch.writable, "room may come back"
    one.scratch.drop(extents.pop())
    one.spill(memory(bytes(256 * KIB)))


def test_a_refused_extent_that_was_half_placed_is_given_back(memory, store, tmp_path: Path) -> None:
    one = store(tmp_path / "a", tmp_path / "b", capacity=3 * MIB, chunk=MIB)
    one.spill(memory(bytes(2 * MIB)))
    with pytest.raises(TierFull):
        one.spill(memory(bytes(2 * MIB)))
    assert one.scratch.occupied == 2 * MIB
    assert one.scratch.written == 2 * MIB
    one.spill(memory(bytes(MIB)))


def test_the_cap_on_written_bytes_ends_writing_for_good(memory, store) -> None:
    one = store(write_cap=64 * KIB)
    extents = [one.spill(memory(os.urandom(16 * KIB))) for _ in range(4)]
    for extent in extents[1:]:
        one.scratch.drop(extent)
    with pytest.raises(TierFull, match="the cap of 64 KiB on bytes written is reached"):
        one.spill(memory(b"x"))
    assert not one.scratch.writable
    with pytest.raises(TierFull, match="nothing more is spilled"):
        one.spill(memory(b"x"))
    assert one.scratch.written == 64 * KIB
    assert len(one.fetch(extents[0])) == 16 * KIB, "what was written is still read"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_a_failed_write_is_the_last(memory, store, code: int) -> None:
    one = store(syscalls=FlakyDisk(code, call="pwritev", at=2, times=None))
    kept = memory(os.urandom(BLOCK))
    extent = one.spill(kept)
    with pytest.raises(TransferFailed if code in (errno.EIO, errno.EROFS) else TierFull):
        one.spill(memory(b"x"))
    assert not one.scratch.writable
    assert one.scratch.occupied == BLOCK
    with pytest.raises(TierFull, match="since a write failed"):
        one.scratch.spill(kept.address, BLOCK, keep=kept)
    assert one.fetch(extent) == kept.content


def test_a_failure_beside_a_cancelled_write_is_not_forgotten(memory, store) -> None:
    one = store(syscalls=FlakyDisk(errno.ENOSPC, call="pwritev", times=None))
    page = memory(bytes(BLOCK))
    _, cancelled = one.scratch.spill(page.address, BLOCK, keep=page)
    _, failing = one.scratch.spill(page.address, BLOCK, keep=page)
    one.queue.submit(failing, Priority.WRITE).settle()
    one.queue.cancel(cancelled)
    one.queue.submit(cancelled, Priority.WRITE).settle()
    assert not one.scratch.writable


def test_memory_that_was_taken_away_says_nothing_of_the_disk(memory, store) -> None:
    one = store()
    with pytest.raises(TransferFailed) as caught:
        one.queue.submit(one.scratch.spill(BLOCK, BLOCK, keep=None)[1], Priority.WRITE).wait(PATIENCE)
    assert caught.value.errno == errno.EFAULT
    assert one.scratch.writable
    one.spill(memory(b"x"))


def test_a_disk_that_has_room_for_just_this_is_used_to_its_end(memory, store) -> None:
    one = store(syscalls=FullDisk(10 * BLOCK))
    contents = [memory(os.urandom(4 * BLOCK)) for _ in range(2)]
    extents = [one.spill(content) for content in contents]
    with pytest.raises(TierFull, match="No space left"):
        one.spill(memory(bytes(4 * BLOCK)))
    assert one.scratch.writable, "no write failed; room may come back"
    assert [one.fetch(extent) for extent in extents] == [content.content for content in contents]


def test_a_disk_that_refuses_to_make_room_is_not_asked_again(memory, store) -> None:
    disk = FlakyDisk(errno.EROFS, call="fallocate", times=None)
    one = store(syscalls=disk)
    with pytest.raises(TransferFailed, match=r"reserve of .* Read-only file system"):
        one.spill(memory(b"x"))
    with pytest.raises(TierFull):
        one.spill(memory(b"x"))
    assert disk.failed == 1
    assert not one.scratch.writable


@pytest.mark.parametrize("mebibytes", [1, 2, 3, 7])
def test_two_disks_share_a_large_write(memory, store, tmp_path: Path, mebibytes: int) -> None:
    one = store(tmp_path / "a", tmp_path / "b", chunk=MIB, checksums=True)
    content = memory(os.urandom(mebibytes * MIB - 1000), 700)
    extents = [one.spill(content) for _ in range(3)]
    assert {piece.file for extent in extents for piece in extent.pieces} == {0, 1}
    if mebibytes > 1:
        assert {piece.file for piece in extents[0].pieces} == {0, 1}
    assert [one.fetch(extent) for extent in extents] == [content.content] * 3
    for extent in extents:
        one.scratch.drop(extent)
    assert one.scratch.occupied == 0


class CountingDisk(Syscalls):
    """Counts the bytes written to each file."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, int] = {}

    def pwritev(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        moved = super().pwritev(fd, iovecs, offset)
        self.written[fd] = self.written.get(fd, 0) + moved
        return moved


def test_two_disks_get_equal_shares(memory, store, tmp_path: Path) -> None:
    disk = CountingDisk()
    one = store(tmp_path / "a", tmp_path / "b", chunk=MIB, syscalls=disk)
    one.spill(memory(bytes(8 * MIB)))
    for _ in range(4):
        one.spill(memory(bytes(64 * KIB)))
    assert list(disk.written.values()) == [4 * MIB + 128 * KIB] * 2


class LimitedFile(Syscalls):
    """The disk of the first file that reserves anything is full beyond `capacity`; other disks are not."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._fd = -1

    def fallocate(self, fd: int, offset: int, nbytes: int) -> None:
        self._fd = fd if self._fd < 0 else self._fd
        if fd == self._fd and offset + nbytes > self._capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().fallocate(fd, offset, nbytes)


def test_when_one_disk_is_full_the_other_takes_all(memory, store, tmp_path: Path) -> None:
    one = store(tmp_path / "a", tmp_path / "b", chunk=MIB, syscalls=LimitedFile(2 * MIB))
    contents = [memory(os.urandom(2 * MIB)) for _ in range(6)]
    extents = [one.spill(content) for content in contents]
    places = [piece.file for extent in extents for piece in extent.pieces]
    assert (places.count(0), places.count(1)) == (2, 10)
    assert [one.fetch(extent) for extent in extents] == [content.content for content in contents]


@pytest.mark.parametrize("bit", [0, 8 * 30_000 + 3])
def test_a_flipped_bit_is_corruption_with_checksums_on(
    memory, store, directory: Path, bit: int, flip
) -> None:
    one = store(checksums=True, chunk=16 * KIB)
    extent = one.spill(memory(bytes(40_000), 100))
    assert one.fetch(extent) == bytes(40_000)
    flip(directory, bit + 8 * 100)
    with pytest.raises(CorruptRecord, match=f"spill file in {directory} at .*: the checksum differs"):
        one.fetch(extent)
    flip(directory, bit + 8 * 100)
    assert one.fetch(extent) == bytes(40_000)
    flip(directory, 8 * 99)
    assert one.fetch(extent) == bytes(40_000), "what lies before ours in its block is not ours"


@pytest.mark.parametrize("left", [0, 1, BLOCK, 30_000])
def test_a_truncated_spill_file_is_corruption(memory, store, directory: Path, left: int, spill_files) -> None:
    one = store()
    extent = one.spill(memory(bytes(40_000)))
    (file,) = spill_files(directory)
    os.truncate(file, left)
    with pytest.raises(CorruptRecord, match=rf"spill file in {directory} ended after {left}"):
        one.fetch(extent)


class Dropper:
    """Garbage that drops an extent when it is collected, wherever that happens to be."""

    def __init__(self, scratch: Scratch, extent: Extent) -> None:
        self.itself = self
        self._scratch, self._extent = scratch, extent

    def __del__(self) -> None:
        self._scratch.drop(self._extent)


def test_a_destructor_may_drop_in_the_middle_of_any_call(memory, store) -> None:
    one, page = store(), memory(bytes(BLOCK))

    def spill_and_leave_garbage() -> None:
        for number in range(300):
            gc.set_threshold(1 + number % 8, 1, 1)
            extent, _ = one.scratch.spill(page.address, BLOCK, keep=page)
            Dropper(one.scratch, extent)
            assert one.scratch.occupied <= 16 * BLOCK

    before = gc.get_threshold()
    thread = threading.Thread(target=spill_and_leave_garbage, daemon=True)
    try:
        thread.start()
        thread.join(PATIENCE)
    finally:
        gc.set_threshold(*before)
    assert not thread.is_alive(), "deadlocked"
    gc.collect()
    assert one.scratch.occupied == 0


def test_nothing_is_left_after_close(memory, store, directory: Path, spill_files) -> None:
    one = store()
    one.spill(memory(bytes(MIB)))
    assert len(spill_files(directory)) == 1
    one.close()
    one.close()
    assert spill_files(directory) == list(directory.iterdir()) == []


def test_a_closed_scratch_says_so(memory, store) -> None:
    one = store()
    extent = one.spill(memory(b"x"))
    one.scratch.close()
    for call in (lambda: one.scratch.fetch(extent), lambda: one.spill(memory(b"x")), one.scratch.trim):
        with pytest.raises(SpillMisuse, match="closed; make a new one"):
            call()
    one.scratch.drop(extent)
    assert not one.scratch.writable


def test_a_full_disk_does_not_keep_the_bytes_it_had_no_room_for(memory, store, tmp_path: Path) -> None:
    class Owner:
        """Something that owns memory, and whose death can be seen."""

    def spill_in_vain() -> weakref.ref[Owner]:
        owner = Owner()
        with pytest.raises(TierFull):
            one.scratch.spill(page.address, BLOCK, keep=owner)
        return weakref.ref(owner)

    one, page = store(tmp_path / "a", tmp_path / "b", capacity=0), memory(bytes(BLOCK))
    gc.disable()
    try:
        assert spill_in_vain()() is None
    finally:
        gc.enable()


def test_without_a_directory_there_is_no_scratch(directory: Path) -> None:
    with pytest.raises(InvalidInput, match="at least one directory"):
        Scratch([], buffers=Slab(BLOCK, page=BLOCK))


def test_a_scratch_that_cannot_be_made_leaves_nothing(store, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(UnsafeDirectory):
        store(tmp_path / "good", tmp_path / "open")
    assert list((tmp_path / "good").iterdir()) == []


def test_it_knows_where_it_is_and_whether_it_goes_direct(store, tmp_path: Path) -> None:
    one = store(tmp_path / "a", tmp_path / "b")
    assert one.scratch.directory == tmp_path / "a"
    assert one.scratch.direct
    assert not store(tmp_path / "c", syscalls=FlakyDisk(errno.EINVAL)).scratch.direct


def test_buffered_bytes_come_back_too(memory, store) -> None:
    one = store(syscalls=FlakyDisk(errno.EINVAL))
    content = memory(os.urandom(300_000), 77)
    assert one.fetch(one.spill(content)) == content.content


def test_an_interpreter_that_forgot_to_close_exits_and_leaves_no_bytes(directory: Path) -> None:
    script = textwrap.dedent(
        """
        import ctypes, sys
        from undercroft.store.scratch import Scratch
        from undercroft.store.slab import Slab
        from undercroft.store.transfer import Priority, TransferQueue
        from undercroft.testing import SlowDisk
        slab, queue = Slab(1 << 20), TransferQueue()
        scratch = Scratch([sys.argv[1]], buffers=slab, syscalls=SlowDisk(1e5))
        memory = ctypes.create_string_buffer(1 << 20)
        for _ in range(50):  # nearly ten minutes' worth
            extent, transfer = scratch.spill(ctypes.addressof(memory), 1 << 20, keep=memory)
            queue.submit(transfer, Priority.WRITE)
        """
    )
    command = [sys.executable, "-c", script, str(directory)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert [list(path.iterdir()) for path in directory.iterdir()] == [[]]
