"""A token's way through an attention layer whose linear layers are packed, in kernels of ours.

It knows packed layers and these kernels; not exact models, which `exact_attention` is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from undercroft.errors import InvalidInput
from undercroft.kernels import trunk
from undercroft.kernels.linear import Weight, is_plain
from undercroft.moe.attention import IMPLEMENTATION, OTHERWISE, attention
from undercroft.moe.kept import Kept
from undercroft.moe.trunk import Norm, PackedLinear
from undercroft.moe.usual_attention import LINEAR, NORMS, norms_of


class Joined:
    """The way of one layer, as `token_attention.Way`: its queries, keys and values are one product.

    Args:
        parts: the linear layers of these.
        norms: of queries and of keys, or none.
        width: of a head.
        kept: all of them, where they are.

    Raises:
        InvalidInput: these parts cannot be joined.
    """

    def __init__(self, parts: list[PackedLinear], norms: list[Norm], width: int, kept: Kept) -> None:
        biases = [part.bias for part in parts if part.bias is not None]
        if len(biases) not in (0, len(parts)) or len({norm.variance_epsilon for norm in norms}) > 1:
            raise InvalidInput("all parts have a bias or none, and norms are alike")
        self._kept = kept
        self._weight = Weight.joined([part.packed for part in parts])
        self._bias = torch.cat(list[Tensor](biases)) if biases else None
        self.heads = (parts[0].out_features // width, parts[1].out_features // width)
        self._norms = (norms[0].weight, norms[1].weight) if norms else None
        self._least = norms[0].variance_epsilon if norms else 0.0

    def takes(self, layer: Any, hidden: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> bool:
        """See `token_attention.Way`."""
        is_usual = mask is None and all(options.get(name) is None for name in OTHERWISE)
        return is_usual and is_plain(hidden) and self._kept.holds

    def turned(self, hidden: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """See `token_attention.Way`."""
        x = self._weight(hidden)
        if self._bias is not None:
            x += self._bias
        trunk.turn(x, self.heads, cosines, sines, self._norms, self._least)
        return x

    def turning(
        self, x: Tensor, heads: Tensor, cosines: Tensor, sines: Tensor
    ) -> Sequence[Callable[[], object]]:
        """The same of an x (1, width), in calls that put it into `heads`."""
        kernels = trunk.load()
        assert kernels is not None, "asked for where nothing compiled them"
        bias = () if self._bias is None else (partial(heads.view(-1).add_, self._bias),)
        turn = kernels.turning(heads, self.heads, self._norms, self._least, cosines, sines)
        return self._weight.multiplying(x, heads), *bias, turn

    @staticmethod
    def is_here(layer: Any) -> bool:
        """Whether a layer would let kernels of ours attend, as `attend_here` has made it."""
        return not layer.training and layer.config._attn_implementation == IMPLEMENTATION

    def attend(
        self,
        layer: Any,
        states: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        options: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """See `token_attention.Way`."""
        return attention(layer, *states, None, scaling=layer.scaling)


def joined(layer: nn.Module) -> Joined | None:
    """The way of a layer, if its forward is known, its linear layers are `PackedLinear` and its norms `Norm`."""
    norms, module = norms_of(layer), cast("Any", layer)
    if norms is None or module.head_dim % trunk.STEP:
        return None
    parts = [getattr(module, name) for name in LINEAR]
    is_light = all(isinstance(part, PackedLinear) for part in parts)
    ours = [norm for norm in norms if isinstance(norm, Norm)]
    if not is_light or len(ours) < len(norms):
        return None
    try:
        kept = Kept([(layer, name) for name in (*LINEAR, *NORMS[: len(norms)])])
        return Joined(parts, ours, module.head_dim, kept)
    except InvalidInput:
        return None
