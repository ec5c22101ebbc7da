"""Products in bfloat16 with the bits of PyTorch's own, several times as fast, and many in one call.

Where a processor has AVX2 and nothing that PyTorch hands bfloat16 on to, PyTorch sums each output by itself, whatever
is computed beside it: then a kernel of ours can do the same sums for many outputs at a time. That is seen, not
believed: each number of columns is tried first, on sums that cancel, so that another order of addition gives other
numbers.
Invariants: what was not seen to have PyTorch's bits is left to PyTorch; sizes, types and devices were checked
before an address goes out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_bool, c_int, c_int64, c_void_p
from functools import cache
from struct import pack

import torch
from torch import Tensor

from undercroft.kernels import library
from undercroft.kernels.bound import Call
from undercroft.kernels.linear import DTYPES, is_plain

PLACES = 64
"""What the columns of a product are a multiple of."""
_FIELDS = 6
_ROWS = (1, 2, 17)
_OUTPUTS = (3, 130)
"""Sizes that are tried: below and above the products that PyTorch thinks worth another's kernels."""


class _Native:
    """The compiled kernels."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        self.multiply = compiled.undercroft_bitwise_multiply
        self.multiply.argtypes = (c_int, c_int64, c_int64, c_void_p)
        self.multiply.restype = c_bool
        self.add_up = compiled.undercroft_bitwise_add_up
        self.add_up.argtypes = (c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
        self.add_up.restype = None


@cache
def reproduces(columns: int) -> bool:
    """Whether products over so many columns have PyTorch's bits on this machine. It is tried once, in milliseconds."""
    if _native() is None or columns % PLACES or not columns:
        return False
    draw = torch.Generator().manual_seed(columns)
    return all(_agree(rows, outputs, columns, draw) for rows in _ROWS for outputs in _OUTPUTS)


def is_here(x: Tensor) -> bool:
    """Whether a kernel may compute with a tensor of the CPU: in one piece, and nobody differentiates or casts."""
    return is_plain(x) and x.is_cpu and x.is_contiguous() and not torch.is_autocast_enabled("cpu")


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `linear` computes these here: bfloat16 on the CPU, nobody differentiates, and it has PyTorch's bits."""
    return takes_all(x, [(weight, bias)])


def takes_all(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]]) -> bool:
    """Whether it does so with each of some layers, a weight and a bias or None."""
    return (
        x.dtype is torch.bfloat16
        and is_here(x)
        and x.dim() > 1
        and x.numel() > 0
        and all(knows(x.shape[-1], weight, bias) for weight, bias in layers)
        and reproduces(x.shape[-1])
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, bit for bit: by a kernel of ours where `takes` allows it, else by PyTorch."""
    if not takes(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    _multiplying(weight.shape[1], _product(x, weight, bias, out))()
    return out


def gates_and_ups(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What one token makes of both halves of some weights, in one call.

    Args:
        x: (1, columns).
        weights: (2 * inner, columns) each, all alike; `takes` allows each with x.

    Returns:
        (weights, inner) of the first halves, and of the others.
    """
    rows, columns = weights[0].shape
    inner = rows // 2
    out = x.new_empty(2, len(weights), inner)
    at, begin, row = x.data_ptr(), out.data_ptr(), out.element_size() * inner
    fields: list[int] = []
    for place, weight in enumerate(weights):
        address, first = weight.data_ptr(), begin + place * row
        fields += (at, 1, address, 0, inner, first)
        fields += (at, 1, address + row * columns, 0, inner, first + len(weights) * row)
    _multiplying(columns, fields)()
    return out[0], out[1]


def side_by_side(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """What some linear layers make of one row, one behind another, in one call.

    Args:
        x: of one row of columns, whatever its shape.
        layers: weight (outputs, columns) and bias of each; `takes_all` allows these.

    Returns:
        (all outputs,).
    """
    out = x.new_empty(sum(len(weight) for weight, _ in layers))
    multiplying(x, layers, out)()
    return out


def multiplying(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]], out: Tensor) -> Call:
    """`side_by_side` into `out`, contiguous, with as many threads as PyTorch has now."""
    begin, at, size = x.data_ptr(), out.data_ptr(), out.element_size()
    fields: list[int] = []
    for weight, bias in layers:
        addend, rows = 0 if bias is None else bias.data_ptr(), len(weight)
        fields += (begin, 1, weight.data_ptr(), addend, rows, at)
        at += size * rows
    weights = [each for pair in layers for each in pair if each is not None]
    return _multiplying(x.numel(), fields, x, out, *weights)


