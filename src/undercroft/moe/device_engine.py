"""Serves experts to a model on a device: from slots there, and through a cache of records in memory from the disk.

It knows slots, leases, and who computes an expert; not streams, nor how a family computes. Invariants: an expert's
slot is not given away before all that is computed with it was submitted; in a quality that never serves less than full
copies, all experts are computed on the device, by the family's own operations.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from undercroft.events import Recorder
from undercroft.kernels import ExpertKernel
from undercroft.moe.carriage import send
from undercroft.moe.cooperate import Estimates
from undercroft.moe.engine import Engine, ExpertReport, ExpertSource, ServedLayer, taken
from undercroft.moe.feed_forward import FeedForward
from undercroft.moe.importance import Importance
from undercroft.moe.layered import ExpertPolicy, Wanted
from undercroft.moe.quality import Quality
from undercroft.moe.serving_order import Choice, waves
from undercroft.moe.slots import Slots
from undercroft.moe.stock import Stock
from undercroft.store.arrivals import NOTHING
from undercroft.store.cache import RecordCache
from undercroft.store.record import Key
from undercroft.store.slab import Lease


class DeviceEngine(Engine):
    """The experts of a model that computes on a device.

    Args:
        source: where they are.
        stock: what there is.
        cache: what holds some of them in memory.
        quality: what may be given up.
        policy: which leaves memory first; the cache's own.
        recorder: the cache's own.
        slots: what holds some of them on the device.
        estimates: of what moving and computing take; told of each copy by the slots.
        cooperate: whether the CPU may compute experts, where the quality degrades.
        restores: whether the source lends memory for what it restores: for no more than one copy under way and another
            that begins.

    Attributes:
        slots: as given.
        estimates: as given.
        cooperates: whether the CPU may compute experts.

    Raises:
        BudgetExceeded: the cache has no room for one expert.
    """

    def __init__(
        self,
        source: ExpertSource,
        stock: Stock,
        cache: RecordCache,
        quality: Quality,
        policy: ExpertPolicy,
        recorder: Recorder,
        *,
        slots: Slots,
        estimates: Estimates,
        cooperate: bool,
        restores: bool,
    ) -> None:
        super().__init__(source, stock, cache, quality, policy, recorder)
        self.slots, self.estimates, self._restores = slots, estimates, restores
        self.cooperates = cooperate and quality.degrades

    def report(self) -> ExpertReport:
        """See `Engine`."""
        found, counted = super().report(), self._recorder.counters
        hits = int(counted.get("device_hits", 0))
        return replace(
            found,
            hits=found.hits + hits,
            device_hits=hits,
            device_held=self.slots.held,
            device_budget=self.slots.budget,
            moved_nbytes=self.slots.carried_nbytes,
            computed=int(counted.get("computed", 0)),
        )

    def turn_to(self, *, is_first: bool, is_prefill: bool) -> None:
        """See `Engine`."""
        super().turn_to(is_first=is_first, is_prefill=is_prefill)
        if is_first:
            self.slots.policy.begin()

    def serve(self, layer: ServedLayer, chosen: Tensor, weights: Tensor) -> DeviceService:
        """See `Engine`."""
        self.slots.collect()
        choices = self._choose(layer, chosen, weights, lambda key: key in self.slots or key in self.cache)
        self._tell_slots(layer.number, choices, len(chosen))
        return DeviceService(self, layer, choices)

    def bind(self, layer: ServedLayer, x: Tensor, chosen: Tensor, shares: Tensor, out: Tensor) -> None:
        """See `Engine`: nothing, for slots are looked at for each token."""

    def foresee(self, layer: int, experts: Sequence[int], chance: float = 1.0) -> int:
        """See `Engine`; what is on the device is not read into memory."""
        keys = self.stock.high_keys[layer]
        return super().foresee(layer, [each for each in experts if keys[each] not in self.slots], chance)

    def bring(self, key: Key, lease: Lease, *, spared: set[Key]) -> bool:
        """Begin to move an expert to the device; see `Slots.bring`."""
        if self._restores:
            self.slots.settle(but=1)
        return self.slots.bring(key, self._source.parameters(key, lease), lease, spared=spared)

    def count(self, name: str, number: int) -> None:
        """Count something for the report."""
        self._recorder.count(name, number)

    def _tell_slots(self, layer: int, choices: Sequence[Choice], tokens: int) -> None:
        wanted = [Wanted(each.expert, each.tokens, each.deserved is Importance.HIGH) for each in choices]
        self.slots.policy.turn_to(layer, wanted, tokens)
        keys = [choice.key for choice in choices if choice.key is not None]
        for key in keys:
            self.slots.policy.touch(key)
        self.count("device_hits", sum(key in self.slots for key in keys))


class _Group(NamedTuple):
    """Experts that came from memory together, by who computes them."""

    moved: Sequence[tuple[Key, Lease]] = ()
    computed: Sequence[tuple[Key, Lease]] = ()


class _Near(NamedTuple):
    """A token's activations in memory, and the seconds in which they came."""

    x: Tensor
    seconds: float

    @staticmethod
    def of(x: Tensor) -> _Near:
        began = time.perf_counter()
        return _Near(x.cpu(), time.perf_counter() - began)


