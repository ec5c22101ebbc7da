"""Measuring a disk: real files, and every way a directory can refuse."""

import ctypes
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from undercroft import machine
from undercroft.errors import TierFull, UnsafeDirectory
from undercroft.store.probe import _buffers, _Probe, disk_rates, measure_disk
from undercroft.units import MIB

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def fresh_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("UNDERCROFT_HOME", str(home))
    return home


def test_a_disk_is_measured_at_three_depths_and_nothing_is_left(tmp_path: Path) -> None:
    rates = measure_disk(tmp_path, nbytes=16 * MIB)
    assert [entry.depth for entry in rates.depths] == [1, 4, 8]
    assert all(entry.read > 0 and entry.write > 0 for entry in rates.depths)
    assert rates.device == machine.disk(tmp_path).device
    assert list(tmp_path.iterdir()) == []


def test_no_place_is_read_into_again_while_it_may_be_cached(tmp_path: Path) -> None:
    places: list[int] = []

    def note(_: int, buffers: list[memoryview], __: int) -> int:
        places.append(ctypes.addressof(ctypes.c_char.from_buffer(buffers[0])))
        return len(buffers[0])

    with (tmp_path / "file").open("wb", buffering=0) as file:
        _Probe(file.fileno(), _buffers(16))._pass(note, 1, range(32))
    assert len(set(places[:16])) == 16
    assert places[:16] == places[16:]


def test_a_measurement_is_kept_until_another_is_asked_for(fresh_home: Path, tmp_path: Path) -> None:
    first = disk_rates(tmp_path)
    assert disk_rates(tmp_path) == first
    assert disk_rates(tmp_path, remeasure=True) != first
    assert machine.cached_rates(tmp_path) != first


@pytest.fixture
def unwritable_cache(fresh_home: Path) -> Path:
    (fresh_home / "disk-rates.json").mkdir()  # cannot be replaced by a file, not even by root
    return fresh_home


def test_a_cache_that_cannot_be_written_does_not_stop_the_measurement(
    unwritable_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="undercroft")
    assert disk_rates(tmp_path).read > 0
    assert "could not be kept" in caplog.text
    assert [path.name for path in unwritable_cache.iterdir()] == ["disk-rates.json"]


@pytest.mark.root
def test_a_file_system_without_direct_io_is_measured_through_the_cache(mount) -> None:
    directory = mount("ramfs")
    (directory / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        os.open(directory / "file", os.O_RDWR | os.O_DIRECT)
    rates = measure_disk(directory, nbytes=16 * MIB)
    assert not rates.direct
    assert rates.read > 0
    assert [path.name for path in directory.iterdir()] == ["file"]


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeDirectory, match="No such file"):
        measure_disk(tmp_path / "missing")


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnsafeDirectory, match="Not a directory"):
        measure_disk(tmp_path / "file")


@pytest.mark.root
def test_a_read_only_disk_is_refused(mount) -> None:
    with pytest.raises(UnsafeDirectory, match="Read-only"):
        measure_disk(mount("tmpfs", "size=64m,ro"))


@pytest.mark.root
def test_a_disk_without_room_is_refused_before_anything_is_written(mount) -> None:
    directory = mount("tmpfs", "size=16m")
    with pytest.raises(TierFull, match="16 MiB are free"):
        measure_disk(directory)
    assert list(directory.iterdir()) == []


@pytest.fixture
def small_file_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_file_limit")
def test_a_limit_on_file_sizes_is_reported_as_a_full_tier(tmp_path: Path) -> None:
    with pytest.raises(TierFull, match="File too large") as caught:
        measure_disk(tmp_path, nbytes=16 * MIB)
    assert caught.value.errno is not None
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_someone_else_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UnsafeDirectory, match="Permission denied"):
        measure_disk(tmp_path)
