"""Which of the experts that a token lacks on a device are moved there, and which the CPU computes where they lie.

Pure: it knows bytes and seconds; not experts, devices or clocks. Both ways work at the same time: the link moves, while
the CPU first hands to the device what is computed there, and then computes its own share. Invariants: no other division
of a step would by these estimates end sooner, so neither of the two ways alone does; the link is never left more than
one expert behind.

HOBBIT (arXiv 2411.01433) has this as a mode of its own; Fiddler (arXiv 2402.07033) decides it expert by
expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

_NEWEST = 0.2
"""How much of an estimate the newest measurement is."""
_DOUBT = 1 / 2048
"""How much of the CPU's estimate is taken off in a step that it has no share of, so that it is tried again some day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What the two ways take.

    Attributes:
        move: seconds for a byte over the link.
        compute: seconds of the CPU for a byte of an expert.
        round_trip: seconds for the activations to the CPU and back, if it computes anything.
        dispatch: seconds of the CPU to hand an expert to the device that computes there.
    """

    move: float
    compute: float
    round_trip: float = 0.0
    dispatch: float = 0.0


class Division(NamedTuple):
    """How a step is divided; experts by their place in what was divided.

    Attributes:
        moved: computed on the device.
        computed: by the CPU.
        kept: those of the latter that are moved as well, behind the others, for tokens to come.
    """

    moved: tuple[int, ...]
    computed: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()


def finish(moved: int, moves: int, computed: int, costs: Costs, busy: float) -> float:
    """Seconds until a step has ended.

    Args:
        moved: bytes.
        moves: experts that these are.
        computed: bytes.
        costs: of both ways.
        busy: seconds until the link is free.
    """
    link = busy + moved * costs.move if moves else 0.0
    return max(link, moves * costs.dispatch + _compute(computed, costs))


def divide(sizes: Sequence[int], costs: Costs, busy: float = 0.0) -> Division:
    """The division that ends soonest; of two that end at once the one that moves more.

    Experts of one size are alike, so that only their numbers are tried: the first of each size are moved.

    Args:
        sizes: bytes of each expert.
        costs: of both ways.
        busy: seconds until the link is free.
    """
    alike: dict[int, list[int]] = {}
    for place, nbytes in enumerate(sizes):
        alike.setdefault(nbytes, []).append(place)

    def key(counts: Sequence[int]) -> tuple[float, int]:
        moved = sum(count * nbytes for count, nbytes in zip(counts, alike, strict=True))
        seconds = finish(moved, sum(counts), sum(sizes) - moved, costs, busy)
        return seconds, -moved

    counts = min(product(*(range(len(each) + 1) for each in alike.values())), key=key)
    pairs = [(each[:count], each[count:]) for count, each in zip(counts, alike.values(), strict=True)]
    moved = sorted(place for first, _ in pairs for place in first)
    computed = sorted(place for _, rest in pairs for place in rest)
    return Division(tuple(moved), tuple(computed), _kept(sizes, moved, computed, costs, busy))


def _kept(
    sizes: Sequence[int], moved: Sequence[int], computed: Sequence[int], costs: Costs, busy: float
) -> tuple[int, ...]:
    """What the link begins to move while the CPU still computes: without it, nothing would ever be there."""
    link = busy + sum(sizes[place] for place in moved) * costs.move
    end = len(moved) * costs.dispatch + _compute(sum(sizes[place] for place in computed), costs)
    kept: list[int] = []
    for place in computed:
        if link >= end:
            break
        kept.append(place)
        link += sizes[place] * costs.move
    return tuple(kept)


def _compute(nbytes: int, costs: Costs) -> float:
    return costs.round_trip + nbytes * costs.compute if nbytes else 0.0


class Estimates:
    """What both ways took, the last times more than those before.

    Until both are known a step finds them out: it moves all, and then has the CPU compute one.
    """

    def __init__(self) -> None:
        self._move: float | None = None
        self._compute: float | None = None
        self._round_trip = self._dispatch = 0.0

    @property
    def costs(self) -> Costs | None:
        """The estimates; None where there are none yet."""
        if self._move is None or self._compute is None:
            return None
        return Costs(
            move=self._move, compute=self._compute, round_trip=self._round_trip, dispatch=self._dispatch
        )

    def note_move(self, nbytes: int, seconds: float) -> None:
        """The link moved so many bytes."""
        self._move = _blend(self._move, seconds / nbytes)

    def note_dispatch(self, experts: int, seconds: float) -> None:
        """The CPU handed so many experts to the device."""
        self._dispatch = _blend(self._dispatch or None, seconds / experts)

    def note_compute(self, nbytes: int, seconds: float, round_trip: float) -> None:
        """The CPU computed with so many bytes, besides what activations took to it and back."""
        self._compute = _blend(self._compute, seconds / nbytes)
        self._round_trip = _blend(self._round_trip or None, round_trip)

    def divide(self, sizes: Sequence[int], flying: int) -> Division:
        """Divide a step.

        Args:
            sizes: bytes of each expert that the device lacks.
            flying: bytes that the link has still to move.
        """
        everything = tuple(range(len(sizes)))
        if self._move is None or not sizes:
            return Division(everything)
        if self._compute is None:
            return Division(everything[1:], everything[:1], everything[:1])
        costs = self.costs
        assert costs is not None
        division = divide(sizes, costs, flying * costs.move)
        if not division.computed:
            self._compute *= 1 - _DOUBT
        return division


def _blend(before: float | None, now: float) -> float:
    return now if before is None else before + _NEWEST * (now - before)
