"""Choosing codes: never worse than rounding to nearest between the extremes, and where little is lost, little is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from undercroft.errors import InvalidInput
from undercroft.kernels import dequantise, quantise
from undercroft.kernels.format import BITS, GROUPS, Format

ALL = [Format(bits, group) for bits in BITS for group in GROUPS]


def stored(values: Tensor) -> Tensor:
    return values.bfloat16().float()


def to_nearest(weight: Tensor, format: Format, stored=lambda values: values) -> Tensor:  # type: ignore[no-untyped-def]
    """Rounded between each group's extremes, with parameters of some precision."""
    groups = weight.float().view(-1, format.group)
    if format.symmetric:
        scale = stored(groups.abs().amax(1, keepdim=True) / 127)
        codes = (groups / torch.where(scale == 0, 1, scale)).round().clamp(-127, 127)
        return (codes * scale).view_as(weight)
    least = stored(groups.amin(1, keepdim=True))
    scale = stored((groups.amax(1, keepdim=True) - least) / format.levels)
    codes = ((groups - least) / torch.where(scale == 0, 1, scale)).round().clamp(0, format.levels)
    return (codes * scale + least).view_as(weight)


def round_trip(weight: Tensor, format: Format) -> Tensor:
    return dequantise(quantise(weight, format), format, *weight.shape)


def squared(found: Tensor, weight: Tensor, format: Format) -> Tensor:
    """Squared error of each group."""
    return (found - weight).double().square().view(-1, format.group).sum(1)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(ALL), st.integers(0, 2**31), st.floats(1e-6, 1e6), st.floats(-3, 3))
def test_no_group_is_worse_than_rounding_to_nearest(
    format: Format, seed: int, size: float, offset: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(3, 2 * format.group, generator=generator) ** 3 + offset) * size
    error = squared(round_trip(weight, format), weight, format)
    plain = squared(to_nearest(weight, format, stored), weight, format)
    slack = 1e-6 * weight.double().square().view(-1, format.group).sum(1) * 1e-6
    assert bool((error <= plain * (1 + 1e-5) + slack).all())


def gaussian() -> Tensor:
    return torch.randn(64, 512, generator=torch.Generator().manual_seed(0))


def with_outliers() -> Tensor:
    weight = gaussian()
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.01] *= 6
    return weight


@pytest.mark.parametrize("make", [gaussian, with_outliers])
@pytest.mark.parametrize("format", ALL, ids=str)
def test_the_search_pays_over_unrounded_parameters(format: Format, make) -> None:  # type: ignore[no-untyped-def]
    weight = make()
    ratio = (
        squared(round_trip(weight, format), weight, format).sum()
        / squared(to_nearest(weight, format), weight, format).sum()
    )
    assert ratio < {8: 1.05, 4: 0.92, 2: 0.66}[format.bits]


def test_errors_on_gaussian_weights_are_what_the_page_says() -> None:
    weight = gaussian()
    for name, most in (("int8", 0.006), ("int4", 0.075), ("int4-g128", 0.098), ("int2", 0.32)):
        assert float((round_trip(weight, Format.parse(name)) - weight).norm() / weight.norm()) < most


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(1e-4, 1e4))
def test_an_int8_weight_is_off_by_little_more_than_half_a_step(seed: int, size: float) -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)) * size
    step = weight.view(-1, 32).abs().amax(1, keepdim=True) / 127
    error = (round_trip(weight, Format(8)) - weight).abs().view(-1, 32)
    assert bool((error <= 0.5 * step * 1.02 + 0.004 * step * 127).all())


@pytest.mark.parametrize("format", ALL, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.75, 3e-39, 1e37])
def test_groups_of_one_value(format: Format, value: float) -> None:
    weight = torch.full((3, 2 * format.group), value)
    found = round_trip(weight, format)
    assert torch.allclose(found, weight, rtol=2**-8, atol=1e-37)


@pytest.mark.parametrize("format", ALL, ids=str)
def test_rows_do_not_depend_on_their_neighbours_or_on_pieces(format: Format) -> None:
    weight = torch.randn(700, 256)
    whole = round_trip(weight, format)
    assert torch.equal(whole[650:651], round_trip(weight[650:651], format))
    assert torch.equal(whole, round_trip(weight.t().contiguous().t(), format))


def test_other_floating_dtypes_are_the_numbers_they_are() -> None:
    weight = torch.randn(40, 128).bfloat16()
    for format in (Format(8), Format(4)):
        assert torch.equal(quantise(weight, format), quantise(weight.float(), format))
        assert torch.equal(quantise(weight, format), quantise(weight.double(), format))
        half = dequantise(quantise(weight, format), format, 40, 128, torch.bfloat16)
        assert torch.equal(half, round_trip(weight.float(), format).bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2e38])
def test_weights_that_no_scale_fits_are_refused(bad: float) -> None:
    weight = torch.zeros(600, 128)
    weight[599, 127] = bad
    with pytest.raises(InvalidInput, match="not numbers"):
        quantise(weight, Format(4))


def test_misuse_is_refused() -> None:
    format = Format(4)
    packed = quantise(torch.randn(40, 64), format)
    for weight in (
        torch.zeros(64),
        torch.zeros(2, 64, dtype=torch.int8),
        torch.zeros(2, 33),
        torch.zeros(0, 32),
    ):
        with pytest.raises(InvalidInput):
            quantise(weight, format)
    for wrong in (packed[:-1], packed.view(1, -1), packed.view(torch.int8), packed.repeat(2)[::2]):
        with pytest.raises(InvalidInput):
            dequantise(wrong, format, 40, 64)
    with pytest.raises(InvalidInput, match="takes"):
        dequantise(packed, format, 65, 64)
