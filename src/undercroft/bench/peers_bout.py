"""What the sides of `peers` did in one precision under one limit, and what is claimed of it.

Pure: it knows stretches, not processes or models. Invariant: a side that was lost is in no table; where it is ours,
what is claimed of it fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from undercroft.bench.llama_worker import MODULES
from undercroft.bench.peers_worker import ACCELERATE, OURS, Stretch
from undercroft.bench.rounds import Spread, Turns
from undercroft.bench.verdict import Line
from undercroft.units import format_size

NO_LIMIT = "none"
LLAMAS = tuple(MODULES)
_LEAST_ALIKE = 0.99


@dataclass(frozen=True, kw_only=True)
class Bout:
    """What the sides of one precision did under one limit.

    Attributes:
        limit: as it was asked for.
        bits: the precision.
        turns: of the sides that lived through it.
        peaks: the most bytes of each side's group, page cache included.
        logits: each side's after the prompt.
        lost: the last words of the sides that did not.
    """

    limit: str
    bits: str
    turns: Turns[Stretch]
    peaks: Mapping[str, int | None]
    logits: Mapping[str, Sequence[float]]
    lost: Mapping[str, str]

    @property
    def sides(self) -> list[str]:
        """Those that lived through it."""
        return list(self.turns.samples)

    def rate(self, side: str) -> Spread:
        """Tokens per second."""
        return self.turns.spread(side, lambda stretch: stretch.rate)

    def total(self, side: str, figure: Callable[[Stretch], float]) -> float:
        """One figure of a side, summed over all rounds."""
        return sum(map(figure, self.turns.samples[side]))

    def per_token(self, side: str, figure: Callable[[Stretch], float]) -> float:
        """One figure of a side, for each token."""
        return self.total(side, figure) / self.total(side, lambda stretch: stretch.tokens)


def claims(bout: Bout) -> Iterator[Line]:
    """What is claimed of a bout, as far as both who claim it and against whom took part."""
    best = max(
        (name for name in LLAMAS if name in bout.sides), key=lambda name: bout.rate(name).median, default=""
    )
    plain = "int8" if bout.bits == "int8" else "exact"
    if bout.limit == NO_LIMIT:
        yield from _faster(bout, plain, best, 0.8)
    else:
        for ours, bound in (("exact", 8.0), ("lossless", 8.0), ("balanced", 12.0)):
            yield from _faster(bout, ours, ACCELERATE, bound)
        for ours in (plain, "lossless"):
            yield from _faster(bout, ours, best, 4.0)
            yield from _frugal(bout, ours)
    for name in bout.sides:
        if name != plain and plain in bout.logits:
            yield Line(
                claim=f"{bout.limit}, {bout.bits}: cosine of {name}'s logits after the prompt with those of {plain}",
                found=_cosine(bout.logits[name], bout.logits[plain]),
                bound=_LEAST_ALIKE,
                relation=">=",
            )


def _faster(bout: Bout, ours: str, peer: str, bound: float) -> Iterator[Line]:
    """Nothing for sides that this bout has not; a side of ours that was lost fails."""
    if peer not in bout.sides or ours not in (*bout.sides, *bout.lost):
        return
    found = bout.turns.ratio(ours, peer, lambda stretch: stretch.rate) if ours in bout.sides else None
    yield Line(
        claim=f"{bout.limit}, {bout.bits}: {ours}, tokens per second over {peer}",
        found=found.median if found else math.nan,
        bound=bound,
        relation=">=",
        note=str(found) if found else bout.lost[ours],
        void=bout.turns.why_void(peer, lambda stretch: stretch.rate) if found else "",
    )


def _frugal(bout: Bout, ours: str) -> Iterator[Line]:
    if ours in bout.sides and (missed := bout.total(ours, lambda stretch: stretch.missed or 0)):
        yield Line(
            claim=f"{bout.limit}, {bout.bits}: {ours}, bytes read over those of the missing experts",
            found=bout.total(ours, lambda stretch: stretch.read) / missed,
            bound=1.1,
        )


def _cosine(some: Sequence[float], others: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(some, others, strict=True))
    return product / (math.hypot(*some) * math.hypot(*others))


def row(bout: Bout, side: str) -> tuple[str, ...]:
    """A side's cells: name, limit, bits, tokens per second, MB and CPU seconds per token, waiting, peak."""
    peak = bout.peaks[side]
    return (
        side,
        bout.limit,
        bout.bits,
        str(bout.rate(side)),
        f"{bout.per_token(side, lambda stretch: stretch.read) / 1e6:.1f}",
        f"{bout.per_token(side, lambda stretch: stretch.cpu):.3f}",
        f"{bout.total(side, lambda each: each.waited) / bout.total(side, lambda each: each.seconds):.0%}"
        if side in OURS
        else "",
        "" if peak is None else format_size(peak),
    )


def figures(bout: Bout) -> dict[str, Any]:
    """All samples, ready for JSON."""
    return {
        "limit": bout.limit,
        "bits": bout.bits,
        "samples": {name: [asdict(each) for each in taken] for name, taken in bout.turns.samples.items()},
        "peaks": dict(bout.peaks),
        "lost": dict(bout.lost),
    }