def row_by_row(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Each row times the transpose of a weight of its own, in one call.

    Args:
        x: (weights, columns), contiguous.
        weights: (outputs, columns) each, all alike; `takes` allows each with x.

    Returns:
        (weights, outputs).
    """
    outputs, columns = weights[0].shape
    out = x.new_empty(len(weights), outputs)
    at, begin, size = x.data_ptr(), out.data_ptr(), out.element_size()
    fields: list[int] = []
    for row, weight in enumerate(weights):
        fields += (at + size * row * columns, 1, weight.data_ptr(), 0, outputs, begin + size * row * outputs)
    _multiplying(columns, fields)()
    return out


def adds(rows: Tensor, shares: Tensor) -> bool:
    """Whether `add_up` takes these here, shares in bfloat16 or float32."""
    return (
        rows.dtype is torch.bfloat16
        and shares.dtype in DTYPES
        and is_plain(rows)
        and rows.is_cpu
        and rows.is_contiguous()
        and _native() is not None
    )


def add_up(rows: Tensor, order: Sequence[int], shares: Sequence[float]) -> Tensor:
    """The weighted sum of rows as PyTorch adds one after another to zeros, each product and each sum in bfloat16.

    Args:
        rows: (count, width) bfloat16, contiguous.
        order: of the rows.
        shares: of these.

    Returns:
        (1, width) bfloat16.
    """
    native = _native()
    assert native is not None, "asked for where `reproduces` says no"
    count, width = len(order), rows.shape[1]
    out = rows.new_empty(1, width)
    terms = (pack(f"{count}q", *order), pack(f"{count}f", *shares))
    native.add_up(width, count, rows.data_ptr(), *terms, nan(), out.data_ptr())
    return out


@cache
def nan() -> int:
    """The bits of the NaN that PyTorch makes of one, where it computes in whole vectors of bfloat16."""
    found = torch.full((PLACES,), torch.nan, dtype=torch.bfloat16, device="cpu") * 1
    return int(found.view(torch.int16)[0]) & 0xFFFF


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> tuple[int, ...]:
    """As `bitwise.cpp` takes it."""
    outputs, columns = weight.shape
    addend = 0 if bias is None else bias.data_ptr()
    return x.data_ptr(), x.numel() // columns, weight.data_ptr(), addend, outputs, out.data_ptr()


def _multiplying(columns: int, fields: Sequence[int], *tensors: Tensor) -> Call:
    """Products whose addresses are those of some tensors."""
    native = _native()
    assert native is not None, "asked for where `reproduces` says no"
    count = len(fields)
    products = pack(f"{count}q", *fields)
    return Call(native.multiply, (torch.get_num_threads(), columns, count // _FIELDS, products), tensors)


@cache
def compiled() -> ctypes.CDLL | None:
    """`bitwise.cpp`; None where there is no AVX2, or nothing compiles."""
    return library.compiled_with_avx2("bitwise", "bitwise.h", "bitwise_experts.h", "chosen.h")


@cache
def _native() -> _Native | None:
    found = compiled()
    return None if found is None else _Native(found)


def knows(columns: int, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a layer of so many columns, and its bias, are what `linear` computes with: bfloat16, in one piece."""
    fits = weight.dim() == 2 and weight.shape[1] == columns and is_weight(weight)
    return fits and (bias is None or (bias.shape == weight.shape[:1] and is_weight(bias)))


def is_weight(tensor: Tensor) -> bool:
    """Whether kernels here can compute with it: bfloat16 on the CPU, in one piece."""
    return tensor.dtype is torch.bfloat16 and tensor.is_cpu and tensor.is_contiguous() and tensor.numel() > 0


@torch.no_grad()
def _agree(rows: int, outputs: int, columns: int, draw: torch.Generator) -> bool:
    x, weight = cancelling(rows, outputs, columns, draw)
    for bias in (None, _drawn(1, outputs, draw)[0]):
        wanted, found = torch.nn.functional.linear(x[None], weight, bias)[0], x.new_empty(rows, outputs)
        _multiplying(columns, _product(x, weight, bias, found))()
        if not torch.equal(wanted.view(torch.int16), found.view(torch.int16)):
            return False
    return True


def cancelling(rows: int, outputs: int, columns: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """An x (rows, columns) and a weight (outputs, columns) of whose products nothing remains but what was rounded off.

    So these differ in all their bits where sums are added up in another order.
    """
    x, weight = _drawn(rows, columns, draw), _drawn(outputs, columns, draw)
    pairs = torch.randperm(columns, generator=draw, device="cpu").view(2, -1)
    x[:, pairs[0]] = -x[:, pairs[1]]
    weight[:, pairs[0]] = weight[:, pairs[1]]
    return x, weight


def _drawn(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    numbers = torch.randn(rows, columns, generator=draw, device="cpu")
    powers = torch.randint(-9, 10, (rows, columns), generator=draw, device="cpu")
    return torch.ldexp(numbers, powers).to(torch.bfloat16)
