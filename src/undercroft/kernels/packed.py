"""The packed layout, in torch: codes and their scales to bytes and back.

It knows docs/kernels.md and nothing of how codes are chosen or used; it runs on any device. Invariant: `unpack`
gives what `pack` was given, for whole blocks of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from undercroft.kernels.format import BLOCK_ROWS, Format


class Codes(NamedTuple):
    """Weights of whole blocks, as codes: a weight is `code * scale + least` of its group.

    Attributes:
        codes: [rows, groups, group], int8 for 8 bits, else uint8.
        scale: [rows, groups], bfloat16.
        least: [rows, groups], bfloat16; None where the format is symmetric.
    """

    codes: Tensor
    scale: Tensor
    least: Tensor | None


def pack(weights: Codes, format: Format) -> Tensor:
    """The bytes of whole blocks: uint8 [rows / 32 * groups * format.group_nbytes]."""
    headers = [weights.scale] if weights.least is None else [weights.scale, weights.least]
    parts = [*map(_header, headers), _interleaved(weights.codes.view(torch.uint8), format.bits)]
    return torch.cat(parts, dim=2).flatten()


def unpack(packed: Tensor, format: Format, groups: int) -> Codes:
    """What `pack` was given; `packed` holds whole blocks of so many groups."""
    parts = packed.view(-1, groups, format.group_nbytes)
    half = 2 * BLOCK_ROWS
    codes = _apart(parts[:, :, format.header_nbytes :], format)
    least = None if format.symmetric else _rows(parts[:, :, half : 2 * half])
    return Codes(codes, _rows(parts[:, :, :half]), least)


def _header(values: Tensor) -> Tensor:
    """[rows, groups] of bfloat16 to [blocks, groups, 64] bytes."""
    blocks = values.view(-1, BLOCK_ROWS, values.shape[1]).transpose(1, 2)
    return blocks.contiguous().view(torch.uint8)


def _rows(header: Tensor) -> Tensor:
    """[blocks, groups, 64] bytes to [rows, groups] of bfloat16."""
    return header.contiguous().view(torch.bfloat16).transpose(1, 2).flatten(0, 1)


def _interleaved(codes: Tensor, bits: int) -> Tensor:
    """[rows, groups, group] to [blocks, groups, bytes]: see the table in docs/kernels.md."""
    rows, groups, _ = codes.shape
    lines = codes.view(rows // BLOCK_ROWS, BLOCK_ROWS, groups, -1, 8 // bits, 4).permute(0, 2, 3, 1, 5, 4)
    packed = lines[..., 0].clone()
    for place in range(1, 8 // bits):
        packed |= lines[..., place] << bits * place
    return packed.flatten(2)


def _apart(packed: Tensor, format: Format) -> Tensor:
    """The inverse of `_interleaved`."""
    bits = format.bits
    lines = packed.reshape(*packed.shape[:2], -1, BLOCK_ROWS, 4)
    if bits < 8:
        lines = torch.stack([(lines >> shift) & format.levels for shift in range(0, 8, bits)], dim=-1)
    else:
        lines = lines.view(torch.int8).unsqueeze(-1)
    return lines.permute(0, 3, 1, 2, 5, 4).flatten(0, 1).flatten(2)
