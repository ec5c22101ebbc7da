"""C++ sources of this package, compiled where they run: once on a machine, then loaded from Undercroft's home.

It knows compilers and files, not what a source is for. Without a compiler there is no library, and whoever wants one
does without. Invariant: nothing is returned that another user could have written.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from undercroft import machine

_FLAGS = ("-std=c++20", "-shared", "-fPIC")
_COMPILE_SECONDS = 120
_log = logging.getLogger(__name__)


def library(
    source: Path,
    *,
    includes: Sequence[Path] = (),
    flags: Sequence[str] = (),
    places: Sequence[str] = (),
    made_for: str = "",
) -> Path:
    """Where a compiled source lies, compiled first if need be, in some twenty seconds.

    Args:
        source: one file of C++20; the library bears its name.
        includes: files of ours that it includes.
        flags: for the compiler, beside those for a shared library.
        places: further flags that only say where on this machine something lies.
        made_for: what else it depends on, such as the version of another library. It is compiled anew when this,
            the text of a file, or a flag differs.

    Raises:
        OSError: there is no compiler, it failed, or another user could have written the result.
        subprocess.SubprocessError: the compiler took too long.
    """
    recipe = "\n".join([*(file.read_text() for file in (source, *includes)), made_for, *_FLAGS, *flags])
    directory = machine.home() / "native"
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / f"{source.stem}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        _compile(source, path, [*_FLAGS, *flags, *places])
    for each in (directory, path):
        _refuse_foreign(each)
    return path


def _compile(source: Path, path: Path, flags: Sequence[str]) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise OSError("no C++ compiler on the path")
    _log.info("compiling %s, once on this machine", source.name)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch) / path.name
        command = [compiler, str(source), "-o", str(built), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
        if done.returncode:
            raise OSError(f"{compiler} failed: {done.stderr.strip()[-300:]}")
        built.chmod(0o700)
        os.replace(built, path)


def _refuse_foreign(path: Path) -> None:
    status = path.stat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise OSError(f"{path} could have been written by another user")
