"""A stock: which experts a model has, in which forms they are stored, and what these weigh.

It knows numbers and names; not weights, files or memory. Invariant: every key of the stock is one object, and
says where it belongs without being parsed.

Layers are counted among those that have experts: 0 is the first of them, whatever lies between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from undercroft.errors import InvalidInput
from undercroft.store.ranges import round_up
from undercroft.store.record import Key

MOST_EXPERTS = 2**20
"""The most experts that a stock may have in all its layers: far above any model, far below what fills memory."""


class Place(NamedTuple):
    """Where a key belongs."""

    layer: int
    expert: int
    is_high: bool


@dataclass(frozen=True, kw_only=True)
class Stock:
    """The experts of a model.

    Attributes:
        experts: in each layer.
        used: by a token in each layer (the top-k of the router).
        high: the kind of the copies in full precision, such as "bfloat16".
        low: the kind of the copies in low precision, or None where there are none.
        high_nbytes: bytes that the high copy of an expert takes, by layer: whole blocks of 4096.
        low_nbytes: the same of the low copy; empty where there are none.
        high_keys: of each expert of each layer.
        low_keys: likewise; empty where there are no low copies.
        places: where each key belongs.

    Raises:
        InvalidInput: numbers that cannot be a model's.
    """

    experts: int
    used: int
    high: str
    high_nbytes: tuple[int, ...]
    low: str | None = None
    low_nbytes: tuple[int, ...] = ()
    high_keys: tuple[tuple[Key, ...], ...] = field(init=False, repr=False, compare=False)
    low_keys: tuple[tuple[Key, ...], ...] = field(init=False, repr=False, compare=False)
    places: dict[Key, Place] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (0 < self.used <= self.experts and 0 < self.experts * self.layers <= MOST_EXPERTS):
            raise InvalidInput(
                f"{self.used} of {self.experts} experts in {self.layers} layers is no model; there must be at least "
                f"one layer, no more experts used than there are, and at most {MOST_EXPERTS} in all"
            )
        if len(self.low_nbytes) != (self.layers if self.low else 0):
            raise InvalidInput(f"sizes of low copies in {len(self.low_nbytes)} of {self.layers} layers")
        if min((*self.high_nbytes, *self.low_nbytes)) < 1 or self.high == self.low:
            raise InvalidInput("every copy of an expert takes bytes, and its low copy is of another kind")
        object.__setattr__(self, "high_keys", self._keys(self.high))
        object.__setattr__(self, "low_keys", self._keys(self.low) if self.low else ())
        object.__setattr__(self, "places", self._places())

    @staticmethod
    def of(
        high_nbytes: Sequence[int],
        *,
        experts: int,
        used: int,
        high: str = "bfloat16",
        low: str | None = None,
        low_nbytes: Sequence[int] = (),
    ) -> Stock:
        """A stock of records: sizes are bytes of content, by layer, and are rounded up to whole blocks."""
        return Stock(
            experts=experts,
            used=used,
            high=high,
            high_nbytes=tuple(map(round_up, high_nbytes)),
            low=low,
            low_nbytes=tuple(map(round_up, low_nbytes)),
        )

    @property
    def layers(self) -> int:
        """How many have experts."""
        return len(self.high_nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all high copies: the whole of which a budget is a share."""
        return self.experts * sum(self.high_nbytes)

    def occupied(self, key: Key) -> int:
        """Bytes that a copy takes."""
        layer, _, is_high = self.places[key]
        return self.high_nbytes[layer] if is_high else self.low_nbytes[layer]

    def _keys(self, kind: str) -> tuple[tuple[Key, ...], ...]:
        return tuple(
            tuple(Key(f"layers.{layer}.experts.{expert}", kind) for expert in range(self.experts))
            for layer in range(self.layers)
        )

    def _places(self) -> dict[Key, Place]:
        copies = ((self.high_keys, True), (self.low_keys, False))
        return {
            key: Place(layer, expert, is_high)
            for keys, is_high in copies
            for layer, row in enumerate(keys)
            for expert, key in enumerate(row)
        }
