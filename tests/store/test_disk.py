"""A file moves every byte or raises a typed error, whatever the system calls answer."""

import errno
import os
import resource
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from undercroft.errors import CorruptRecord, TierFull, TransferFailed
from undercroft.store.disk import DiskFile, Iovec, Syscalls, can_go_direct, open_file
from undercroft.testing import FlakyDisk, FullDisk
from undercroft.units import KIB, MIB

pytestmark = pytest.mark.usefixtures("nothing_left")

BLOCK = 4096


class HaltingDisk(Syscalls):
    """Moves at most the given numbers of bytes, call by call, then whole transfers; notes every call."""

    def __init__(self, *most: int) -> None:
        super().__init__()
        self._most = list(most)
        self.calls: list[tuple[str, int, int]] = []

    def preadv(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        return super().preadv(fd, self._cut("read", iovecs, offset), offset)

    def pwritev(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        return super().pwritev(fd, self._cut("write", iovecs, offset), offset)

    def _cut(self, verb: str, iovecs: Sequence[Iovec], offset: int) -> list[Iovec]:
        nbytes = sum(length for _, length in iovecs)
        self.calls.append((verb, offset, nbytes))
        left = self._most.pop(0) if self._most else nbytes
        cut: list[Iovec] = []
        for address, length in iovecs:
            cut.append((address, min(length, left)))
            left -= cut[-1][1]
        return cut


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDWR | os.O_TMPFILE, 0o600)
    yield fd
    os.close(fd)


def buffered(fd: int, syscalls: Syscalls | None = None) -> DiskFile:
    return DiskFile(fd, "a file", direct=False, syscalls=syscalls)


def noise(nbytes: int) -> bytes:
    return os.urandom(nbytes)


@pytest.mark.parametrize("direct", [True, False])
def test_bytes_of_several_pieces_of_memory_go_out_and_come_back_in_order(fd: int, memory, direct) -> None:
    if direct:
        fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT)
    file = DiskFile(fd, "a file", direct=direct)
    first, second = memory(noise(2 * BLOCK)), memory(noise(BLOCK))
    file.write(BLOCK, [first.iovec, second.iovec])
    back = memory(bytes(3 * BLOCK))
    file.read(BLOCK, [back.iovec])
    assert back.content == first.content + second.content
    if direct:
        file.close()


def test_more_pieces_of_memory_than_the_system_takes_at_once(fd: int, memory) -> None:
    pages = memory(noise(1500 * BLOCK))
    pieces = [(pages.address + n * BLOCK, BLOCK) for n in range(1500)]
    buffered(fd).write(0, pieces)
    back = memory(bytes(1500 * BLOCK))
    buffered(fd).read(0, [(back.address + n * BLOCK, BLOCK) for n in range(1500)])
    assert back.content == pages.content


@pytest.mark.parametrize(
    ("most", "then"),
    [
        ([BLOCK], [BLOCK]),
        ([BLOCK + 1], [BLOCK]),
        ([3 * BLOCK - 1], [2 * BLOCK]),
        ([BLOCK + 17, 2 * BLOCK - 5, 100], [BLOCK, 2 * BLOCK, 2 * BLOCK]),
        ([4000, 4000], [0, 0]),
    ],
)
@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_short_transfer_goes_on_from_an_aligned_place(fd: int, memory, verb: str, most, then) -> None:
    disk = HaltingDisk(*most)
    content = memory(noise(5 * BLOCK + 24))
    if verb == "write":
        buffered(fd, disk).write(0, [content.iovec])
        assert os.pread(fd, content.nbytes + 1, 0) == content.content
    else:
        os.pwrite(fd, content.content, 0)
        back = memory(bytes(content.nbytes))
        buffered(fd, disk).read(0, [back.iovec])
        assert back.content == content.content
    expected = [(verb, offset, content.nbytes - offset) for offset in [0, *then]]
    assert disk.calls == expected


