"""Order, cancellation, lifetimes and ends of transfers, by what began after what, never by the clock."""

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import pytest

from undercroft.errors import CorruptRecord, InvalidInput, SpillMisuse, TransferFailed, UndercroftError
from undercroft.events import Recorder
from undercroft.store.disk import DiskFile, Syscalls
from undercroft.store.transfer import CHUNK, Cancelled, Chunk, Priority, Transfer, TransferQueue, cut
from undercroft.testing import FlakyDisk
from undercroft.units import GIB, KIB, MIB

pytestmark = pytest.mark.usefixtures("nothing_left")

BLOCK = 4096
PATIENCE = 30.0  # seconds after which a test that hangs fails; nothing is measured


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDWR | os.O_TMPFILE, 0o600)
    os.ftruncate(fd, 64 * MIB)
    yield fd
    os.close(fd)


@pytest.fixture
def queue(gate) -> Iterator[Callable[..., TransferQueue]]:
    """``queue(workers=…)``: closed at the end, with the gate open."""
    made: list[TransferQueue] = []

    def make(**options) -> TransferQueue:
        made.append(TransferQueue(**options))
        return made[-1]

    yield make
    gate.let()
    for each in made:
        each.close(PATIENCE)


class Owner:
    """Something that owns memory, and whose death can be seen."""


@pytest.fixture
def move(fd: int, memory) -> Callable[..., Transfer]:
    """``move("read", disk, offset, chunks)``: a transfer of 4 KiB chunks, all at the same place in memory."""
    page = memory(bytes(BLOCK))

    def make(direction, disk: Syscalls | None = None, offset=0, chunks=1, **options) -> Transfer:
        file = DiskFile(fd, "a file", direct=False, syscalls=disk)
        places = range(offset, offset + chunks * BLOCK, BLOCK)
        pieces = [Chunk(file, place, (page.iovec,), BLOCK, page.iovec) for place in places]
        return Transfer(direction, pieces, **options)

    return make


def close(queue: TransferQueue, gate) -> None:
    """Close a queue whose calls wait at the gate, which opens only once the closing has begun."""
    closer = threading.Thread(target=queue.close, args=(PATIENCE,))
    closer.start()
    while not queue._closed:
        time.sleep(0.001)
    gate.let()
    closer.join(PATIENCE)
    assert not closer.is_alive()


def test_bytes_go_out_and_come_back(fd: int, memory, queue) -> None:
    file = DiskFile(fd, "a file", direct=False)
    content, back = memory(os.urandom(5 * CHUNK + 3 * BLOCK)), memory(bytes(5 * CHUNK + 3 * BLOCK))

    def chunks(address: int) -> list[Chunk]:
        starts = range(0, content.nbytes, CHUNK)
        spans = [(start, min(CHUNK, content.nbytes - start)) for start in starts]
        return [Chunk(file, s, ((address + s, n),), n, (address + s, n)) for s, n in spans]

    io = queue()
    write = io.submit(Transfer("write", chunks(content.address)), Priority.WRITE)
    assert write.wait(PATIENCE)
    read = io.submit(Transfer("read", chunks(back.address)), Priority.DEMAND)
    assert read.wait(PATIENCE)
    assert back.content == content.content
    assert (write.nbytes, write.moved, read.moved) == (content.nbytes,) * 3
    assert io.rate("read") > 0 < io.rate("write")


def test_a_demand_read_goes_before_a_gibibyte_of_queued_prefetch(fd: int, memory, queue, gate) -> None:
    """Both workers are busy with prefetch; the next chunk that any of them begins is the demanded one."""
    os.ftruncate(fd, GIB + CHUNK)
    file, buffer = DiskFile(fd, "a file", direct=False, syscalls=gate), memory(bytes(CHUNK))

    def read(start: int, nbytes: int) -> Transfer:
        places = range(start, start + nbytes, CHUNK)
        return Transfer("read", [Chunk(file, p, (buffer.iovec,), CHUNK, buffer.iovec) for p in places])

    io = queue(workers=2)
    prefetch = [io.submit(read(start, 64 * MIB), Priority.PREFETCH) for start in range(0, GIB, 64 * MIB)]
    gate.wait_for(2)
    demand = io.submit(read(GIB, CHUNK), Priority.DEMAND)
    gate.let(1)
    assert gate.wait_for(3) == [("read", 0), ("read", CHUNK), ("read", GIB)]
    for transfer in prefetch:
        io.cancel(transfer)
    gate.let()
    assert demand.wait(PATIENCE)
    assert io.drain(PATIENCE)
    assert len(gate.began) == 3


