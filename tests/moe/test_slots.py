"""Slots on a device: within their budget, never read before they are filled, never written while they are read.

The device here is made of two threads, one that copies and one that computes, each in its own order as a stream does.
"""

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from undercroft.errors import BudgetExceeded
from undercroft.kernels import Format, packed_nbytes, quantise
from undercroft.moe.carriage import Carriage, HostCarrier, Mark
from undercroft.moe.packed import PackedMatrix
from undercroft.moe.policies import make_policy
from undercroft.moe.slots import Parameters, Slots
from undercroft.moe.stock import Stock
from undercroft.store.record import Key

BLOCK = 4096
STOCK = Stock.of([3 * BLOCK, 5 * BLOCK, 2 * BLOCK], experts=6, used=2)
KEYS = list(STOCK.places)


class Point:
    """A point in a thread's work."""

    def __init__(self, future: Future[float]) -> None:
        self.future = future

    @property
    def seconds(self) -> float:
        return self.future.result()

    def query(self) -> bool:
        return self.future.done()

    def synchronize(self) -> None:
        self.future.result()


class Threads:
    """A device; a `Carrier`."""

    def __init__(self) -> None:
        self.link = ThreadPoolExecutor(1)
        self.compute = ThreadPoolExecutor(1)

    def arena(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def carry(self, pieces: Sequence[tuple[Tensor, Tensor]], after: Iterable[Mark]) -> Point:
        marks = list(after)

        def copy() -> float:
            for mark in marks:
                mark.synchronize()
            for there, here in pieces:
                there.copy_(here)
            return 0.001

        return Point(self.link.submit(copy))

    def mark(self) -> Point:
        return Point(self.compute.submit(float))

    def wait(self, carriage: Carriage) -> None:
        self.compute.submit(carriage.synchronize)

    def close(self) -> None:
        self.link.shutdown()
        self.compute.shutdown()


@pytest.fixture
def device() -> Iterator[Threads]:
    found = Threads()
    yield found
    found.close()


def expert(key: Key) -> dict[str, Tensor]:
    """Parameters that say whose they are, and fill nearly all of the room."""
    number = KEYS.index(key)
    rows = STOCK.occupied(key) // 4 // 2 - 32
    return {name: torch.full((rows,), number + 0.5) for name in ("gate_up_proj", "down_proj")}


def slots_of(budget: int, carrier: Any, on_carried: Callable[[int, float], None] | None = None) -> Slots:
    return Slots(budget, STOCK, make_policy("lru", STOCK), carrier, on_carried or (lambda *_: None))


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [5, 7, 12, 30])
def test_what_is_computed_with_is_what_was_brought(budget: int, seed: int) -> None:
    device, chance = Threads(), random.Random(seed)
    slots, wrong = slots_of(budget * BLOCK, device), list[Key]()

    def compute(key: Key, parameters: Parameters, seconds: float) -> None:
        time.sleep(seconds)
        for name, wanted in expert(key).items():
            if not torch.equal(wanted, parameters[name]):
                wrong.append(key)

    for step in range(120):
        key = chance.choice(KEYS)
        if key not in slots:
            assert slots.bring(key, expert(key), None, spared=set())
        assert slots.held <= slots.budget
        slots.policy.touch(key)
        device.compute.submit(compute, key, slots.use(key), chance.choice([0, 0, 1e-3]))
        if step % 3 == 0:
            slots.mark()
            slots.collect()
    slots.settle()
    device.close()
    assert wrong == []
    assert slots.flying == 0


def test_what_is_spared_stays(device: Threads) -> None:
    slots = slots_of(6 * BLOCK, device)
    first, second, third = STOCK.high_keys[0][:3]
    for key in (first, second):
        assert slots.bring(key, expert(key), None, spared=set())
    assert not slots.bring(third, expert(third), None, spared={first, second})
    assert third not in slots
    assert slots.bring(third, expert(third), None, spared={first})
    assert (first in slots, second in slots, third in slots) == (True, False, True)


def test_a_copy_beside_what_is_computed_does_not_wait_for_it(device: Threads) -> None:
    """Only one to where something is still read does."""
    slots, release = slots_of(6 * BLOCK, device), threading.Event()
    first, second, third = STOCK.high_keys[0][:3]
    slots.bring(first, expert(first), None, spared=set())
    slots.use(first)
    device.compute.submit(release.wait, 30)
    slots.mark()
    slots.bring(second, expert(second), None, spared=set())
    device.link.submit(float).result(30)  # it is through, though the device still computes
    slots.bring(third, expert(third), None, spared=set())
    assert first not in slots
    slots.collect()
    assert slots.flying > 0
    release.set()
    slots.settle()
    assert slots.flying == 0


def test_what_is_copied_from_is_kept_until_then(device: Threads) -> None:
    class Kept:
        """Something whose life can be watched."""

    import weakref

    slots, hold = slots_of(6 * BLOCK, device), threading.Event()
    device.link.submit(hold.wait, 30)
    kept = Kept()
    alive = weakref.ref(kept)
    slots.bring(KEYS[0], expert(KEYS[0]), kept, spared=set())
    del kept
    slots.collect()
    assert alive() is not None
    hold.set()
    slots.settle()
    assert alive() is None


def test_copies_are_told_of() -> None:
    told: list[tuple[int, float]] = []
    slots = slots_of(6 * BLOCK, HostCarrier(), lambda *each: told.append(each))
    slots.bring(KEYS[0], expert(KEYS[0]), None, spared=set())
    slots.settle()
    ((nbytes, seconds),) = told
    assert nbytes == slots.carried_nbytes > 2 * BLOCK
    assert seconds >= 0


def test_packed_matrices_keep_what_their_inputs_are_multiplied_by() -> None:
    format = Format(4)
    packed = quantise(torch.randn(32, 64), format)
    matrix = PackedMatrix(packed, format, 32, 64, transposed=False, inputs=torch.rand(64))
    assert packed.numel() == packed_nbytes(format, 32, 64)
    slots = slots_of(6 * BLOCK, HostCarrier())
    slots.bring(KEYS[0], {"down_proj": matrix, "bias": torch.ones(5)}, None, spared=set())
    found = slots.use(KEYS[0])
    moved = found["down_proj"]
    assert isinstance(moved, PackedMatrix)
    assert moved.packed.data_ptr() != packed.data_ptr()
    assert torch.equal(moved.tensor(), matrix.tensor())
    assert torch.equal(found["bias"], torch.ones(5))
    assert all(each.data_ptr() % 64 == 0 for each in (moved.packed, found["bias"]))


def test_a_budget_below_one_expert_is_refused() -> None:
    with pytest.raises(BudgetExceeded, match="device tier"):
        slots_of(5 * BLOCK - 1, HostCarrier())


def test_an_expert_larger_than_all_slots_is_refused_when_it_comes() -> None:
    slots = slots_of(5 * BLOCK, HostCarrier())
    with pytest.raises(BudgetExceeded, match="device tier"):
        slots.bring(KEYS[0], {"down_proj": torch.ones(6 * BLOCK)}, None, spared=set())
