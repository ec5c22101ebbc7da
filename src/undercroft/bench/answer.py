"""The answer to one benchmark question: for people as text, for programs as JSON.

It knows no question. Invariant: what would prove the claim wrong is stated beside every table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from undercroft.bench.verdict import Line


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was asked and found.

    Attributes:
        theme: one word or two, such as "store": names the report's files.
        question: what was asked.
        falsified_by: what would prove the claim wrong.
        head: names of the table's columns.
        rows: its cells, as text; the first of a row is its name.
        lines: the acceptance, line by line.
        notes: what a reader should know beside the table.
        figures: every number, ready for JSON.
        plot: SVG, or empty.
    """

    theme: str
    question: str
    falsified_by: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    plot: str = ""

    @property
    def passed(self) -> bool:
        """Whether every line did; a void line did not."""
        return all(line.verdict == "PASS" for line in self.lines)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the plot, ready for JSON."""
        return {
            "theme": self.theme,
            "question": self.question,
            "falsified_by": self.falsified_by,
            "passed": self.passed,
            "lines": [line.as_dict() for line in self.lines],
            "notes": list(self.notes),
            "figures": self.figures,
        }

    def __str__(self) -> str:
        parts = [
            f"{self.question}\nFalsified by: {self.falsified_by}",
            table(self.head, self.rows),
            "\n".join(self.notes),
            "\n".join(map(str, self.lines)),
        ]
        return "\n\n".join(part for part in parts if part)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of plain text: the first to the left, the others to the right."""
    cells = [head, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join("  ".join(_padded(row, widths)).rstrip() for row in cells)


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
