"""Decides whether experts are predicted, how many layers ahead, and which predictions are sure enough to be read.

Pure: it knows counts, bytes and seconds that it is told; not experts, disks or clocks. Invariants: equal inputs give
equal decisions; the depth moves by one layer at a time, within its limits; a depth that does not pay is left after one
window, and waits twice as long for every further trial.

Reading ahead pays where forwards wait for reads, but not so much that the disk has no idle time left to read in; where
what is read is wanted (a wrong read may delay a demand by as much as a right one saves, so more than half of it must
be); and where forwards then are done sooner. All three are measured, the last against the window before
the depth was tried, since published gains run from +15 % to a loss of 38 % where flash was saturated. A window that
happens to want fewer bytes gains nothing by that, and what prediction itself costs is part of what a forward takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from undercroft.errors import InvalidInput

_PRIOR = 0.8
"""The precision of predictions that were never judged: enough to be tried."""
_RATE = 1 / 8
"""How much of a precision the newest judgement is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When prediction pays.

    Attributes:
        depth: the most layers to look ahead; 0 turns prediction off.
        window: forwards between two decisions.
        least_precise: share of an expert's predictions that must have come true for it to be read, 0 to 1.
        least_useful: share of the bytes read ahead that must have been wanted.
        least_waiting: share of the time spent waiting for reads below which a gain would not pay for predicting.
        most_waiting: the share above which the disk has no time for anything but demands.
        least_gain: how much of the time spent waiting must be won when the depth rises.
        longest_pause: windows between two trials of a depth that never pays.

    Raises:
        InvalidInput: a depth below 0, or no windows or pauses to count.
    """

    depth: int = 2
    window: int = 8
    least_precise: float = 0.7
    least_useful: float = 0.6
    least_waiting: float = 0.1
    most_waiting: float = 0.9
    least_gain: float = 0.05
    longest_pause: int = 64

    def __post_init__(self) -> None:
        if self.depth < 0 or self.window < 1 or self.longest_pause < 1:
            raise InvalidInput(
                f"a governor cannot look {self.depth} layers ahead, or decide in no time: {self}"
            )


class Totals(NamedTuple):
    """What decoding has cost so far.

    Attributes:
        seconds: that forwards took.
        waited: seconds of these that they stood still for reads.
        read: bytes that were read.
        predicted: bytes that were begun to be read ahead.
        useful: bytes of these that were wanted by the forward they were read for.
        wasted: bytes of these that were read, and were not.
    """

    seconds: float = 0.0
    waited: float = 0.0
    read: int = 0
    predicted: int = 0
    useful: int = 0
    wasted: int = 0

    @property
    def waiting(self) -> float:
        """Share of the time spent waiting, 0 to 1."""
        return min(1.0, self.waited / self.seconds) if self.seconds > 0 else 0.0

    @property
    def use(self) -> float:
        """Share of the bytes read ahead that were wanted; 0 where there were none."""
        return self.useful / self.predicted if self.predicted else 0.0

    def seconds_for(self, nbytes: int) -> float:
        """What it would have cost with so many wanted bytes to be read in the place of its own."""
        wanted = self.read - self.wasted
        return self.seconds - self.waited + (self.waited * nbytes / wanted if wanted > 0 else self.waited)

    def since(self, before: Totals) -> Totals:
        """What came on top."""
        return Totals(
            self.seconds - before.seconds,
            self.waited - before.waited,
            self.read - before.read,
            self.predicted - before.predicted,
            self.useful - before.useful,
            self.wasted - before.wasted,
        )

    def plus(self, more: Totals) -> Totals:
        """Both together."""
        return self.since(Totals().since(more))


class Governor:
    """Watches decoding and decides, window by window.

    Attributes:
        depth: layers to look ahead now; 0 while prediction is off.

    Args:
        limits: when it pays.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.depth = 0
        self._limits = limits or Limits()
        self._precisions: dict[tuple[int, int], list[float]] = {}
        self._pauses = [1] * (self._limits.depth + 1)
        self._rest = 1
        self._forwards = 0
        self._before = Totals()
        self._shallower: Totals | None = None

    def judge(self, layer: int, distance: int, right: Sequence[float]) -> None:
        """Take note of what became of predictions.

        Args:
            layer: for which they were.
            distance: from how many layers before.
            right: the likeliest first: the share of the forward's tokens for which it was right, 0 to 1.
        """
        known = self._precisions.setdefault((layer, distance), [_PRIOR] * len(right))
        for rank, share in enumerate(right[: len(known)]):
            known[rank] += _RATE * (share - known[rank])

    def precisions(self, layer: int, distance: int, ranks: int) -> list[float]:
        """How often the likeliest predictions come true, 0 to 1, for as many as are sure enough to be read.

        Args:
            layer: for which they are.
            distance: from how many layers before.
            ranks: how many there are.
        """
        known = self._precisions.get((layer, distance), [_PRIOR] * ranks)
        return list(takewhile(lambda each: each >= self._limits.least_precise, known[:ranks]))

    def turn(self, totals: Totals) -> None:
        """A forward of decoding ended; decide, if a window ended with it."""
        self._forwards += 1
        if self._forwards % self._limits.window == 0:
            window, self._before = totals.since(self._before), totals
            self._decide(window)

    def _decide(self, window: Totals) -> None:
        if self.depth and not self._pays(window):
            self._fall(window)
        elif self._shallower is not None:
            self._pauses[self.depth], self._shallower = 1, None
        else:
            self._rest -= 1
            if self._rest <= 0 and self._could_gain(window):
                self._climb(window)

    def _pays(self, window: Totals) -> bool:
        limits, before = self._limits, self._shallower
        if before is not None:
            won = before.seconds - window.seconds_for(before.read - before.wasted)
            if won < limits.least_gain * before.waited:
                return False
        return window.use >= limits.least_useful and window.waiting <= limits.most_waiting

    def _could_gain(self, window: Totals) -> bool:
        limits = self._limits
        is_worth_it = limits.least_waiting <= window.waiting <= limits.most_waiting
        return self.depth < limits.depth and window.read > 0 and is_worth_it

    def _climb(self, window: Totals) -> None:
        self.depth += 1
        self._shallower = window

    def _fall(self, window: Totals) -> None:
        """Leave a depth; one at which there was nothing to read is not to blame."""
        if window.read:
            self._pauses[self.depth] = min(2 * self._pauses[self.depth], self._limits.longest_pause)
        self._rest = self._pauses[self.depth]
        self.depth -= 1
        self._shallower = None


def came_true(guesses: Sequence[Sequence[int]], chosen: Sequence[Sequence[int]]) -> Iterator[float]:
    """Share of a forward's tokens that wanted what was guessed, by rank.

    Args:
        guesses: of each token, the likeliest first; of all equally many.
        chosen: of each token, in any order.
    """
    wanted = [set(each) for each in chosen]
    for rank in range(len(guesses[0])):
        yield sum(each[rank] in wants for each, wants in zip(guesses, wanted, strict=True)) / len(guesses)
