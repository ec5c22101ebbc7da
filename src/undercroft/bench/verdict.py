"""One line of an acceptance: what was claimed, what was found, and whether that is enough.

Pure. Invariant: a line whose reference was unsteady is VOID, whatever was found.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["PASS", "FAIL", "VOID"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A claim and the figure that decides it.

    Attributes:
        claim: what ought to hold, without the bound.
        found: the figure; NaN where there is none.
        bound: what it is held against.
        relation: whether the figure must not exceed the bound, or not fall short of it.
        unit: of both; empty for a ratio.
        note: what a reader should know beside the figure, such as its spread.
        void: why nothing can be said; empty where something can.
    """

    claim: str
    found: float
    bound: float
    relation: Literal["<=", ">="] = "<="
    unit: str = ""
    note: str = ""
    void: str = ""

    @property
    def verdict(self) -> Verdict:
        """PASS, FAIL or VOID; a figure that is no number fails."""
        if self.void:
            return "VOID"
        holds = self.found <= self.bound if self.relation == "<=" else self.found >= self.bound
        return "PASS" if holds else "FAIL"

    def as_dict(self) -> dict[str, Any]:
        """All fields and the verdict, ready for JSON."""
        found = self.found if math.isfinite(self.found) else None
        return {**asdict(self), "found": found, "verdict": self.verdict}

    def __str__(self) -> str:
        remark = self.void or self.note
        figures = f"{_number(self.found)}{self.unit} {self.relation} {_number(self.bound)}{self.unit}"
        return f"{self.verdict}  {self.claim}: {figures}" + (f"  ({remark})" if remark else "")


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3f}"
