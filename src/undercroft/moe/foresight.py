"""Predicts which experts the next layers will want, so that they are read while this one computes.

From layer to layer the residual changes little, so the router of a later layer, applied to it now, mostly chooses what
it will choose then. As in HOBBIT (arXiv 2411.01433, its "Stacking Computer") the routers of all layers are stacked, so
that looking some layers ahead is one product, and the look goes on until a layer needs reads; unlike there, the later
layers' own norms are folded in, and a governor decides how deep to look, and whether at all.

It knows routers, residuals and the order of layers; not files or room. Invariants: it asks for reads in decoding only,
after what the layer itself wants; it changes no number that the model computes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from undercroft.moe.engine import Engine
from undercroft.moe.gate import FEW, Gate, Squash, Watch, normalised, squashed
from undercroft.moe.governor import Governor, Totals, came_true
from undercroft.moe.streamed import Binds, Serve, Service, attach, attached

_log = logging.getLogger(__name__)
_Guesses = list[list[int]]
"""Of each token, experts, the likeliest first."""


class Foresight:
    """Looks ahead for the layers of a model.

    Args:
        engine: what serves their experts.
        governor: when to look, and how far.
        watch: finds the gates of the layers during the first decoding.
        clock: seconds.

    Attributes:
        unseen: layers for which nothing is predicted, because their routers were not found.
    """

    def __init__(
        self, engine: Engine, governor: Governor, watch: Watch, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.unseen: frozenset[int] = frozenset()
        self._engine, self._governor, self._clock = engine, governor, clock
        self._watch: Watch | None = watch
        self._routers: _Routers | None = None
        self._residual: Tensor | None = None
        self._guesses: dict[int, list[tuple[int, _Guesses]]] = {}
        self._totals = Totals()
        self._began: Totals | None = None

    def serve(self, number: int, serve: Serve, chosen: Tensor, weights: Tensor) -> Service:
        """As `serve` of layer `number`, and then look ahead."""
        service = serve(chosen, weights)
        if len(chosen) > FEW:
            self._began = None
        else:
            if number == 0:
                self._turn()
            if self._watch is not None:
                self._find(self._watch, number, chosen)
            elif self._guesses or self._governor.depth:
                self._judge(number, chosen)
                self._look(number, chosen.shape[1])
        return service

    def serve_bound(self, number: int, serve: Callable[[], bool]) -> bool:
        """As `serve`, for a token and a `serve` that is bound to its memory; no where there is something to see."""
        if self._watch is not None or self._guesses or self._governor.depth or not serve():
            return False
        if number == 0:
            self._turn()
        return True

    def _turn(self) -> None:
        """A forward of decoding begins, and perhaps another ended."""
        now = self._now()
        self._guesses.clear()
        if self._began is not None:
            self._totals = self._totals.plus(now.since(self._began))
            self._governor.turn(self._totals)
        self._began = now

    def _now(self) -> Totals:
        report = self._engine.report()
        return Totals(
            seconds=self._clock(),
            waited=report.waited_seconds,
            read=report.read_nbytes,
            predicted=report.predicted,
            useful=report.useful,
            wasted=report.wasted,
        )

    def _find(self, watch: Watch, number: int, chosen: Tensor) -> None:
        watch.see(number, chosen)
        if not watch.is_over:
            return
        watch.close()
        self._watch, self.unseen = None, frozenset(watch.unseen)
        self._routers = _Routers.of(watch.gates, self._engine.stock.layers)
        for gate in watch.gates.values():
            gate.norm.register_forward_pre_hook(self._note)
        if watch.unseen:
            _log.warning(
                "no experts are predicted for %d of %d layers, whose routers do not choose by a norm of the residual",
                len(watch.unseen),
                self._engine.stock.layers,
            )

    def _note(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """A layer's norm is given the residual before its experts."""
        self._residual = args[0] if self._governor.depth else None

    def _judge(self, number: int, chosen: Tensor) -> None:
        wanted = cast("_Guesses", chosen.tolist())
        for distance, guesses in self._guesses.pop(number, ()):
            if len(guesses) == len(wanted):
                self._governor.judge(number, distance, list(came_true(guesses, wanted)))

    def _look(self, number: int, used: int) -> None:
        residual, self._residual = self._residual, None
        depth = min(self._governor.depth, self._engine.stock.layers - 1 - number)
        if residual is None or self._routers is None or depth < 1:
            return
        for distance, guesses in enumerate(
            self._routers.likeliest(residual, number + 1, depth, used), start=1
        ):
            layer = number + distance
            if layer in self.unseen:
                continue
            self._guesses.setdefault(layer, []).append((distance, guesses))
            precisions = self._governor.precisions(layer, distance, used)
            if self._engine.foresee(layer, _by_rank(guesses, len(precisions)), min(precisions, default=0.0)):
                break


