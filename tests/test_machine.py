"""The machine: memory under control groups of both versions, disks, and a cache that survives anything."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from undercroft import machine
from undercroft.errors import InvalidInput, UnsafeDirectory
from undercroft.machine import DepthRates, DiskRates
from undercroft.units import GIB, MIB

MEMINFO = f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 7 kB\nMemAvailable: {12 * GIB // 1024} kB\n"


@pytest.fixture
def kernel(tmp_path: Path) -> tuple[Path, Path]:
    """An empty /proc with 12 of 16 GiB available, and an empty cgroup mount."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)
    cgroups.mkdir()
    return proc, cgroups


def _group(directory: Path, **files: str | int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (directory / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.fixture
def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("UNDERCROFT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def rates(device: str = "8:0 ext4 1", read: float = 2e9) -> DiskRates:
    depths = (DepthRates(depth=1, read=read / 2, write=1e9), DepthRates(depth=4, read=read, write=5e8))
    return DiskRates(device=device, measured="2026-11-22", direct=True, depths=depths)


def test_home_is_made_private(fresh_home: Path) -> None:
    assert machine.home() == fresh_home
    assert stat.S_IMODE(fresh_home.stat().st_mode) == 0o700


def test_home_without_the_variable_lies_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNDERCROFT_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.home() == tmp_path / ".cache" / "undercroft"


def test_a_home_that_cannot_be_made_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNDERCROFT_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(UnsafeDirectory, match="set UNDERCROFT_HOME"):
        machine.home()


def test_ram_of_this_machine_adds_up() -> None:
    ram = machine.ram()
    assert 0 < ram.usable <= ram.available <= ram.total
    assert ram.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_ram_without_control_groups_is_what_is_available(kernel: tuple[Path, Path]) -> None:
    ram = machine.ram(*kernel)
    assert (ram.total, ram.available, ram.limit, ram.usable) == (16 * GIB, 12 * GIB, None, 12 * GIB)


def test_ram_under_version_2_is_what_the_tightest_group_leaves(kernel: tuple[Path, Path]) -> None:
    proc, cgroups = kernel
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    _group(cgroups / "job", memory__max=4 * GIB, memory__current=3 * GIB, memory__stat=f"inactive_file {GIB}")
    _group(cgroups / "job" / "step", memory__max="max", memory__current=GIB)
    ram = machine.ram(proc, cgroups)
    assert (ram.limit, ram.usable) == (4 * GIB, 2 * GIB)


def test_ram_under_version_1_reads_the_memory_controller(kernel: tuple[Path, Path]) -> None:
    proc, cgroups = kernel
    (proc / "self" / "cgroup").write_text("12:cpu,cpuacct:/x\n4:memory:/not/mounted/here\n")
    _group(
        cgroups / "memory",
        memory__limit_in_bytes=2 * GIB,
        memory__usage_in_bytes=GIB,
        memory__stat=f"cache 9\ntotal_inactive_file {256 * MIB}",
    )
    ram = machine.ram(proc, cgroups)
    assert (ram.limit, ram.usable) == (2 * GIB, GIB + 256 * MIB)


def test_a_limit_above_the_machine_is_no_limit(kernel: tuple[Path, Path]) -> None:
    proc, cgroups = kernel
    (proc / "self" / "cgroup").write_text("4:memory:/\n")
    _group(cgroups / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=GIB)
    assert machine.ram(proc, cgroups).limit is None


def test_a_group_over_its_limit_leaves_nothing(kernel: tuple[Path, Path]) -> None:
    proc, cgroups = kernel
    (proc / "self" / "cgroup").write_text("0::/\n")
    _group(cgroups, memory__max=GIB, memory__current=GIB + 5)
    assert machine.ram(proc, cgroups).usable == 0


def test_the_first_device_is_the_cpu() -> None:
    cpu = machine.devices()[0]
    assert cpu.name == "cpu"
    assert cpu.label
    assert cpu.threads >= 1
    assert cpu.nbytes == machine.ram().total


@pytest.mark.gpu
def test_gpus_follow_with_their_memory() -> None:
    gpu = machine.devices()[1]
    assert gpu.name == "cuda:0"
    assert gpu.nbytes > GIB


def test_disk_knows_free_and_total(tmp_path: Path) -> None:
    disk = machine.disk(tmp_path)
    assert 0 < disk.free <= disk.total
    assert disk.directory == tmp_path.resolve()


@pytest.mark.root
@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_a_disk_in_ram_is_told_apart(mount, kind: str) -> None:
    inside = mount(kind) / "a directory"
    inside.mkdir()
    disk = machine.disk(inside)
    assert (disk.file_system, disk.in_ram) == (kind, True)


@pytest.mark.root
def test_a_mount_over_a_mount_hides_it(mount, tmp_path: Path) -> None:
    outer = mount("tmpfs")
    assert machine.disk(outer).file_system == "tmpfs"
    assert not machine.disk("/proc").in_ram


def test_a_directory_that_is_missing_has_no_disk(tmp_path: Path) -> None:
    with pytest.raises(UnsafeDirectory, match="No such file"):
        machine.disk(tmp_path / "missing")


def test_rates_must_be_positive() -> None:
    with pytest.raises(InvalidInput, match="positive"):
        rates(read=0)


@pytest.mark.parametrize(
    ("found", "expected"), [((2.2e9, 2.25e9, 2.1e9), 1), ((1e9, 2.9e9, 3e9), 4), ((1e9, 2e9, 3e9), 8)]
)
def test_as_few_readers_as_come_near_the_best_rate(
    fresh_home: Path, tmp_path: Path, found: tuple[float, ...], expected: int
) -> None:
    assert machine.readers(tmp_path) == 2
    depths = tuple(
        DepthRates(depth=depth, read=read, write=1e9) for depth, read in zip((1, 4, 8), found, strict=True)
    )
    measured = DiskRates(device=machine.disk(tmp_path).device, measured="", direct=True, depths=depths)
    machine.store_rates(tmp_path, measured)
    assert machine.readers(tmp_path) == expected


def test_the_best_rate_may_come_from_different_depths() -> None:
    assert (rates().read, rates().write) == (2e9, 1e9)


def test_stored_rates_come_back(fresh_home: Path, tmp_path: Path) -> None:
    assert machine.cached_rates(tmp_path) is None
    machine.store_rates(tmp_path, rates(read=3e9))
    machine.store_rates(tmp_path, rates(read=4e9))
    assert machine.cached_rates(tmp_path) == rates(read=4e9)
    assert [path.name for path in fresh_home.iterdir()] == ["disk-rates.json"]


@pytest.mark.root
def test_each_disk_has_its_own_rates(fresh_home: Path, tmp_path: Path, mount) -> None:
    other = mount("tmpfs", "size=1m")
    machine.store_rates(tmp_path, rates(read=3e9))
    assert machine.cached_rates(other) is None
    machine.store_rates(other, rates(read=4e9))
    assert machine.cached_rates(tmp_path) == rates(read=3e9)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"8:0": null}',
        '{"8:0": {"device": "x"}}',
        '{"8:0": {"device": "x", "measured": "y", "direct": true, "depths": []}}',
        '{"8:0": {"device": "x", "measured": "y", "direct": true, "depths": [{"depth": 1}]}}',
        '{"8:0": {"device": "x", "measured": "y", "direct": true, '
        '"depths": [{"depth": 1, "read": "a", "write": 1}]}}',
        "\x00\xff",
    ],
)
def test_a_corrupt_cache_is_no_cache_and_is_replaced(fresh_home: Path, tmp_path: Path, text: str) -> None:
    (machine.home() / "disk-rates.json").write_text(text)
    assert machine.cached_rates(tmp_path) is None
    machine.store_rates(tmp_path, rates())
    assert machine.cached_rates(tmp_path) == rates()
    json.loads((fresh_home / "disk-rates.json").read_text())
