"""Serves the experts of each layer out of a cache of records, as its forward asks for them.

It knows layers, leases and the order in which experts are wanted; not transformers, nor how a family computes.
Invariants: an expert's bytes are held while its products run, and not after; what one forward of a layer wants is
asked for at once, or in waves where the cache has no room for all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from undercroft.errors import BudgetExceeded
from undercroft.events import Recorder
from undercroft.kernels import ExpertKernel
from undercroft.kernels.block import Mixing
from undercroft.moe.feed_forward import FeedForward
from undercroft.moe.hints import Hints
from undercroft.moe.importance import Use, weigh
from undercroft.moe.journal import Journal
from undercroft.moe.layered import ExpertPolicy
from undercroft.moe.packed import PackedMatrix
from undercroft.moe.packed_weight import PackedWeight
from undercroft.moe.quality import Quality
from undercroft.moe.residents import Residents
from undercroft.moe.serving_order import Choice, IsHere, ServingOrder, waves
from undercroft.moe.stock import Stock
from undercroft.moe.streamed import Service
from undercroft.moe.trace import Trace
from undercroft.store.arrivals import NOTHING
from undercroft.store.cache import RecordCache
from undercroft.store.record import Key
from undercroft.store.slab import Lease


class ExpertSource(Protocol):
    """Where the experts are."""

    def parameters(self, key: Key, lease: Lease) -> Mapping[str, Tensor | PackedMatrix]:
        """An expert's parameters, as stored, over a lease that holds it."""
        ...

    def kernel(self, layer: int, *, low: bool) -> ExpertKernel | None:
        """What computes a layer's experts by addresses, low copies too or not; then `block` gives each."""
        ...

    def block(self, key: Key, lease: Lease) -> tuple[int, ...]:
        """Where an expert is while a lease holds it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedLayer:
    """What is to be known of a layer.

    Attributes:
        number: among the layers with experts.
        experts: how many.
        dtypes: of each of their parameters in the model.
        kernel: what computes them by their addresses, if something does.
        is_usual: one token goes through `outputs` or `blocks`; other forwards may keep what they are given for longer.
    """

    number: int
    experts: int
    dtypes: Mapping[str, torch.dtype]
    kernel: ExpertKernel | None = None
    is_usual: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertReport:
    """What the experts of a model cost so far.

    Attributes:
        hits: experts that were in memory, or on their way there, when they were wanted.
        misses: experts that were not.
        read_nbytes: bytes read for them.
        evictions: copies that left to make room.
        held: bytes of experts in memory now.
        budget: the most that there may be.
        waited_seconds: time that forwards stood still for reads.
        low_mass: share of the gate mass served by low copies, 0 to 1.
        skip_mass: share left out.
        predicted: bytes of experts that were begun to be read ahead.
        useful: bytes of these that were wanted by the forward they were read for.
        wasted: bytes of these that were read, and were not.
        device_hits: of the hits, experts that were on the device.
        device_held: bytes of experts there now.
        device_budget: the most that there may be.
        moved_nbytes: bytes copied there.
        computed: experts that the CPU computed, because moving them would have taken longer.
    """

    hits: int
    misses: int
    read_nbytes: int
    evictions: int
    held: int
    budget: int
    waited_seconds: float
    low_mass: float
    skip_mass: float
    predicted: int = 0
    useful: int = 0
    wasted: int = 0
    device_hits: int = 0
    device_held: int = 0
    device_budget: int = 0
    moved_nbytes: int = 0
    computed: int = 0

    @property
    def hit_rate(self) -> float:
        """Of all experts that were wanted; 0 where none was."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0