def test_a_short_transfer_goes_on_in_the_right_piece_of_memory(fd: int, memory) -> None:
    pieces = [memory(noise(BLOCK)) for _ in range(4)]
    buffered(fd, HaltingDisk(2 * BLOCK + 9, BLOCK)).write(0, [piece.iovec for piece in pieces])
    assert os.pread(fd, 4 * BLOCK, 0) == b"".join(piece.content for piece in pieces)


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
@pytest.mark.parametrize("code", [errno.EINTR, errno.EAGAIN])
def test_an_interrupted_call_is_made_again_as_often_as_it_takes(fd: int, memory, call, code: int) -> None:
    os.pwrite(fd, bytes(BLOCK), 0)
    disk = FlakyDisk(code, call=call, times=7)
    page = memory(noise(BLOCK))
    (buffered(fd, disk).read if call == "preadv" else buffered(fd, disk).write)(0, [page.iovec])
    assert disk.failed == 7
    assert os.pread(fd, BLOCK, 0) == page.content


def test_an_interrupted_reservation_is_made_again(fd: int) -> None:
    buffered(fd, FlakyDisk(errno.EINTR, call="fallocate", times=3)).reserve(0, MIB)
    assert os.fstat(fd).st_size == MIB
    assert os.fstat(fd).st_blocks * 512 >= MIB


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_one_device_error_is_forgiven(fd: int, memory, call) -> None:
    os.pwrite(fd, bytes(BLOCK), 0)
    disk = FlakyDisk(errno.EIO, call=call)
    page = memory(noise(BLOCK))
    (buffered(fd, disk).read if call == "preadv" else buffered(fd, disk).write)(0, [page.iovec])
    assert disk.failed == 1
    assert os.pread(fd, BLOCK, 0) == page.content


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_a_second_device_error_is_not_and_the_error_names_the_file(fd: int, memory, call) -> None:
    disk = FlakyDisk(errno.EIO, call=call, times=None)
    page = memory(bytes(2 * BLOCK))
    move = buffered(fd, disk).read if call == "preadv" else buffered(fd, disk).write
    with pytest.raises(
        TransferFailed, match=r"of 8192 bytes at 4096 of a file: Input/output error"
    ) as caught:
        move(BLOCK, [page.iovec])
    assert caught.value.errno == errno.EIO
    assert disk.failed == 2


@pytest.mark.parametrize("code", [errno.EROFS, errno.EBADF, errno.EFAULT, errno.EINVAL])
def test_other_errors_are_not_tried_again(fd: int, memory, code: int) -> None:
    disk = FlakyDisk(code, call="pwritev", times=None)
    with pytest.raises(TransferFailed) as caught:
        buffered(fd, disk).write(0, [memory(bytes(BLOCK)).iovec])
    assert (caught.value.errno, disk.failed) == (code, 1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["pwritev", "fallocate"])
def test_each_kind_of_fullness_is_a_full_tier(fd: int, memory, call, code: int) -> None:
    file = buffered(fd, FlakyDisk(code, call=call, times=None))
    with pytest.raises(TierFull, match="a file") as caught:
        file.write(0, [memory(bytes(BLOCK)).iovec]) if call == "pwritev" else file.reserve(0, BLOCK)
    assert caught.value.errno == code


@pytest.mark.parametrize("capacity", [6 * BLOCK, 6 * BLOCK + 512, 512])
def test_a_write_that_is_cut_short_by_a_full_disk_is_a_full_tier(fd: int, memory, capacity: int) -> None:
    with pytest.raises(TierFull):
        buffered(fd, FullDisk(capacity)).write(0, [memory(bytes(8 * BLOCK)).iovec])


def test_a_file_system_that_cannot_reserve_is_written_without(fd: int, memory) -> None:
    file = buffered(fd, FlakyDisk(errno.EOPNOTSUPP, call="fallocate", times=None))
    file.reserve(0, MIB)
    file.write(0, [memory(b"x" * BLOCK).iovec])
    assert os.fstat(fd).st_size == BLOCK


