"""Products of one token with squeezed weights, with the bits of PyTorch's own, without restoring them in memory.

`bitwise` multiplies with weights in bfloat16, `lossless` restores such from fewer bytes; here each is restored in
registers, where it is multiplied, in the same order of sums. That is seen, not believed: each number of columns is
tried first, on sums that cancel and weights most of whose exponents are rare.
Invariants: what was not seen to have PyTorch's bits is refused; sizes, types and devices were checked before an
address goes out; bytes that nobody squeezed give some product or are refused, and never make it read beyond them.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_int, c_int64, c_void_p
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from undercroft.errors import CorruptRecord, InvalidInput
from undercroft.kernels import bitwise, library
from undercroft.kernels.bound import require_memory
from undercroft.kernels.lossless import CHUNK, Lossless, rare_in, squeeze

_NOT_WHOLE = 2  # as C answers


@dataclass(frozen=True, slots=True, eq=False)
class Squeezed:
    """A matrix in bfloat16, in the bytes that `lossless.squeeze` gives.

    Attributes:
        packed: uint8 [form.nbytes], contiguous, on the CPU.
        form: of these bytes.
        rows: outputs.
        columns: inputs.

    Raises:
        InvalidInput: these do not fit.
    """

    packed: Tensor = field(repr=False)
    form: Lossless
    rows: int
    columns: int

    def __post_init__(self) -> None:
        packed, form = self.packed, self.form
        is_here = packed.dtype is torch.uint8 and packed.is_cpu and packed.is_contiguous()
        if not is_here or packed.numel() != form.nbytes or self.rows * self.columns != form.count:
            raise InvalidInput(
                f"{packed.numel()} elements of {packed.dtype} are no {self.rows} x {self.columns} of {form}"
            )

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
        self.multiply.argtypes = (c_int, *(c_int64,) * 3, *(c_void_p,) * 3)
        self.multiply.restype = c_int


@cache
def reproduces(columns: int) -> bool:
    """Whether products over so many columns have PyTorch's bits on this machine. It is tried once, in milliseconds."""
    if _native() is None or not bitwise.reproduces(columns):
        return False
    draw = torch.Generator().manual_seed(columns)
    return all(_agree(outputs, columns, draw) for outputs in (3, CHUNK // columns + 66))


def linear(x: Tensor, weight: Squeezed) -> Tensor:
    """One token times the transpose of a squeezed weight, bit for bit as PyTorch with the restored one.

    Args:
        x: (1, columns), bfloat16 on the CPU, contiguous; `reproduces` says yes to the columns.
        weight: (rows, columns).

    Returns:
        (1, rows).

    Raises:
        InvalidInput: they are not so.
        CorruptRecord: the bytes of the weight are none that `squeeze` gives.
    """
    native, form = _native(), weight.form
    fits = x.dtype is torch.bfloat16 and x.shape == (1, weight.columns) and x.is_cpu and x.is_contiguous()
    if native is None or not fits:
        raise InvalidInput(f"{list(x.shape)} of {x.dtype} on {x.device} is not multiplied with {weight}")
    out = x.new_empty(1, weight.rows)
    sizes = (torch.get_num_threads(), weight.columns, weight.rows, form.rare)
    require_whole(native.multiply(*sizes, x.data_ptr(), weight.packed.data_ptr(), out.data_ptr()))
    return out


def require_whole(answer: int) -> None:
    """What a kernel for squeezed weights answered.

    Raises:
        CorruptRecord: that bytes are none that `squeeze` gives.
        MemoryError: that it had no memory.
    """
    if answer == _NOT_WHOLE:
        raise CorruptRecord("squeezed weights ask for more rare exponents than they have")
    require_memory(not answer)


@cache
def compiled() -> ctypes.CDLL | None:
    """`bitwise_lossless.cpp`; None where the instructions that it takes are not here, or nothing compiles."""
    found = library.compiled_with_avx2(
        "bitwise_lossless", "bitwise.h", "bitwise_experts.h", "chosen.h", "lossless.h"
    )
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
    found, wanted = linear(x, Squeezed.of(weight)), torch.nn.functional.linear(x, weight)
    return torch.equal(wanted.view(torch.int16), found.view(torch.int16))
