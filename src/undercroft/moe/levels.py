"""Brings the columns of a matrix to one level, before few bits must express them.

In large models a few channels are far larger than the rest (Dettmers et al. 2022, arXiv 2208.07339), and widen the
range that a group of weights must cover. Such columns are divided by a power of two, and the inputs that meet them are
multiplied by it (the equivalence of SmoothQuant, arXiv 2211.10438, with factors from weights alone, not activations).
Pure. Invariant: powers of two round nothing, so the product stays what it was, as long as nothing overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 2
"""Columns less than about four times the typical one stay."""
_MOST = 30


def levels_of(weight: Tensor) -> Tensor:
    """How many times each column is to be halved.

    Args:
        weight: [rows, columns], floating.

    Returns:
        int8 [columns], 0 for most; 0 for all where weights are not finite.
    """
    sizes = weight.float().square().mean(0).sqrt()
    doublings = (sizes / sizes.median()).log2().round().nan_to_num(0, 0, 0)
    return torch.where(doublings >= _LEAST, doublings.clamp(max=_MOST), 0).to(torch.int8)


def factors(levels: Tensor) -> Tensor:
    """What inputs are multiplied by: float32 [columns] of int8 [columns]."""
    return torch.ldexp(torch.ones(levels.shape), levels.int())
