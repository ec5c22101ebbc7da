"""One side of a comparison at arm's length: a process under a memory limit, which speaks in lines of JSON.

It knows processes and control groups, not what is measured. Invariant: leaving the context ends the process, reaps
it, and removes its group.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from undercroft.bench.cgroup import MemoryGroup
from undercroft.errors import UndercroftError

_ENTER_GROUP = 'echo $$ > "$0" && exec "$@"'
_END_SECONDS = 60.0
_LAST_WORDS = 4096


class SideEnded(UndercroftError):
    """A side's process ended before it answered.

    Attributes:
        code: its exit code as a shell shows it: 137 where the kernel killed it.
    """

    def __init__(self, name: str, code: int, last_words: str) -> None:
        self.code = code
        super().__init__(f"{name} ended with code {code}{': ' if last_words else ''}{last_words}")


class Side:
    """A process that answers.

    Args:
        name: for errors.
        command: what to run.
        limit: bytes of memory, page cache included; None for no limit.
        threads: for computing.

    Raises:
        NoControlGroup: there is a limit, and this process may not set it.
    """

    def __init__(self, name: str, command: Sequence[str], *, limit: int | None, threads: int) -> None:
        self._name = name
        self._group = MemoryGroup(limit) if limit else None
        enter = ["/bin/sh", "-c", _ENTER_GROUP, str(self._group.processes)] if self._group else []
        self._words = os.memfd_create("last words")
        self._process = subprocess.Popen(
            [*enter, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )

    @property
    def peak(self) -> int | None:
        """The most bytes that its group used at once, page cache included; None without a limit."""
        return self._group.peak if self._group else None

    def hear(self) -> dict[str, Any]:
        """Its next answer.

        Raises:
            SideEnded: there will be none.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return json.loads(line)

    def ask(self, line: str) -> dict[str, Any]:
        """Its answer to a line.

        Raises:
            SideEnded: there will be none.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer that does not come says more
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        return self.hear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        try:
            with suppress(BrokenPipeError):
                self._process.communicate(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        os.close(self._words)
        if self._group:
            self._group.__exit__(kind, error, trace)

    def _ended(self) -> SideEnded:
        code = self._process.wait()
        said = os.pread(self._words, _LAST_WORDS, max(0, os.fstat(self._words).st_size - _LAST_WORDS))
        words = said.decode(errors="replace").strip().splitlines()
        return SideEnded(self._name, 128 - code if code < 0 else code, words[-1] if words else "")
