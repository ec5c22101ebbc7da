"""Faults of real file systems, devices, limits and processes: bytes stay right, or a typed error says why not."""

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from undercroft.errors import CorruptRecord, SpillMisuse, TierFull, TransferFailed
from undercroft.store.directory import PrivateDirectory
from undercroft.store.transfer import Chunk, Priority, Transfer
from undercroft.testing import FlakyDisk
from undercroft.units import KIB, MIB

pytestmark = pytest.mark.usefixtures("nothing_left")

BLOCK = 4096
PATIENCE = 30.0


@pytest.fixture
def image(tmp_path: Path, mount) -> Callable[..., Path]:
    """``image(size, *mkfs)``: a sparse file that holds a fresh ext4, below tmp_path or a directory given."""

    def make(size: int, *options: str, below: Path = tmp_path) -> Path:
        path = below / "disk.img"
        path.touch()
        os.truncate(path, size)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", *options, str(path)], check=True)
        return path

    return make


@pytest.fixture
def mount_image(mount) -> Callable[[Path], Path]:
    """Mounts an image; the directory to spill in below it does not exist yet."""

    def mount_one(path: Path, options: str = "loop") -> Path:
        return mount("ext4", options, path) / "spill"

    return mount_one


def fill(one, memory, nbytes: int) -> tuple[list, list, OSError]:
    """Spill until an error; what was spilled, where, and the error."""
    contents, extents = [], []
    while True:
        contents.append(memory(os.urandom(nbytes), 12))
        try:
            extents.append(one.spill(contents[-1]))
        except OSError as error:
            return contents, extents, error


def check_nothing_was_lost(one, contents: list, extents: list) -> None:
    assert extents
    assert [one.fetch(extent) for extent in extents] == [content.content for content in contents[:-1]]
    assert any(contents[-1].content), "the bytes that found no room stay in memory"


@pytest.mark.root
def test_a_write_cut_short_by_a_full_tmpfs_is_a_full_tier(mount, memory) -> None:
    with PrivateDirectory(mount("tmpfs", "size=8m,mode=700")) as directory:
        file = directory.create()
        with pytest.raises(TierFull, match="No space left on device") as caught:
            file.write(0, [memory(bytes(9 * MIB)).iovec])
        assert caught.value.errno == errno.ENOSPC
        assert 0 < os.fstat(file.fd).st_size < 9 * MIB, "the first write was cut short"
        file.close()


@pytest.mark.root
def test_a_full_tmpfs_takes_what_it_can_and_loses_nothing(mount, memory, store) -> None:
    one = store(mount("tmpfs", "size=8m,mode=700"))
    contents, extents, error = fill(one, memory, MIB)
    assert isinstance(error, TierFull)
    assert len(extents) >= 6
    check_nothing_was_lost(one, contents, extents)


@pytest.mark.root
@pytest.mark.parametrize(
    "features", ["extent", "^extent,^64bit,^has_journal"], ids=["reserved", "unreserved"]
)
def test_a_full_ext4_takes_what_it_can_and_loses_nothing(image, mount_image, memory, store, features) -> None:
    """Without extents ext4 cannot reserve blocks, so that the disk is met full in the middle of a write."""
    one = store(mount_image(image(16 * MIB, "-O", features)))
    assert one.scratch.direct
    contents, extents, error = fill(one, memory, MIB)
    assert isinstance(error, TierFull)
    assert len(extents) >= 6
    assert one.scratch.writable == (features == "extent")
    check_nothing_was_lost(one, contents, extents)


@pytest.mark.root
def test_a_device_error_on_reading_is_a_failed_transfer(image, mount_image, memory, store) -> None:
    disk = image(64 * MIB)
    one = store(mount_image(disk))
    content = memory(os.urandom(8 * MIB))
    extent = one.spill(content)
    assert one.fetch(extent) == content.content
    os.truncate(disk, MIB)
    with pytest.raises(TransferFailed, match=r"read of .* of spill file in .*: Input/output error") as caught:
        one.fetch(extent)
    assert caught.value.errno == errno.EIO


