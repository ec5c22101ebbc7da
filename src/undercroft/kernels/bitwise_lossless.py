"""Products of one token with squeezed weights, with the bits of PyTorch's own, without restoring them in memory.

`bitwise` multiplies with weights in bfloat16, `lossless` restores such from fewer bytes; here each is restored in
registers, where it is multiplied, in the same order of sums. That is seen, not believed: each number of columns is
tried first, on sums that cancel and weights most of whose exponents are rare.
Invariants: what was not seen to have PyTorch's bits is refused; sizes, types and devices were checked before an
address goes out; bytes that nobody squeezed give some product or are refused, and never make it read beyond them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_bool, c_int, c_int64, c_void_p
from dataclasses import dataclass, field
from functools import cache
from struct import pack

import torch
from torch import Tensor

from undercroft.errors import CorruptRecord, InvalidInput
from undercroft.kernels import bitwise, library
from undercroft.kernels.lossless import CHUNK, Lossless, rare_in, squeeze

_FIELDS = 7
_NO_MEMORY, _NOT_WHOLE = 1, 2  # as C answers


@dataclass(frozen=True, slots=True, eq=False)
class Squeezed:
    """A matrix in bfloat16, in the bytes that `lossless.squeeze` gives.

    Attributes:
        packed: uint8 [form.nbytes], contiguous, on the CPU.
        form: of these bytes.
        rows: outputs.
        columns: inputs.
        fields: of these, as C takes them.

    Raises:
        InvalidInput: these do not fit.
    """

    packed: Tensor = field(repr=False)
    form: Lossless
    rows: int
    columns: int
    fields: tuple[int, int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        packed, form = self.packed, self.form
        is_here = packed.dtype is torch.uint8 and packed.is_cpu and packed.is_contiguous()
        if not is_here or packed.numel() != form.nbytes or self.rows * self.columns != form.count:
            raise InvalidInput(
                f"{packed.numel()} elements of {packed.dtype} are no {self.rows} x {self.columns} of {form}"
            )
        object.__setattr__(self, "fields", (packed.data_ptr(), self.rows, form.rare))

    @staticmethod
    def of(weight: Tensor) -> Squeezed:
        """Squeeze a weight.

        Args:
            weight: bfloat16 [rows, columns], on the CPU.
        """
        form = Lossless(weight.numel(), rare_in(weight))
        return Squeezed(squeeze(weight, form), form, *weight.shape)


class _Native:
    """The compiled kernel."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        self.multiply = compiled.undercroft_bitwise_lossless_multiply
        self.multiply.argtypes = (c_int, c_int64, c_int64, c_void_p)
        self.multiply.restype = c_int


@cache
def reproduces(columns: int) -> bool:
    """Whether products over so many columns have PyTorch's bits on this machine. It is tried once, in milliseconds."""
    if _native() is None or not bitwise.reproduces(columns):
        return False
    draw = torch.Generator().manual_seed(columns)
    return all(_agree(outputs, columns, draw) for outputs in (3, CHUNK // columns + 66))


def takes(x: Tensor) -> bool:
    """Whether one token may be multiplied here with squeezed weights of as many columns: x (1, columns) in bfloat16."""
    return (
        x.dtype is torch.bfloat16
        and x.dim() == 2
        and len(x) == 1
        and bitwise.is_here(x)
        and reproduces(x.shape[1])
    )


def gates_and_ups(x: Tensor, weights: Sequence[Squeezed]) -> tuple[Tensor, Tensor]:
    """What one token makes of both halves of some weights, in one call.

    Args:
        x: (1, columns); `takes` allows it.
        weights: of (2 * inner, columns) each.

    Returns:
        (weights, inner) of the first halves, and of the others.

    Raises:
        InvalidInput: these are not alike, or have other columns.
        CorruptRecord: the bytes of a weight are none that `squeeze` gives.
    """
    _require_alike(x, 1, weights)
    inner, count = weights[0].rows // 2, len(weights)
    out = x.new_empty(2, count, inner)
    at, begin, row = x.data_ptr(), out.data_ptr(), out.element_size() * inner
    fields: list[int] = []
    for place, weight in enumerate(weights):
        first = begin + place * row
        fields += (at, *weight.fields, 0, inner, first)
        fields += (at, *weight.fields, inner, inner, first + count * row)
    _multiply(x.shape[1], fields)
    return out[0], out[1]


def row_by_row(x: Tensor, weights: Sequence[Squeezed]) -> Tensor:
    """Each row times the transpose of a weight of its own, in one call.

    Args:
        x: (weights, columns), contiguous; `takes` allows each row.
        weights: of (outputs, columns) each.

    Returns:
        (weights, outputs).

    Raises:
        InvalidInput: these are not alike, or not as many as the rows, or have other columns.
        CorruptRecord: the bytes of a weight are none that `squeeze` gives.
    """
    _require_alike(x, len(weights), weights)
    outputs, columns = weights[0].rows, weights[0].columns
    out = x.new_empty(len(weights), outputs)
    at, begin, size = x.data_ptr(), out.data_ptr(), out.element_size()
    fields: list[int] = []
    for row, weight in enumerate(weights):
        fields += (at + size * row * columns, *weight.fields, 0, outputs, begin + size * row * outputs)
    _multiply(columns, fields)
    return out


def _require_alike(x: Tensor, rows: int, weights: Sequence[Squeezed]) -> None:
    fits = x.dtype is torch.bfloat16 and x.dim() == 2 and len(x) == rows and x.is_cpu and x.is_contiguous()
    outputs = weights[0].rows if weights else 0
    columns = x.shape[-1]
    if not fits or not outputs or any(each.rows != outputs or each.columns != columns for each in weights):
        raise InvalidInput(f"{list(x.shape)} of {x.dtype} is not multiplied with {weights}")


def _multiply(columns: int, fields: Sequence[int]) -> None:
    native = _native()
    assert native is not None, "asked for where `reproduces` says no"
    count, products = len(fields) // _FIELDS, pack(f"{len(fields)}q", *fields)
    done = native.multiply(torch.get_num_threads(), columns, count, products)
    if done == _NOT_WHOLE:
        raise CorruptRecord("squeezed weights ask for more rare exponents than they have")
    library.require_memory(done != _NO_MEMORY)


@cache
def compiled() -> ctypes.CDLL | None:
    """`bitwise_lossless.cpp`; None where the instructions that it takes are not here, or nothing compiles."""
    found = library.compiled_with_avx2("bitwise_lossless", "bitwise.h", "bitwise_experts.h", "lossless.h")
    if found is None:
        return None
    found.undercroft_bitwise_lossless_works.restype = c_bool
    return found if found.undercroft_bitwise_lossless_works() else None


@cache
def _native() -> _Native | None:
    found = compiled()
    return None if found is None else _Native(found)


@torch.no_grad()
def _agree(outputs: int, columns: int, draw: torch.Generator) -> bool:
    x, weight = bitwise.cancelling(1, outputs, columns, draw)
    found, wanted = row_by_row(x, [Squeezed.of(weight)]), torch.nn.functional.linear(x, weight)
    return torch.equal(wanted.view(torch.int16), found.view(torch.int16))
