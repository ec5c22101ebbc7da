"""Finds how each layer of a model chooses its experts from the residual, by watching one forward.

No family is known by name. What is looked for: the module beside a layer's experts that holds a matrix of (experts,
width), and the module with a vector of (width,) whose output is what that one was given. Whether they are a router
and a norm is then tried: a `Gate` computed from both must choose what the model chose. Invariant: no gate is given out
that did not, near-ties aside.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from undercroft.moe.streamed import expert_count

Squash = Literal["none", "sigmoid", "softmax"]

FEW = 4
"""The most tokens of a forward that counts as decoding."""
_SQUASHES: dict[Squash, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda scores: scores.softmax(-1),
    "none": lambda scores: scores,
}
_WITHOUT_BIAS: tuple[Squash, ...] = ("none",)
_LEAST_AGREEMENT = 0.7
"""Share of a choice that a gate must reproduce: not all, for routers that compute in 8 bits flip near-ties."""
_LEAST_LIKENESS = 0.999
_SIGHTINGS = 6
"""Forwards after which a layer's gate is settled: one alone does not tell gates apart that differ little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """How a layer chooses: the largest of ``squash(normalised(residual) @ weight.T) + bias``.

    Attributes:
        norm: the module whose input is the residual.
        weight: (experts, width) float32, of the router times that of the norm.
        bias: (experts,) float32.
        squash: what comes between the two; "none" where it changes nothing, for want of a bias.
    """

    norm: nn.Module
    weight: Tensor
    bias: Tensor
    squash: Squash


def normalised(residual: Tensor) -> Tensor:
    """(tokens, width) float32 of any residual, each token's root mean square 1, as RMSNorm does before its weight."""
    rows = residual.detach().reshape(-1, residual.shape[-1]).float()
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny)


def squashed(scores: Tensor, squash: Squash) -> Tensor:
    """Scores as a gate compares them before its bias; experts last."""
    return _SQUASHES[squash](scores)


class Watch:
    """Watches the forwards of a model until each layer's gate was looked for.

    Args:
        model: whose modules are watched.
        layers: number of each layer with experts → name of the module of its experts.

    Attributes:
        gates: those found so far, by layer.
        unseen: the layers that were looked at in vain.
    """

    def __init__(self, model: nn.Module, layers: Mapping[int, str]) -> None:
        self.gates: dict[int, Gate] = {}
        self.unseen: set[int] = set()
        self._routers = {number: list(_routers(model, name)) for number, name in layers.items()}
        self._inputs: dict[weakref.ref[nn.Module], Tensor] = {}
        self._sightings = dict.fromkeys(layers, 0)
        self._tried: dict[int, dict[int, tuple[float, Gate]]] = {number: {} for number in layers}
        self._normed: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._handles = list(self._hooks(model))

    @property
    def is_over(self) -> bool:
        """Whether every layer was looked at."""
        return len(self.gates) + len(self.unseen) == len(self._routers)

    def see(self, number: int, chosen: Tensor) -> None:
        """A layer has chosen; after a few such forwards its gate is settled.

        Args:
            number: of the layer.
            chosen: (tokens, k), of few tokens, on the CPU.
        """
        if self._sightings[number] < _SIGHTINGS:
            self._try(number, chosen)
        self._inputs.clear()
        self._normed.clear()

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._routers.clear()
        self._tried.clear()
        self._inputs.clear()
        self._normed.clear()

    def _try(self, number: int, chosen: Tensor) -> None:
        tried = self._tried[number]
        for place, (agreement, gate) in enumerate(self._gates(number, chosen)):
            tried[place] = (tried.get(place, (0.0, gate))[0] + agreement, gate)
        self._sightings[number] += 1
        if self._sightings[number] == _SIGHTINGS:
            self._settle(number)

    def _settle(self, number: int) -> None:
        agreed, gate = max(self._tried[number].values(), key=itemgetter(0), default=(0.0, None))
        if gate is not None and agreed >= _LEAST_AGREEMENT * _SIGHTINGS:
            self.gates[number] = gate
        else:
            self.unseen.add(number)

    def _hooks(self, model: nn.Module) -> Iterator[RemovableHandle]:
        owners = {owner() for routers in self._routers.values() for owner, _ in routers}
        widths = {weight.shape[1] for routers in self._routers.values() for _, weight in routers}
        for owner in filter(None, owners):
            yield owner.register_forward_pre_hook(self._note_input, with_kwargs=True)
        for module in model.modules():
            if any(each.shape == (width,) for each in module.parameters(recurse=False) for width in widths):
                yield module.register_forward_hook(self._note_norm)

    def _note_input(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        if given is not None and _is_few(given):
            self._inputs[weakref.ref(owner)] = given

    def _note_norm(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and _is_few(output):
            self._normed.append((module, args[0], output))

    def _gates(self, number: int, chosen: Tensor) -> Iterator[tuple[float, Gate]]:
        for reference, weight in self._routers[number]:
            owner, given = reference(), self._inputs.get(reference)
            if owner is None or given is None:
                continue
            for norm, residual, normed in reversed(self._normed):
                if normed.data_ptr() == given.data_ptr():
                    yield from _tried(norm, residual, normed, owner, weight, chosen)


def _routers(model: nn.Module, experts: str) -> Iterator[tuple[weakref.ref[nn.Module], Tensor]]:
    """Modules beside the experts with a matrix that has a row for each of these."""
    own = model.get_submodule(experts)
    rows, inside = expert_count(own), set(own.modules())
    for owner in model.get_submodule(experts.rpartition(".")[0]).modules():
        for weight in owner.parameters(recurse=False) if owner not in inside else ():
            if weight.ndim == 2 and len(weight) == rows:
                yield weakref.ref(owner), weight.detach()


def _tried(
    norm: nn.Module, residual: Tensor, normed: Tensor, owner: nn.Module, weight: Tensor, chosen: Tensor
) -> Iterator[tuple[float, Gate]]:
    """Gates, and how much of what was chosen they choose."""
    gain = _gain(norm, residual, normed)
    if gain is None or gain.shape != weight.shape[1:]:
        return
    folded = weight.float() * gain
    scores = normalised(residual) @ folded.T
    for bias in (*_biases(owner, len(weight)), scores.new_zeros(len(weight))):
        for squash in _SQUASHES if bias.any() else _WITHOUT_BIAS:
            likeliest = (squashed(scores, squash) + bias).topk(chosen.shape[1]).indices
            agreement = (likeliest.cpu()[..., None] == chosen[:, None]).any(-1).float().mean().item()
            yield agreement, Gate(norm=norm, weight=folded, bias=bias, squash=squash)


def _gain(norm: nn.Module, residual: Tensor, normed: Tensor) -> Tensor | None:
    """(width,): what a norm multiplies by after normalising; None if that is not all it does."""
    ones = residual.new_ones(1, 1, residual.shape[-1])
    gain = norm.forward(ones).detach().float().flatten()
    if len(gain) != residual.shape[-1]:
        return None
    wanted, found = normed.detach().reshape(-1, normed.shape[-1]).float(), normalised(residual) * gain
    likeness = torch.cosine_similarity(wanted, found, dim=-1).min()
    return gain if wanted.shape == found.shape and likeness >= _LEAST_LIKENESS else None


def _biases(owner: nn.Module, experts: int) -> Iterator[Tensor]:
    for each in (*owner.buffers(), *owner.parameters()):
        if each.numel() == experts:
            yield each.detach().float().flatten()


def _is_few(tensor: Tensor) -> bool:
    return tensor.numel() <= FEW * tensor.shape[-1]
