"""Control groups with a memory limit, where this process may make them."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from undercroft.bench.cgroup import MemoryGroup, NoControlGroup
from undercroft.units import MIB

_HOLD = "b = bytearray(int('{nbytes}')); b[::4096] = b'x' * len(b[::4096])"


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    try:
        found = MemoryGroup(64 * MIB)
    except NoControlGroup as error:
        pytest.skip(str(error))
    with found:
        yield found


def hold(group: MemoryGroup, nbytes: int) -> int:
    script = f'echo $$ > {group.processes} && exec python3 -c "{_HOLD.format(nbytes=nbytes)}"'
    return subprocess.run(["sh", "-c", script], check=False).returncode


@pytest.mark.root
def test_what_exceeds_the_limit_is_killed_and_counted(group: MemoryGroup) -> None:
    assert hold(group, 16 * MIB) == 0
    assert group.kills == 0
    assert 16 * MIB <= group.peak <= 64 * MIB
    assert hold(group, 256 * MIB) == -9
    assert group.kills == 1
    assert group.peak <= 64 * MIB


@pytest.mark.root
def test_a_group_is_gone_when_it_is_left(group: MemoryGroup) -> None:
    with MemoryGroup() as other:
        folder = other.processes.parent
        assert folder.is_dir()
    assert not folder.exists()
    assert group.processes.exists()


def test_without_the_right_to_make_one_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NoControlGroup, match="as root, outside a container"):
        MemoryGroup(MIB, root=tmp_path / "missing")
