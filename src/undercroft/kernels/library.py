"""The native kernels, compiled on first use: tensors in, tensors out.

It knows the C functions of `linear.cpp` and which instruction sets this CPU has. Invariant: sizes, types and devices
were checked before an address goes out, so that nothing is read or written out of bounds.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from collections.abc import Sequence
from ctypes import c_bool, c_int, c_int64, c_void_p
from functools import cache
from itertools import chain
from pathlib import Path
from struct import pack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from undercroft import native
from undercroft.errors import InvalidInput
from undercroft.kernels.bound import Call, require_memory
from undercroft.kernels.format import Format

_HERE = Path(__file__).parent
_NAMES = ("portable", "avx2", "avx512vnni")  # in the order of their numbers in C
_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno")
_log = logging.getLogger(__name__)


class Library:
    """The compiled kernels. Arguments of its methods are as `linear` and `expert` have checked them.

    Args:
        library: the compiled `linear.cpp`.

    Attributes:
        instructions: names of the instruction sets that work here, the fastest last.
        threaded: whether PyTorch's OpenMP threads can be used.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._linear = library.undercroft_kernels_linear
        self._expert = library.undercroft_kernels_expert
        call = (c_int, c_int, c_bool, c_int64, c_int64)
        weight = (c_void_p, c_int, c_int64)
        self._linear.argtypes = (*call, c_void_p, *weight, c_int64, c_void_p)
        self._expert.argtypes = (*call, c_int64, c_void_p, *weight, *weight, c_void_p)
        self._blocks = library.undercroft_kernels_blocks
        self._blocks.argtypes = (*call, c_int64, c_void_p, c_void_p, c_void_p)
        self._linear.restype = self._expert.restype = self._blocks.restype = c_bool
        self._add_up = library.undercroft_kernels_add_up
        self._add_up.argtypes = (c_bool, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p)
        self._add_up.restype = None
        self._mix = library.undercroft_kernels_mix
        self._mix.argtypes = (*self._blocks.argtypes[:-1], c_int64, c_void_p, c_void_p, c_void_p)
        self._mix.restype = c_bool
        self._mix_chosen = library.undercroft_kernels_mix_chosen
        sizes, chosen = (c_int64, c_int64), (c_void_p, c_bool, c_void_p, c_void_p)
        self._mix_chosen.argtypes = (c_int, c_int, c_bool, *sizes, c_void_p, c_void_p, *sizes, *chosen)
        self._mix_chosen.restype = c_int
        self.instructions = _NAMES[: library.undercroft_kernels_instructions() + 1]
        self._fastest = len(self.instructions) - 1
        self.threaded = bool(library.undercroft_kernels_threaded())

    def linear(
        self, x: Tensor, packed: Tensor, format: Format, rows: int, *, instructions: str | None = None
    ) -> Tensor:
        """The product of x [..., K] with a packed [rows, K], with the named or the fastest instruction set."""
        out = x.new_empty(*x.shape[:-1], rows)
        self.multiplying(x, packed, format, rows, out, instructions=instructions)()
        return out

    def multiplying(
        self,
        x: Tensor,
        packed: Tensor,
        format: Format,
        rows: int,
        out: Tensor,
        *,
        instructions: str | None = None,
    ) -> Call:
        """The same into `out`, with as many threads as PyTorch has now."""
        weight = (packed.data_ptr(), format.bits, format.group)
        arguments = (*self._call(x, instructions), x.data_ptr(), *weight, rows, out.data_ptr())
        return Call(self._linear, arguments, (x, packed, out))

    def expert(
        self,
        x: Tensor,
        gate_up: tuple[Tensor, Format],
        down: tuple[Tensor, Format],
        intermediate: int,
        *,
        instructions: str | None = None,
    ) -> Tensor:
        """down(silu(gate(x)) * up(x)) for x [M, H], with the named or the fastest instruction set."""
        out = torch.empty_like(x)
        call = self._call(x, instructions)
        weights = [
            value
            for packed, format in (gate_up, down)
            for value in (packed.data_ptr(), format.bits, format.group)
        ]
        require_memory(self._expert(*call, intermediate, x.data_ptr(), *weights, out.data_ptr()))
        return out

    def blocks(
        self,
        x: Tensor,
        blocks: Sequence[tuple[int, ...]],
        intermediate: int,
        *,
        instructions: str | None = None,
    ) -> Tensor:
        """What each block makes of the token x [1, H], float32 [blocks, H]; see `block.Block`."""
        out = torch.empty(len(blocks), x.shape[1])
        name, threads, bf16, _, width = self._call(x, instructions)
        call = (name, threads, bf16, len(blocks), width, intermediate)
        require_memory(self._blocks(*call, x.data_ptr(), _table(blocks), out.data_ptr()))
        return out

    def mix(
        self,
        x: Tensor,
        blocks: Sequence[tuple[int, ...]],
        intermediate: int,
        order: Sequence[int],
        shares: Sequence[float],
        out: Tensor | None = None,
    ) -> Tensor:
        """`add_up` of what `blocks` gives, in the dtype of x."""
        out = torch.empty_like(x) if out is None else out
        name, threads, bf16, _, width = self._call(x, None)
        call = (name, threads, bf16, len(blocks), width, intermediate)
        terms = (len(order), pack(f"{len(order)}q", *order), pack(f"{len(order)}f", *shares))
        require_memory(self._mix(*call, x.data_ptr(), _table(blocks), *terms, out.data_ptr()))
        return out

    def mixing(
        self,
        x: Tensor,
        table: NDArray[np.int64],
        intermediate: int,
        chosen: Tensor,
        shares: Tensor,
        out: Tensor,
    ) -> Call:
        """`mix` of those that a token chose; see `ExpertKernel.mixing`."""
        number, threads, bf16, _, width = self._call(x, None)
        sizes, picked = (width, intermediate, x.data_ptr()), (table.ctypes.data, len(table), chosen.numel())
        terms = (chosen.data_ptr(), shares.dtype is torch.bfloat16, shares.data_ptr(), out.data_ptr())
        arguments = (number, threads, bf16, *sizes, *picked, *terms)
        return Call(self._mix_chosen, arguments, (x, table, chosen, shares, out))

    def add_up(
        self, rows: Tensor, order: Sequence[int], shares: Sequence[float], dtype: torch.dtype
    ) -> Tensor:
        """The sum of some rows of float32 [N, W], each times its share, in the order given: [1, W] of a dtype."""
        count, width = len(order), rows.shape[1]
        out = torch.empty(1, width, dtype=dtype)
        terms = (pack(f"{count}q", *order), pack(f"{count}f", *shares))
        self._add_up(dtype is torch.bfloat16, count, width, rows.data_ptr(), *terms, out.data_ptr())
        return out

    def _call(self, x: Tensor, instructions: str | None) -> tuple[int, int, bool, int, int]:
        columns = x.shape[-1]
        number = self._fastest if instructions is None else self.number(instructions)
        return number, torch.get_num_threads(), x.dtype is torch.bfloat16, x.numel() // columns, columns

    def number(self, instructions: str | None) -> int:
        """In C, of an instruction set by name, or of the fastest.

        Raises:
            InvalidInput: this CPU has no such.
        """
        if instructions is None:
            return self._fastest
        if instructions not in self.instructions:
            raise InvalidInput(f"this CPU has {', '.join(self.instructions)}, not {instructions}")
        return _NAMES.index(instructions)


@cache
def load() -> Library | None:
    """The native kernels; None where they cannot be compiled.

    The first call on a machine compiles them, in some twenty seconds; later ones load what is in Undercroft's home.
    """
    library = compiled("linear", "chosen.h", "tile.inc")
    return None if library is None else Library(library)


def compiled(name: str, *includes: str) -> ctypes.CDLL | None:
    """What a source of this folder was compiled to, compiled first if need be; None where that cannot be done."""
    files = [_HERE / include for include in ("vectors.h", "dispatch.inc", *includes)]
    try:
        return ctypes.CDLL(str(native.library(_HERE / f"{name}.cpp", includes=files, flags=_FLAGS)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("no native kernels (%s): quantised layers work, several times slower", error)
        return None


def compiled_with_avx2(name: str, *includes: str) -> ctypes.CDLL | None:
    """The same of a source that is called only where there is AVX2; None also where there is none."""
    found = load()
    return compiled(name, *includes) if found is not None and "avx2" in found.instructions else None


def _table(blocks: Sequence[tuple[int, ...]]) -> bytes:
    fields = [*chain.from_iterable(blocks)]
    return pack(f"{len(fields)}q", *fields)
