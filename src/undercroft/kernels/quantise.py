"""Weights to packed bytes, with little error, and back.

It knows how codes are chosen; `packed` knows where they lie. Invariant: in no group is the squared error larger than
that of rounding to nearest between the group's extremes with the same stored precision of scale and least weight.

Sources: clipping the range before rounding, searched per group: Banner et al. 2019 (arXiv 1810.05723); scale and
least weight from the line of least squares through the codes: as in llama.cpp's `make_qkx2_quants`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from undercroft.errors import InvalidInput
from undercroft.kernels.format import BLOCK_ROWS, Format, packed_nbytes
from undercroft.kernels.packed import Codes, pack, unpack

# Shares cut off the lower and the upper end of a group's range before its codes are chosen.
_CUTS = {
    4: ((0.0, 0.0), (0.02, 0.02), (0.04, 0.04), (0.0, 0.04), (0.04, 0.0)),
    2: ((0.15, 0.15), (0.1, 0.25), (0.25, 0.1), (0.05, 0.15), (0.15, 0.05)),
}
_PIECE = 1 << 18  # weights that are worked on at a time
_LARGEST, _SMALLEST = 1e38, 1e-37


def quantise(weight: Tensor, format: Format) -> Tensor:
    """Pack a weight.

    Args:
        weight: [rows, columns], any floating dtype; the columns divide into groups.
        format: of the result.

    Returns:
        uint8 [packed_nbytes(format, rows, columns)], on the CPU. Memory beyond it does not grow with the rows.

    Raises:
        InvalidInput: another shape or dtype, or weights that are not finite.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise InvalidInput(
            f"a weight is [rows, columns] of floats, not {list(weight.shape)} of {weight.dtype}"
        )
    rows, columns = weight.shape
    packed = torch.empty(packed_nbytes(format, rows, columns), dtype=torch.uint8)
    end = 0
    for piece in _pieces(weight.detach(), columns):
        part = pack(_codes(piece, format), format)
        packed[end : end + part.numel()] = part
        end += part.numel()
    return packed


def dequantise(
    packed: Tensor, format: Format, rows: int, columns: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights that packed bytes stand for: [rows, columns], on the device of `packed`.

    A weight is `code * scale + least`, computed in float32 and then rounded to `dtype`.

    Raises:
        InvalidInput: the bytes are not those of such a weight.
    """
    require_packed(packed, format, rows, columns)
    codes, scale, least = unpack(packed, format, columns // format.group)
    weights = codes.float() * scale.float().unsqueeze(-1)
    if least is not None:
        weights += least.float().unsqueeze(-1)
    return weights.flatten(1)[:rows].to(dtype)


def require_packed(packed: Tensor, format: Format, rows: int, columns: int) -> None:
    """Refuse bytes that are not those of a weight of this shape, before anything reads them.

    Raises:
        InvalidInput: another dtype, size or memory layout.
    """
    needed = packed_nbytes(format, rows, columns)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        raise InvalidInput(
            f"packed weights are contiguous uint8 [nbytes], not {list(packed.shape)} of {packed.dtype}"
        )
    if packed.numel() != needed:
        raise InvalidInput(
            f"[{rows}, {columns}] in {format} takes {needed} bytes packed, not {packed.numel()}"
        )


def _pieces(weight: Tensor, columns: int) -> Iterator[Tensor]:
    """The weight in float32, some whole blocks at a time, the last one padded with rows of zeros."""
    step = max(1, _PIECE // (BLOCK_ROWS * columns)) * BLOCK_ROWS
    for part in torch.split(weight, step):
        piece = part.to("cpu", torch.float32)
        if not bool((piece.abs() < _LARGEST).all()):
            raise InvalidInput("some weights are infinite or not numbers, so no scale fits their group")
        padding = -len(piece) % BLOCK_ROWS
        yield torch.nn.functional.pad(piece, (0, 0, 0, padding)).contiguous()


def _codes(piece: Tensor, format: Format) -> Codes:
    """The best codes found for [rows, columns] of weights.

    The search runs on [group, rows * groups]: what is summed over a group then lies in as many separate runs, which
    PyTorch adds twice as fast as neighbours.
    """
    weights = piece.view(-1, format.group).t().contiguous()
    codes, scale, least = _symmetric(weights) if format.symmetric else _asymmetric(weights, format)
    shape = (len(piece), -1)
    return Codes(
        codes.t().reshape(*shape, format.group).to(torch.int8 if least is None else torch.uint8),
        scale.view(shape).bfloat16(),
        None if least is None else least.view(shape).bfloat16(),
    )


def _symmetric(weights: Tensor) -> tuple[Tensor, Tensor, None]:
    plain = _stored(weights.abs().amax(0) / 127)
    codes = _nearest(weights, plain, -127, 127)
    fitted = _stored(_ratio((codes * weights).sum(0), codes.square().sum(0)))
    again = _nearest(weights, fitted, -127, 127)
    better = _error(again * fitted, weights) < _error(codes * plain, weights)
    return torch.where(better, again, codes), torch.where(better, fitted, plain), None


def _asymmetric(weights: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor]:
    low, high = weights.amin(0), weights.amax(0)
    scale, least = _between(low, high, format)
    error = _error_of(weights, scale, least, format)
    for below, above in _CUTS[format.bits]:
        start = _between(low + below * (high - low), high - above * (high - low), format)
        other = _fitted(weights, *start, format)
        other_error = _error_of(weights, *other, format)
        better = other_error < error
        error = torch.where(better, other_error, error)
        scale, least = torch.where(better, other[0], scale), torch.where(better, other[1], least)
    return _nearest(weights - least, scale, 0, format.levels), scale, least


def _between(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Scale and least weight, as stored, whose codes reach from low to high."""
    least = _stored(low)
    return _stored((high - least) / format.levels), least


def _fitted(weights: Tensor, scale: Tensor, least: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """The line of least squares through the codes that a scale and a least weight give, as stored."""
    codes = _nearest(weights - least, scale, 0, format.levels)
    count, total, squares = len(codes), codes.sum(0), codes.square().sum(0)
    product, sum_of_weights = (codes * weights).sum(0), weights.sum(0)
    slope = _ratio(product - total * sum_of_weights / count, squares - total.square() / count)
    least = _stored((sum_of_weights - slope * total) / count)
    return _stored(_ratio(product - least * total, squares)), least


def _stored(values: Tensor) -> Tensor:
    return values.bfloat16().float()


def _nearest(values: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    return _ratio(values, scale).round_().clamp_(lowest, highest)


def _ratio(values: Tensor, divisor: Tensor) -> Tensor:
    """The quotient; 0 where the divisor is so small that its inverse is none."""
    return values * torch.where(divisor.abs() < _SMALLEST, 0.0, 1 / divisor)


def _error_of(weights: Tensor, scale: Tensor, least: Tensor, format: Format) -> Tensor:
    codes = _nearest(weights - least, scale, 0, format.levels)
    return _error(codes.mul_(scale).add_(least), weights)


def _error(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square_().sum(0)
