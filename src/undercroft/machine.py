"""What is here: memory, devices, disks, and how fast the disks were when they were last measured.

It reads the system's own tables and a small cache file; it measures nothing itself (`store.probe` does) and
decides nothing. Invariant: importing it costs no more than the standard library; torch is imported only to
list devices.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from undercroft.errors import InvalidInput, UnsafeDirectory

_RAM_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
_RATES_FILE = "disk-rates.json"
_READERS = 2
_NEARLY = 0.95
"""Of a rate, what counts as coming near it."""


def home() -> Path:
    """Undercroft's own directory: ``UNDERCROFT_HOME``, else ``~/.cache/undercroft``; made private if missing.

    Raises:
        UnsafeDirectory: it cannot be created.
    """
    directory = Path(os.environ.get("UNDERCROFT_HOME") or "~/.cache/undercroft").expanduser()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UnsafeDirectory(
            f"cannot create {directory}: {error.strerror}; set UNDERCROFT_HOME to a writable directory"
        ) from error
    return directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Ram:
    """Memory of this machine, in bytes.

    Attributes:
        total: all of it.
        available: what new allocations can have without swapping.
        limit: the tightest limit of the control groups this process is in, or None.
        usable: the smaller of `available` and what that limit still leaves.
    """

    total: int
    available: int
    limit: int | None
    usable: int


def ram(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Ram:
    """Memory as the kernel and the control groups (version 1 or 2) report it now."""
    table = dict(re.findall(r"^(\w+):\s+(\d+) kB$", (proc / "meminfo").read_text(), re.MULTILINE))
    total, available = int(table["MemTotal"]) * 1024, int(table["MemAvailable"]) * 1024
    limits = [(limit, left) for limit, left in _cgroup_limits(proc, cgroups) if limit < total]
    return Ram(
        total=total,
        available=available,
        limit=min((limit for limit, _ in limits), default=None),
        usable=max(0, min([available, *(left for _, left in limits)])),
    )


def _cgroup_limits(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """The limit of each memory group around this process, and the bytes that it still leaves."""
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _limits_above(cgroups, path, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
                yield from _limits_above(cgroups / "memory", path, *names)


def _limits_above(mount: Path, path: str, limit_file: str, usage_file: str) -> Iterator[tuple[int, int]]:
    inner = mount / path.strip("/")
    for group in (inner, *inner.parents):
        if group.is_relative_to(mount):  # inside a container the path may name a group that is not mounted
            limit, usage = _number(group / limit_file), _number(group / usage_file)
            if limit is not None and usage is not None:
                yield limit, limit - usage + _reclaimable(group)


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" where version 2 sets no limit


def _reclaimable(group: Path) -> int:
    """Bytes of page cache that the kernel gives back before it refuses memory to the group."""
    try:
        match = re.search(
            r"^(?:total_)?inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE
        )
    except OSError:
        return 0
    return int(match[1]) if match else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device that computes.

    Attributes:
        name: as torch spells it, such as "cpu" or "cuda:0".
        label: the maker's name for it.
        nbytes: its memory in bytes; for the CPU, the machine's.
        threads: threads that torch computes with on it; 0 for a GPU.
    """

    name: str
    label: str
    nbytes: int
    threads: int


def devices() -> tuple[Device, ...]:
    """The CPU, then each CUDA device. Imports torch, but creates no CUDA context."""
    import torch

    cpu = Device(name="cpu", label=_cpu_label(), nbytes=ram().total, threads=torch.get_num_threads())
    return (cpu, *(_gpu(index) for index in range(torch.cuda.device_count())))


def _gpu(index: int) -> Device:
    import torch

    properties = cast(Any, torch.cuda.get_device_properties(index))
    return Device(name=f"cuda:{index}", label=properties.name, nbytes=properties.total_memory, threads=0)


