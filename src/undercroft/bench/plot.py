"""Lines over two axes of bytes, as SVG that stands alone.

Pure. It knows points and words; not what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from undercroft.units import MIB

_WIDTH, _HEIGHT = 720, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 48, 60
_STEPS = (1, 2, 5, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line.

    Attributes:
        name: for the legend.
        points: (x, y) in bytes.
        color: any that SVG knows.
        dashed: for what is expected rather than measured; drawn without dots.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    color: str
    dashed: bool = False


def plot(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """An SVG document; both axes begin at 0 and are marked in MiB."""
    x_marks = _marks(max(x for each in series for x, _ in each.points))
    y_marks = _marks(max(y for each in series for _, y in each.points))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(middle, 24, title, size=16),
        _text(middle, _HEIGHT - 14, x_label),
        f'<g transform="rotate(-90 18 {_HEIGHT / 2})">{_text(18, _HEIGHT / 2, y_label)}</g>',
        *(_x_mark(mark, x_marks[-1]) for mark in x_marks),
        *(_y_mark(mark, y_marks[-1]) for mark in y_marks),
        *(_line(each, x_marks[-1], y_marks[-1]) for each in series),
        *(_legend(number, each) for number, each in enumerate(series)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _marks(largest: float) -> list[float]:
    """Round numbers of MiB from 0 to at least `largest`, in 4 to 10 steps."""
    magnitude = 10 ** math.floor(math.log10(max(largest / MIB, 1e-6) / 4))
    rough = largest / MIB / 8
    step = next(factor * magnitude for factor in _STEPS if factor * magnitude >= rough)
    return [number * step * MIB for number in range(math.ceil(largest / MIB / step) + 1)]


def _x(value: float, largest: float) -> float:
    return _LEFT + value / largest * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, largest: float) -> float:
    return _HEIGHT - _BOTTOM - value / largest * (_HEIGHT - _TOP - _BOTTOM)


def _text(x: float, y: float, words: str, *, size: int = 12, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, look: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {look}/>'


def _x_mark(mark: float, largest: float) -> str:
    x, foot = _x(mark, largest), _HEIGHT - _BOTTOM
    return _rule(x, _TOP, x, foot, 'stroke="#ddd"') + _text(x, foot + 18, f"{mark / MIB:g}")


def _y_mark(mark: float, largest: float) -> str:
    y = _y(mark, largest)
    return _rule(_LEFT, y, _WIDTH - _RIGHT, y, 'stroke="#ddd"') + _text(
        _LEFT - 8, y + 4, f"{mark / MIB:g}", anchor="end"
    )


def _line(series: Series, x_largest: float, y_largest: float) -> str:
    places = [(_x(x, x_largest), _y(y, y_largest)) for x, y in series.points]
    way = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline points="{way}" fill="none" {_look(series)}/>'
    if series.dashed:
        return drawn
    return drawn + "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{series.color}"/>' for x, y in places
    )


def _legend(number: int, series: Series) -> str:
    x, y = _LEFT + 12, _TOP + 14 + 18 * number
    return _rule(x, y - 4, x + 24, y - 4, _look(series)) + _text(x + 32, y, series.name, anchor="start")


def _look(series: Series) -> str:
    dashes = ' stroke-dasharray="6 4"' if series.dashed else ""
    return f'stroke="{series.color}" stroke-width="2"{dashes}'
