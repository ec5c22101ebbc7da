"""A comparison as a table of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from undercroft.units import format_seconds, format_size

if TYPE_CHECKING:
    from undercroft.training.compare import Row

_HEAD = ("", "peak memory", "of plain", "per step", "CPU", "same bits", "spilled", "stalled")


def comparison_table(rows: Sequence[Row]) -> str:
    """One line a way of running; peak memory is above what the process holds between steps."""
    cells = [_HEAD, *(_cells(row) for row in rows if row.failure is None)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD))]
    lines = ["  ".join(_padded(line, widths)).rstrip() for line in cells]
    lines += [f"{row.name} gave no result: {row.failure}" for row in rows if row.failure is not None]
    return "\n".join(lines)


def _padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[0].ljust(widths[0])] + [
        cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)
    ]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        "?" if row.peak_nbytes is None else format_size(row.peak_nbytes),
        "" if row.fraction is None else f"{row.fraction:.0%}",
        "?" if row.seconds_per_step is None else format_seconds(row.seconds_per_step),
        "?" if row.cpu_seconds_per_step is None else format_seconds(row.cpu_seconds_per_step),
        {None: "", True: "yes", False: "NO"}[row.equal],
        "" if row.spilled_nbytes is None else format_size(row.spilled_nbytes),
        "" if row.stall_fraction is None else f"{row.stall_fraction:.1%}",
    )
