"""A private directory for bytes that die with their process.

It knows ownership, modes and locks; not what is stored. Each process gets a subdirectory of its own and
holds a lock on it; what dead processes left is reclaimed when the next one starts, by lock and never by
pid. Files have no name, or lose it at once, so a killed process leaves at most an empty subdirectory.
Invariants: nothing is ever followed through a symbolic link, the directory is 0700 and ours, files are
0600, and only what has the form of a name of ours is ever removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from undercroft.errors import TierFull, UndercroftError, UnsafeDirectory
from undercroft.store.disk import DiskFile, Syscalls, open_file

_OURS = re.compile(r"spill-[0-9a-f]{16}")
_LEAF = re.compile(r"[0-9a-f]{16}")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_UNNAMED_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}
_FULL = {errno.ENOSPC, errno.EDQUOT}


class PrivateDirectory:
    """The subdirectory of this process below `path`, which is created 0700 where it is missing.

    Raises:
        UnsafeDirectory: `path` is a link, no directory, not ours, open to others, or cannot be written.
        TierFull: no room for even a directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self._owner = os.getpid()
        self._top = self._fd = -1
        self._name = f"spill-{secrets.token_hex(8)}"
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._top = os.open(self.path, _DIRECTORY)
            _check(self._top, self.path)
            self._claim()
        except OSError as error:
            self.close()
            raise _typed(f"spill directory {self.path}", error) from error
        except UnsafeDirectory:
            self.close()
            raise

    def create(self, *, syscalls: Syscalls | None = None) -> DiskFile:
        """A new file of mode 0600 that has no name, can be given none, and vanishes with its last descriptor.

        Raises:
            TierFull: no room for even an empty file.
            UnsafeDirectory: the directory cannot be written.
        """
        name = f"spill file in {self.path}"
        unnamed = os.O_RDWR | os.O_TMPFILE | os.O_EXCL
        try:
            return open_file(".", unnamed, name=name, dir_fd=self._fd, syscalls=syscalls)
        except OSError as error:
            if error.errno not in _NO_UNNAMED_FILES:
                raise _typed(name, error) from error
        return self._create_and_unlink(name, syscalls)

    def close(self) -> None:
        """Remove the subdirectory, in the process that made it; again is allowed."""
        top, self._top, fd, self._fd = self._top, -1, self._fd, -1
        if fd >= 0:
            os.close(fd)
            if os.getpid() == self._owner:
                with suppress(OSError):
                    os.rmdir(self._name, dir_fd=top)
        if top >= 0:
            os.close(top)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _claim(self) -> None:
        fcntl.flock(self._top, fcntl.LOCK_EX)  # so that nobody reclaims ours between its birth and its lock
        _reclaim(self._top)
        os.mkdir(self._name, 0o700, dir_fd=self._top)
        self._fd = os.open(self._name, _DIRECTORY, dir_fd=self._top)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        fcntl.flock(self._top, fcntl.LOCK_UN)

    def _create_and_unlink(self, name: str, syscalls: Syscalls | None) -> DiskFile:
        leaf = secrets.token_hex(8)
        new = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            os.close(os.open(leaf, new, 0o600, dir_fd=self._fd))
            try:
                return open_file(leaf, os.O_RDWR, name=name, dir_fd=self._fd, syscalls=syscalls)
            finally:
                os.unlink(leaf, dir_fd=self._fd)
        except OSError as error:
            raise _typed(name, error) from error


def _check(fd: int, path: Path) -> None:
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        raise UnsafeDirectory(
            f"spill directory {path} belongs to user {status.st_uid}; choose one of your own"
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise UnsafeDirectory(
            f"spill directory {path} is open to other users; chmod 700 it, or name a new one"
        )


def _reclaim(top: int) -> None:
    for name in filter(_OURS.fullmatch, os.listdir(top)):
        with suppress(OSError):  # locked: its process lives
            _reclaim_one(top, name)


def _reclaim_one(top: int, name: str) -> None:
    fd = os.open(name, _DIRECTORY, dir_fd=top)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leaf in filter(_LEAF.fullmatch, os.listdir(fd)):
            os.unlink(leaf, dir_fd=fd)
        os.rmdir(name, dir_fd=top)
    finally:
        os.close(fd)


def _typed(what: str, error: OSError) -> UndercroftError:
    if error.errno in _FULL:
        return TierFull(f"{what}: {error.strerror}", errno=error.errno or errno.ENOSPC)
    return UnsafeDirectory(f"{what} cannot be used: {_explain(error)}")


def _explain(error: OSError) -> str:
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EEXIST):
        return "it is a symbolic link or no directory, and links are not followed; name a real directory"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{error.strerror}; name a directory that you can write with --disk or directory="
    return str(error.strerror)