def test_classes_go_by_urgency_and_within_one_the_first_comes_first(queue, gate, move) -> None:
    io = queue(workers=1)
    io.submit(move("read", gate, 0), Priority.PREFETCH)
    gate.wait_for(1)
    order = [Priority.SCRUB, Priority.WRITE, Priority.PREFETCH, Priority.DEMAND]
    for place, priority in enumerate(order * 2, start=1):
        verb = "write" if priority is Priority.WRITE else "read"
        io.submit(move(verb, gate, place * BLOCK), priority)
    gate.let()
    assert io.drain(PATIENCE)
    assert [offset // BLOCK for _, offset in gate.began] == [0, 4, 8, 3, 7, 2, 6, 1, 5]


@pytest.mark.parametrize("slow", [Priority.WRITE, Priority.SCRUB])
@pytest.mark.parametrize("workers", [2, 3])
def test_writes_never_take_the_last_worker(queue, gate, move, slow: Priority, workers: int) -> None:
    io = queue(workers=workers)
    verb = "write" if slow is Priority.WRITE else "read"
    for _ in range(3):
        io.submit(move(verb, gate, chunks=8), slow)
    gate.wait_for(workers - 1)
    io.submit(move("read", gate, 40 * BLOCK), Priority.PREFETCH)
    assert gate.wait_for(workers)[-1] == ("read", 40 * BLOCK)
    gate.let()
    assert io.drain(PATIENCE)
    assert len(gate.began) == 25


def test_a_single_worker_writes_too(queue, move) -> None:
    io = queue(workers=1)
    assert io.submit(move("write", chunks=3), Priority.WRITE).wait(PATIENCE)


@pytest.mark.parametrize("options", [{"workers": 0}, {"max_queued": 0}])
def test_a_queue_that_could_move_nothing_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match="would move nothing"):
        TransferQueue(**options)


def test_the_chunks_of_one_transfer_are_shared_by_the_workers(queue, gate, move) -> None:
    io = queue(workers=2)
    io.submit(move("read", gate, chunks=4), Priority.PREFETCH)
    assert gate.wait_for(2) == [("read", 0), ("read", BLOCK)]


def test_a_cancelled_transfer_ends_at_the_next_chunk_and_keeps_its_memory_until_then(
    queue, gate, move
) -> None:
    owner, ends = Owner(), []
    alive = weakref.ref(owner)
    io = queue(workers=2)
    transfer = move("read", gate, chunks=8, keep=owner, on_done=ends.append)
    del owner
    io.submit(transfer, Priority.PREFETCH)
    gate.wait_for(2)
    io.cancel(transfer)
    other = io.submit(move("read", gate, 20 * BLOCK), Priority.PREFETCH)
    gate.let(1)  # one of the two chunks under way comes back, and the worker goes on to the other transfer
    assert gate.wait_for(3)[-1] == ("read", 20 * BLOCK)
    assert alive() is not None
    assert not transfer.done()
    assert ends == []
    gate.let()
    with pytest.raises(Cancelled):
        transfer.wait(PATIENCE)
    assert other.wait(PATIENCE)
    assert alive() is None
    assert ends == [transfer]
    assert transfer.moved == 2 * BLOCK
    assert len(gate.began) == 3


def test_a_transfer_cancelled_before_its_turn_never_begins(queue, gate, move) -> None:
    io = queue(workers=1)
    io.submit(move("read", gate), Priority.PREFETCH)
    gate.wait_for(1)
    owner = Owner()
    alive, ends = weakref.ref(owner), []
    transfer = io.submit(move("read", gate, BLOCK, keep=owner, on_done=ends.append), Priority.PREFETCH)
    del owner
    io.cancel(transfer)
    io.cancel(transfer)
    gate.let()
    with pytest.raises(Cancelled):
        transfer.wait(PATIENCE)
    assert (ends, alive(), len(gate.began), transfer.moved) == ([transfer], None, 1, 0)


def test_a_transfer_cancelled_before_it_was_submitted_ends_when_it_is(queue, gate, move) -> None:
    io, ends = queue(), []
    transfer = move("read", gate, on_done=ends.append)
    io.cancel(transfer)
    io.submit(transfer, Priority.DEMAND)
    with pytest.raises(Cancelled):
        transfer.wait(PATIENCE)
    assert (ends, gate.began) == ([transfer], [])


