"""A training process at arm's length: started, asked for steps, ended.

It knows the protocol of `training_worker`, not what is measured. Invariant: leaving the context ends the
process and reaps it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from undercroft.bench.training_worker import MEASURE_IDLE, Settings, Step
from undercroft.errors import UndercroftError
from undercroft.store import heap

_ENTER_GROUP = 'echo $$ > "$0" && exec "$@"'
_END_SECONDS = 60.0
_LAST_WORDS = 4096


class WorkerEnded(UndercroftError):
    """A training process ended before it answered.

    Attributes:
        code: its exit code as a shell shows it: 137 where the kernel killed it.
    """

    def __init__(self, mode: str, code: int, last_words: str) -> None:
        self.code = code
        super().__init__(f"{mode} training ended with code {code}{': ' if last_words else ''}{last_words}")


class Worker:
    """One mode of training, taking steps on demand.

    Args:
        settings: what to train and how.
        group: the control group to start in: its file of process ids.
    """

    def __init__(self, settings: Settings, *, group: Path | None = None) -> None:
        self._settings = settings
        if settings.settle_heap:
            heap.settle()  # so that the pool is built here, once, and not by several workers at a time
        command = [sys.executable, "-m", "undercroft.bench.training_worker", json.dumps(asdict(settings))]
        enter = ["/bin/sh", "-c", _ENTER_GROUP, str(group)] if group else []
        self._words = os.memfd_create("last words")
        self._process = subprocess.Popen(
            [*enter, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env={name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")},
        )

    def step(self, *, measure_idle: bool = False) -> Step:
        """One step of training.

        Raises:
            WorkerEnded: the process is no more.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # the answer that does not come says more
            self._process.stdin.write(MEASURE_IDLE + "\n" if measure_idle else "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return Step.parse(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        try:
            self._process.communicate(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        os.close(self._words)

    def _ended(self) -> WorkerEnded:
        code = self._process.wait()
        said = os.pread(self._words, _LAST_WORDS, max(0, os.fstat(self._words).st_size - _LAST_WORDS))
        words = said.decode(errors="replace").strip().splitlines()
        return WorkerEnded(self._settings.mode, 128 - code if code < 0 else code, words[-1] if words else "")
