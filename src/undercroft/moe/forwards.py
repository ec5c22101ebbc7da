"""The forwards of a trace, as tensors for an engine that is driven by it.

It knows traces and shapes; not engines or weights. Invariants: no token uses an expert twice; equal arguments give
equal tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from undercroft.errors import InvalidInput
from undercroft.moe.trace import Trace


class Forward(NamedTuple):
    """What one forward does in one layer.

    Attributes:
        layer: which.
        is_first: whether a forward begins with it.
        begins: whether a sequence does, too.
        is_prefill: or else it is a step of decoding.
        hidden: (tokens, width), what goes into the experts.
        chosen: (tokens, used) int64.
        weights: (tokens, used), in the dtype of `hidden`.
    """

    layer: int
    is_first: bool
    begins: bool
    is_prefill: bool
    hidden: Tensor
    chosen: Tensor
    weights: Tensor


def forwards(trace: Trace, hidden: int, dtype: torch.dtype, *, seed: int = 0) -> Iterator[Forward]:
    """The forwards of a trace in order. What goes into the experts is random, and the same for every layer.

    Args:
        trace: of the routing.
        hidden: width of the activations.
        dtype: of the activations.
        seed: of their randomness.
    """
    random = torch.Generator().manual_seed(seed)
    most = max((len(step.experts) for step in trace.steps()), default=1)
    tokens = torch.randn(most, hidden, generator=random).to(dtype)
    turn: int | None = None
    for step in trace.steps():
        begins, turn = step.turn != turn, step.turn
        yield Forward(
            layer=step.layer,
            is_first=step.is_first,
            begins=begins,
            is_prefill=step.is_prefill,
            hidden=tokens[: len(step.experts)],
            chosen=torch.from_numpy(step.experts.astype(np.int64)),
            weights=torch.from_numpy(step.weights.copy()).to(dtype),
        )


def fold(trace: Trace, *, layers: int, experts: int, expert_nbytes: int) -> Trace:
    """A trace for experts of another shape: what lies beyond it begins again at its start.

    A forward through more layers becomes several. Where two experts of a token become one, the second takes the next
    that the token does not use.

    Args:
        trace: of any model.
        layers: that there are; at least 2, unless the trace has one only.
        experts: in each layer.
        expert_nbytes: bytes of each.

    Raises:
        InvalidInput: fewer experts than a token uses, or too few layers.
    """
    if trace.used > experts or layers < min(2, trace.layers):
        raise InvalidInput(
            f"a trace of {trace.layers} layers, {trace.used} experts for a token, does not fold into {layers} layers "
            f"of {experts} experts"
        )
    layers = min(layers, trace.layers)
    again, layer = np.divmod(trace.layer, layers)
    passes = -(-trace.layers // layers)
    return replace(
        trace,
        layers=layers,
        experts=experts,
        layer=layer,
        step=trace.step * passes + again,
        expert=_distinct(trace.expert % experts, experts),
        expert_nbytes=dict.fromkeys(range(layers), expert_nbytes),
    )


def decoding(trace: Trace, *, layers: int, tokens: int) -> Trace:
    """The first steps of decoding in the first layers, alone.

    Args:
        trace: of any model.
        layers: at most.
        tokens: at most.

    Raises:
        InvalidInput: nothing is decoded in it.
    """
    kept = (trace.phase == 1) & (trace.layer < layers)
    kept &= np.cumsum(kept & (trace.layer == 0)) <= tokens
    if not kept.any():
        raise InvalidInput("no token is decoded in this trace")
    rows = ("turn", "phase", "step", "layer", "expert", "weight")
    found = {name: getattr(trace, name)[kept] for name in rows}
    sizes = {layer: nbytes for layer, nbytes in trace.expert_nbytes.items() if layer < layers}
    return replace(trace, layers=min(layers, trace.layers), expert_nbytes=sizes, **found)


def twice(trace: Trace) -> Trace:
    """A trace, and the same again as further turns."""
    rows = ("phase", "step", "layer", "expert", "weight")
    doubled = {name: np.concatenate([getattr(trace, name)] * 2) for name in rows}
    turns = int(trace.turn.max(initial=0)) + 1
    return replace(trace, turn=np.concatenate([trace.turn, trace.turn + turns]), **doubled)


def _distinct(chosen: NDArray[np.int32], experts: int) -> NDArray[np.int32]:
    """Rows without repetition."""
    ordered = np.sort(chosen, axis=1)
    found = chosen.copy()
    for row in np.flatnonzero((np.diff(ordered, axis=1) == 0).any(axis=1)):
        taken: set[int] = set()
        for slot, expert in enumerate(found[row].tolist()):
            while expert in taken:
                expert = (expert + 1) % experts
            taken.add(expert)
            found[row, slot] = expert
    return found
