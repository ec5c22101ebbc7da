"""Writes down a training step as it happens: the trace that the planner reads, the calls that an `Order` learns.

It knows numbers of storages and times that it is told; no tensors and no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from undercroft.training.order import Call
from undercroft.training.step import SavedStorage, StepTrace


@dataclass(slots=True)
class _Life:
    nbytes: int
    packed: int
    uses: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    released: int | None = None


class Recording:
    """One step under way.

    Attributes:
        calls: the hook calls so far.
        unpacks: how many of them were unpacks.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.unpacks = 0
        self._times: list[float] = []
        self._lives: list[_Life] = []

    def add(self, nbytes: int, seconds: float) -> int:
        """A storage was saved for the first time; returns its number."""
        self._lives.append(_Life(nbytes, self._event(seconds)))
        self.calls.append(len(self._lives) - 1)
        return len(self._lives) - 1

    def save_again(self, number: int) -> None:
        """Another view of a storage was saved."""
        self.calls.append(number)

    def unpack(self, number: int, seconds: float) -> int:
        """A storage was unpacked; returns the event, to be given to `end_use`."""
        self.calls.append(~number)
        self.unpacks += 1
        return self._event(seconds)

    def end_use(self, number: int, unpacked: int, seconds: float) -> None:
        """The backward node that unpacked a storage at that event has finished."""
        self._lives[number].uses.append((unpacked, self._event(seconds)))

    def release(self, number: int, seconds: float) -> None:
        """The last token of a storage died."""
        self._lives[number].released = self._event(seconds)

    def trace(self) -> StepTrace:
        """What was recorded; a storage not yet released is taken to live to the end."""
        last = len(self._times) - 1
        storages = tuple(
            SavedStorage(
                nbytes=life.nbytes,
                packed=life.packed,
                uses=tuple(sorted(life.uses)),
                released=last if life.released is None else life.released,
            )
            for life in self._lives
        )
        return StepTrace(storages=storages, times=tuple(self._times))

    def _event(self, seconds: float) -> int:
        self._times.append(seconds)
        return len(self._times) - 1
