"""The order in which a layer is served: which copy of each expert, and what is asked for at once.

The engine and the simulation both go through here, so that they cannot differ. It knows stock, quality and policy;
not what holds the copies, but for a question whether one is there. Invariants: a copy that is there in full precision
always serves; a low copy never serves what deserves a high one; the promise of `quality.Account`.

To serve a step is: `step`, then for each of its waves one fetch of all its keys, whose leases are dropped before
the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from undercroft.moe.importance import Importance, Use, classify
from undercroft.moe.layered import ExpertPolicy, Wanted
from undercroft.moe.quality import Account, Offer, Quality
from undercroft.moe.stock import Stock
from undercroft.store.record import Key

IsHere = Callable[[Key], bool]


class Choice(NamedTuple):
    """How an expert is served in this step.

    Attributes:
        expert: which.
        key: the copy that serves it; None if it is skipped.
        served: HIGH, LOW or SKIP.
        deserved: the same, had no copy been there.
        mass: its gate mass.
        tokens: how many of the forward's tokens are routed to it.
    """

    expert: int
    key: Key | None
    served: Importance
    deserved: Importance
    mass: float
    tokens: int


class ServingOrder:
    """Decides step by step; one for each model that runs.

    Attributes:
        account: of gate mass.

    Args:
        stock: which experts there are.
        quality: what may be given up.
        policy: told of every step.
    """

    def __init__(self, stock: Stock, quality: Quality, policy: ExpertPolicy) -> None:
        self.account = Account(quality, 1 / (stock.used * max(stock.high_nbytes)))
        self._stock, self._quality, self._policy = stock, quality, policy
        self._wanted = [Wanted(expert) for expert in range(stock.experts)]

    def step(self, layer: int, uses: Sequence[Use], tokens: int, is_here: IsHere) -> list[Choice]:
        """Turn to a layer.

        Args:
            layer: which.
            uses: what the forward wants of it, in ascending order of experts.
            tokens: of the forward.
            is_here: whether a copy is in memory now.

        Returns:
            A choice for each use, in their order.
        """
        choices = self._choose(layer, uses, tokens, is_here)
        wanted = [Wanted(each.expert, each.tokens, each.deserved is Importance.HIGH) for each in choices]
        self._policy.turn_to(layer, wanted, tokens)
        return choices

    def of_a_token(self, layer: int, experts: Sequence[int]) -> list[Choice]:
        """`step` of one token's experts where nothing is given up, so that their weights do not matter.

        Args:
            layer: which.
            experts: in ascending order.
        """
        self.note_token(layer, experts)
        highs, high = self._stock.high_keys[layer], Importance.HIGH
        return [Choice(expert, highs[expert], high, high, 1.0, 1) for expert in experts]

    def note_token(self, layer: int, experts: Sequence[int]) -> None:
        """`of_a_token` for whom knows what serves it."""
        assert not self._quality.degrades, "what may be given up is to be decided"
        self.account.note(1)
        self._policy.turn_to(layer, [self._wanted[expert] for expert in experts])

    def _choose(self, layer: int, uses: Sequence[Use], tokens: int, is_here: IsHere) -> list[Choice]:
        highs = self._stock.high_keys[layer]
        if not self._quality.degrades:
            self.account.note(tokens)
            high = Importance.HIGH
            return [Choice(use.expert, highs[use.expert], high, high, use.mass, use.tokens) for use in uses]
        if self._quality.thresholds is not None:
            classes = [classify(use.score, self._quality.thresholds) for use in uses]
        else:
            classes = self._decide(layer, uses, tokens, is_here)
        choices = [self._serve(layer, use, each, is_here) for use, each in zip(uses, classes, strict=True)]
        if self._quality.thresholds is not None:
            self.account.note(tokens, _mass(choices, Importance.LOW), _mass(choices, Importance.SKIP))
        return choices

    def _decide(self, layer: int, uses: Sequence[Use], tokens: int, is_here: IsHere) -> list[Importance]:
        """What each use deserves by the account; an expert that is the first of any token is HIGH."""
        lesser = {index: self._offer(layer, use, is_here) for index, use in enumerate(uses) if use.score > 0}
        decided = dict(zip(lesser, self.account.decide(tokens, list(lesser.values())), strict=True))
        return [decided.get(index, Importance.HIGH) for index in range(len(uses))]

    def _offer(self, layer: int, use: Use, is_here: IsHere) -> Offer:
        nbytes = self._stock.high_nbytes[layer]
        skip_saves = nbytes if self._quality.skip else 0
        is_miss = not is_here(self._stock.high_keys[layer][use.expert])
        if not self._stock.low:
            return Offer(use.mass, 0, skip_saves, is_miss)
        if is_here(self._stock.low_keys[layer][use.expert]):
            return Offer(use.mass, nbytes, 0, is_miss)
        return Offer(use.mass, nbytes - self._stock.low_nbytes[layer], skip_saves, is_miss)

    def _serve(self, layer: int, use: Use, deserved: Importance, is_here: IsHere) -> Choice:
        """The copy in memory that will do, or else the one to read."""
        high = self._stock.high_keys[layer][use.expert]
        low = self._stock.low_keys[layer][use.expert] if self._stock.low else None
        served, key = Importance.SKIP, None
        if deserved is Importance.HIGH or is_here(high):
            served, key = Importance.HIGH, high
        elif low is not None and (deserved is Importance.LOW or is_here(low)):
            served, key = Importance.LOW, low
        return Choice(use.expert, key, served, deserved, use.mass, use.tokens)


def _mass(choices: Sequence[Choice], served: Importance) -> float:
    return sum(choice.mass for choice in choices if choice.served is served)


def waves(keys: Iterable[Key], stock: Stock, budget: int) -> Iterator[list[Key]]:
    """Keys in runs of which each finds room together, whatever holes there are.

    A run is no longer than half the budget has room for keys as large as its largest. Then there is a place for
    each: with the others of n keys of at most B bytes in use, at least 2 n B - (n - 1) B bytes are free or can
    be freed, in at most n pieces, so one of these has more than B.

    Args:
        keys: what a step wants.
        stock: says what they weigh.
        budget: bytes; a key that is larger than half of it makes a run by itself.
    """
    wave: list[Key] = []
    largest = 0
    for key in keys:
        nbytes = stock.occupied(key)
        if wave and 2 * (len(wave) + 1) * max(largest, nbytes) > budget:
            yield wave
            wave, largest = [], 0
        wave.append(key)
        largest = max(largest, nbytes)
    if wave:
        yield wave
