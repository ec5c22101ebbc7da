"""Progress on stderr: a bar where someone watches, lines where stderr is a file.

It knows names, steps and texts; results never pass through it. Rich is imported when a bar begins.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress

_LINES = 20


class Steps:
    """Shows the steps of a run.

    Args:
        name: of the run.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._watched = sys.stderr.isatty()
        self._bar: Progress | None = None
        self._task: Any = None

    def show(self, step: int, steps: int, text: str) -> None:
        """Step number `step` of `steps` has ended; `text` says how."""
        if self._watched:
            self._advance(step, steps, text)
        elif step in (1, steps) or step % max(steps // _LINES, 1) == 0:
            print(f"{self._name} step {step}/{steps} {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _advance(self, step: int, steps: int, text: str) -> None:
        if self._bar is None:
            self._bar = _new_bar()
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=steps, text=text)
        self._bar.update(self._task, completed=step, text=text)


@contextmanager
def warnings_as_lines() -> Generator[None]:
    """Print warnings as one line each, without the place in the code."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        yield


def _show_warning(message: Warning | str, *place: object) -> None:
    print(f"undercroft: {message}", file=sys.stderr, flush=True)


def _new_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
