"""A quantised matrix where a family's forward expects a weight: products with it run on its packed bytes.

It knows torch's ways to multiply; not experts or leases. What it does not know is done with the dequantised matrix, so
that a forward is never refused, only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from undercroft import kernels
from undercroft.kernels.linear import DTYPES
from undercroft.moe.packed import PackedMatrix


class PackedWeight(torch.Tensor):
    """Has the shape and dtype of the parameter that it stands for, and no elements."""

    matrix: PackedMatrix

    @staticmethod
    def of(matrix: PackedMatrix, dtype: torch.dtype) -> PackedWeight:
        """Stand for a matrix in a model of some dtype."""
        shape = (matrix.rows, matrix.columns)
        empty = torch.empty(shape[::-1] if matrix.transposed else shape, dtype=dtype, device="meta")
        made = cast("PackedWeight", torch.Tensor._make_subclass(PackedWeight, empty))  # pyright: ignore
        made.matrix = matrix
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Multiply on the packed bytes, or do whatever it is with the matrix itself."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute, such as its shape
            return cast("Any", super()).__torch_function__(func, types, args, kwargs)
        product = _PRODUCTS.get(name)
        if product is not None and (result := product(args, kwargs)) is not None:
            return result
        return func(*map(_whole, args), **{key: _whole(each) for key, each in kwargs.items()})


def multiply(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """``x @ matrix.t()`` in the dtype of `x`: (…, columns) to (…, rows)."""
    scaled = x if matrix.inputs is None else x * matrix.inputs
    taken = scaled if scaled.dtype in DTYPES else scaled.float()
    rows = taken.reshape(-1, matrix.columns)
    product = kernels.linear(rows, matrix.packed, matrix.format, matrix.rows)
    return product.view(*x.shape[:-1], matrix.rows).to(x.dtype)


def _linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
    if not isinstance(weight, PackedWeight) or weight.matrix.transposed:
        return None
    product = multiply(x, weight.matrix)
    return product if bias is None else product + bias


def _matmul(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, weight = args[:2]
    packed = isinstance(weight, PackedWeight) and weight.matrix.transposed
    return multiply(x, weight.matrix) if packed else None


_PRODUCTS: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "mm"), _matmul),
}


def _whole(value: Any) -> Any:
    return value.matrix.tensor(value.dtype) if isinstance(value, PackedWeight) else value
