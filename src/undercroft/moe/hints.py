"""What an engine has asked its cache to read ahead, and what came of it.

It knows keys, layers and room; not who predicts, nor how well. Invariants: a hint lives until its layer is served, or a
forward begins; what is read ahead takes no room from what is likelier to be wanted, nor room that a demand needs.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import partial
from typing import NamedTuple

from undercroft.events import Recorder
from undercroft.moe.layered import ExpertPolicy
from undercroft.moe.stock import Stock
from undercroft.store.cache import RecordCache
from undercroft.store.record import Key


class Foreseen(NamedTuple):
    """Bytes of experts read ahead.

    Attributes:
        predicted: that were begun to be read.
        useful: of these, wanted by the forward they were read for.
        wasted: of these, read and not wanted; what was stopped in time is neither.
    """

    predicted: int
    useful: int
    wasted: int


class Hints:
    """The hints of one engine.

    Args:
        stock: which experts there are.
        cache: what reads them.
        policy: the cache's own.
        recorder: the cache's own.
    """

    def __init__(self, stock: Stock, cache: RecordCache, policy: ExpertPolicy, recorder: Recorder) -> None:
        self._stock, self._cache, self._policy, self._recorder = stock, cache, policy, recorder
        self._open: dict[int, list[Key]] = {}
        self._now = self._wanted = 0

    @property
    def tally(self) -> Foreseen:
        """What came of them so far."""
        counted = self._recorder.counters
        names = ("foreseen_bytes", "useful_bytes", "cancelled_bytes")
        predicted, useful, cancelled = (int(counted.get(name, 0)) for name in names)
        undecided = sum(self._stock.occupied(key) for keys in self._open.values() for key in keys)
        return Foreseen(predicted, useful, max(0, predicted - useful - cancelled - undecided))

    @property
    def is_idle(self) -> bool:
        """Whether nothing is foreseen."""
        return not self._open

    def turn_to(self, layer: int, wanted: Set[Key | None]) -> None:
        """A layer is served, and wants these; take back what was foreseen for it and is not among them."""
        self.pass_by(layer, len(wanted))
        for number in [each for each in self._open if each <= layer or layer == 0]:
            self._cache.recant(key for key in self._open.pop(number) if key not in wanted)

    def pass_by(self, layer: int, wanted: int) -> None:
        """A layer is served, and wants so many, while nothing is foreseen."""
        self._now, self._wanted = layer, wanted

    def foresee(self, layer: int, experts: Sequence[int], chance: float) -> int:
        """Begin to read experts; see `Engine.foresee`."""
        keys = [self._stock.high_keys[layer][expert] for expert in experts]
        absent = [key for key in keys if key not in self._cache]
        if not absent or (room := self._room()) <= 0:
            return 0
        begun = self._cache.foresee(absent[:room], may_leave=partial(self._may_leave, layer, chance))
        if begun:
            self._open.setdefault(layer, []).extend(begun)
        return len(begun)

    def _room(self) -> int:
        """Experts that may be on their way ahead; `serving_order.waves` says why only half of the budget counts."""
        places = self._cache.budget // (2 * max(self._stock.high_nbytes))
        return places - self._wanted - sum(map(len, self._open.values()))

    def _may_leave(self, layer: int, chance: float, key: Key) -> bool:
        its_layer, expert, _ = self._stock.places[key]
        return not self._now < its_layer <= layer and self._policy.chance(its_layer, expert) < chance
