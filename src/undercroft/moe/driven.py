"""An engine that is driven by a trace: routing as it was recorded, experts as they are on disk, and real products.

It knows how the parts that serve experts fit; not routers, attention or text. What it computes says nothing; what it
waits for and multiplies is what a model of that shape with that routing would. Invariants: its hits and bytes are those
of `simulate` on the same trace; each product is the one that a family's own forward does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from undercroft import machine
from undercroft.errors import InvalidInput
from undercroft.events import Recorder
from undercroft.kernels import ExpertKernel
from undercroft.moe.engine import Engine, ServedLayer
from undercroft.moe.feed_forward import FeedForward
from undercroft.moe.forwards import Forward
from undercroft.moe.manifest import PackedLayer
from undercroft.moe.packed import PackedExperts
from undercroft.moe.policies import make_policy
from undercroft.moe.quality import Quality
from undercroft.moe.streamed import attach, streamed_forward
from undercroft.store.cache import RecordCache
from undercroft.store.slab import Slab
from undercroft.store.transfer import TransferQueue


class Driven:
    """Experts of a folder behind an engine, to be driven; a context manager.

    Args:
        experts: gated feed-forward blocks, such as `random_experts` gives; they stay the caller's to close.
        used: experts that a token uses in a layer.
        budget: the most bytes of experts in memory, which is taken at once.
        policy: which leave first; see `make_policy`.
        quality: what may be given up; nothing if None.
        readers: reads in flight; as many as suit the disk if None, see `machine.readers`.

    Attributes:
        engine: that serves.
        queue: that reads.

    Raises:
        InvalidInput: experts of another form, or there is no such policy.
        BudgetExceeded: the budget does not hold one expert.
    """

    def __init__(
        self,
        experts: PackedExperts,
        *,
        used: int,
        budget: int,
        policy: str = "expected-use",
        quality: Quality | None = None,
        readers: int | None = None,
    ) -> None:
        modules = [_module(layer) for layer in experts.layers]
        stock, recorder = experts.stock(used), Recorder(enabled=False)
        leaving = make_policy(policy, stock)
        self._experts = experts
        self._slab = Slab(budget, prefault=True)
        flying = machine.readers(experts.folder) if readers is None else readers
        self.queue = TransferQueue(workers=flying + 1)
        self._cache = RecordCache(
            experts.files, budget, self._slab, self.queue, policy=leaving, recorder=recorder
        )
        try:
            exact = Quality.preset("exact")
            self.engine = Engine(experts, stock, self._cache, quality or exact, leaving, recorder)
        except BaseException:
            self.close()
            raise
        low = quality is not None and quality.degrades
        self._layers = [_served(experts, layer, low=low) for layer in experts.layers]
        for layer, module in zip(self._layers, modules, strict=True):
            attach(module, partial(self.engine.serve, layer))
        self._modules = modules

    def run(self, forwards: Iterable[Forward]) -> Iterator[Tensor]:
        """What each forward gives: (tokens, width)."""
        return _outputs(self._modules, self._told(forwards))

    def read(self, forwards: Iterable[Forward]) -> None:
        """Bring all that the forwards want, in the same order, and multiply nothing."""
        for each in self._told(forwards):
            service = self.engine.serve(self._layers[each.layer], each.chosen, each.weights)
            for expert in np.unique(each.chosen.numpy()).tolist():
                if expert not in service.skipped:
                    service.__getitem__(expert)  # whose result must not live on while the next is waited for
            service.close()

    def resident(self) -> Resident:
        """The same experts with nothing that serves them: all are read now, and none leaves while that lives.

        Raises:
            BudgetExceeded: the budget does not hold them all.
        """
        return Resident(self._experts.layers, [self._all(layer) for layer in self._layers])

    def close(self) -> None:
        """Return the memory and end the threads; again is allowed."""
        self._cache.close()
        self.queue.close()
        self._slab.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _all(self, layer: ServedLayer) -> Held:
        """The experts of a layer."""
        parameters: dict[int, Mapping[str, Tensor]] = {}
        blocks: dict[int, tuple[int, ...]] = {}
        for key, lease in self._cache.fetch(self.engine.stock.high_keys[layer.number]):
            expert = self.engine.stock.places[key].expert
            parameters[expert] = self.engine.open(layer, key, lease)  # which hold the lease
            if layer.kernel is not None:
                blocks[expert] = self.engine.block(key, lease)
        return Held(parameters, blocks, layer.kernel)

    def _told(self, forwards: Iterable[Forward]) -> Iterator[Forward]:
        """The forwards, as the engine is told of each."""
        for each in forwards:
            if each.is_first:
                self.engine.turn_to(is_first=each.begins, is_prefill=each.is_prefill)
            yield each


class Held(NamedTuple):
    """The experts of a layer, in memory.

    Attributes:
        parameters: of each, as the model takes them.
        blocks: where they are, if there is a `kernel`.
        kernel: what computes them by that, if something does.
    """

    parameters: Mapping[int, Mapping[str, Tensor]]
    blocks: Mapping[int, tuple[int, ...]]
    kernel: ExpertKernel | None


class Resident:
    """Experts in memory, with nothing that serves them: the least that their forwards can cost.

    Args:
        layers: what they are made of.
        held: the experts of each.
    """

    def __init__(self, layers: Sequence[PackedLayer], held: Sequence[Held]) -> None:
        self.held = held
        self._modules = [_module(layer) for layer in layers]
        for module, each in zip(self._modules, held, strict=True):
            attach(module, partial(_give, each))

    def run(self, forwards: Iterable[Forward]) -> Iterator[Tensor]:
        """What each forward gives, bit for bit as `Driven.run`: (tokens, width)."""
        return _outputs(self._modules, forwards)


class _Here:
    """Experts that are there: a `streamed.Service`."""

    skipped: Set[int] = frozenset()

    def __init__(self, held: Held, chosen: Tensor) -> None:
        self._held, self._chosen = held, chosen
        self.kernel = held.kernel

    def __getitem__(self, expert: int) -> Mapping[str, Tensor]:
        return self._held.parameters[expert]

    def blocks(self) -> Iterator[Sequence[tuple[int, tuple[int, ...]]]]:
        """All at once."""
        return iter([[(expert, self._held.blocks[expert]) for expert in self._wanted()]])

    def outputs(self, x: Tensor, feed_forward: FeedForward) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Of all at once."""
        experts = self._wanted()
        return iter([(experts, feed_forward.of_each(x, [self._held.parameters[each] for each in experts]))])

    def close(self) -> None:
        """Nothing is let go of."""

    def _wanted(self) -> list[int]:
        return np.unique(self._chosen.numpy()).tolist()