@pytest.mark.root
@pytest.mark.parametrize("direct", [True, False])
def test_bytes_that_a_device_fails_to_store_are_never_believed(
    image, mount, mount_image, memory, store, direct: bool
) -> None:
    """The device claims 64 MiB and has 6, and may take a part of a write for the whole, which checksums find out.

    A page cache takes every byte, and learns of the loss only when it writes them back.
    """
    disk = image(64 * MIB, "-O", "^has_journal", below=mount("tmpfs", "size=6m"))
    options = {} if direct else {"syscalls": FlakyDisk(errno.EINVAL)}
    one = store(mount_image(disk), checksums=True, **options)
    assert one.scratch.direct == direct
    contents, extents, _ = fill(one, memory, MIB)
    assert not one.scratch.writable
    assert len(extents) < 12
    for content, extent in zip(contents, extents, strict=False):
        with suppress(TransferFailed, CorruptRecord):
            assert one.fetch(extent) == content.content


@pytest.mark.root
def test_a_file_system_that_becomes_read_only_is_still_read(image, mount_image, memory, store) -> None:
    disk = image(64 * MIB)
    directory = mount_image(disk, "loop,errors=remount-ro")
    one = store(directory)
    content = memory(os.urandom(MIB))
    extent = one.spill(content)
    device = subprocess.run(
        ["findmnt", "-no", "SOURCE", str(directory.parent)], capture_output=True, text=True, check=True
    )
    trigger = Path("/sys/fs/ext4") / Path(device.stdout.strip()).name / "trigger_fs_error"
    trigger.write_text("a test")
    with pytest.raises(TransferFailed, match="Read-only file system") as caught:
        one.spill(memory(bytes(65 * MIB)))
    assert caught.value.errno == errno.EROFS
    assert not one.scratch.writable
    assert one.fetch(extent) == content.content


@pytest.mark.root
def test_a_file_system_without_direct_io_is_used_through_its_cache(mount, memory, store, caplog) -> None:
    top = mount("ramfs", "mode=700")
    one = store(top, checksums=True)
    assert not one.scratch.direct
    assert f"{top}: this file system refuses O_DIRECT; buffered I/O is used" in caplog.text
    for shift, nbytes in [(0, 1), (17, 100_001), (4095, 5 * MIB)]:
        content = memory(os.urandom(nbytes), shift)
        assert one.fetch(one.spill(content)) == content.content


@pytest.mark.root
def test_an_overlay_goes_direct(mount, tmp_path: Path, memory, store) -> None:
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    one = store(mount("overlay", layers) / "spill")
    assert one.scratch.direct
    content = memory(os.urandom(MIB), 40)
    assert one.fetch(one.spill(content)) == content.content


def pages_in_cache(fd: int, nbytes: int) -> int:
    """How many pages of a file the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    with mmap.mmap(fd, nbytes) as mapping:
        view = ctypes.c_char.from_buffer(mapping)
        pages = ctypes.create_string_buffer(nbytes // BLOCK)
        assert libc.mincore(ctypes.addressof(view), nbytes, pages) == 0
        del view
    return sum(byte & 1 for byte in pages.raw)


@pytest.mark.parametrize("direct", [True, False])
def test_nothing_stays_in_the_page_cache(memory, store, directory: Path, spill_files, direct: bool) -> None:
    one = store(syscalls=None if direct else FlakyDisk(errno.EINVAL))
    content = memory(os.urandom(4 * MIB))
    extent = one.spill(content)
    (link,) = spill_files(directory)
    fd = os.open(link, os.O_RDWR)
    assert pages_in_cache(fd, 4 * MIB) == 0
    os.pread(fd, BLOCK, 0)
    assert pages_in_cache(fd, 4 * MIB) > 0, "the test can see them"
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert one.fetch(extent) == content.content
    assert pages_in_cache(fd, 4 * MIB) == 0
    os.close(fd)


def run(script: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    """Run a script in an interpreter of its own, in which `store` and `memory` are made as the tests make them."""
    prelude = textwrap.dedent(
        """
        import ctypes, os, resource, signal, sys, time
        from undercroft.errors import *
        from undercroft.store.scratch import Scratch
        from undercroft.store.slab import Slab
        from undercroft.store.transfer import Priority, TransferQueue

        def spill(content, **options):
            memory = ctypes.create_string_buffer(content, len(content))
            address = ctypes.addressof(memory)
            extent, transfer = scratch.spill(address, len(content), keep=memory, **options)
            queue.submit(transfer, Priority.WRITE).wait()
            return extent

        def fetch(extent):
            lease, transfer = scratch.fetch(extent)
            queue.submit(transfer, Priority.DEMAND).wait()
            return ctypes.string_at(lease.address + extent.head, extent.nbytes)
        """
    )
    command = [sys.executable, "-c", prelude + textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_the_limit_on_file_sizes_ends_writing_and_loses_nothing(directory: Path) -> None:
    """Twice: where room is reserved, and in the middle of a write, which is cut short first."""
    finished = run(
        """
        slab, queue = Slab(1 << 24), TransferQueue()
        contents = [os.urandom(1 << 18) for _ in range(4)]
        for when in ("reserving", "writing"):
            scratch = Scratch([sys.argv[1]], buffers=slab)
            if when == "writing":
                scratch.drop(spill(contents[0]))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, resource.RLIM_INFINITY))
            extents, error = [], None
            try:
                for content in contents:
                    extents.append(spill(content))
            except TierFull as raised:
                error = raised
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert [fetch(extent) for extent in extents] == contents[:len(extents)]
            print(when, len(extents), error.errno, scratch.writable)
            scratch.close()
        queue.close()
        """,
        directory,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == [
        f"reserving 1 {errno.EFBIG} True",
        f"writing 1 {errno.EFBIG} False",
    ]


def test_no_memory_needs_to_be_locked(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(directory, 65534, 65534)
        for parent in directory.parents[:-2]:
            parent.chmod(0o755)
    finished = run(
        """
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        if os.geteuid() == 0:
            os.setuid(65534)
        slab, queue = Slab(1 << 24), TransferQueue()
        scratch = Scratch([sys.argv[1]], buffers=slab)
        content = os.urandom(1 << 20)
        assert fetch(spill(content)) == content
        print(scratch.direct)
        queue.close(), scratch.close(), slab.close()
        """,
        directory,
    )
    assert (finished.returncode, finished.stdout) == (0, "True\n"), finished.stderr


KILLS = """
import random