class DeviceService:
    """The experts of one forward of one layer; a `streamed.Service`."""

    kernel: ExpertKernel | None = None

    def __init__(self, engine: DeviceEngine, layer: ServedLayer, choices: Sequence[Choice]) -> None:
        self._engine, self._slots, self._layer = engine, engine.slots, layer
        self.skipped = {choice.expert for choice in choices if choice.key is None}
        self._keys = {choice.expert: choice.key for choice in choices if choice.key is not None}
        self._pending = set(self._keys.values())  # what is still to be computed, and so does not leave
        absent = [key for key in self._keys.values() if key not in self._slots]
        self._absent = deque(absent)  # less those that were brought in their turn
        self._waves = waves(absent, engine.stock, engine.cache.budget)
        self._is_near = any(key in engine.cache for key in absent)
        self._coming = NOTHING
        self._held: dict[Key, Lease] = {}
        self._at: Key | None = None
        self._parameters: Mapping[str, Tensor] = {}
        self._begin()

    def __getitem__(self, expert: int) -> Mapping[str, Tensor]:
        key = self._keys.get(expert) or self._engine.stock.high_keys[self._layer.number][expert]
        if key != self._at:
            self._parameters = {}
            if self._at is not None:
                self._pending.discard(self._at)
            self._at = key
            self._pending.add(key)
            while key not in self._slots:
                self._bring_needed(key)
            self._bring_ahead()
            self._parameters = self._open(key)
        return self._parameters

    def outputs(self, x: Tensor, feed_forward: FeedForward) -> Iterator[tuple[Sequence[int], Tensor]]:
        """See `streamed.Service`. Copies begin before anything is computed beside them."""
        near = _Near.of(x) if self._engine.cooperates and self._absent else None
        there = [key for key in self._keys.values() if key in self._slots]
        group = self._divide(self._together()) if self._is_near else _Group()
        yield from self._on_device(there, x, feed_forward)
        while True:
            yield from self._on_device(self._brought(group), x, feed_forward)
            yield from self._without_room(group, x, feed_forward)
            if near is not None and group.computed:
                yield from self._on_cpu(group.computed, near, x.device, feed_forward)
            group = _Group()
            if not (arrived := self._together()) and not self._begin():
                return
            group = self._divide(arrived)
            del arrived

    def blocks(self) -> Iterator[Sequence[tuple[int, tuple[int, ...]]]]:
        """None; see `kernel`."""
        return iter(())

    def close(self) -> None:
        """See `streamed.Service`."""
        self._parameters, self._at = {}, None
        self._held.clear()
        self._coming = NOTHING
        self._slots.mark()
        self._slots.collect()

    def _begin(self) -> bool:
        """Ask memory for the next wave, in which leases of the one before have no part."""
        wave = next(self._waves, None)
        if wave is not None:
            self._ask(wave)
        return wave is not None

    def _ask(self, keys: Sequence[Key]) -> None:
        self._held.clear()
        self._slots.settle()
        self._coming = self._engine.cache.fetch(keys)

    def _together(self) -> list[tuple[Key, Lease]]:
        """Some of those that were asked for, waited for; none where all came."""
        began = time.perf_counter()
        arrived = self._coming.together()
        self._engine.waited_seconds += time.perf_counter() - began
        return arrived

    def _bring_needed(self, key: Key) -> None:
        """Begin to move what is computed next; wait for it, and let others leave for it, if need be."""
        while key not in self._held:
            if arrived := self._together():
                self._held.update(arrived)
                self._bring_ahead()
                if key in self._slots:
                    return
            elif not self._begin():  # a forward asks for what nobody chose, or what had to leave
                self._ask([key])
        lease = self._held.pop(key)
        if not self._engine.bring(key, lease, spared=self._pending):
            self._engine.bring(key, lease, spared=set())

    def _bring_ahead(self) -> None:
        """Begin to move what came and will be computed, in that order, as far as there is room."""
        while self._absent:
            key = self._absent[0]
            if key in self._pending and key not in self._slots:
                lease = self._held.get(key)
                if lease is None or not self._engine.bring(key, lease, spared=self._pending):
                    return
                del self._held[key]
            self._absent.popleft()

    def _open(self, key: Key) -> dict[str, Tensor]:
        return taken(self._slots.use(key), self._layer)

    def _divide(self, arrived: Sequence[tuple[Key, Lease]]) -> _Group:
        """Begin to move those that the CPU does not compute, as far as there is room, and then some that it does."""
        if not self._engine.cooperates:
            self._move(arrived)
            return _Group(arrived)
        self._slots.collect()
        sizes = [self._engine.stock.occupied(key) for key, _ in arrived]
        moved, computed, kept = self._engine.estimates.divide(sizes, self._slots.flying)
        self._move([arrived[place] for place in moved])
        self._move([arrived[place] for place in kept])
        return _Group([arrived[place] for place in moved], [arrived[place] for place in computed])

    def _move(self, arrived: Sequence[tuple[Key, Lease]]) -> None:
        for key, lease in arrived:
            if not self._engine.bring(key, lease, spared=self._pending):
                return

    def _brought(self, group: _Group) -> list[Key]:
        """Those of a group that have room already: the first ones."""
        return [key for key, _ in group.moved if key in self._slots]

    def _without_room(
        self, group: _Group, x: Tensor, feed_forward: FeedForward
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The others, one after another: what was computed leaves for them."""
        for key, lease in group.moved:
            if key in self._pending:
                self._engine.bring(key, lease, spared=set())
                yield from self._on_device([key], x, feed_forward)

    def _on_device(
        self, keys: Sequence[Key], x: Tensor, feed_forward: FeedForward
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        began = time.perf_counter()
        found = [(key, feed_forward(x, self._open(key))) for key in keys]
        if keys and self._engine.cooperates:
            self._engine.estimates.note_dispatch(len(keys), time.perf_counter() - began)
        self._pending.difference_update(keys)
        for key, out in found:
            yield (self._engine.stock.places[key].expert,), out

    def _on_cpu(
        self,
        arrived: Sequence[tuple[Key, Lease]],
        near: _Near,
        device: torch.device,
        feed_forward: FeedForward,
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        began = time.perf_counter()
        found = self._products(arrived, near.x, feed_forward)
        computed = time.perf_counter()
        found = send(found.to(near.x.dtype), device)
        seconds = near.seconds + time.perf_counter() - computed
        stock = self._engine.stock
        nbytes = sum(stock.occupied(key) for key, _ in arrived)
        self._engine.estimates.note_compute(nbytes, computed - began, seconds)
        self._engine.count("computed", len(arrived))
        self._pending.difference_update(key for key, _ in arrived)
        yield [stock.places[key].expert for key, _ in arrived], found

    def _products(self, arrived: Sequence[tuple[Key, Lease]], x: Tensor, feed_forward: FeedForward) -> Tensor:
        """What experts make of one token where they lie: (experts, width)."""
        kernel = self._layer.kernel if feed_forward.is_silu else None
        taken = None if kernel is None else kernel.taken(x)
        if kernel is not None and taken is not None:
            return kernel.feed_forwards(taken, [self._engine.block(key, lease) for key, lease in arrived])
        opened = (self._engine.open(self._layer, key, lease) for key, lease in arrived)
        return torch.cat([feed_forward.of_each(x, [each]) for each in opened])