def _give(held: Held, chosen: Tensor, weights: Tensor) -> _Here:
    return _Here(held, chosen)


def _outputs(modules: Sequence[MixtralExperts], forwards: Iterable[Forward]) -> Iterator[Tensor]:
    for each in forwards:
        with torch.no_grad():  # not around the loop: what is left off in the middle would leave gradients off
            found = streamed_forward(modules[each.layer], each.hidden, each.chosen, each.weights)
        yield found


def _module(layer: PackedLayer) -> MixtralExperts:
    """A module that runs such experts, without weights.

    Raises:
        InvalidInput: they are no gated feed-forward blocks.
    """
    shapes = {name: each.shape for name, each in layer.parameters.items()}
    if shapes.keys() != {"gate_up_proj", "down_proj"}:
        raise InvalidInput(
            f"{layer.module} has {', '.join(shapes)}; only gated feed-forward blocks can be driven"
        )
    hidden, intermediate = shapes["down_proj"]
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_local_experts=layer.experts
    )
    with torch.device("meta"):
        return MixtralExperts(config)


def _served(experts: PackedExperts, layer: PackedLayer, *, low: bool) -> ServedLayer:
    dtypes = {name: each.dtype for name, each in layer.parameters.items()}
    kernel = experts.kernel(layer.number, low=low)
    return ServedLayer(
        number=layer.number, experts=layer.experts, dtypes=dtypes, kernel=kernel, is_usual=True
    )
