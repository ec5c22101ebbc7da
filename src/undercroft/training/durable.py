"""Folders and files that appear whole or not at all, whatever kills the process or the power.

What is written lies under another name first, is forced to the disk, and is renamed. What a killed process
left under such a name is removed by `clear_partial`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from undercroft.errors import TierFull, TransferFailed

_PARTIAL = ".partial-"


@contextmanager
def whole_folder(target: Path) -> Generator[Path]:
    """A new folder to write into; it becomes `target` when the block ends without an error, else it vanishes.

    Raises:
        TierFull: the disk is full.
        TransferFailed: it could not be written for another reason.
    """
    partial = target.with_name(f"{_PARTIAL}{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise _explain(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_whole(target: Path, text: str) -> None:
    """Write a text file.

    Raises:
        TierFull, TransferFailed: as `whole_folder`.
    """
    partial = target.with_name(f"{_PARTIAL}{target.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        _sync(partial)
        partial.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise _explain(target, error) from error
    finally:
        partial.unlink(missing_ok=True)


def clear_partial(directory: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in directory.glob(f"{_PARTIAL}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _explain(target: Path, error: Exception) -> TierFull | TransferFailed:
    if "No space left" in str(error):  # safetensors raises an error of its own, with the system's words
        return TierFull(f"no room to write {target}; free some, or choose another folder with --output")
    code = error.errno if isinstance(error, OSError) else None
    return TransferFailed(f"cannot write {target}: {error}; choose another folder with --output", errno=code)