@pytest.mark.parametrize("nbytes", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_ends_early_is_corrupt(tmp_path: Path, memory, nbytes: int, direct: bool) -> None:
    (tmp_path / "file").write_bytes(noise(nbytes))
    fd = os.open(tmp_path / "file", os.O_RDWR | (os.O_DIRECT if direct else 0))
    file = DiskFile(fd, "a file", direct=direct)
    with pytest.raises(CorruptRecord, match=rf"12288 bytes at 0 of a file ended after {nbytes}: .*shorter"):
        file.read(0, [memory(bytes(3 * BLOCK)).iovec])
    file.close()


def test_the_last_block_may_end_with_the_file_where_less_is_needed(fd: int, memory) -> None:
    os.pwrite(fd, b"u" * 5000, 0)
    back = memory(bytes(2 * BLOCK))
    buffered(fd).read(0, [back.iovec], need=5000)
    assert back.content == b"u" * 5000 + bytes(2 * BLOCK - 5000)
    with pytest.raises(CorruptRecord):
        buffered(fd).read(0, [back.iovec], need=5001)


def test_memory_that_is_gone_is_an_error_and_no_crash(fd: int, memory) -> None:
    with pytest.raises(TransferFailed) as caught:
        buffered(fd).write(0, [(BLOCK, BLOCK)])
    assert caught.value.errno == errno.EFAULT


def test_the_limit_on_file_sizes_is_a_full_tier(fd: int, memory) -> None:
    """The first write is cut short, the next one refused with EFBIG; Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512 * KIB, hard))
    try:
        with pytest.raises(TierFull, match=r"524288 bytes at 524288 of a file: File too large") as caught:
            buffered(fd).write(0, [memory(bytes(MIB)).iovec])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert os.fstat(fd).st_size == 512 * KIB


class ForgetfulDisk(Syscalls):
    """A page cache that fails to write back once, and says so to the first who asks."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self._asked, self._code = 0, code

    def drop_cache(self, fd: int, offset: int, nbytes: int) -> None:
        self._asked += 1
        if self._asked == 2:
            raise OSError(self._code, os.strerror(self._code))
        super().drop_cache(fd, offset, nbytes)


@pytest.mark.parametrize(("code", "kind"), [(errno.EIO, TransferFailed), (errno.ENOSPC, TierFull)])
def test_nothing_is_believed_once_the_page_cache_lost_bytes(fd: int, memory, code: int, kind) -> None:
    file = buffered(fd, ForgetfulDisk(code))
    page = memory(noise(BLOCK))
    file.write(0, [page.iovec])
    with pytest.raises(kind, match=os.strerror(code)):
        file.write(BLOCK, [page.iovec])
    with pytest.raises(TransferFailed, match=os.strerror(code)):  # whose bytes were lost is not known
        file.read(0, [page.iovec])


def test_a_file_is_opened_direct_where_that_works(tmp_path: Path) -> None:
    file = open_file(str(tmp_path), os.O_RDWR | os.O_TMPFILE, name="new")
    assert file.direct
    assert stat.S_IMODE(os.fstat(file.fd).st_mode) == 0o600
    assert not os.get_inheritable(file.fd)
    file.close()
    file.close()
    assert file.fd == -1


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_disk_that_takes_the_flag_and_refuses_the_transfer_is_buffered(
    tmp_path: Path, memory, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    disk = FlakyDisk(code)  # refuses the trial read only
    file = open_file(str(tmp_path), os.O_RDWR | os.O_TMPFILE, name="new", syscalls=disk)
    assert not file.direct
    assert "new: this file system refuses O_DIRECT" in caplog.text
    page = memory(noise(100), shift=3)  # no alignment is asked for
    file.write(17, [page.iovec])
    back = memory(bytes(100), shift=5)
    file.read(17, [back.iovec])
    assert back.content == page.content
    file.close()


def test_a_device_error_in_the_trial_read_does_not_speak_against_direct_io(fd: int) -> None:
    assert can_go_direct(fd, syscalls=FlakyDisk(errno.EIO))


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        open_file(str(tmp_path / "link"), os.O_RDWR, name="link")


def test_a_missing_file_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_file(str(tmp_path / "file"), os.O_RDWR, name="file")
