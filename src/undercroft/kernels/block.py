"""Gated feed-forward blocks of packed matrices, by address: what one token wants of a layer, in one call.

It knows where bytes lie, not what holds them there. Invariant: whoever makes a `Block` has checked that its matrices
lie within memory that stays as it is until the call returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from undercroft.errors import InvalidInput
from undercroft.kernels import library
from undercroft.kernels.linear import DTYPES


class Gated(NamedTuple):
    """Sizes of a gated feed-forward block.

    Attributes:
        width: H, of what goes in and comes out.
        intermediate: outputs of gate.
    """

    width: int
    intermediate: int


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


def available() -> bool:
    """Whether `feed_forwards` can be called: something compiled the native kernels."""
    return library.load() is not None


def feed_forwards(x: Tensor, blocks: Sequence[Block], sizes: Gated) -> Tensor:
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
    if x.shape != (1, sizes.width) or x.dtype not in DTYPES or not x.is_cpu or not blocks:
        raise InvalidInput(
            f"one token [1, {sizes.width}] of float32 or bfloat16 on the CPU meets blocks, not {list(x.shape)} of "
            f"{x.dtype} on {x.device} and {len(blocks)} blocks"
        )
    found = library.load()
    assert found is not None, "asked for where `available` says no"
    return found.blocks(x.contiguous(), blocks, sizes.intermediate)
