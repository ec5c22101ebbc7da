"""Where a token goes: bit for bit what PyTorch computes, equal experts in its order too, or refused."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from undercroft.kernels import bitwise_router
from undercroft.kernels.bitwise_router import MOST_USED, route, routes, stock_route
from undercroft.kernels.library import Library

EXPERTS = [8, 9, 15, 16, 32, 60, 64, 100, 128, 256, 257, 512]
USED = range(1, MOST_USED + 1)


@pytest.fixture(autouse=True)
def _without_gradients(native: Library) -> Iterator[None]:
    torch.manual_seed(0)
    if not routes(64, 8):
        pytest.skip("PyTorch chooses in another way on this processor")
    with torch.no_grad():
        yield


def assert_same(logits: Tensor, used: int) -> None:
    for among in (True, False):
        for rounded in (True, False):
            found = route(logits, used, among=among, rounded=rounded)
            wanted = stock_route(logits, used, among=among, rounded=rounded)
            assert found is not None
            assert [each.dtype for each in found] == [each.dtype for each in wanted]
            assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("experts", EXPERTS)
def test_any_token_goes_where_pytorch_sends_it(experts: int) -> None:
    for used in USED:
        assert routes(experts, used)
        for size in (0.1, 1.0, 30.0):
            assert_same((size * torch.randn(1, experts)).bfloat16(), used)


@pytest.mark.parametrize("experts", EXPERTS)
def test_of_equal_experts_those_are_chosen_that_pytorch_chooses(experts: int) -> None:
    for used in USED:
        for values in (1, 2, 5):
            assert_same(torch.randint(values, (1, experts)).bfloat16(), used)


def test_logits_far_apart_leave_nothing_to_the_others() -> None:
    logits = torch.zeros(1, 64, dtype=torch.bfloat16)
    logits[0, 5] = 3e38
    assert_same(logits, 4)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_left_to_pytorch(value: float) -> None:
    logits = torch.randn(1, 64).bfloat16()
    logits[0, 63] = value
    assert route(logits, 8, among=True, rounded=True) is None


@pytest.mark.parametrize(("experts", "used"), [(4, 2), (7, 1), (64, 0), (64, MOST_USED + 1)])
def test_other_sizes_are_refused(experts: int, used: int) -> None:
    assert not routes(experts, used)


def test_another_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_other_order(logits: Tensor, used: int, **kinds: bool) -> tuple[Tensor, Tensor]:
        shares, chosen = stock_route(logits.flip(-1), used, **kinds)
        return shares, logits.shape[1] - 1 - chosen

    routes.cache_clear()
    monkeypatch.setattr(bitwise_router, "stock_route", in_other_order)
    assert not routes(64, 8)
    routes.cache_clear()
