"""A spill directory in a hostile place: nobody else reads what is spilled, or has us write where they choose."""

import ctypes
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from undercroft.errors import UnsafeDirectory
from undercroft.store.directory import PrivateDirectory
from undercroft.store.scratch import Scratch
from undercroft.store.slab import Slab
from undercroft.store.transfer import Priority, TransferQueue
from undercroft.units import MIB

pytestmark = pytest.mark.usefixtures("nothing_left")

SECRET = b"a private conversation, which only its owner may read. " * 1000
STRANGER = 54321


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "spill"


@pytest.fixture
def spilled(directory: Path) -> Iterator[Path]:
    """A directory into which the secret was spilled, still in use."""
    slab, queue = Slab(MIB, page=4096), TransferQueue()
    scratch = Scratch([directory], buffers=slab)
    memory = ctypes.create_string_buffer(SECRET, len(SECRET))
    _, transfer = scratch.spill(ctypes.addressof(memory), len(SECRET), keep=memory)
    assert queue.submit(transfer, Priority.WRITE).wait(30)
    yield directory
    queue.close()
    scratch.close()
    slab.close()


def nameless_files(directory: Path) -> list[Path]:
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    ours = [link for link in links if os.readlink(link).startswith(f"{directory}/")]
    return [link for link in ours if link.is_file()]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_whatever_the_umask_only_the_owner_may_enter(directory: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with PrivateDirectory(directory) as private:
            file = private.create()
            found = [directory, *directory.rglob("*")]
            modes = {stat.S_IMODE(path.stat().st_mode) for path in found}
            file_mode = stat.S_IMODE(os.fstat(file.fd).st_mode)
            file.close()
    finally:
        os.umask(before)
    assert modes == {0o700}
    assert file_mode == 0o600


def test_what_is_spilled_has_no_name(spilled: Path) -> None:
    assert [path for path in spilled.rglob("*") if not path.is_dir()] == []
    (file,) = nameless_files(spilled)
    assert SECRET[:50] in file.read_bytes(), "the test looks at the right bytes"
    assert file.stat().st_nlink == 0


def test_no_name_can_be_made_for_it_even_by_its_owner(spilled: Path, tmp_path: Path) -> None:
    (file,) = nameless_files(spilled)
    descriptors = os.open("/proc/self/fd", os.O_RDONLY)
    with pytest.raises(FileNotFoundError):
        os.link(file.name, tmp_path / "stolen", src_dir_fd=descriptors)
    os.close(descriptors)


@pytest.mark.root
def test_a_stranger_reads_nothing_by_any_path(spilled: Path) -> None:
    for parent in spilled.parents[:-2]:
        parent.chmod(0o755)
    (file,) = nameless_files(spilled)
    (own,) = spilled.iterdir()
    for tool, path in [("ls", spilled), ("ls", own), ("cat", f"/proc/{os.getpid()}/fd/{file.name}")]:
        finished = subprocess.run(
            [tool, str(path)],
            user=STRANGER,
            group=STRANGER,
            extra_groups=[],
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Permission denied" in finished.stderr
        assert finished.stdout == ""


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o705, 0o777, 0o1777])
def test_a_directory_that_others_may_enter_is_refused_untouched(directory: Path, mode: int) -> None:
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(UnsafeDirectory, match="chmod 700"):
        PrivateDirectory(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == mode, "whose it is decides, not we"
    assert list(directory.iterdir()) == []


@pytest.mark.root
def test_a_directory_prepared_by_a_stranger_is_refused(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    os.chown(directory, STRANGER, STRANGER)
    with pytest.raises(UnsafeDirectory, match=f"belongs to user {STRANGER}"):
        PrivateDirectory(directory)
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("target", ["real", "missing", "spill"])
def test_a_link_in_its_place_is_refused(directory: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    directory.symlink_to(tmp_path / target)
    with pytest.raises(UnsafeDirectory, match="links are not followed"):
        PrivateDirectory(directory)
    assert list((tmp_path / "real").iterdir()) == []
    assert not (tmp_path / "missing").exists()


def test_a_link_swapped_in_at_any_moment_leads_nowhere(directory: Path, tmp_path: Path) -> None:
    """An attacker who may rename in the parent exchanges directory and link as fast as he can."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    directory.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(elsewhere)
    stop, libc = threading.Event(), ctypes.CDLL(None)

    def swap() -> None:
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        names = os.fsencode(directory), os.fsencode(tmp_path / "link")
        while not stop.is_set():
            assert libc.renameat2(here, names[0], here, names[1], exchange) == 0

    attacker = threading.Thread(target=swap)
    attacker.start()
    made = 0
    try:
        while made < 50:
            try:
                with PrivateDirectory(directory) as private:
                    private.create().close()
                    assert list(elsewhere.iterdir()) == []
                    made += 1
            except UnsafeDirectory:
                continue
    finally:
        stop.set()
        attacker.join()


def test_a_directory_moved_away_while_in_use_is_still_the_one_cleaned(
    directory: Path, tmp_path: Path
) -> None:
    with PrivateDirectory(directory) as private:
        (own,) = directory.iterdir()
        os.rename(directory, tmp_path / "away")
        (tmp_path / "other" / own.name).mkdir(parents=True)
        directory.symlink_to(tmp_path / "other")
        file = private.create()
        file.close()
    assert list((tmp_path / "away").iterdir()) == []
    assert (tmp_path / "other" / own.name).exists(), "the link was not followed to remove a namesake"


def test_links_planted_where_the_dead_lay_lead_nowhere(directory: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "0123456789abcdef").write_bytes(SECRET)
    directory.mkdir(mode=0o700)
    (directory / "spill-0123456789abcdef").symlink_to(victim)
    dead = directory / "spill-fedcba9876543210"
    dead.mkdir()
    (dead / "0123456789abcdef").symlink_to(victim / "0123456789abcdef")
    with PrivateDirectory(directory):
        assert not dead.exists()
    assert (victim / "0123456789abcdef").read_bytes() == SECRET


def test_a_killed_process_leaves_no_bytes(directory: Path) -> None:
    script = textwrap.dedent(
        """
        import ctypes, os, sys
        from undercroft.store.scratch import Scratch
        from undercroft.store.slab import Slab
        from undercroft.store.transfer import Priority, TransferQueue
        secret = sys.stdin.buffer.read()
        memory = ctypes.create_string_buffer(secret, len(secret))
        slab, queue = Slab(1 << 20), TransferQueue()
        scratch = Scratch([sys.argv[1]], buffers=slab)
        _, transfer = scratch.spill(ctypes.addressof(memory), len(secret), keep=memory)
        queue.submit(transfer, Priority.WRITE).wait()
        os.kill(os.getpid(), 9)
        """
    )
    command = [sys.executable, "-c", script, str(directory)]
    finished = subprocess.run(command, input=SECRET, timeout=60, check=False)
    assert finished.returncode == -signal.SIGKILL
    (left,) = directory.iterdir()
    assert list(left.iterdir()) == []
    assert stat.S_IMODE(left.stat().st_mode) == 0o700
    with PrivateDirectory(directory):
        assert not left.exists()


def test_no_descriptor_reaches_a_program_that_is_started(spilled: Path) -> None:
    script = "import os\nfor fd in os.listdir('/proc/self/fd'):\n    try: print(os.readlink(f'/proc/self/fd/{fd}'))\n"
    script += "    except OSError: pass"
    finished = subprocess.run(
        [sys.executable, "-S", "-c", script], close_fds=False, capture_output=True, text=True, check=True
    )
    assert str(spilled) not in finished.stdout
