"""Products with packed weights in plain torch: on any device, and where nothing can be compiled.

It knows the packed layout through `dequantise`. Invariant: at most `_PIECE` weights are dequantised at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from undercroft.kernels.format import BLOCK_ROWS, Format
from undercroft.kernels.quantise import dequantise

_PIECE = 1 << 24


def linear(x: Tensor, packed: Tensor, format: Format, rows: int) -> Tensor:
    """The product of x [M, K] with a packed [rows, K]; the activations are not quantised.

    On the CPU it computes in float32, where products are faster than in bfloat16; elsewhere in the dtype of x.
    """
    columns = x.shape[1]
    dtype = torch.float32 if x.is_cpu else x.dtype
    step = max(1, _PIECE // (BLOCK_ROWS * columns)) * BLOCK_ROWS
    pieces = torch.split(packed, step // BLOCK_ROWS * format.groups(columns) * format.group_nbytes)
    wide, out = x.to(dtype), x.new_empty(x.shape[0], rows)
    for first, piece in zip(range(0, rows, step), pieces, strict=True):
        weight = dequantise(piece, format, min(step, rows - first), columns, dtype)
        out[:, first : first + step] = functional.linear(wide, weight)
    return out


def expert(
    x: Tensor, gate_up: tuple[Tensor, Format], down: tuple[Tensor, Format], intermediate: int
) -> Tensor:
    """down(silu(gate(x)) * up(x)) for x [M, H]; between the two products in float32."""
    gate, up = linear(x.float(), *gate_up, 2 * intermediate).chunk(2, dim=1)
    return linear(functional.silu(gate) * up, *down, x.shape[1]).to(x.dtype)
