"""A control group with a memory limit, of version 1 or 2.

It knows the kernel's files, not what runs in the group. Invariant: leaving the context removes the group; no
process may be in it by then.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from undercroft.errors import UndercroftError

_ROOT = Path("/sys/fs/cgroup")


class NoControlGroup(UndercroftError):
    """This process may not make a control group that limits memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """What a version calls things: the limits of memory and swap, the most ever used, the count of kills.

    Version 1 limits memory and swap together, version 2 swap alone.
    """

    limit: str
    swap: str
    peak: str
    events: str


_VERSION_1 = _Files(
    limit="memory.limit_in_bytes",
    swap="memory.memsw.limit_in_bytes",
    peak="memory.max_usage_in_bytes",
    events="memory.oom_control",
)
_VERSION_2 = _Files(limit="memory.max", swap="memory.swap.max", peak="memory.peak", events="memory.events")


class MemoryGroup:
    """A fresh control group.

    Args:
        limit: bytes of memory, swap included; None for no limit.
        root: where control groups are mounted.

    Raises:
        NoControlGroup: not root, no memory controller, or a read-only mount, as in most containers.
    """

    def __init__(self, limit: int | None = None, *, root: Path = _ROOT) -> None:
        is_first = (root / "memory" / _VERSION_1.limit).exists()
        self._files = _VERSION_1 if is_first else _VERSION_2
        self._path = (root / "memory" if is_first else root) / f"undercroft-{secrets.token_hex(4)}"
        try:
            if not is_first:
                (root / "cgroup.subtree_control").write_text("+memory")
            self._path.mkdir()
        except OSError as error:
            raise NoControlGroup(
                f"cannot make a control group for memory in {root}: {error.strerror}; "
                "run this as root, outside a container"
            ) from error
        try:
            self._set(limit)
        except OSError as error:
            self._path.rmdir()
            raise NoControlGroup(f"cannot limit memory in {self._path}: {error.strerror}") from error

    @property
    def processes(self) -> Path:
        """The file that a process writes its id into, to enter."""
        return self._path / "cgroup.procs"

    @property
    def peak(self) -> int:
        """The most bytes used at once since the group was made, page cache included.

        Raises:
            NoControlGroup: this kernel keeps no such figure (version 2 before Linux 5.19).
        """
        try:
            return int((self._path / self._files.peak).read_text())
        except FileNotFoundError as error:
            raise NoControlGroup("this kernel does not record a group's peak; it needs Linux 5.19") from error

    @property
    def kills(self) -> int:
        """How many processes the kernel killed for the limit."""
        found = re.search(r"^oom_kill (\d+)$", (self._path / self._files.events).read_text(), re.MULTILINE)
        return int(found[1]) if found else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._path.rmdir()

    def _set(self, limit: int | None) -> None:
        if limit is None:
            return
        (self._path / self._files.limit).write_text(str(limit))
        swap = self._path / self._files.swap
        if swap.exists():  # else this kernel does not account for it
            swap.write_text(str(limit) if self._files is _VERSION_1 else "0")