class Engine:
    """The experts of a model.

    Args:
        source: where they are.
        stock: what there is.
        cache: what holds some of them.
        quality: what may be given up.
        policy: which leaves first; the cache's own.
        recorder: the cache's own.

    Attributes:
        is_exact: no expert is ever served by less than its full copy.

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
    ) -> None:
        self.stock, self.cache = stock, cache
        self._source = source
        self.waited_seconds = 0.0
        self._recorder = recorder
        self._journal: Journal | None = None
        self._policy = policy
        self._order = ServingOrder(stock, quality, policy)
        self.is_exact = not quality.degrades
        self._hints = Hints(stock, cache, policy, recorder)
        self._residents = Residents(stock)
        cache.tell_of_leaving(self._residents.forget)
        # By the lease that an expert is kept by, not by one that pins it: so what was made of it goes when it leaves.
        self._opened: WeakKeyDictionary[Lease, tuple[Key, Mapping[str, Tensor]]] = WeakKeyDictionary()
        largest = max((*stock.high_nbytes, *stock.low_nbytes))
        if cache.budget < largest:
            raise BudgetExceeded(largest, cache.budget, least=largest)

    def report(self) -> ExpertReport:
        """What was done so far."""
        counted, account = self._recorder.counters, self._order.account
        return ExpertReport(
            hits=int(counted.get("hits", 0) + counted.get("waits", 0)),
            misses=int(counted.get("misses", 0)),
            read_nbytes=int(counted.get("read_bytes", 0)),
            evictions=int(counted.get("evictions", 0)),
            held=self.cache.held,
            budget=self.cache.budget,
            waited_seconds=self.waited_seconds,
            low_mass=account.low_mass / account.mass if account.mass else 0.0,
            skip_mass=account.skip_mass / account.mass if account.mass else 0.0,
            **self._hints.tally._asdict(),
        )

    def keep_journal(self) -> None:
        """Note from now on what is routed where."""
        self._journal = Journal(self.stock)

    def trace(self) -> Trace:
        """What was routed since `keep_journal`."""
        assert self._journal is not None, "no journal is kept"
        return self._journal.trace()

    def turn_to(self, *, is_first: bool, is_prefill: bool) -> None:
        """A forward begins, perhaps the first of a sequence."""
        if is_first:
            self._policy.begin()
        if self._journal is not None:
            self._journal.turn_to(is_first=is_first, is_prefill=is_prefill)

    def serve(self, layer: ServedLayer, chosen: Tensor, weights: Tensor) -> Service:
        """Begin to bring what one forward of a layer wants.

        Args:
            layer: which.
            chosen: (tokens, k) int64 on the CPU, experts by number; a number beyond the last means none.
            weights: (tokens, k), of the chosen.
        """
        choices = self._choose(layer, chosen, weights, self.cache.__contains__)
        return LayerService(self, layer, choices, is_token=len(chosen) == 1)

    def bind(
        self, layer: ServedLayer, x: Tensor, chosen: Tensor, shares: Tensor, out: Tensor
    ) -> Callable[[], bool] | None:
        """What serves one token after another in the same memory, as long as all its experts are in memory.

        Args:
            layer: which.
            x: (1, width), what goes into them.
            chosen: (1, used) int64 on the CPU; see `serve`.
            shares: (1, used), of the chosen.
            out: like x.

        Returns:
            It says whether it did; if not, or if there is none, `serve` has to.
        """
        kernel = layer.kernel
        if kernel is None or not self.is_exact or kernel.taken(x) is not x:
            return None
        table = self._residents.table(layer.number, layer.experts, kernel.fields)
        return partial(self._serve_token, layer, chosen, kernel.mixing(x, table, chosen, shares, out))

    def _serve_token(self, layer: ServedLayer, chosen: Tensor, mix: Mixing) -> bool:
        if self._journal is not None or not self._hints.is_idle:
            return False
        still = self.cache.still()
        is_done = mix()
        del still
        if is_done:
            (routed,) = cast("list[list[int]]", chosen.tolist())
            wanted = sorted(expert for expert in routed if expert < layer.experts)
            self._order.note_token(layer.number, wanted)
            self._hints.pass_by(layer.number, len(wanted))
            keys = self.stock.high_keys[layer.number]
            self.cache.touch([keys[expert] for expert in wanted])
        return is_done

    def foresee(self, layer: int, experts: Sequence[int], chance: float = 1.0) -> int:
        """Begin to read what a later layer of this forward will probably want, behind all that is wanted now.

        Room is taken from experts only that the policy gives up first, that no layer up to this one may want, and
        that are less likely to be wanted. So much is left that no demand of as many experts as the last one had lacks
        room for it. Where what is in memory decides which copy serves, nothing is read: results would depend on time.

        Args:
            layer: behind the one that is served now.
            experts: the likeliest first.
            chance: that they will be wanted, 0 to 1; the least of theirs.

        Returns:
            How many reads began.
        """
        return self._hints.foresee(layer, experts, chance) if self.is_exact else 0

    def open(self, layer: ServedLayer, key: Key, lease: Lease) -> Mapping[str, Tensor]:
        """An expert's parameters as the model takes them, over a lease that holds it."""
        return taken(self._source.parameters(key, lease), layer)

    def view(self, layer: ServedLayer, key: Key, lease: Lease) -> tuple[Mapping[str, Tensor], bool]:
        """The same, for as long as the lease lives and no longer, and whether they are nothing but views of its bytes.

        Such are made once while the expert stays.
        """
        known = self._opened.get(lease.first)
        if known is not None and known[0] == key:  # what leaves hands its room on
            return known[1], True
        opened = self.open(layer, key, lease.first)
        stays = all(type(each) is Tensor and _is_in(lease, each) for each in opened.values())
        if stays:
            self._opened[lease.first] = (key, opened)
        return opened, stays

    def block(self, key: Key, lease: Lease) -> tuple[int, ...]:
        """An expert as the kernels take it, for as long as the lease lives."""
        block = self._source.block(key, lease)
        self._residents.note(key, block)
        return block

    def _choose(self, layer: ServedLayer, chosen: Tensor, weights: Tensor, is_here: IsHere) -> list[Choice]:
        """What serves a forward of a layer, of which everybody is told."""
        if self._journal is not None:
            self._journal.note(layer.number, chosen.numpy(), weights.float().cpu().numpy())
        if self.is_exact and len(chosen) == 1:
            (routed,) = cast("list[list[int]]", chosen.tolist())
            wanted = sorted(expert for expert in routed if expert < layer.experts)
            choices = self._order.of_a_token(layer.number, wanted)
        else:
            uses = self._uses(layer, chosen.numpy(), weights)
            choices = self._order.step(layer.number, uses, len(chosen), is_here)
        self._hints.turn_to(layer.number, {choice.key for choice in choices})
        return choices

    def _uses(self, layer: ServedLayer, experts: NDArray[np.int64], weights: Tensor) -> list[Use]:
        if not self.is_exact:
            return weigh(experts, weights.float().cpu().numpy())
        numbers, counts = np.unique(experts, return_counts=True)
        return [
            Use(number, float(count), 0.0, count)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
            if number < layer.experts
        ]


