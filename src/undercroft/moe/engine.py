"""Serves the experts of each layer out of a cache of records, as its forward asks for them.

It knows layers, leases and the order in which experts are wanted; not transformers, nor how a family computes.
Invariants: an expert's bytes are held while its products run, and not after; what one forward of a layer wants is
asked for at once, or in waves where the cache has no room for all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from undercroft.errors import BudgetExceeded
from undercroft.moe.bank import Layer
from undercroft.moe.indexed import KIND, IndexedExperts
from undercroft.store.cache import RecordCache
from undercroft.store.record import Key
from undercroft.store.slab import Lease


class Engine:
    """The experts of a model.

    Args:
        layers: what they are made of.
        source: where they are.
        cache: what holds some of them.
    """

    def __init__(self, layers: Sequence[Layer], source: IndexedExperts, cache: RecordCache) -> None:
        self.layers, self._source, self._cache = layers, source, cache
        largest = max(source[layer.key(0, KIND)].occupied for layer in layers)
        if cache.budget < largest:
            raise BudgetExceeded(largest, cache.budget, least=largest)

    def layer(self, layer: Layer) -> LayerEngine:
        """What serves one layer."""
        return LayerEngine(self, layer)

    def fetch(self, keys: Sequence[Key]) -> Iterator[tuple[Key, Lease]]:
        """Ask the cache for experts that it has room for at once."""
        return self._cache.fetch(keys)

    def waves(self, keys: Sequence[Key]) -> Iterator[list[Key]]:
        """Keys in runs that the cache has room for at once."""
        wave: list[Key] = []
        room = self._cache.budget
        for key in keys:
            nbytes = self._source[key].occupied
            if wave and nbytes > room:
                yield wave
                wave, room = [], self._cache.budget
            wave.append(key)
            room -= nbytes
        if wave:
            yield wave

    def parameters(self, key: Key, layer: Layer, lease: Lease) -> Mapping[str, Tensor]:
        """An expert's parameters in the model's dtype, over its lease where that is how they are stored."""
        found = self._source.parameters(key, layer, lease)
        return {name: tensor.to(layer.parameters[name].dtype) for name, tensor in found.items()}


class LayerEngine:
    """Serves the experts of one layer; see `streamed.StreamedLayer`."""

    def __init__(self, engine: Engine, layer: Layer) -> None:
        self.parameters = layer.parameters
        self._engine, self._layer = engine, layer

    def fetch(self, experts: list[int], weights: Tensor, chosen: Tensor) -> LayerFetch:
        """Begin to bring experts, which will be asked for in this order."""
        return LayerFetch(self._engine, self._layer, experts)


class LayerFetch:
    """The experts of one forward of one layer; see `streamed.Fetch`."""

    def __init__(self, engine: Engine, layer: Layer, experts: Sequence[int]) -> None:
        self._engine, self._layer = engine, layer
        self._waves = engine.waves([layer.key(expert, KIND) for expert in experts])
        self._coming: Iterator[tuple[Key, Lease]] = iter(())
        self._held: dict[Key, Lease] = {}
        self._at: Key | None = None
        self._parameters: Mapping[str, Tensor] = {}
        self._begin()

    def __getitem__(self, expert: int) -> Mapping[str, Tensor]:
        key = self._layer.key(expert, KIND)
        if key != self._at:
            self._parameters, self._at = {}, None
            lease = self._lease(key)
            self._parameters, self._at = self._engine.parameters(key, self._layer, lease), key
        return self._parameters

    def close(self) -> None:
        """Let go of all."""
        self._parameters, self._at = {}, None
        self._held.clear()
        self._coming = iter(())

    def _begin(self) -> bool:
        wave = next(self._waves, None)
        if wave is None:
            return False
        self._held.clear()
        self._coming = self._engine.fetch(wave)
        return True

    def _lease(self, key: Key) -> Lease:
        while key not in self._held:
            arrived = next(self._coming, None)
            if arrived is not None:
                self._held[arrived[0]] = arrived[1]
            elif not self._begin():  # a forward that asks for an expert nobody chose
                self._held.clear()
                self._coming = self._engine.fetch([key])
        return self._held.pop(key)
