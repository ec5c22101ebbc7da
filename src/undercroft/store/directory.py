"""A private directory for bytes that die with their process.

It knows ownership, modes and locks; not what is stored. Each process gets a subdirectory of its own and holds a lock
on it; what dead processes left is reclaimed when the next one starts, by lock and never by pid. Files are unlinked from
birth, so a killed process leaves at most an empty subdirectory. Invariants: nothing is ever followed through a
symbolic link, the directory is 0700 and ours, files are 0600.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from undercroft.errors import TierFull, UnsafeDirectory
from undercroft.store.disk import DiskFile, Syscalls, open_file

_PREFIX = "spill-"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class PrivateDirectory:
    """The subdirectory of this process below `path`, which is created 0700 where it is missing.

    Raises:
        UnsafeDirectory: `path` is a link, no directory, not ours, open to others, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self._owner = os.getpid()
        self._fd = -1
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            top = os.open(self.path, _DIRECTORY)
        except OSError as error:
            raise UnsafeDirectory(f"spill directory {self.path}: {_explain(error)}") from error
        try:
            _check(top, self.path)
            self._claim(top)
        except OSError as error:
            raise UnsafeDirectory(f"spill directory {self.path} cannot be used: {_explain(error)}") from error
        finally:
            os.close(top)

    def create(self, *, syscalls: Syscalls | None = None) -> DiskFile:
        """A new file of mode 0600 that has no name and vanishes with its last descriptor.

        Raises:
            TierFull: no room for even an empty file.
            UnsafeDirectory: the directory cannot be written.
        """
        name = f"spill file in {self.path}"
        try:
            return open_file(".", os.O_RDWR | os.O_TMPFILE, name=name, dir_fd=self._fd, syscalls=syscalls)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise TierFull(f"{name}: {error.strerror}") from error
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise UnsafeDirectory(f"{name}: {_explain(error)}") from error
        return self._create_and_unlink(name, syscalls)

    def close(self) -> None:
        """Remove the subdirectory, in the process that made it; again is allowed."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        os.close(fd)
        if os.getpid() == self._owner:
            with suppress(OSError):
                os.rmdir(self.path / self._name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _claim(self, top: int) -> None:
        fcntl.flock(top, fcntl.LOCK_EX)  # so that nobody reclaims ours between its birth and its lock
        _reclaim(top)
        self._name = _PREFIX + secrets.token_hex(8)
        os.mkdir(self._name, 0o700, dir_fd=top)
        self._fd = os.open(self._name, _DIRECTORY, dir_fd=top)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def _create_and_unlink(self, name: str, syscalls: Syscalls | None) -> DiskFile:
        leaf = secrets.token_hex(8)
        try:
            os.close(os.open(leaf, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=self._fd))
            try:
                return open_file(leaf, os.O_RDWR, name=name, dir_fd=self._fd, syscalls=syscalls)
            finally:
                os.unlink(leaf, dir_fd=self._fd)
        except OSError as error:
            raise UnsafeDirectory(f"{name}: {_explain(error)}") from error


def _check(fd: int, path: Path) -> None:
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        raise UnsafeDirectory(f"spill directory {path} belongs to user {status.st_uid}; choose one of your own")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise UnsafeDirectory(f"spill directory {path} is open to other users; chmod 700 it, or name a new one")


def _reclaim(top: int) -> None:
    for name in os.listdir(top):
        if name.startswith(_PREFIX):
            with suppress(OSError):  # locked: its process lives
                _reclaim_one(top, name)


def _reclaim_one(top: int, name: str) -> None:
    fd = os.open(name, _DIRECTORY, dir_fd=top)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leaf in os.listdir(fd):
            os.unlink(leaf, dir_fd=fd)
        os.rmdir(name, dir_fd=top)
    finally:
        os.close(fd)


def _explain(error: OSError) -> str:
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return "it is a symbolic link or no directory, and links are not followed; name a real directory"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{error.strerror}; name a directory that you can write with --disk or directory="
    return str(error.strerror)
