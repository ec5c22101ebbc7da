"""The trunk of a model, in 8 bits: every linear layer that is no expert, no router and not tied to another weight.

It knows modules and packed matrices; not experts or files. Nothing of it is exact, and nobody gets it unasked.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from undercroft.kernels.format import Format
from undercroft.kernels.quantise import quantise
from undercroft.moe.packed import PackedMatrix
from undercroft.moe.packed_weight import multiply

_GROUPS = (128, 64, 32)


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed.

    Args:
        linear: what it replaces.
        format: a group of it divides the layer's inputs.
    """

    def __init__(self, linear: nn.Linear, format: Format) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias: nn.Parameter | None = linear.bias
        packed = quantise(linear.weight.detach(), format)
        self._matrix = PackedMatrix(packed, format, linear.out_features, linear.in_features, transposed=False)

    @property
    def weight(self) -> Tensor:
        """What the packed bytes stand for, float32 [out_features, in_features]."""
        return self._matrix.tensor()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return self._matrix.packed.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.t() + bias``, (..., in_features) to (..., out_features), in the dtype of `x`."""
        product = multiply(x, self._matrix)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self._matrix.format}"


def quantise_trunk(model: nn.Module, *, experts: int) -> int:
    """Put the linear layers of a model's trunk into 8 bits, one after another.

    Args:
        model: changed in place.
        experts: in a layer; a matrix with so many rows is a router, and stays.

    Returns:
        How many layers were replaced. Those stay whose inputs no group divides, and those whose weight is another's
        too, which would take more memory, not less.
    """
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    replaced = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and uses[id(child.weight)] == 1 and child.out_features != experts:
                format = _format(child.in_features)
                if format is not None and not child.weight.is_meta:
                    setattr(parent, name, PackedLinear(child, format))
                    replaced += 1
    return replaced


def _format(columns: int) -> Format | None:
    group: Any = next((each for each in _GROUPS if columns % each == 0), None)
    return Format(8, group) if group else None
