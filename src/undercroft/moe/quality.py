"""How much precision may be given up, and an account that keeps the promise.

Pure: it knows gate masses and bytes that could be saved; not experts, kinds of storage or memory. Invariant:
after every step the mass served low is at most `low` times all mass so far, and the mass skipped at most
`skip` times it, however the steps come.

Gate mass stands for quality because a gate weight and the weight of what its expert adds to the output
correlate with r = 0.99 (HOBBIT, arXiv 2411.01433, section 2). Fixed thresholds do not bound it: those of the
paper serve 3 of 10 parts of the mass of a top-6 router low.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from undercroft.errors import InvalidInput
from undercroft.moe.importance import Importance

High = Literal["keep", "bfloat16", "int8", "int4"]
Low = Literal["int4", "int2"]
Dense = Literal["keep", "int8"]

_LEAST_PRICE = 0.1
"""The going price of an empty account, in fair prices: experts a tenth as important as others are always cheap."""
_PATIENCE = 100.0
"""Unspent steps of one token for which the going price grows by e."""
_LONGEST_UNSPENT = 1000.0
"""Steps of one token, about 20 tokens of a large model, after which what is unspent expires."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What may be given up for speed. Nothing of it is without being asked for: see `preset("exact")`.

    Attributes:
        low: the share of all gate mass that may be served by low copies, 0 to 1.
        skip: the share that may be left out, 0 to 1.
        high: the least precision of the full copies; "keep" is that of the checkpoint.
        low_precision: that of the low copies; None means there are none.
        dense: the precision of all other weights.
        thresholds: the scores up to which an expert is HIGH and LOW (`importance.classify`), for every token
            alike; None means that an `Account` decides, and that only `low` and `skip` bind it.

    Raises:
        InvalidInput: a share that is none, or a precision that is not offered.
    """

    low: float = 0.05
    skip: float = 0.0
    high: High = "keep"
    low_precision: Low | None = "int4"
    dense: Dense = "keep"
    thresholds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("low", "skip"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInput(f"{name} is a share of the gate mass, 0 to 1, not {getattr(self, name)!r}")
        offered = {"high": get_args(High), "low_precision": (*get_args(Low), None), "dense": get_args(Dense)}
        for name, values in offered.items():
            if getattr(self, name) not in values:
                raise InvalidInput(f"{name} is one of {values}, not {getattr(self, name)!r}")
        if self.high == self.low_precision:
            raise InvalidInput(f"low copies in {self.low_precision}, like the high ones, would save nothing")
        if self.thresholds and not 0 <= self.thresholds[0] <= self.thresholds[1]:
            raise InvalidInput(f"thresholds are two rising scores, not {self.thresholds!r}")

    @property
    def is_exact(self) -> bool:
        """Whether every number is the one that the checkpoint in memory would give."""
        return self.high == self.dense == "keep" and not self.degrades

    @property
    def degrades(self) -> bool:
        """Whether an expert may ever be served by less than its high copy."""
        has_low = self.low_precision is not None and self.low > 0
        return has_low or self.skip > 0

    @staticmethod
    def preset(name: str) -> Quality:
        """A quality by name.

        Args:
            name: "exact" gives up nothing; "balanced" has experts in int8, at most 5 % of the gate mass in int4, and
                all other weights in int8; "fast" has them in int4, at most 10 % in int2; "hobbit" has the thresholds .6
                and .9 of the paper, and no bound.

        Raises:
            InvalidInput: no such name.
        """
        if name not in _PRESETS:
            raise InvalidInput(f"{name!r} is no quality; there are {', '.join(_PRESETS)}")
        return _PRESETS[name]


_PRESETS = {
    "exact": Quality(low=0.0, low_precision=None),
    "balanced": Quality(low=0.05, high="int8", dense="int8"),
    "fast": Quality(low=0.10, high="int4", low_precision="int2", dense="int8"),
    "hobbit": Quality(low=1.0, skip=1.0, thresholds=(0.6, 0.9)),
}


class Offer(NamedTuple):
    """An expert that may be degraded if it is not in memory.

    Attributes:
        mass: its gate mass.
        low_saves: bytes not read if it is served low.
        skip_saves: bytes not read if it is skipped.
        is_miss: whether it is not in memory, so that a class below HIGH is charged.
    """

    mass: float
    low_saves: int
    skip_saves: int
    is_miss: bool


class Account:
    """The running account of a quality's gate mass.

    Offers compete by price: gate mass for each byte saved. A step takes the cheapest ones first, and none above the
    going price, which rises with what the account has to spend. So a step does not spend on a dear miss what
    the next could spend on a cheap one. What is left unspent for long expires: the tokens after a long prompt are not
    served worse for all that the prompt did not need.

    Attributes:
        mass: all gate mass so far; a token has 1 in each layer.
        low_mass: what was served low.
        skip_mass: what was skipped.

    Args:
        quality: what the account allows.
        fair_price: gate mass for a byte of an ordinary expert: 1 over the experts that a token uses and the bytes of
            one.
    """

    def __init__(self, quality: Quality, fair_price: float) -> None:
        self.quality = quality
        self.mass = self.low_mass = self.skip_mass = 0.0
        self._low_left = self._skip_left = 0.0
        self._least_price = _LEAST_PRICE * fair_price

    def note(self, mass: float, low: float = 0.0, skip: float = 0.0) -> None:
        """Take note of a step that was not for the account to decide."""
        self.mass += mass
        self.low_mass += low
        self.skip_mass += skip

    def decide(self, mass: float, offers: Sequence[Offer]) -> list[Importance]:
        """What each offer deserves; the account is charged for those of them that are misses.

        Args:
            mass: gate mass of the whole step.
            offers: the experts that may be degraded.
        """
        self._pay_in(mass)
        going = self._going_price()
        classes = [Importance.HIGH] * len(offers)
        for index in sorted(range(len(offers)), key=lambda each: _price(offers[each])):
            if _price(offers[index]) > going:
                break
            classes[index] = self._settle(offers[index])
        return classes

    def _pay_in(self, mass: float) -> None:
        self.mass += mass
        most = max(mass, _LONGEST_UNSPENT)
        self._low_left = min(self._low_left + self.quality.low * mass, self.quality.low * most)
        self._skip_left = min(self._skip_left + self.quality.skip * mass, self.quality.skip * most)

    def _settle(self, offer: Offer) -> Importance:
        charge = offer.mass if offer.is_miss else 0.0
        if offer.skip_saves and self._can_skip(offer.mass):
            self.skip_mass += charge
            self._skip_left -= charge
            return Importance.SKIP
        if offer.low_saves and self._can_lower(offer.mass):
            self.low_mass += charge
            self._low_left -= charge
            return Importance.LOW
        return Importance.HIGH

    def _can_skip(self, mass: float) -> bool:
        return mass <= self._skip_left and self.skip_mass + mass <= self.quality.skip * self.mass

    def _can_lower(self, mass: float) -> bool:
        return mass <= self._low_left and self.low_mass + mass <= self.quality.low * self.mass

    def _going_price(self) -> float:
        """Grows by e with every so many steps of one token whose allowance was not spent."""
        allowed = self.quality.low + self.quality.skip
        unspent = (self._low_left + self._skip_left) / allowed if allowed else 0.0
        return self._least_price * math.exp(min(unspent / _PATIENCE, 50.0))


def _price(offer: Offer) -> float:
    return offer.mass / max(offer.low_saves, offer.skip_saves, 1)
