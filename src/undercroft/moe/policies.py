"""The eviction policies for experts, by name: ours, those of the literature, and one that knows the future.

Pure. They exist to be compared by the same simulation, so each says which formula it is. Tokens are counted in
forwards: a prefill counts as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from undercroft.errors import InvalidInput
from undercroft.moe.expected_use import ExpectedUse
from undercroft.moe.layered import ExpertPolicy, Heedless, Layered, Standing, Wanted
from undercroft.moe.stock import Stock
from undercroft.store.policy import Lfu, Lru
from undercroft.store.record import Key

Step = tuple[int, Sequence[int]]
"""A layer, and the experts that a forward wants of it."""


class LeastRecent(Lru[Key], Heedless):
    """`store.policy.Lru` over all layers."""


class LeastFrequent(Lfu[Key], Heedless):
    """`store.policy.Lfu` over all layers."""


class _Counting(Layered):
    """Remembers when and how often each key was touched in this sequence."""

    def __init__(self, stock: Stock) -> None:
        super().__init__(stock)
        self.begin()

    def begin(self) -> None:
        """See `ExpertPolicy`: the records of HOBBIT are those of one sequence."""
        self._forwards = 0
        self._served = [0] * self._stock.layers
        self._last: dict[Key, int] = {}
        self._touches: dict[Key, int] = {}
        self._unsorted.update(range(self._stock.layers))

    def touch(self, key: Key) -> None:
        """See `EvictionPolicy`."""
        self._last[key] = self._forwards
        self._touches[key] = self._touches.get(key, 0) + 1
        self._unsorted.add(self._stock.places[key].layer)

    def _learn(self, layer: int, wanted: Sequence[Wanted], tokens: int) -> None:
        if layer <= self._now or not self._forwards:
            self._forwards += 1
        self._served[layer] = self._forwards

    def _distances(self) -> list[int]:
        """Of each layer, in layer steps; 0 is the one that is served."""
        return [(layer - self._now) % self._stock.layers for layer in range(self._stock.layers)]


class Lfru(_Counting):
    """Fewest touches per forward since the last one: frequency divided by age, as expert caches of servers do."""

    def _standing(self, key: Key) -> Standing:
        age = self._served[self._stock.places[key].layer] - self._last.get(key, 0) + 1
        return Standing(0, -self._touches.get(key, 0) / age)

    def _head_starts(self) -> Sequence[float]:
        return [0.0] * self._stock.layers


class Hobbit(_Counting):
    """The priority of HOBBIT (arXiv 2411.01433, section 3.4) with a quarter of the weight on each of its four terms.

    R / T + F / T + H / T + 1 - ((l - now) mod L) / L, with R the last forward that used it, F its uses, H its uses
    that deserved the high copy, T forwards so far. The paper fits the weights and does not publish them.
    """

    def begin(self) -> None:
        """See `ExpertPolicy`."""
        self._highs: dict[Key, int] = {}
        super().begin()

    def _learn(self, layer: int, wanted: Sequence[Wanted], tokens: int) -> None:
        super()._learn(layer, wanted, tokens)
        for expert, _, is_high in wanted:
            key = self._stock.high_keys[layer][expert]
            self._highs[key] = self._highs.get(key, 0) + is_high

    def _standing(self, key: Key) -> Standing:
        records = (self._last, self._touches, self._highs)
        return Standing(0, -sum(record.get(key, 0) for record in records))

    def _head_starts(self) -> Sequence[float]:
        return [self._forwards * distance / self._stock.layers for distance in self._distances()]


class Apex(_Counting):
    """Least Costly Used, of MoE-APEX (doi 10.1145/3779212.3790187).

    C / T + [used in the previous forward] / (((l - now) mod L) + 0.1), with C the uses that deserved the high copy
    plus the low ones at the price of a low copy, T forwards so far.
    """

    groups = 2

    def begin(self) -> None:
        """See `ExpertPolicy`."""
        self._costs: dict[tuple[int, int], float] = {}
        super().begin()

    def _learn(self, layer: int, wanted: Sequence[Wanted], tokens: int) -> None:
        super()._learn(layer, wanted, tokens)
        low_nbytes = self._stock.low_nbytes
        low_cost = low_nbytes[layer] / self._stock.high_nbytes[layer] if low_nbytes else 0.0
        for expert, _, is_high in wanted:
            place = (layer, expert)
            self._costs[place] = self._costs.get(place, 0.0) + (1.0 if is_high else low_cost)

    def _standing(self, key: Key) -> Standing:
        layer, expert, _ = self._stock.places[key]
        is_recent = self._last.get(key, -1) == self._served[layer]
        return Standing(int(is_recent), -self._costs.get((layer, expert), 0.0))

    def _head_starts(self) -> Sequence[float]:
        bonuses = (self._forwards / (distance + 0.1) for distance in self._distances())
        return [start for bonus in bonuses for start in (0.0, -bonus)]


class Belady(Layered):
    """Latest next use first: no policy hits more often where all copies weigh the same.

    Args:
        stock: which experts there are.
        future: every step to come, in order; each `turn_to` is one of them.
    """

    def __init__(self, stock: Stock, future: Iterable[Step]) -> None:
        super().__init__(stock)
        self._step = 0
        self._uses: dict[tuple[int, int], list[int]] = {}
        for number, (layer, experts) in enumerate(future, start=1):
            for expert in experts:
                self._uses.setdefault((layer, expert), []).append(number)
        self._never = 1 + max((numbers[-1] for numbers in self._uses.values()), default=0)
        for numbers in self._uses.values():
            numbers.reverse()

    def _learn(self, layer: int, wanted: Sequence[Wanted], tokens: int) -> None:
        self._step += 1
        for each in wanted:
            self._uses[layer, each.expert].pop()

    def _standing(self, key: Key) -> Standing:
        layer, expert, _ = self._stock.places[key]
        numbers = self._uses.get((layer, expert))
        return Standing(0, float(numbers[-1] if numbers else self._never))

    def _head_starts(self) -> Sequence[float]:
        return [0.0] * self._stock.layers


_POLICIES: dict[str, Callable[[Stock], ExpertPolicy]] = {
    "expected-use": ExpectedUse,
    "lru": lambda stock: LeastRecent(),
    "lfu": lambda stock: LeastFrequent(),
    "lfru": Lfru,
    "hobbit": Hobbit,
    "apex": Apex,
}
ONLINE = tuple(_POLICIES)
"""The policies that need not know the future, the default first."""


def make_policy(name: str, stock: Stock, *, future: Iterable[Step] | None = None) -> ExpertPolicy:
    """A policy by name: one of `ONLINE`, or "belady".

    Args:
        name: which.
        stock: which experts there are.
        future: every step to come; only "belady" needs it.

    Raises:
        InvalidInput: there is no such policy, or "belady" is not told the future.
    """
    if name == "belady" and future is not None:
        return Belady(stock, future)
    if name not in _POLICIES:
        hint = "; belady runs in a simulation only" if name == "belady" else ""
        raise InvalidInput(f"{name!r} is no policy; there are {', '.join(ONLINE)}{hint}")
    return _POLICIES[name](stock)
