"""Weights, and what a product with them may be off by."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from undercroft.kernels import dequantise, library, quantise
from undercroft.kernels.format import BITS, GROUPS, Format

ALL = [Format(bits, group) for bits in BITS for group in GROUPS]

Bound = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@pytest.fixture(params=ALL, ids=str)
def format(request: pytest.FixtureRequest) -> Format:
    return request.param


@pytest.fixture
def native() -> library.Library:
    found = library.load()
    if found is None:
        pytest.skip("no C++ compiler here, so there are no native kernels")
    return found


@pytest.fixture
def weights(format: Format) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """``weights(rows, columns)``: packed, and what they stand for in float64."""

    def make(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        packed = quantise(torch.randn(rows, columns), format)
        return packed, dequantise(packed, format, rows, columns).double()

    return make


@pytest.fixture
def bound() -> Bound:
    """``bound(x, weight, group)``: the exact product, and the most an element may be off by.

    An activation is off by half a step of its group at most, a step being its largest over 127; float32 sums and
    the result's own dtype add a little.
    """

    def expected(x: Tensor, weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
        exact = x.double() @ weight.T
        steps = x.double().abs().unflatten(1, (-1, group)).amax(2) / 127
        codes = steps @ weight.abs().unflatten(1, (-1, group)).sum(2).T / 2
        sums = x.double().abs() @ weight.abs().T * 1e-5
        dtype = exact.abs() * (2**-8 if x.dtype == torch.bfloat16 else 0)
        return exact, codes * 1.01 + sums + dtype

    return expected
