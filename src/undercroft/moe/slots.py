"""Experts on a device: as many as a budget of its bytes holds, each in a slot of one arena.

It knows slots, what fills them and what is computed with them; not files, layers or transformers. Which experts leave
first a policy says, as in a record cache. Invariants: slots never take more than the budget; a slot is not written
while what was computed with its last content may still run; what fills it stays in memory until the copy is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from undercroft.errors import BudgetExceeded
from undercroft.moe.carriage import Carriage, Carrier, Mark
from undercroft.moe.layered import ExpertPolicy
from undercroft.moe.packed import PackedMatrix
from undercroft.moe.paper import PaperSlab, PaperSource
from undercroft.moe.stock import Stock
from undercroft.store.ranges import BLOCK, round_up
from undercroft.store.record import Key
from undercroft.store.shelf import Entry, Shelf

_ALIGNMENT = 256
"""Of each tensor in its slot: as PyTorch's own are, so that products choose the same kernels."""
Parameters = Mapping[str, Tensor | PackedMatrix]


@dataclass(slots=True, eq=False)
class _Slot:
    """A range of the arena, and what there is to know of it.

    Attributes:
        start: in the arena.
        end: in the arena.
        parameters: of the expert, over the arena.
        carriage: what fills it; None once that is known to be done.
        used: behind all that was computed with it; None while nothing was.
    """

    start: int
    end: int
    parameters: Parameters
    carriage: Carriage | None
    used: Mark | None = None


class _Use(NamedTuple):
    """A range of the arena that something may still be computed with."""

    start: int
    end: int
    used: Mark


class _Flight(NamedTuple):
    """A copy that may be under way, and what must live until it is done."""

    carriage: Carriage
    nbytes: int
    keep: object


class Slots:
    """Experts by key, under a budget of bytes on a device.

    Args:
        budget: the most bytes that they may take; all are taken at once.
        stock: which experts there are.
        policy: which leaves first; the caller tells it of layers.
        carrier: what copies to the device.
        on_carried: told the bytes of each copy that is done, and the seconds that it took.

    Attributes:
        budget: as given, in whole blocks.
        policy: as given.
        carried_nbytes: of all copies so far.

    Raises:
        BudgetExceeded: it does not hold the largest expert.
    """

    def __init__(
        self,
        budget: int,
        stock: Stock,
        policy: ExpertPolicy,
        carrier: Carrier,
        on_carried: Callable[[int, float], None],
    ) -> None:
        largest = max((*stock.high_nbytes, *stock.low_nbytes))
        if budget < largest:
            raise BudgetExceeded(largest, budget, least=largest, tier="device")
        self.budget, self.policy = budget // BLOCK * BLOCK, policy
        self.carried_nbytes = 0
        self._carrier, self._on_carried = carrier, on_carried
        self._arena = carrier.arena(self.budget)
        self._source = PaperSource(stock)
        self._shelf = Shelf(self.budget, PaperSlab(self.budget, page=BLOCK), policy, self._left)
        self._slots: dict[Key, _Slot] = {}
        self._unmarked: list[_Slot] = []
        self._in_use: list[_Use] = []
        self._flights: deque[_Flight] = deque()

    @property
    def held(self) -> int:
        """Bytes of experts that are there, or on their way."""
        return self._shelf.held

    @property
    def flying(self) -> int:
        """Bytes on their way, as of the last `collect`."""
        return sum(flight.nbytes for flight in self._flights)

    def __contains__(self, key: Key) -> bool:
        return key in self._slots

    def use(self, key: Key) -> Parameters:
        """The parameters of an expert that is there or on its way, for what is submitted to compute before `mark`."""
        slot = self._slots[key]
        if slot.carriage is not None:
            if slot.carriage.query():
                slot.carriage = None
            else:
                self._carrier.wait(slot.carriage)
        self._unmarked.append(slot)
        return slot.parameters

    def mark(self) -> None:
        """All that computes with what `use` gave is submitted; before nothing else comes on another stream."""
        if self._unmarked:
            mark = self._carrier.mark()
            for slot in self._unmarked:
                slot.used = mark
            self._unmarked.clear()

    def bring(self, key: Key, parameters: Parameters, keep: object, *, spared: Set[Key]) -> bool:
        """Begin to copy an expert there; experts leave for it, but none that is spared.

        Args:
            key: which; it is not there.
            parameters: here.
            keep: what must live until they are copied.
            spared: who does not leave.

        Returns:
            Whether there was room.

        Raises:
            BudgetExceeded: there is none, though nobody is spared.
        """
        places, nbytes = _places(parameters)
        record = replace(self._source[key], nbytes=nbytes, shape=(nbytes,))
        entry = self._shelf.admit(record, self._source, spare=lambda each: each.key not in spared)
        if entry is None:
            if not spared:
                raise BudgetExceeded(record.occupied, self.budget, least=record.occupied, tier="device")
            return False
        self._shelf.land(entry)
        start, end = entry.address, entry.address + entry.nbytes
        after = self._uses_of(start, end)
        there = {name: self._view(start + place, here) for name, (place, here) in places.items()}
        pieces = [(_bytes(there[name]), _bytes(here)) for name, (_, here) in places.items()]
        carriage = self._carrier.carry(pieces, after)
        self._flights.append(_Flight(carriage, nbytes, (keep, parameters)))
        self.carried_nbytes += nbytes
        self._slots[key] = _Slot(start, end, _moved(parameters, there), carriage)
        return True

    def collect(self) -> None:
        """Let go of what copies that are done were made of."""
        while self._flights and self._flights[0].carriage.query():
            flight = self._flights.popleft()
            self._on_carried(flight.nbytes, flight.carriage.seconds)

    def settle(self, but: int = 0) -> None:
        """Wait for all copies but the last few, and let go of what they were made of."""
        while len(self._flights) > but:
            self._flights[0].carriage.synchronize()
            self.collect()

    def _left(self, entry: Entry) -> None:
        slot = self._slots.pop(entry.key)
        if slot in self._unmarked:
            self.mark()
        if slot.used is not None:
            self._in_use.append(_Use(slot.start, slot.end, slot.used))

    def _uses_of(self, start: int, end: int) -> list[Mark]:
        """What may still read a range of the arena."""
        self._in_use = [each for each in self._in_use if not each.used.query()]
        return [each.used for each in self._in_use if each.start < end and start < each.end]

    def _view(self, place: int, like: Tensor) -> Tensor:
        """As `like`, but in the arena."""
        return self._arena[place : place + like.nbytes].view(like.dtype).view(like.shape)


def _places(parameters: Parameters) -> tuple[dict[str, tuple[int, Tensor]], int]:
    """Where in its slot each tensor of an expert goes, and the bytes of all."""
    places: dict[str, tuple[int, Tensor]] = {}
    end = 0
    for name, tensor in _tensors(parameters).items():
        places[name] = (end, tensor)
        end = round_up(end + tensor.nbytes, _ALIGNMENT)
    return places, end


def _tensors(parameters: Parameters) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, each in parameters.items():
        if isinstance(each, Tensor):
            found[name] = each
            continue
        found[name] = each.packed
        if each.inputs is not None:
            found[f"{name}.inputs"] = each.inputs
    return found


def _moved(parameters: Parameters, there: Mapping[str, Tensor]) -> Parameters:
    """The same parameters over other tensors."""
    return {
        name: there[name]
        if isinstance(each, Tensor)
        else replace(each, packed=there[name], inputs=there.get(f"{name}.inputs"))
        for name, each in parameters.items()
    }


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
