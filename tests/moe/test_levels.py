"""Levelling columns: outliers are found, nothing is rounded, and few bits then lose no more than without outliers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from undercroft import kernels
from undercroft.kernels.quantise import dequantise, quantise
from undercroft.moe.levels import factors, levels_of


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 127), st.integers(3, 20))
def test_an_outlier_is_brought_to_the_level_of_the_others(column: int, doublings: int) -> None:
    matrix = weights()
    matrix[:, column] *= 2.0**doublings
    levels = levels_of(matrix)
    expected = torch.zeros(128, dtype=torch.int8)
    expected[column] = doublings
    assert (levels - expected).abs().max() <= 1
    assert levels.count_nonzero() == 1
    assert torch.equal(matrix / factors(levels) * factors(levels), matrix)


@pytest.mark.parametrize("matrix", [weights(), torch.zeros(4, 8), torch.full((4, 8), float("nan"))])
def test_what_has_no_outliers_stays(matrix: torch.Tensor) -> None:
    assert not levels_of(matrix).any()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_few_bits_lose_no_more_than_without_outliers(bits: int) -> None:
    plain, format = weights(), kernels.Format(bits, 32)
    scaled = plain.clone()
    scaled[:, ::32] *= 64
    levels = factors(levels_of(scaled))

    def loss(matrix: torch.Tensor, like: torch.Tensor) -> float:
        found = dequantise(quantise(matrix, format), format, *matrix.shape)
        return ((found - matrix) * (like / matrix)).square().sum().item()

    assert loss(scaled / levels, plain) < 1.2 * loss(plain, plain)
    assert loss(scaled, plain) > 2 * loss(plain, plain) or bits == 8
