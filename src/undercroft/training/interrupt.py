"""Ctrl-C that waits for the end of a step, so that nothing is left half-written.

It knows the signal, not what a step is. Outside the main thread, where Python delivers no signals, it does
nothing. Invariant: the handler that was there is back when the context is left.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self


class Interrupted(KeyboardInterrupt):
    """Training was interrupted after a whole step.

    Attributes:
        step: steps done.
        checkpoint: the folder they were saved in, or None where nothing is saved.
    """

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        self.step = step
        self.checkpoint = checkpoint
        kept = f"they are saved in {checkpoint}; resume=True (--resume) goes on from there"
        super().__init__(f"interrupted after {step} steps; {kept if checkpoint else 'nothing was saved'}")


class Interruption:
    """While entered, the first Ctrl-C only sets `asked`; the second raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: signal.Handlers | int | object = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)  # pyright: ignore[reportArgumentType]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
