"""A token's experts in bfloat16 in one call, with the bits of PyTorch's own: two products each, SiLU, and their sum.

Weights are as they lie in memory, or squeezed. SiLU is looked up: PyTorch itself has said what it makes of each of the
65536 numbers. It knows addresses, not what holds the bytes there. Invariants: what was not seen to have PyTorch's
bits is refused; whoever makes a block has checked that its matrices lie within memory that stays as it is until the
call returns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_bool, c_int, c_int64, c_void_p
from functools import cache, partial
from itertools import chain
from struct import pack
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear, silu

from undercroft.kernels import bitwise, bitwise_lossless
from undercroft.kernels.bitwise_lossless import Squeezed, require_whole
from undercroft.kernels.block import Mixing, mixed
from undercroft.kernels.bound import Call

_PIECE = 1 << 14  # numbers, so few that PyTorch looks at them in one thread, in whole vectors


class PlainBlock(NamedTuple):
    """Where an expert has its matrices, in bfloat16; the order of the fields is that of `bitwise.cpp`.

    Attributes:
        gate_up: address of [2 * intermediate, width], the rows of gate first.
        down: address of [width, intermediate].
    """

    gate_up: int
    down: int

    @staticmethod
    def of(gate_up: Tensor, down: Tensor) -> PlainBlock:
        """Of matrices, for as long as these live."""
        return PlainBlock(gate_up.data_ptr(), down.data_ptr())

    def at(self, address: int) -> PlainBlock:
        """The same of offsets into a record, for where that lies."""
        return PlainBlock(address + self.gate_up, address + self.down)


class SqueezedBlock(NamedTuple):
    """The same, squeezed; the order of the fields is that of `bitwise_lossless.cpp`.

    Attributes:
        gate_up: address.
        gate_up_rare: how many rare exponents there is room for, see `Lossless`.
        down: address.
        down_rare: likewise.
    """

    gate_up: int
    gate_up_rare: int
    down: int
    down_rare: int

    @staticmethod
    def of(gate_up: Squeezed, down: Squeezed) -> SqueezedBlock:
        """Of matrices, for as long as these live."""
        ends = ((each.packed.data_ptr(), each.form.rare) for each in (gate_up, down))
        return SqueezedBlock(*chain.from_iterable(ends))

    def at(self, address: int) -> SqueezedBlock:
        """The same of offsets into a record, for where that lies."""
        return SqueezedBlock(address + self.gate_up, self.gate_up_rare, address + self.down, self.down_rare)


class BitwiseExperts(NamedTuple):
    """What computes experts of some sizes, all of which are blocks of one kind; see `block.ExpertKernel`.

    Attributes:
        width: of what goes in and comes out.
        intermediate: outputs of gate.
        squeezed: blocks are `SqueezedBlock`s; else `PlainBlock`s.
    """

    width: int
    intermediate: int
    squeezed: bool

    @property
    def reproduces(self) -> bool:
        """Whether they have PyTorch's bits on this machine. It is tried once, in milliseconds."""
        return _reproduces(self)

    @property
    def fields(self) -> int:
        """See `block.ExpertKernel`."""
        return len((SqueezedBlock if self.squeezed else PlainBlock)._fields)

    def mixing(
        self, x: Tensor, table: NDArray[np.int64], chosen: Tensor, shares: Tensor, out: Tensor
    ) -> Mixing:
        """See `block.ExpertKernel`."""
        native = _native()
        assert native is not None, "asked for where `reproduces` says no"
        sizes = (torch.get_num_threads(), self.width, self.intermediate)
        between = (native.activation.data_ptr(), bitwise.nan(), x.data_ptr())
        terms = (chosen.numel(), chosen.data_ptr(), shares.dtype is torch.bfloat16, shares.data_ptr())
        arguments = (*sizes, table.ctypes.data, len(table), *between, *terms, out.data_ptr())
        function = native.squeezed_chosen if self.squeezed else native.plain_chosen
        return partial(mixed, Call(function, arguments, (x, table, chosen, shares, out)), require_whole)

    def taken(self, x: Tensor) -> Tensor | None:
        """A token as it is computed with; None where PyTorch has to: another dtype, or somebody differentiates."""
        return x if x.dtype is torch.bfloat16 and bitwise.is_here(x) else None

    def feed_forwards(self, x: Tensor, blocks: Sequence[tuple[int, ...]]) -> Tensor:
        """What each makes of one token.

        Args:
            x: (1, width) that was `taken`.
            blocks: at least one.

        Returns:
            bfloat16 (blocks, width).

        Raises:
            CorruptRecord: the bytes of one are none that `squeeze` gives.
        """
        out = x.new_empty(len(blocks), self.width)
        self._compute(x, blocks, (), (), out)
        return out

    def mix(
        self,
        x: Tensor,
        blocks: Sequence[tuple[int, ...]],
        terms: Sequence[tuple[int, float]],
        out: Tensor | None = None,
    ) -> Tensor:
        """`add_up` of what `feed_forwards` gives, in one call.

        Args:
            x: (1, width) that was `taken`.
            blocks: at least one.
            terms: number and share of each, in the order of their sum.
            out: like x, for the result; memory of its own if None.

        Returns:
            bfloat16 (1, width).

        Raises:
            CorruptRecord: the bytes of one are none that `squeeze` gives.
        """
        out = x.new_empty(1, self.width) if out is None else out
        self._compute(x, blocks, [row for row, _ in terms], [share for _, share in terms], out)
        return out

    def add_up(
        self, products: Sequence[Tensor], terms: Sequence[tuple[int, float]], dtype: torch.dtype
    ) -> Tensor:
        """The sum of rows of what `feed_forwards` gave, each by its number times its share, in `dtype`, bfloat16."""
        rows = products[0] if len(products) == 1 else torch.cat(list(products))
        return bitwise.add_up(rows, [row for row, _ in terms], [share for _, share in terms])

    def _compute(
        self,
        x: Tensor,
        blocks: Sequence[tuple[int, ...]],
        order: Sequence[int],
        shares: Sequence[float],
        out: Tensor,
    ) -> None:
        native = _native()
        assert native is not None, "asked for where `reproduces` says no"
        fields = [*chain.from_iterable(blocks)]
        sizes = (torch.get_num_threads(), self.width, self.intermediate, len(blocks))
        table = (pack(f"{len(fields)}q", *fields), native.activation.data_ptr(), bitwise.nan())
        terms = (len(order), pack(f"{len(order)}q", *order), pack(f"{len(order)}f", *shares))
        compute = native.squeezed if self.squeezed else native.plain
        require_whole(compute(*sizes, *table, x.data_ptr(), *terms, out.data_ptr()))


