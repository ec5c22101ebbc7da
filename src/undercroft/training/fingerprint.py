"""A name for the bits of some tensors: equal names are equal bits and shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import xxhash


def fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """A hash (xxh3, 128 bits, hexadecimal) of shapes, types and bytes, in order."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        raw: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(raw)
    return digest.hexdigest()
