"""A record: one contiguous run of bytes on disk that holds a tensor, or several.

It knows where the bytes lie and what they are; not how they are read. Pure but for `tensor`, which gives
them a shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from undercroft.store.ranges import round_up
from undercroft.store.slab import Lease

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
}
"""The element types of the format, by name."""
MOST_DIMENSIONS = 32


class Key(NamedTuple):
    """What a record is asked for by; a plain tuple of two texts will do."""

    name: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One contiguous run of bytes on disk.

    Attributes:
        name: which weights, such as "layers.3.experts.17".
        kind: which form of them, such as "bfloat16" or "int4".
        offset: bytes into the data file, a multiple of 4096.
        nbytes: bytes of content; zeros follow up to the next multiple of 4096.
        dtype: a name in `DTYPES`.
        shape: elements along each axis.
        checksum: xxh3_64 of the content.
        metadata: anything its writer wanted to say.
        key: what it is asked for by.
        occupied: bytes it takes on disk and in memory: `nbytes` rounded up to a multiple of 4096.
        end: where the next record may begin.
    """

    name: str
    kind: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    checksum: int
    metadata: Mapping[str, Any]
    key: Key = field(init=False, repr=False, compare=False)
    occupied: int = field(init=False, repr=False, compare=False)
    end: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        occupied = round_up(self.nbytes)
        object.__setattr__(self, "key", Key(self.name, self.kind))
        object.__setattr__(self, "occupied", occupied)
        object.__setattr__(self, "end", self.offset + occupied)

    def can_be(self) -> bool:
        """Whether it has content, and as much of it as its dtype and shape say."""
        if len(self.shape) > MOST_DIMENSIONS or min(self.shape, default=1) < 1:
            return False
        return self.nbytes == math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def tensor(self, lease: Lease) -> torch.Tensor:
        """The content as a tensor over a lease that holds it, which it keeps alive. Do not write to it."""
        return torch.empty(0, dtype=DTYPES[self.dtype]).set_(lease.storage(0, self.nbytes)).view(self.shape)