class _Native:
    """The compiled kernels, and SiLU of each number of bfloat16, by its bits."""

    def __init__(self, plain: ctypes.CDLL, squeezed: ctypes.CDLL) -> None:
        self.plain, self.squeezed = (
            plain.undercroft_bitwise_experts,
            squeezed.undercroft_bitwise_lossless_experts,
        )
        pointers = (c_void_p, c_void_p, c_int, c_void_p)
        for function in (self.plain, self.squeezed):
            function.argtypes = (c_int, *(c_int64,) * 3, *pointers, c_int64, *(c_void_p,) * 3)
            function.restype = c_int
        self.plain_chosen = plain.undercroft_bitwise_chosen
        self.squeezed_chosen = squeezed.undercroft_bitwise_lossless_chosen
        between, terms = (c_void_p, c_int, c_void_p), (c_int64, c_void_p, c_bool, c_void_p)
        for function in (self.plain_chosen, self.squeezed_chosen):
            function.argtypes = (c_int, c_int64, c_int64, c_void_p, c_int64, *between, *terms, c_void_p)
            function.restype = c_int
        numbers = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.int16).view(torch.bfloat16)
        self.activation = torch.cat([silu(each) for each in numbers.view(-1, _PIECE)])


@cache
def _native() -> _Native | None:
    plain, squeezed = bitwise.compiled(), bitwise_lossless.compiled()
    return None if plain is None or squeezed is None else _Native(plain, squeezed)


@cache
def _reproduces(kernel: BitwiseExperts) -> bool:
    columns = bitwise_lossless if kernel.squeezed else bitwise
    if not (columns.reproduces(kernel.width) and columns.reproduces(kernel.intermediate)):
        return False
    return _native() is not None and _agrees(kernel)


@torch.no_grad()
def _agrees(kernel: BitwiseExperts) -> bool:
    draw = torch.Generator("cpu").manual_seed(kernel.width)
    shapes = ((1, kernel.width), (2 * kernel.intermediate, kernel.width), (kernel.width, kernel.intermediate))
    x, gate_up, down = (
        torch.randn(shape, generator=draw, device="cpu", dtype=torch.float32).bfloat16() for shape in shapes
    )
    gate, up = linear(x, gate_up / 16).chunk(2, dim=-1)
    wanted = torch.zeros_like(x).add_(linear(silu(gate) * up, down) * 0.7)
    plain = gate_up / 16, down
    squeezed = tuple(map(Squeezed.of, plain)) if kernel.squeezed else None
    block = PlainBlock.of(*plain) if squeezed is None else SqueezedBlock.of(*squeezed)
    found = kernel.mix(x, [block], [(0, torch.tensor(0.7).item())])
    return torch.equal(wanted.view(torch.int16), found.view(torch.int16))


def exact_kernel(gate_up: tuple[int, ...], down: tuple[int, ...], *, squeezed: bool) -> BitwiseExperts | None:
    """What computes experts whose matrices have these shapes, with PyTorch's bits; None where nothing does.

    Args:
        gate_up: that of (2 * intermediate, width), if it is to be computed here.
        down: that of (width, intermediate).
        squeezed: see `BitwiseExperts`.
    """
    if len(gate_up) != 2 or len(down) != 2 or gate_up != (2 * down[1], down[0]):
        return None
    kernel = BitwiseExperts(*down, squeezed)
    return kernel if kernel.reproduces else None
