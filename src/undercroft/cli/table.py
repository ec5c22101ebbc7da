"""Comparisons as tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from undercroft.units import format_seconds, format_size

if TYPE_CHECKING:
    from undercroft.moe.demonstration import StreamedRow
    from undercroft.training.compare import Row

_STREAMING_HEAD = ("", "tokens/s", "read per token", "hits", "served low", "perplexity", "same bits")
_HEAD = ("", "peak memory", "of plain", "per step", "CPU", "same bits", "spilled", "stalled")


def comparison_table(rows: Sequence[Row]) -> str:
    """One line a way of running; peak memory is above what the process holds between steps."""
    lines = _aligned([_HEAD, *(_cells(row) for row in rows if row.failure is None)])
    lines += [f"{row.name} gave no result: {row.failure}" for row in rows if row.failure is not None]
    return "\n".join(lines)


def streaming_table(rows: Sequence[StreamedRow]) -> str:
    """One line a way of holding experts; perplexity is what changed against all of them in memory."""
    return "\n".join(_aligned([_STREAMING_HEAD, *map(_streaming_cells, rows)]))


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(_padded(line, widths)).rstrip() for line in cells]


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


def _streaming_cells(row: StreamedRow) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.tokens_per_second:.1f}",
        "" if row.nbytes_per_token is None else format_size(row.nbytes_per_token),
        "" if row.hit_rate is None else f"{row.hit_rate:.0%}",
        "" if row.low_mass is None else f"{row.low_mass:.1%}",
        f"{row.perplexity_change:+.2%}" if row.perplexity_change else "",
        "yes" if row.same else "no",
    )