def _cpu_label(proc: Path = Path("/proc")) -> str:
    with suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", (proc / "cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match[1]
    return os.uname().machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The file system that holds a directory.

    Attributes:
        directory: the directory asked about, resolved.
        total: bytes in all.
        free: bytes that this user may still write.
        file_system: its type, such as "ext4".
        in_ram: its files lie in memory, so spilling to it saves none.
        device: names it between runs of this machine.
    """

    directory: Path
    total: int
    free: int
    file_system: str
    in_ram: bool
    device: str


def disk(directory: str | os.PathLike[str]) -> Disk:
    """The disk under a directory.

    Raises:
        UnsafeDirectory: the directory does not exist or cannot be reached.
    """
    path = Path(directory).expanduser()
    try:
        path = path.resolve(strict=True)
        status, space = path.stat(), os.statvfs(path)
    except OSError as error:
        raise UnsafeDirectory(f"cannot look at {path}: {error.strerror}") from error
    kind = _file_system(path)
    total = space.f_blocks * space.f_frsize
    return Disk(
        directory=path,
        total=total,
        free=space.f_bavail * space.f_frsize,
        file_system=kind,
        in_ram=kind in _RAM_FILE_SYSTEMS,
        device=f"{os.major(status.st_dev)}:{os.minor(status.st_dev)} {kind} {total}",
    )


def _file_system(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    found, kind = -1, "unknown"
    for line in mountinfo.read_text().splitlines():
        before, _, after = line.partition(" - ")
        mount = Path(_unescape(before.split()[4]))
        if (
            path.is_relative_to(mount) and len(mount.parts) >= found
        ):  # the last of several on one point is on top
            found, kind = len(mount.parts), after.split()[0]
    return kind


def _unescape(mount_point: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount_point)


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthRates:
    """Bytes per second with `depth` transfers of 8 MiB in flight."""

    depth: int
    read: float
    write: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRates:
    """What one disk was measured to do.

    Attributes:
        device: the disk, as `Disk.device` names it.
        measured: the date, ISO 8601.
        direct: past the page cache (O_DIRECT); otherwise through it, which costs more CPU.
        depths: one entry per queue depth, shallowest first.
    """

    device: str
    measured: str
    direct: bool
    depths: tuple[DepthRates, ...]

    def __post_init__(self) -> None:
        if not self.depths or any(rates.read <= 0 or rates.write <= 0 for rates in self.depths):
            raise InvalidInput(f"disk rates must be positive, at one depth at least: {self.depths}")

    @property
    def read(self) -> float:
        """The best read rate at any depth, bytes per second."""
        return max(rates.read for rates in self.depths)

    @property
    def write(self) -> float:
        """The best write rate at any depth, bytes per second."""
        return max(rates.write for rates in self.depths)


def readers(directory: str | os.PathLike[str]) -> int:
    """How many reads of some megabytes to keep in flight on the disk under a directory.

    The fewest with which it was measured to come near its best rate: then what is asked for first arrives first, and is
    computed with while the rest is on its way. 2 where nothing was measured.

    Raises:
        UnsafeDirectory: the directory does not exist or cannot be reached.
    """
    rates = cached_rates(directory)
    if rates is None:
        return _READERS
    return next(each.depth for each in rates.depths if each.read >= _NEARLY * rates.read)


def cached_rates(directory: str | os.PathLike[str]) -> DiskRates | None:
    """What the disk under a directory was last measured to do, or None where nothing readable is kept."""
    return _load_rates().get(disk(directory).device)


def store_rates(directory: str | os.PathLike[str], rates: DiskRates) -> None:
    """Keep a measurement for the disk under a directory; another process never sees half of it.

    Raises:
        UnsafeDirectory: Undercroft's home cannot be created.
        OSError: it cannot be written.
    """
    table = _load_rates() | {disk(directory).device: rates}
    text = json.dumps({device: asdict(entry) for device, entry in table.items()}, indent=1)
    handle, temporary = tempfile.mkstemp(dir=home(), prefix=_RATES_FILE)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, home() / _RATES_FILE)
    except BaseException:
        os.unlink(temporary)
        raise


def _load_rates() -> dict[str, DiskRates]:
    """All kept measurements; none where the file is missing or is not what `store_rates` writes."""
    try:
        table: dict[str, dict[str, Any]] = json.loads((home() / _RATES_FILE).read_text(encoding="utf-8"))
        return {device: _rates_from(entry) for device, entry in table.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UnsafeDirectory):
        return {}


def _rates_from(entry: dict[str, Any]) -> DiskRates:
    return DiskRates(
        device=str(entry["device"]),
        measured=str(entry["measured"]),
        direct=bool(entry["direct"]),
        depths=tuple(DepthRates(**rates) for rates in entry["depths"]),
    )