class Server(NamedTuple):
    """How the module of a layer finds its experts; a `streamed.Serve` that binds tokens."""

    engine: Engine
    layer: ServedLayer

    def __call__(self, chosen: Tensor, weights: Tensor) -> Service:
        """See `Engine.serve`."""
        return self.engine.serve(self.layer, chosen, weights)

    def bind(self, x: Tensor, chosen: Tensor, shares: Tensor, out: Tensor) -> Callable[[], bool] | None:
        """See `Engine.bind`."""
        return self.engine.bind(self.layer, x, chosen, shares, out)


class LayerService:
    """The experts of one forward of one layer; a `streamed.Service`."""

    def __init__(
        self, engine: Engine, layer: ServedLayer, choices: Sequence[Choice], *, is_token: bool
    ) -> None:
        self._engine, self._layer = engine, layer
        self.skipped = {choice.expert for choice in choices if choice.key is None}
        self._keys = {choice.expert: choice.key for choice in choices if choice.key is not None}
        self._waves = waves(self._keys.values(), engine.stock, engine.cache.budget)
        self._coming = NOTHING
        self._held: dict[Key, Lease] = {}
        self._at = -1
        self._parameters: Mapping[str, Tensor] = {}
        # What `outputs` and `blocks` use does not outlive this object, so one pin may do for all, where all are there.
        keys = list(self._keys.values())
        self._hold = engine.cache.hold(keys) if is_token and layer.is_usual else None
        if self._hold is None:
            self._begin()
        else:
            self._held, self._waves = dict(zip(keys, self._hold.leases, strict=True)), iter(())

    def __getitem__(self, expert: int) -> Mapping[str, Tensor]:
        if expert != self._at:
            self._parameters, self._at = {}, -1
            key = self._keys.get(expert) or self._engine.stock.high_keys[self._layer.number][expert]
            self._parameters, self._at = self._engine.open(self._layer, key, self._lease(key)), expert
        return self._parameters

    def outputs(self, x: Tensor, feed_forward: FeedForward) -> Iterator[tuple[Sequence[int], Tensor]]:
        """What those make of a token that were chosen and are not skipped: those in memory first, then as they come.

        Those that lie in the cache as they are computed with are computed together. The others are made for it, one
        at a time, for what is made takes memory.
        """
        while True:
            while arrived := self._together():
                yield from self._made(arrived, x, feed_forward)
            if not self._begin():
                return

    @property
    def kernel(self) -> ExpertKernel | None:
        """See `streamed.Service`."""
        return self._layer.kernel

    def blocks(self) -> Iterator[Sequence[tuple[int, tuple[int, ...]]]]:
        """Those, all that are there at a time, as blocks that stay until the next are asked for.

        All of a wave have room together, so none has to leave for the next.
        """
        places = self._engine.stock.places
        while True:
            while arrived := self._together():
                yield [(places[key].expert, self._engine.block(key, lease)) for key, lease in arrived]
                del arrived
            if not self._begin():
                return

    def close(self) -> None:
        """Let go of all."""
        self._parameters, self._at = {}, -1
        self._held.clear()
        self._hold, self._coming = None, NOTHING

    def _made(
        self, arrived: list[tuple[Key, Lease]], x: Tensor, feed_forward: FeedForward
    ) -> list[tuple[Sequence[int], Tensor]]:
        """What those make of a token that arrived; none of their leases is left."""
        places = self._engine.stock.places
        made: list[tuple[Sequence[int], Tensor]] = []
        kept: list[tuple[int, Lease, Mapping[str, Tensor]]] = []
        arrived.reverse()
        while arrived:
            key, lease = arrived.pop()
            parts, stays = self._engine.view(self._layer, key, lease)
            if stays:
                kept.append((places[key].expert, lease, parts))
            else:
                made.append(((places[key].expert,), feed_forward.of_each(x, [parts])))
            del lease, parts
        if kept:
            rows = feed_forward.of_each(x, [parts for _, _, parts in kept])
            made.append(([expert for expert, _, _ in kept], rows))
        return made

    def _begin(self) -> bool:
        wave = next(self._waves, None)
        if wave is None:
            return False
        self._held.clear()
        self._coming = self._engine.cache.fetch(wave)
        return True

    def _lease(self, key: Key) -> Lease:
        while key not in self._held:
            if self._arrive() is None and not self._begin():  # a forward asks for an expert that nobody chose
                self._held.clear()
                self._coming = self._engine.cache.fetch([key])
        return self._held.pop(key)

    def _together(self) -> list[tuple[Key, Lease]]:
        """Those that are held; or wait for some of those that were asked for; none where all came."""
        if self._held:
            held, self._held = list(self._held.items()), {}
            return held
        began = time.perf_counter()
        arrived = self._coming.together()
        self._engine.waited_seconds += time.perf_counter() - began
        return arrived

    def _arrive(self) -> Key | None:
        """Wait for the next of those that were asked for; None where all came."""
        began = time.perf_counter()
        arrived = next(self._coming, None)
        self._engine.waited_seconds += time.perf_counter() - began
        if arrived is None:
            return None
        key, self._held[arrived[0]] = arrived
        return key


def _is_in(lease: Lease, tensor: Tensor) -> bool:
    return 0 <= tensor.data_ptr() - lease.address < lease.nbytes


def taken(found: Mapping[str, Tensor | PackedMatrix], layer: ServedLayer) -> dict[str, Tensor]:
    """An expert's parameters as the model takes them."""
    return {name: _taken(each, layer.dtypes[name]) for name, each in found.items()}


def _taken(stored: Tensor | PackedMatrix, dtype: torch.dtype) -> Tensor:
    if isinstance(stored, PackedMatrix):
        return PackedWeight.of(stored, dtype)
    return stored if stored.dtype is dtype else stored.to(dtype)