def test_cancelling_what_has_ended_changes_nothing(queue, move) -> None:
    io = queue()
    transfer = io.submit(move("read"), Priority.DEMAND)
    assert transfer.wait(PATIENCE)
    io.cancel(transfer)
    assert io.submit(move("read"), Priority.DEMAND).wait(PATIENCE)
    assert transfer.wait(PATIENCE)


class Canceller:
    """Garbage that cancels a transfer when it is collected, wherever that happens to be."""

    def __init__(self, queue: TransferQueue, transfer: Transfer) -> None:
        self.itself = self
        self._queue, self._transfer = queue, transfer

    def __del__(self) -> None:
        self._queue.cancel(self._transfer)


def test_a_destructor_may_cancel_in_the_middle_of_any_call(queue, move) -> None:
    """With the collector run at every chance, garbage dies inside the queue, under its lock."""
    io = queue(workers=2)
    transfers = [move("read", chunks=3) for _ in range(300)]

    def submit_and_leave_garbage() -> None:
        for number, transfer in enumerate(transfers):
            gc.set_threshold(1 + number % 8, 1, 1)
            Canceller(io, transfer)
            io.submit(transfer, Priority.PREFETCH)
            io.promote(transfer, Priority.DEMAND)

    before = gc.get_threshold()
    try:
        thread = threading.Thread(target=submit_and_leave_garbage, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "deadlocked"
    finally:
        gc.set_threshold(*before)
    assert io.drain(PATIENCE)
    assert all(transfer.done() for transfer in transfers)


def test_promotion_brings_what_is_left_forward(queue, gate, move) -> None:
    io = queue(workers=1)
    first, second, third = (move("read", gate, 10 * n * BLOCK, chunks=3) for n in range(3))
    for transfer in (first, second, third):
        io.submit(transfer, Priority.PREFETCH)
    gate.wait_for(1)
    io.promote(third, Priority.DEMAND)
    gate.let(2)
    gate.wait_for(3)
    io.promote(second, Priority.DEMAND)
    io.promote(third, Priority.WRITE)  # less urgent: it stays where it is
    gate.let()
    assert io.drain(PATIENCE)
    assert [offset // BLOCK for _, offset in gate.began] == [0, 20, 21, 22, 10, 11, 12, 1, 2]


def test_a_promotion_before_submission_is_not_lost(queue, gate, move) -> None:
    io = queue(workers=1)
    io.submit(move("read", gate), Priority.PREFETCH)
    gate.wait_for(1)
    io.submit(move("read", gate, BLOCK), Priority.PREFETCH)
    promoted = move("read", gate, 2 * BLOCK)
    io.promote(promoted, Priority.DEMAND)
    io.submit(promoted, Priority.PREFETCH)
    gate.let()
    assert io.drain(PATIENCE)
    assert [offset // BLOCK for _, offset in gate.began] == [0, 2, 1]


def test_promoting_what_has_ended_changes_nothing(queue, move) -> None:
    io = queue()
    transfer = io.submit(move("read"), Priority.PREFETCH)
    assert transfer.wait(PATIENCE)
    io.promote(transfer, Priority.DEMAND)
    assert io.drain(PATIENCE)


def test_a_failure_drops_the_rest_and_surfaces_at_wait(queue, move) -> None:
    io, ends = queue(workers=1), []
    owner = Owner()
    alive = weakref.ref(owner)
    disk = FlakyDisk(at=3, times=2)
    failing = move("read", disk, chunks=9, keep=owner, on_done=ends.append)
    del owner
    io.submit(failing, Priority.PREFETCH)
    after = io.submit(move("read"), Priority.PREFETCH)
    for _ in range(2):
        with pytest.raises(TransferFailed, match="read of 4096 bytes at 8192 of a file"):
            failing.wait(PATIENCE)
    failing.settle()
    assert after.wait(PATIENCE)
    assert (failing.done(), ends, alive(), failing.moved) == (True, [failing], None, 2 * BLOCK)


def test_a_failure_while_another_chunk_is_under_way_waits_for_it(queue, gate, move) -> None:
    owner = Owner()
    alive = weakref.ref(owner)
    io = queue(workers=2)
    failing = move("read", gate, 63 * MIB + 1020 * KIB, chunks=2, keep=owner)  # the second is past the end
    del owner
    io.submit(failing, Priority.PREFETCH)
    gate.wait_for(2)
    assert alive() is not None
    gate.let()
    with pytest.raises(CorruptRecord, match="shorter than its index"):
        failing.wait(PATIENCE)
    assert alive() is None


def test_an_unforeseen_error_is_wrapped_with_its_cause(queue, move) -> None:
    def before() -> None:
        raise ZeroDivisionError

    transfer = queue().submit(move("read", before=before), Priority.DEMAND)
    with pytest.raises(TransferFailed, match="ZeroDivisionError") as caught:
        transfer.wait(PATIENCE)
    assert isinstance(caught.value.__cause__.__cause__, ZeroDivisionError)


def test_nothing_is_read_from_memory_that_is_not_ready_by_any_worker(queue, gate, move) -> None:
    ready, asked = threading.Event(), threading.Semaphore(0)

    def before() -> None:
        asked.release()
        assert ready.wait(PATIENCE)

    io = queue(workers=4)
    transfer = io.submit(move("write", gate, chunks=9, before=before), Priority.WRITE)
    for _ in range(3):  # as many workers as writes may have
        assert asked.acquire(timeout=PATIENCE)
    assert gate.began == []
    ready.set()
    gate.let()
    assert transfer.wait(PATIENCE)


def test_memory_that_was_taken_away_is_not_touched_even_for_a_checksum(fd: int, queue, gate) -> None:
    class Gone(UndercroftError):
        """Its owner took it."""

    def before() -> None:
        raise Gone

    nowhere = (BLOCK, BLOCK)
    file = DiskFile(fd, "a file", direct=False, syscalls=gate)
    chunks = [Chunk(file, n * BLOCK, (nowhere,), BLOCK, nowhere) for n in range(3)]
    transfer = Transfer("write", chunks, before=before, checksums=[])
    queue(workers=4).submit(transfer, Priority.WRITE)
    with pytest.raises(Gone):
        transfer.wait(PATIENCE)
    assert gate.began == []


def test_an_error_in_on_done_surfaces_and_the_worker_lives(queue, move) -> None:
    def on_done(transfer: Transfer) -> None:
        raise ZeroDivisionError

    io = queue(workers=1)
    transfer = io.submit(move("read", on_done=on_done), Priority.DEMAND)
    with pytest.raises(TransferFailed, match="ZeroDivisionError"):
        transfer.wait(PATIENCE)
    assert io.submit(move("read"), Priority.DEMAND).wait(PATIENCE)


def test_on_done_sees_the_outcome_and_the_memory(queue, move) -> None:
    owner, seen = Owner(), []
    alive = weakref.ref(owner)
    transfer = move("read", keep=owner, on_done=lambda t: seen.append((t.error, t.done(), alive() is None)))
    del owner
    assert queue().submit(transfer, Priority.DEMAND).wait(PATIENCE)
    assert seen == [(None, False, False)]


def test_a_full_queue_makes_the_submitter_wait_but_never_a_demand(queue, gate, move) -> None:
    io = queue(workers=1, max_queued=2)
    io.submit(move("read", gate), Priority.PREFETCH)
    gate.wait_for(1)
    for n in (1, 2):
        io.submit(move("read", gate, n * BLOCK), Priority.PREFETCH)
    submitted = threading.Event()

    def submit_one_more() -> None:
        io.submit(move("read", gate, 3 * BLOCK), Priority.PREFETCH)
        submitted.set()

    thread = threading.Thread(target=submit_one_more)
    thread.start()
    demand = io.submit(move("read", gate, 4 * BLOCK), Priority.DEMAND)
    assert not submitted.wait(0.02)
    assert len(io) == 3
    gate.let(2)  # the one under way, then the demand: the class is as full as before
    demand.wait(PATIENCE)
    gate.let()
    assert submitted.wait(PATIENCE)
    thread.join()
    assert io.drain(PATIENCE)
    assert [offset // BLOCK for _, offset in gate.began] == [0, 4, 1, 2, 3]


def test_cancelling_makes_room_for_a_waiting_submitter(queue, gate, move) -> None:
    io = queue(workers=1, max_queued=1)
    io.submit(move("read", gate), Priority.PREFETCH)
    gate.wait_for(1)
    queued = io.submit(move("read", gate, BLOCK), Priority.PREFETCH)
    io.cancel(queued)
    thread = threading.Thread(target=io.submit, args=(move("read", gate, 2 * BLOCK), Priority.PREFETCH))
    thread.start()
    gate.let()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert io.drain(PATIENCE)
    assert [offset // BLOCK for _, offset in gate.began] == [0, 2]


def test_a_submitter_that_waits_for_room_is_refused_when_the_queue_closes(queue, gate, move) -> None:
    io = queue(workers=1, max_queued=1)
    for n in range(2):
        io.submit(move("read", gate, n * BLOCK), Priority.PREFETCH)
    gate.wait_for(1)
    refused: list[BaseException] = []

    def submit_one_more() -> None:
        try:
            io.submit(move("read", gate, 2 * BLOCK), Priority.PREFETCH)
        except SpillMisuse as error:
            refused.append(error)

    threads = [threading.Thread(target=submit_one_more) for _ in range(3)]
    for thread in threads:
        thread.start()
    close(io, gate)
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert len(refused) == 3


def test_closing_cancels_what_waits_and_lets_what_is_under_way_come_back(queue, gate, move) -> None:
    io, ends = queue(workers=2), []
    transfers = [
        io.submit(move("read", gate, 10 * n * BLOCK, chunks=2, on_done=ends.append), Priority.PREFETCH)
        for n in range(5)
    ]
    gate.wait_for(2)
    close(io, gate)
    assert transfers[0].wait(0)
    for transfer in transfers[1:]:
        with pytest.raises(Cancelled):
            transfer.wait(0)
    assert sorted(map(id, ends)) == sorted(map(id, transfers))
    assert len(gate.began) == 2
    assert not any(thread.is_alive() for thread in io._threads)
    io.close()


def test_a_closed_queue_refuses_and_ends_what_it_is_given(queue, move) -> None:
    io, ends, owner = queue(), [], Owner()
    alive = weakref.ref(owner)
    io.close()
    transfer = move("read", keep=owner, on_done=ends.append)
    del owner
    with pytest.raises(SpillMisuse, match="closed"):
        io.submit(transfer, Priority.DEMAND)
    assert (ends, alive(), transfer.done()) == ([transfer], None, True)
    with pytest.raises(SpillMisuse):
        transfer.wait()


def test_a_queue_may_be_closed_on_one_of_its_own_threads(queue, move) -> None:
    io = queue()
    transfer = io.submit(move("read", on_done=lambda _: io.close()), Priority.DEMAND)
    assert transfer.wait(PATIENCE)
    for thread in io._threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_a_finalizer_may_close_a_queue_that_has_its_lock(queue) -> None:
    """Garbage collected inside the queue, on a thread of its own, may include the queue's owner."""
    io, closed = queue(), threading.Event()

    def close_inside() -> None:
        with io._lock:
            io.close(0)
            closed.set()

    thread = threading.Thread(target=close_inside, daemon=True)
    thread.start()
    assert closed.wait(PATIENCE)
    thread.join()


def test_a_hung_disk_does_not_hold_up_closing_for_longer_than_allowed(queue, gate, move) -> None:
    io = queue(workers=2)
    transfer = io.submit(move("read", gate, chunks=2), Priority.DEMAND)
    gate.wait_for(2)
    io.close(timeout=0.01)
    assert not transfer.done()


def test_draining_has_a_deadline_and_waits_for_the_last_on_done(queue, gate, move) -> None:
    io, at_end, may_end = queue(workers=2), threading.Event(), threading.Event()

    def on_done(_: Transfer) -> None:
        at_end.set()
        assert may_end.wait(PATIENCE)

    assert io.drain(PATIENCE)
    io.submit(move("read", gate, chunks=3, on_done=on_done), Priority.PREFETCH)
    assert not io.drain(0.01)
    gate.let()
    assert at_end.wait(PATIENCE)
    assert not io.drain(0.01)
    may_end.set()
    assert io.drain(PATIENCE)


def test_waiting_has_a_timeout(queue, gate, move) -> None:
    transfer = queue().submit(move("read", gate), Priority.DEMAND)
    assert not transfer.wait(0.01)
    gate.let()
    assert transfer.wait(PATIENCE)


def test_a_rate_is_known_after_the_first_move(queue, move) -> None:
    io = queue()
    assert io.rate("read") is None
    io.submit(move("read", FlakyDisk(times=None)), Priority.DEMAND).settle()
    assert io.rate("read") is None, "what failed moved nothing"
    io.submit(move("read", chunks=4), Priority.DEMAND).settle()
    assert io.rate("read") > 0
    assert io.rate("write") is None


def test_every_chunk_is_recorded_in_its_lane(queue, move) -> None:
    recorder = Recorder()
    io = queue(recorder=recorder)
    io.submit(move("write", chunks=3), Priority.WRITE).settle()
    io.submit(move("read", chunks=2), Priority.DEMAND).settle()
    assert [(event.name, event.lane, event.nbytes) for event in recorder.events] == [
        *[("write", "disk write", BLOCK)] * 3,
        *[("read", "disk read", BLOCK)] * 2,
    ]


def test_a_flipped_bit_is_found_by_the_checksum(fd: int, memory, queue) -> None:
    io, file = queue(), DiskFile(fd, "a file", direct=False)
    page = memory(os.urandom(3 * BLOCK))
    payload = (page.address + 100, BLOCK)

    def chunks() -> list[Chunk]:
        whole = Chunk(file, 0, ((page.address, 2 * BLOCK),), 2 * BLOCK, payload)
        return [whole, Chunk(file, 2 * BLOCK, ((page.address + 2 * BLOCK, BLOCK),), BLOCK, (page.address, 1))]

    sums: list[int] = []
    assert io.submit(Transfer("write", chunks(), checksums=sums), Priority.WRITE).wait(PATIENCE)
    assert len(set(sums)) == 2
    assert io.submit(Transfer("read", chunks(), checksums=sums), Priority.DEMAND).wait(PATIENCE)
    for offset, is_ours in [(99, False), (100, True), (BLOCK + 99, True), (BLOCK + 100, False)]:
        byte = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([byte[0] ^ 4]), offset)
        read = io.submit(Transfer("read", chunks(), checksums=sums), Priority.DEMAND)
        if is_ours:
            with pytest.raises(CorruptRecord, match="a file at 0: the checksum differs"):
                read.wait(PATIENCE)
        else:
            assert read.wait(PATIENCE), "alignment is not ours"
        os.pwrite(fd, byte, offset)


def test_a_transfer_that_ended_holds_nothing(queue, move) -> None:
    class Holder:
        def before(self) -> None: ...
        def on_done(self, _: Transfer) -> None: ...

    holder = Holder()
    alive = weakref.ref(holder)
    io = queue()
    transfer = io.submit(move("read", before=holder.before, on_done=holder.on_done), Priority.DEMAND)
    assert transfer.wait(PATIENCE)
    assert io.drain(PATIENCE)
    del holder
    assert alive() is None


def test_an_error_does_not_hold_what_its_caller_held(queue, move) -> None:
    def wait_and_fail() -> weakref.ref[Owner]:
        owner = Owner()
        with pytest.raises(TransferFailed):
            queue().submit(move("read", FlakyDisk(times=None)), Priority.DEMAND).wait(PATIENCE)
        return weakref.ref(owner)

    gc.disable()
    try:
        assert wait_and_fail()() is None
    finally:
        gc.enable()


def test_an_idle_worker_holds_no_transfer(queue, move) -> None:
    io = queue()
    alive = weakref.ref(io.submit(move("read"), Priority.DEMAND))
    assert io.drain(PATIENCE)
    assert alive() is None


def test_an_interpreter_with_hours_of_queued_writes_exits(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import ctypes, os, sys
        from undercroft.store.disk import DiskFile
        from undercroft.store.transfer import Chunk, Priority, Transfer, TransferQueue
        from undercroft.testing import SlowDisk
        fd = os.open(sys.argv[1], os.O_RDWR | os.O_TMPFILE, 0o600)
        file = DiskFile(fd, "a file", direct=False, syscalls=SlowDisk(1.0))
        page = ctypes.create_string_buffer(4096)
        place = (ctypes.addressof(page), 4096)
        queue = TransferQueue()
        for _ in range(100):
            chunk = Chunk(file, 0, (place,), 4096, place)
            queue.submit(Transfer("write", [chunk], keep=page), Priority.WRITE)
        print(len(queue))
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert int(finished.stdout) >= 98


@pytest.mark.parametrize("blocks", [1, 2047, 2048, 2049, 2304, 4096, 4097, 10_000])
def test_a_run_is_cut_into_few_and_like_pieces(blocks: int) -> None:
    pieces = list(cut(blocks * BLOCK))
    assert [begin for begin, _ in pieces] == [0, *accumulate(nbytes for _, nbytes in pieces)][:-1]
    assert sum(nbytes for _, nbytes in pieces) == blocks * BLOCK
    assert len(pieces) == -(-blocks * BLOCK // CHUNK)
    lengths = {nbytes for _, nbytes in pieces}
    assert max(lengths) <= CHUNK
    assert max(lengths) - min(lengths) <= len(pieces) * BLOCK
    assert all(nbytes % BLOCK == 0 for nbytes in lengths)
