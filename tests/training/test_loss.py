"""The loss in chunks: the same number but for rounding, under a budget in which the logits do not fit."""

import pytest
import torch
from torch.nn import functional

from undercroft import ActivationSpill, BudgetExceeded, InvalidInput, chunked_cross_entropy
from undercroft.units import MIB


def whole(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())


def leaves(tokens: int = 50, vocabulary: int = 37) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(2, tokens, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, 16, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(vocabulary, (2, tokens))


@pytest.mark.parametrize("rows", [1, 7, 100, 1000])
def test_it_is_the_mean_cross_entropy_and_so_are_its_gradients(rows: int) -> None:
    hidden, weight, labels = leaves()
    labels[0, 3:9] = -100
    expected = torch.autograd.grad(whole(hidden, weight, labels), (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, labels, rows=rows)
    found = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close((loss, *found), (whole(hidden, weight, labels), *expected))


def test_no_token_that_counts_is_nan_as_in_pytorch() -> None:
    hidden, weight, labels = leaves()
    assert chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100)).isnan()


def test_it_trains_under_a_budget_that_the_logits_exceed(tmp_path) -> None:
    hidden, weight, labels = leaves(tokens=1024, vocabulary=1024)
    spill = ActivationSpill(budget=4 * MIB, directory=tmp_path / "one", min_bytes=4096)
    with spill, pytest.raises(BudgetExceeded):
        whole(hidden, weight, labels).backward()
    spill.close()
    with ActivationSpill(budget=4 * MIB, directory=tmp_path / "two", min_bytes=4096) as spill:
        chunked_cross_entropy(hidden, weight, labels, rows=64).backward()
    spill.close()


@pytest.mark.parametrize(("rows", "tokens"), [(0, 50), (4, 49)])
def test_what_cannot_be_meant_is_refused(rows: int, tokens: int) -> None:
    hidden, weight, labels = leaves()
    with pytest.raises(InvalidInput, match="one label for each token"):
        chunked_cross_entropy(hidden, weight, labels[:, :tokens], rows=rows)