class _Foreseeing(NamedTuple):
    """How the module of a layer finds its experts while somebody looks ahead; a `streamed.Serve` that binds tokens."""

    foresight: Foresight
    number: int
    serve: Serve

    def __call__(self, chosen: Tensor, weights: Tensor) -> Service:
        return self.foresight.serve(self.number, self.serve, chosen, weights)

    def bind(self, x: Tensor, chosen: Tensor, shares: Tensor, out: Tensor) -> Callable[[], bool] | None:
        bound = self.serve.bind(x, chosen, shares, out) if isinstance(self.serve, Binds) else None
        return None if bound is None else partial(self.foresight.serve_bound, self.number, bound)


class _Routers:
    """The routers of all layers in one matrix.

    Args:
        weight: (layers times experts, width) float32.
        bias: (layers, experts) float32.
        squash: see `Gate`.
    """

    def __init__(self, weight: Tensor, bias: Tensor, squash: Squash) -> None:
        self._weight, self._bias = weight, bias
        self._squash: Squash = squash

    @staticmethod
    def of(gates: Mapping[int, Gate], layers: int) -> _Routers | None:
        """Those of a model; a layer without a gate has zeros. None where no layer has one."""
        if not gates:
            return None
        any_gate = next(iter(gates.values()))
        weight = any_gate.weight.new_zeros(layers, *any_gate.weight.shape)
        bias = any_gate.weight.new_zeros(layers, len(any_gate.weight))
        for number, gate in gates.items():
            weight[number], bias[number] = gate.weight, gate.bias
        squashes: Counter[Squash] = Counter(gate.squash for gate in gates.values() if gate.bias.any())
        return _Routers(weight.flatten(0, 1), bias, squashes.most_common(1)[0][0] if squashes else "none")

    def likeliest(self, residual: Tensor, first: int, layers: int, used: int) -> list[_Guesses]:
        """What some layers would choose of this residual: for each, of each token, experts, the likeliest first."""
        experts = self._bias.shape[1]
        rows = self._weight[first * experts : (first + layers) * experts]
        scores = (normalised(residual) @ rows.T).view(-1, layers, experts).transpose(0, 1)
        chosen = squashed(scores, self._squash) + self._bias[first : first + layers, None]
        return cast("list[_Guesses]", chosen.topk(used).indices.tolist())


def look_ahead(model: nn.Module, engine: Engine, layers: Mapping[int, str], governor: Governor) -> Foresight:
    """Let a model whose experts are served by an engine predict them.

    Args:
        model: its experts are `attach`ed already.
        engine: what serves them.
        layers: number of each layer with experts → name of the module of its experts.
        governor: when to look, and how far.
    """
    foresight = Foresight(engine, governor, Watch(model, layers))
    for number, name in layers.items():
        module = model.get_submodule(name)
        attach(module, _Foreseeing(foresight, number, attached(module)))
    return foresight


def _by_rank(guesses: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """The experts of the first ranks of all tokens, each once, those of the first rank first."""
    return list(dict.fromkeys(each[rank] for rank in range(ranks) for each in guesses))
