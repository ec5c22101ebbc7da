"""A gated feed-forward block in one call: as its three products one by one."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from undercroft.errors import InvalidInput
from undercroft.kernels import expert, linear, quantise
from undercroft.kernels.format import Format
from undercroft.kernels.library import Library

WIDTH, INTERMEDIATE = 128, 192
FIRST, SECOND = Format(4, 64), Format(8, 32)


@pytest.fixture
def packed() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    gate_up = torch.randn(2 * INTERMEDIATE, WIDTH) / WIDTH**0.5
    return quantise(gate_up, FIRST), quantise(torch.randn(WIDTH, INTERMEDIATE), SECOND)


def one_by_one(x: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
    gate, up = linear(x.float(), packed[0], FIRST, 2 * INTERMEDIATE).chunk(2, dim=1)
    return linear(functional.silu(gate) * up, packed[1], SECOND, WIDTH).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [0, 1, 2, 5, 40])
def test_it_is_what_its_products_give(batch: int, dtype: torch.dtype, packed: tuple[Tensor, Tensor]) -> None:
    x = torch.randn(batch, WIDTH).to(dtype)
    with torch.no_grad():
        found = expert(x, *packed, FIRST, SECOND, INTERMEDIATE)
        wanted = one_by_one(x, packed)
    assert found.dtype == dtype
    # Another exp may round one activation to the neighbouring code: a step of one of 192 terms.
    assert float((found - wanted).float().abs().max() if batch else 0) <= 0.1
    assert float((found - wanted).float().norm()) <= 0.01 * float(wanted.float().norm())


def test_gate_comes_first() -> None:
    format = Format(8)
    gate, up = torch.full((32, 32), 1.0), torch.zeros(32, 32)
    gate_up, down = quantise(torch.cat([gate, up]), format), quantise(torch.eye(32), format)
    assert not expert(torch.ones(1, 32), gate_up, down, format, format, 32).any()
    gate_up = quantise(torch.cat([gate, gate]), format)
    found = expert(torch.ones(1, 32) / 32, gate_up, down, format, format, 32)
    torch.testing.assert_close(found, torch.full((1, 32), 1 / (1 + 2.718281828**-1)), rtol=0.02, atol=0)


def test_instruction_sets_and_company_change_no_bit(packed: tuple[Tensor, Tensor], native: Library) -> None:
    x = torch.randn(30, WIDTH)
    weights = (packed[0], FIRST), (packed[1], SECOND)
    results = [native.expert(x, *weights, INTERMEDIATE, instructions=name) for name in native.instructions]
    assert all(torch.equal(results[0], each) for each in results[1:])
    assert torch.equal(results[0][7:8], native.expert(x[7:8].contiguous(), *weights, INTERMEDIATE))


def test_a_row_that_is_not_finite_is_nan(packed: tuple[Tensor, Tensor]) -> None:
    x = torch.randn(2, WIDTH)
    x[0, 0] = float("inf")
    found = expert(x, *packed, FIRST, SECOND, INTERMEDIATE)
    assert bool(found[0].isnan().all())
    assert bool(found[1].isfinite().all())


@pytest.mark.parametrize("gradients", [False, True])
def test_what_does_not_fit_is_refused(packed: tuple[Tensor, Tensor], gradients: bool) -> None:
    x, (gate_up, down) = torch.zeros(2, WIDTH), packed
    with torch.set_grad_enabled(gradients):
        with pytest.raises(InvalidInput, match="silu"):
            expert(x, gate_up, down, FIRST, SECOND, INTERMEDIATE, activation="gelu")
        for wrong in (
            (x, down, gate_up, FIRST, SECOND, INTERMEDIATE),
            (x, gate_up, down, SECOND, FIRST, INTERMEDIATE),
            (x, gate_up, down, FIRST, SECOND, INTERMEDIATE + 32),
            (x, gate_up, down, FIRST, SECOND, 0),
            (x[:, :64], gate_up, down, FIRST, SECOND, INTERMEDIATE),
            (x.half(), gate_up, down, FIRST, SECOND, INTERMEDIATE),
        ):
            with pytest.raises(InvalidInput):
                expert(*wrong)
