"""The packed layout: to bytes and back, and read by a program that knows docs/kernels.md only."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undercroft.kernels import dequantise, packed_nbytes, quantise
from undercroft.kernels.format import BITS, GROUPS, Format
from undercroft.kernels.packed import Codes, pack, unpack

ALL = [Format(bits, group) for bits in BITS for group in GROUPS]


@settings(deadline=None)
@given(st.sampled_from(ALL), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**31))
def test_unpack_gives_what_pack_was_given(format: Format, blocks: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (32 * blocks, groups, format.group)
    if format.symmetric:
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    else:
        codes = torch.randint(0, format.levels + 1, shape, dtype=torch.uint8, generator=generator)
    scale, least = (torch.randn(shape[:2], generator=generator).bfloat16() for _ in range(2))
    weights = Codes(codes, scale, None if format.symmetric else least)
    packed = pack(weights, format)
    assert packed.numel() == packed_nbytes(format, shape[0], groups * format.group)
    for found, given_ in zip(unpack(packed, format, groups), weights, strict=True):
        assert found is given_ is None or torch.equal(found, given_)


def bfloat16(data: bytes, at: int) -> float:
    return struct.unpack("<f", b"\0\0" + data[at : at + 2])[0]


def weight_by_the_page(data: bytes, bits: int, group: int, columns: int, row: int, column: int) -> float:
    """One weight, read as docs/kernels.md says."""
    header = 64 if bits == 8 else 128
    start = (row // 32 * (columns // group) + column // group) * (header + group * 4 * bits)
    n, k = row % 32, column % group
    per_byte = 8 // bits
    line, slot = divmod(k // 4, per_byte)
    byte = data[start + header + 128 * line + 4 * n + k % 4]
    scale = bfloat16(data, start + 2 * n)
    if bits == 8:
        return (byte - 256 if byte > 127 else byte) * scale
    return (byte >> bits * slot & (1 << bits) - 1) * scale + bfloat16(data, start + 64 + 2 * n)


@pytest.mark.parametrize("format", ALL, ids=str)
def test_a_stranger_reads_the_same_weights(format: Format) -> None:
    rows, columns = 37, 3 * format.group
    packed = quantise(torch.randn(rows, columns), format)
    weights = dequantise(packed, format, rows, columns)
    data = packed.numpy().tobytes()
    for row in range(rows):
        for column in range(0, columns, 5):
            found = weight_by_the_page(data, format.bits, format.group, columns, row, column)
            assert found == pytest.approx(float(weights[row, column]), rel=1e-6, abs=1e-6)
