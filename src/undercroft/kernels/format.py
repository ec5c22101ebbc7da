"""In which form weights are held: bits, group, and the bytes that a matrix takes.

Pure arithmetic: it knows sizes, not tensors. Invariant: `packed_nbytes` is what docs/kernels.md says, byte for byte.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from undercroft.errors import InvalidInput

BLOCK_ROWS = 32
"""Rows of a weight that are interleaved; the last block is padded with zeros."""

BITS = (2, 4, 8)
GROUPS = (32, 64, 128)
_NAME = re.compile(r"int(\d)(?:-g(\d+))?")


@dataclass(frozen=True, slots=True)
class Format:
    """A form of group-quantised weights.

    Attributes:
        bits: of a weight: 8 (symmetric: scale only), 4 or 2 (scale and least weight).
        group: neighbouring columns of a row that share them: 32, 64 or 128.
        group_nbytes: bytes of a group of a block: its header, then its codes.
    """

    bits: int
    group: int = GROUPS[0]
    group_nbytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.group not in GROUPS:
            raise InvalidInput(
                f"no format of {self.bits} bits in groups of {self.group}: bits are one of {BITS}, groups of {GROUPS}"
            )

        codes_nbytes = self.group * BLOCK_ROWS * self.bits // 8
        object.__setattr__(self, "group_nbytes", self.header_nbytes + codes_nbytes)

    @classmethod
    def parse(cls, text: str) -> Format:
        """The format that a name such as "int4" (groups of 32) or "int4-g128" stands for.

        Raises:
            InvalidInput: there is no such format.
        """
        match = _NAME.fullmatch(text)
        if match is None:
            raise InvalidInput(f'no format is called {text!r}; try "int8", "int4", "int2" or "int4-g128"')
        return cls(int(match[1]), int(match[2] or GROUPS[0]))

    def __str__(self) -> str:
        return f"int{self.bits}" + (f"-g{self.group}" if self.group != GROUPS[0] else "")

    @property
    def levels(self) -> int:
        """The largest code."""
        return 127 if self.bits == 8 else 2**self.bits - 1

    @property
    def symmetric(self) -> bool:
        """Whether a weight is its code times a scale, with no least weight to add."""
        return self.bits == 8

    @property
    def header_nbytes(self) -> int:
        """Bytes of the scales, and least weights, of a group of a block."""
        return (2 if self.symmetric else 4) * BLOCK_ROWS

    def groups(self, columns: int) -> int:
        """Groups in a row of so many columns.

        Raises:
            InvalidInput: they do not divide into groups.
        """
        if columns < 1 or columns % self.group:
            fits = [group for group in GROUPS if columns > 0 and columns % group == 0]
            instead = f"groups of {fits[-1]} would" if fits else "pad it with columns of zeros"
            raise InvalidInput(f"{columns} columns do not divide into groups of {self.group}; {instead}")
        return columns // self.group


def packed_nbytes(format: Format, rows: int, columns: int) -> int:
    """Bytes of a weight of so many rows (outputs) and columns (inputs), packed.

    Raises:
        InvalidInput: there are no rows, or the columns do not divide into groups.
    """
    if rows < 1:
        raise InvalidInput(f"a weight of {rows} rows has nothing to pack")
    return -(-rows // BLOCK_ROWS) * format.groups(columns) * format.group_nbytes
