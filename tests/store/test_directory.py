"""A private directory: ours alone, reclaimed by lock, and nothing of anyone else's ever touched."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from undercroft.errors import TierFull, UnsafeDirectory
from undercroft.store.directory import PrivateDirectory
from undercroft.testing import FlakyDisk

pytestmark = pytest.mark.usefixtures("nothing_left")

BLOCK = 4096


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def dead(directory: Path) -> Path:
    """What a killed process leaves: a subdirectory nobody has locked."""
    directory.mkdir(mode=0o700, exist_ok=True)
    left = directory / "spill-00112233445566ff"
    left.mkdir(mode=0o700)
    return left


def test_it_is_made_with_its_parents_and_gone_but_for_the_top_after_close(tmp_path: Path) -> None:
    top = tmp_path / "a" / "b"
    with PrivateDirectory(top) as directory:
        assert directory.path == top
        (own,) = top.iterdir()
        assert (mode(top), mode(own)) == (0o700, 0o700)
    directory.close()
    assert names(top) == []


def test_a_permissive_umask_opens_nothing(directory: Path) -> None:
    before = os.umask(0)
    try:
        with PrivateDirectory(directory) as private:
            file = private.create()
            (own,) = directory.iterdir()
            modes = mode(directory), mode(own), stat.S_IMODE(os.fstat(file.fd).st_mode)
            file.close()
    finally:
        os.umask(before)
    assert modes == (0o700, 0o700, 0o600)


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with PrivateDirectory("~/spill") as directory:
        assert directory.path == tmp_path / "spill"


def test_a_change_of_the_working_directory_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with PrivateDirectory("spill") as directory:
        monkeypatch.chdir("/")
        directory.create().close()
    assert names(tmp_path / "spill") == []


def test_a_file_has_no_name_and_can_be_given_none(directory: Path, memory) -> None:
    with PrivateDirectory(directory) as private:
        file = private.create()
        file.write(0, [memory(b"x" * BLOCK).iovec])
        (own,) = directory.iterdir()
        assert names(own) == []
        descriptors = os.open("/proc/self/fd", os.O_RDONLY)
        with pytest.raises(FileNotFoundError):
            os.link(str(file.fd), own / "name", src_dir_fd=descriptors)
        os.close(descriptors)
        file.close()


def test_two_at_once_have_a_subdirectory_each(directory: Path) -> None:
    with PrivateDirectory(directory):
        with PrivateDirectory(directory):
            assert len(names(directory)) == 2
        assert len(names(directory)) == 1


def test_what_a_dead_process_left_is_reclaimed(directory: Path) -> None:
    left = dead(directory)
    (left / "0123456789abcdef").write_bytes(b"bytes of a process killed before it could unlink its file")
    with PrivateDirectory(directory):
        assert not left.exists()
        assert len(names(directory)) == 1


def test_what_a_living_process_holds_is_not(directory: Path) -> None:
    left = dead(directory)
    held = os.open(left, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with PrivateDirectory(directory):
        assert left.exists()
    os.close(held)
    with PrivateDirectory(directory):
        assert not left.exists()


def test_a_live_one_survives_any_number_of_newcomers(directory: Path) -> None:
    with PrivateDirectory(directory) as first:
        (own,) = directory.iterdir()
        for _ in range(3):
            PrivateDirectory(directory).close()
        assert own.exists()
        first.create().close()


@pytest.mark.parametrize(
    "name", ["spill-notes", "spill-00112233445566FF", "xspill-00112233445566ff", "notes"]
)
def test_only_a_name_of_ours_is_ever_removed(directory: Path, name: str) -> None:
    theirs = directory / name / "0123456789abcdef"
    theirs.parent.mkdir(parents=True)
    directory.chmod(0o700)
    theirs.write_text("a user's own file")
    with PrivateDirectory(directory):
        assert theirs.read_text() == "a user's own file"


@pytest.mark.parametrize("leaf", ["notes.txt", "0123456789abcdef.txt", "sub/0123456789abcdef"])
def test_nothing_foreign_is_removed_from_a_dead_subdirectory(directory: Path, leaf: str) -> None:
    theirs = dead(directory) / leaf
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("a user's own file")
    with PrivateDirectory(directory):
        assert theirs.read_text() == "a user's own file"


def test_a_link_that_looks_like_ours_is_left_alone(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0123456789abcdef").touch()
    dead(directory).rmdir()
    (directory / "spill-00112233445566ff").symlink_to(tmp_path / "elsewhere")
    with PrivateDirectory(directory):
        pass
    assert names(tmp_path / "elsewhere") == ["0123456789abcdef"]
    assert (directory / "spill-00112233445566ff").is_symlink()


def test_a_link_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    directory.symlink_to(tmp_path / "real")
    with pytest.raises(UnsafeDirectory, match=r"symbolic link or no directory.*name a real directory"):
        PrivateDirectory(directory)
    assert names(tmp_path / "real") == []


def test_a_link_to_nothing_is_refused_and_creates_nothing(directory: Path, tmp_path: Path) -> None:
    directory.symlink_to(tmp_path / "nothing")
    with pytest.raises(UnsafeDirectory, match="symbolic link or no directory"):
        PrivateDirectory(directory)
    assert not (tmp_path / "nothing").exists()


def test_a_file_is_refused(directory: Path) -> None:
    directory.touch()
    with pytest.raises(UnsafeDirectory, match="no directory"):
        PrivateDirectory(directory)


def test_a_directory_below_a_file_is_refused(directory: Path) -> None:
    directory.touch()
    with pytest.raises(UnsafeDirectory, match="name a real directory"):
        PrivateDirectory(directory / "below")


@pytest.mark.parametrize("open_to", [0o755, 0o710, 0o701, 0o770, 0o1777])
def test_a_directory_open_to_others_is_refused(directory: Path, open_to: int) -> None:
    directory.mkdir()
    directory.chmod(open_to)
    with pytest.raises(UnsafeDirectory, match=rf"{directory} is open to other users; chmod 700 it"):
        PrivateDirectory(directory)
    assert names(directory) == []


@pytest.mark.root
def test_a_directory_of_another_user_is_refused_even_to_root(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    os.chown(directory, 12345, 12345)
    with pytest.raises(UnsafeDirectory, match="belongs to user 12345; choose one of your own"):
        PrivateDirectory(directory)


@pytest.mark.root
def test_a_read_only_file_system_is_refused(mount) -> None:
    top = mount("tmpfs", "size=1m,mode=700")
    subprocess.run(["mount", "-o", "remount,ro", str(top)], check=True)
    with pytest.raises(UnsafeDirectory, match="Read-only file system; name a directory that you can write"):
        PrivateDirectory(top)


@pytest.mark.root
def test_a_file_system_without_room_for_a_directory_is_full(mount) -> None:
    top = mount("tmpfs", "size=1m,mode=700,nr_inodes=1")
    with pytest.raises(TierFull, match="No space left"):
        PrivateDirectory(top)


@pytest.mark.root
def test_a_file_system_that_gets_full_has_no_file_to_give(mount) -> None:
    top = mount("tmpfs", "size=1m,mode=700,nr_inodes=2")
    with PrivateDirectory(top) as directory, pytest.raises(TierFull, match="No space left") as caught:
        directory.create()
    assert caught.value.errno == errno.ENOSPC


def test_without_unnamed_files_a_file_loses_its_name_at_once(directory: Path, memory) -> None:
    """Taken directly, because every file system that can be mounted here knows O_TMPFILE."""
    with PrivateDirectory(directory) as private:
        file = private._create_and_unlink("a file", None)
        (own,) = directory.iterdir()
        assert names(own) == []
        assert stat.S_IMODE(os.fstat(file.fd).st_mode) == 0o600
        content, back = memory(os.urandom(BLOCK)), memory(bytes(BLOCK))
        file.write(0, [content.iovec])
        file.read(0, [back.iovec])
        assert back.content == content.content
        file.close()
    assert names(directory) == []


def test_a_file_that_cannot_go_direct_is_made_all_the_same(directory: Path, caplog) -> None:
    with PrivateDirectory(directory) as private:
        file = private.create(syscalls=FlakyDisk(errno.EINVAL))
        assert not file.direct
        assert str(directory) in caplog.text
        file.close()


def test_a_forked_child_that_closes_it_takes_nothing_away(directory: Path) -> None:
    with PrivateDirectory(directory) as private:
        (own,) = directory.iterdir()
        if (child := os.fork()) == 0:
            private.close()
            os._exit(0)
        assert os.waitpid(child, 0) == (child, 0)
        assert own.exists()
        PrivateDirectory(directory).close()  # nor is it unlocked
        assert own.exists()
    assert names(directory) == []


def test_many_processes_may_start_at_once(directory: Path) -> None:
    """None reclaims the subdirectory of another between its birth and its lock."""
    script = (
        "import os, sys\n"
        "from undercroft.store.directory import PrivateDirectory\n"
        "for _ in range(30):\n"
        "    with PrivateDirectory(sys.argv[1]) as private:\n"
        "        private.create().close()\n"
        "        assert os.listdir(private._fd) == []\n"
    )
    command = [sys.executable, "-c", script, str(directory)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 4, errors
    assert names(directory) == []