def spill_forever():
    global scratch, queue
    queue = TransferQueue()
    scratch = Scratch([sys.argv[1]], buffers=Slab(1 << 20), chunk=1 << 18)
    extents = []
    while True:
        extents.append(spill(os.urandom(1 << 20)))
        if len(extents) > 3:
            scratch.drop(extents.pop(0))

chance = random.Random(7)
for _ in range(20):
    child = os.fork()
    if child == 0:
        try:
            spill_forever()
        finally:
            os._exit(1)
    time.sleep(chance.random() * 0.15)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


def kill_many(directory: Path) -> None:
    finished = run(KILLS, directory)
    assert finished.returncode == 0, finished.stderr


def check_only_ours(store, directory: Path) -> None:
    left = list(directory.iterdir())
    assert len(left) <= 1, "each start reclaimed what the one before had left"
    assert [list(path.iterdir()) for path in left] == [[]] * len(left), "no bytes have a name"
    one = store(directory)
    (own,) = directory.iterdir()
    assert own not in left
    one.close()
    assert list(directory.iterdir()) == []


def test_a_killed_process_leaves_nothing_that_the_next_does_not_reclaim(directory: Path, store) -> None:
    kill_many(directory)
    check_only_ours(store, directory)


@pytest.mark.root
def test_the_disk_gets_the_room_of_a_killed_process_back(image, mount_image, store) -> None:
    directory = mount_image(image(128 * MIB))
    directory.mkdir(mode=0o700)
    before = os.statvfs(directory).f_bfree
    kill_many(directory)
    os.sync()
    check_only_ours(store, directory)
    assert before - os.statvfs(directory).f_bfree <= 16  # blocks: the table of names may have grown


def test_two_processes_share_a_directory(directory: Path, memory, store) -> None:
    one = store()
    content = memory(os.urandom(MIB), 5)
    extent = one.spill(content)
    script = """
        slab, queue = Slab(1 << 24), TransferQueue()
        scratch = Scratch([sys.argv[1]], buffers=slab)
        content = os.urandom(1 << 20)
        assert fetch(spill(content)) == content
        print(len(os.listdir(sys.argv[1])), flush=True)
        queue.close(), scratch.close(), slab.close()
        """
    for _ in range(2):
        finished = run(script, directory)
        assert (finished.returncode, finished.stdout) == (0, "2\n"), finished.stderr
    assert one.fetch(extent) == content.content
    assert one.fetch(one.spill(content)) == content.content


