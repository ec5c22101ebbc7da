"""The parts of a trunk that need not be exact: linear layers in 8 bits, and norms in a kernel of ours.

It knows modules and packed matrices; not experts or files. Nobody gets it unasked.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from undercroft.kernels import trunk
from undercroft.kernels.format import Format
from undercroft.kernels.linear import DTYPES, Weight, is_plain
from undercroft.kernels.quantise import dequantise, quantise
from undercroft.moe.usual_attention import is_rms_norm

_GROUPS = (128, 64, 32)


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed.

    Args:
        linear: what it replaces.
        format: a group of it divides the layer's inputs.

    Attributes:
        packed: its weight.
    """

    def __init__(self, linear: nn.Linear, format: Format) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias: nn.Parameter | None = linear.bias
        packed = quantise(linear.weight.detach(), format)
        self.packed = Weight(packed, format, linear.out_features, linear.in_features)

    @property
    def weight(self) -> Tensor:
        """What the packed bytes stand for, float32 [out_features, in_features]."""
        it = self.packed
        return dequantise(it.packed, it.format, it.rows, it.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return self.packed.packed.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.t() + bias``, (..., in_features) to (..., out_features), in the dtype of `x`."""
        product = self.packed(x) if x.dtype in DTYPES else self.packed(x.float()).to(x.dtype)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.packed.format}"


class Norm(nn.Module):
    """RMSNorm, as Llama's and most families' is.

    Args:
        norm: what it replaces.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon
        self._otherwise: Any = type(norm).forward

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Of the last dimension, in the dtype of the input if the weight is of it."""
        weight = self.weight
        if is_plain(hidden_states) and hidden_states.dtype is weight.dtype and weight.dtype in DTYPES:
            return trunk.rms_norm(hidden_states, weight, self.variance_epsilon)
        return self._otherwise(self, hidden_states)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def replace_norms(model: nn.Module) -> int:
    """Let the kernels compute each RMSNorm whose code is, instruction by instruction, Llama's; how many there are."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if _is_usual(child)
    ]
    for parent, name, child in found:
        setattr(parent, name, Norm(child))
    return len(found)


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


def _is_usual(norm: nn.Module) -> bool:
    weight: Any = getattr(norm, "weight", None)
    return is_rms_norm(norm) and weight.numel() % trunk.STEP == 0


def _format(columns: int) -> Format | None:
    group: Any = next((each for each in _GROUPS if columns % each == 0), None)
    return Format(8, group) if group else None
