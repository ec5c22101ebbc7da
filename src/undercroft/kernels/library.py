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
from pathlib import Path

import torch
from torch import Tensor

from undercroft import native
from undercroft.errors import InvalidInput
from undercroft.kernels.format import Format

_SOURCE = Path(__file__).with_name("linear.cpp")
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
        self.instructions = _NAMES[: library.undercroft_kernels_instructions() + 1]
        self.threaded = bool(library.undercroft_kernels_threaded())

    def linear(
        self, x: Tensor, packed: Tensor, format: Format, rows: int, *, instructions: str | None = None
    ) -> Tensor:
        """The product of x [M, K] with a packed [rows, K], with the named or the fastest instruction set."""
        out = torch.empty(x.shape[0], rows, dtype=x.dtype)
        call = self._call(x, instructions)
        weight = (packed.data_ptr(), format.bits, format.group)
        _require_memory(self._linear(*call, x.data_ptr(), *weight, rows, out.data_ptr()))
        return out

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
        _require_memory(self._expert(*call, intermediate, x.data_ptr(), *weights, out.data_ptr()))
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
        flat = [field for block in blocks for field in block]
        table = (c_int64 * len(flat))(*flat)
        call = (name, threads, bf16, len(blocks), width, intermediate)
        _require_memory(self._blocks(*call, x.data_ptr(), table, out.data_ptr()))
        return out

    def _call(self, x: Tensor, instructions: str | None) -> tuple[int, int, bool, int, int]:
        name = instructions or self.instructions[-1]
        if name not in self.instructions:
            raise InvalidInput(f"this CPU has {', '.join(self.instructions)}, not {name}")
        return _NAMES.index(name), torch.get_num_threads(), x.dtype == torch.bfloat16, x.shape[0], x.shape[1]


@cache
def load() -> Library | None:
    """The native kernels; None where they cannot be compiled.

    The first call on a machine compiles them, in some ten seconds; later ones load what is in Undercroft's home.
    """
    try:
        path = native.library(_SOURCE, includes=[_SOURCE.with_name("tile.inc")], flags=_FLAGS)
        return Library(ctypes.CDLL(str(path)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("no native kernels (%s): quantised layers work, several times slower", error)
        return None


def _require_memory(done: bool) -> None:
    if not done:
        raise MemoryError("no memory for the quantised activations of a linear layer")