@pytest.fixture
def in_child() -> Iterator[Callable[[Callable[[], None]], int]]:
    """``in_child(check)`` forks, runs a check there, and returns the exit status: 0 if it passed."""
    pids: list[int] = []

    def fork(check: Callable[[], None]) -> int:
        if (pid := os.fork()) == 0:
            status = 1
            try:
                signal.alarm(int(PATIENCE))  # a child that waits for a thread it does not have
                check()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    yield fork
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_is_refused_and_harms_nothing(memory, store, directory: Path, in_child, gate) -> None:
    """The child is made while chunks are in flight and workers hold every lock they ever hold."""
    gate.let(11)  # the trial of O_DIRECT, and two extents of five chunks
    one = store(syscalls=gate, chunk=64 * KIB, slab=MIB)
    contents = [memory(os.urandom(256 * KIB), n) for n in range(1, 5)]
    extents = [one.spill(content) for content in contents[:2]]
    lease, reading = one.scratch.fetch(extents[0])
    one.queue.submit(reading, Priority.DEMAND)
    writing = [one.scratch.spill(content.address, content.nbytes, keep=content) for content in contents[2:]]
    for _, transfer in writing:
        one.queue.submit(transfer, Priority.WRITE)
    page = memory(bytes(BLOCK))

    def new_transfer() -> Transfer:
        return Transfer(
            "read", [Chunk(one.scratch._files[0], 0, (page.iovec,), BLOCK, page.iovec)], keep=page
        )

    misuses = [
        lambda: one.scratch.spill(page.address, BLOCK, keep=page),
        lambda: one.scratch.fetch(extents[0]),
        one.scratch.trim,
        lambda: one.queue.submit(new_transfer(), Priority.DEMAND),
        lambda: one.queue.promote(reading, Priority.DEMAND),
        lambda: one.queue.drain(1),
        lambda: one.queue.rate("read"),
        writing[1][1].wait,
        writing[1][1].settle,
    ]

    def check() -> None:
        for call in misuses:
            with pytest.raises(SpillMisuse, match=r"forked; make a new one here"):
                call()
        one.queue.cancel(writing[1][1])
        one.scratch.drop(extents[0])
        one.queue.close()
        one.scratch.close()

    with one.queue._lock, one.scratch._lock:  # as a worker may, at the moment of the fork
        status = in_child(check)
    assert status == 0
    gate.let()
    assert reading.wait(PATIENCE)
    assert ctypes.string_at(lease.address + extents[0].head, 256 * KIB) == contents[0].content
    assert all(transfer.wait(PATIENCE) for _, transfer in writing)
    found = [one.fetch(extent) for extent in [*extents, *(extent for extent, _ in writing)]]
    assert found == [content.content for content in contents]
    assert len(list(directory.iterdir())) == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_bytes_are_right_however_often_the_process_forks_in_the_middle(memory, store, in_child) -> None:
    """O_DIRECT into memory that a fork shares copy-on-write can end in the wrong copy; the slab is not shared."""
    one = store(chunk=64 * KIB, slab=32 * MIB)
    contents = [memory(os.urandom(MIB), n) for n in range(12)]
    for _ in range(4):
        writing = [one.scratch.spill(content.address, content.nbytes, keep=content) for content in contents]
        for _, transfer in writing:
            one.queue.submit(transfer, Priority.WRITE)
        assert in_child(lambda: None) == 0
        for _, transfer in writing:
            assert transfer.wait(PATIENCE)
        reading = [one.scratch.fetch(extent) for extent, _ in writing]
        for _, transfer in reading:
            one.queue.submit(transfer, Priority.PREFETCH)
        assert in_child(lambda: None) == 0
        for (lease, transfer), (extent, _), content in zip(reading, writing, contents, strict=True):
            assert transfer.wait(PATIENCE)
            assert ctypes.string_at(lease.address + extent.head, extent.nbytes) == content.content
            one.scratch.drop(extent)
        del reading, lease


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_can_have_a_store_of_its_own(memory, store, directory: Path, in_child) -> None:
    one = store()
    content = memory(os.urandom(MIB), 9)
    extent = one.spill(content)

    def check() -> None:
        own = type(one)(directory)
        assert own.fetch(own.spill(content)) == content.content
        assert len(list(directory.iterdir())) == 2
        own.close()

    assert in_child(check) == 0
    assert len(list(directory.iterdir())) == 1
    assert one.fetch(extent) == content.content
