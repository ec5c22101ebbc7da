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
    from rich.live import Live

_LINES = 20


class Steps:
    """Shows the steps of a run.

    Args:
        name: of the run.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._watched = sys.stderr.isatty()
        self._text = ""
        self._live: Live | None = None
        self._bar: Any = None

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
        if self._live is not None:
            self._live.stop()

    def _advance(self, step: int, steps: int, text: str) -> None:
        if self._live is None:
            self._live = self._begin(steps)
        self._bar.update(0, completed=step)
        self._text = text

    def _begin(self, steps: int) -> Live:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text

        columns = (TextColumn(self._name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns)
        self._bar.add_task(self._name, total=steps)
        live = Live(
            console=Console(stderr=True),
            get_renderable=lambda: Group(self._bar, Text(self._text, overflow="ellipsis")),
        )
        live.start()
        return live


@contextmanager
def warnings_as_lines() -> Generator[None]:
    """Print warnings as one line each, without the place in the code."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        yield


def _show_warning(message: Warning | str, *place: object) -> None:
    print(f"undercroft: {message}", file=sys.stderr, flush=True)
