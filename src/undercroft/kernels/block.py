"""Gated feed-forward blocks of packed matrices, by address: what one token wants of a layer, in one call.

It knows where bytes lie, not what holds them there. Invariant: whoever makes a `Block` has checked that its matrices
lie within memory that stays as it is until the call returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from undercroft.errors import InvalidInput
from undercroft.kernels import library
from undercroft.kernels.bound import Call, require_memory
from undercroft.kernels.linear import DTYPES

Mixing = Callable[[], bool]
"""Says no, and has done nothing, where one of the chosen is not in memory, or none was chosen."""
ABSENT = 3
"""What a C function answers then; 0 that it is done, others as each has it."""


class ExpertKernel(Protocol):
    """What computes gated feed-forward blocks of one token by their addresses."""

    @property
    def fields(self) -> int:
        """Numbers in a block; the first is never zero."""
        ...

    def mixing(
        self, x: Tensor, table: NDArray[np.int64], chosen: Tensor, shares: Tensor, out: Tensor
    ) -> Mixing:
        """`mix` of a token's experts, again and again in the same memory.

        Args:
            x: (1, width), such as is `taken`.
            table: (experts, fields), the blocks of all experts, beginning with zero for those that are not in memory.
            chosen: (1, used) int64, experts by number, of whom the sum is in ascending order; a number beyond the last
                means none.
            shares: (1, used), bfloat16 or float32.
            out: like x.
        """
        ...

    def taken(self, x: Tensor) -> Tensor | None:
        """A token (1, width) as it is computed with; None where it cannot be."""
        ...

    def feed_forwards(self, x: Tensor, blocks: Sequence[tuple[int, ...]]) -> Tensor:
        """What each block makes of a token that was `taken`, (blocks, width)."""
        ...

    def mix(
        self,
        x: Tensor,
        blocks: Sequence[tuple[int, ...]],
        terms: Sequence[tuple[int, float]],
        out: Tensor | None = None,
    ) -> Tensor:
        """The sum of some, each by its number and its share, in the order of the terms, (1, width), in `out` if any."""
        ...

    def add_up(
        self, products: Sequence[Tensor], terms: Sequence[tuple[int, float]], dtype: torch.dtype
    ) -> Tensor:
        """The same sum of what `feed_forwards` gave in one call or more, whose rows count on."""
        ...


class Gated(NamedTuple):
    """Sizes of a gated feed-forward block; an `ExpertKernel` of `Block`s.

    Attributes:
        width: H, of what goes in and comes out.
        intermediate: outputs of gate.
    """

    width: int
    intermediate: int

    @property
    def fields(self) -> int:
        """See `ExpertKernel`."""
        return len(Block._fields)

    def mixing(
        self, x: Tensor, table: NDArray[np.int64], chosen: Tensor, shares: Tensor, out: Tensor
    ) -> Mixing:
        """See `ExpertKernel`."""
        call = _native().mixing(x, table, self.intermediate, chosen, shares, out)
        return partial(mixed, call, _require_done)

    def taken(self, x: Tensor) -> Tensor:
        """See `ExpertKernel`."""
        return x if x.dtype in DTYPES else x.float()

    def feed_forwards(self, x: Tensor, blocks: Sequence[tuple[int, ...]]) -> Tensor:
        """See `ExpertKernel`, and the function of that name."""
        return feed_forwards(x, blocks, self)

    def mix(
        self,
        x: Tensor,
        blocks: Sequence[tuple[int, ...]],
        terms: Sequence[tuple[int, float]],
        out: Tensor | None = None,
    ) -> Tensor:
        """See `ExpertKernel`, and the function of that name."""
        return mix(x, blocks, self, terms, out)

    def add_up(
        self, products: Sequence[Tensor], terms: Sequence[tuple[int, float]], dtype: torch.dtype
    ) -> Tensor:
        """See `ExpertKernel`, and the function of that name."""
        return add_up(products, terms, dtype)


class Block(NamedTuple):
    """Where down(silu(gate(x)) * up(x)) has its matrices; the order of the fields is that of `linear.cpp`.

    Attributes:
        gate_up: address of the packed [2 * intermediate, H], the rows of gate first.
        gate_up_levels: address of int8 [H], how many times what meets a column is doubled; 0 for never.
        bits: of the first matrix.
        group: of the first matrix.
        down: address of the packed [H, intermediate].
        down_levels: as above, int8 [intermediate].
        down_bits: of the second.
        down_group: of the second.
    """

    gate_up: int
    gate_up_levels: int
    bits: int
    group: int
    down: int
    down_levels: int
    down_bits: int
    down_group: int

    def at(self, address: int) -> Block:
        """The same of offsets into a record, for where that lies."""
        levels, down_levels = self.gate_up_levels, self.down_levels
        return Block(
            address + self.gate_up,
            levels and address + levels,
            self.bits,
            self.group,
            address + self.down,
            down_levels and address + down_levels,
            self.down_bits,
            self.down_group,
        )


def available() -> bool:
    """Whether `feed_forwards` can be called: something compiled the native kernels."""
    return library.load() is not None


def feed_forwards(x: Tensor, blocks: Sequence[tuple[int, ...]], sizes: Gated) -> Tensor:
    """What each block makes of one token; bit for bit the same whatever other blocks the call has.

    Args:
        x: [1, H], float32 or bfloat16, on the CPU.
        blocks: at least one.
        sizes: of each of them.

    Returns:
        float32 [len(blocks), H].

    Raises:
        InvalidInput: x is no such token, or there is no block.
    """
    _require_token(x, blocks, sizes)
    return _native().blocks(x.contiguous(), blocks, sizes.intermediate)


def mix(
    x: Tensor,
    blocks: Sequence[tuple[int, ...]],
    sizes: Gated,
    terms: Sequence[tuple[int, float]],
    out: Tensor | None = None,
) -> Tensor:
    """`add_up` of what `feed_forwards` gives, in one call and to the bit.

    Args:
        x: [1, H], float32 or bfloat16, on the CPU.
        blocks: at least one.
        sizes: of each of them.
        terms: number and share of each block, in the order of their sum.
        out: like x, for the result; memory of its own if None.

    Returns:
        [1, H], in the dtype of x.

    Raises:
        InvalidInput: x is no such token, or there is no such block.
    """
    _require_token(x, blocks, sizes)
    order = [row for row, _ in terms]
    _require_rows(order, len(blocks))
    shares = [share for _, share in terms]
    return _native().mix(x.contiguous(), blocks, sizes.intermediate, order, shares, out)


def add_up(products: Sequence[Tensor], terms: Sequence[tuple[int, float]], dtype: torch.dtype) -> Tensor:
    """The sum of some rows of what `feed_forwards` gave, each times its share, in the order of the terms.

    Args:
        products: float32 [blocks, H], of one or more calls; their rows count on.
        terms: number and share of each row.
        dtype: of the result.

    Returns:
        [1, H]; zeros where there is no term.

    Raises:
        InvalidInput: there is no such row.
    """
    rows = products[0] if len(products) == 1 else torch.cat(list(products))
    order = [row for row, _ in terms]
    _require_rows(order, rows.shape[0])
    if rows.dtype is not torch.float32 or rows.dim() != 2:
        raise InvalidInput(f"products are float32 [blocks, H], not {list(rows.shape)} of {rows.dtype}")
    taken = dtype if dtype in DTYPES else torch.float32
    return _native().add_up(rows.contiguous(), order, [share for _, share in terms], taken).to(dtype)


def mixed(call: Call, require_done: Callable[[int], None]) -> bool:
    """As `Mixing`, by a C function whose other answers somebody knows."""
    answer = call.function(*call.arguments)
    if answer == ABSENT:
        return False
    require_done(answer)
    return True


def _require_done(answer: int) -> None:
    require_memory(not answer)


def _native() -> library.Library:
    found = library.load()
    assert found is not None, "asked for where `available` says no"
    return found


def _require_token(x: Tensor, blocks: Sequence[tuple[int, ...]], sizes: Gated) -> None:
    if x.shape != (1, sizes.width) or x.dtype not in DTYPES or not x.is_cpu or not blocks:
        raise InvalidInput(
            f"one token [1, {sizes.width}] of float32 or bfloat16 on the CPU meets blocks, not {list(x.shape)} of "
            f"{x.dtype} on {x.device} and {len(blocks)} blocks"
        )


def _require_rows(order: Sequence[int], count: int) -> None:
    if order and not 0 <= min(order) <= max(order) < count:
        raise InvalidInput(f"there are {count} rows, and {list(order)} are asked for")
