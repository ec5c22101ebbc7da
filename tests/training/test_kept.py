"""What cannot be spilled is kept by reference, counted, and has the same gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from undercroft import ActivationSpill


class Marked(Tensor):
    pass


def of_sparse(x: Tensor, w: Tensor) -> Tensor:
    return torch.sparse.mm(x.detach().to_sparse(), w).sin().sum()


def of_csr(x: Tensor, w: Tensor) -> Tensor:
    return torch.sparse.mm(x.detach().relu().to_sparse_csr(), w).sin().sum()


def of_mkldnn(x: Tensor, w: Tensor) -> Tensor:
    return torch.relu((x @ w).to_mkldnn()).to_dense().sin().sum()


def of_nested(x: Tensor, w: Tensor) -> Tensor:
    rows = torch.nested.as_nested_tensor([(x @ w)[:3], (x @ w)[3:]], layout=torch.jagged)
    return (rows.sin() * rows).values().sum()


def of_subclass(x: Tensor, w: Tensor) -> Tensor:
    return ((x @ w).as_subclass(Marked).sin() ** 2).sum().as_subclass(Tensor)


KEPT = {
    "sparse": (of_sparse, "layout"),
    "csr": (of_csr, "layout"),
    "mkldnn": (of_mkldnn, "layout"),
    "nested": (of_nested, "subclass"),
    "subclass": (of_subclass, "subclass"),
}


@pytest.mark.filterwarnings(
    "ignore:Sparse:UserWarning", "ignore:The PyTorch API of nested tensors:UserWarning"
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("name", KEPT)
def test_it_is_kept_counted_and_right(tmp_path: Path, name: str) -> None:
    function, reason = KEPT[name]
    torch.manual_seed(0)
    x, w = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    plain = torch.autograd.grad(function(x, w), [x, w], allow_unused=True)
    with ActivationSpill(None, "1MiB", tmp_path, 1) as spill:
        spilled = torch.autograd.grad(function(x, w), [x, w], allow_unused=True)
    spill.close()
    assert spill.report.kept.get(reason, 0) > 0, spill.report.kept
    for one, two in zip(plain, spilled, strict=True):
        assert one is two is None or torch.equal(one, two)


def test_parameters_and_buffers_are_never_written(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64))
    with ActivationSpill(model, "4MiB", tmp_path, 1) as spill:
        model(torch.randn(4, 64)).sum().backward()
    spill.close()
    assert spill.report.kept["parameter or long-lived"] >= 2
    assert spill.report.excluded_nbytes >= 64 * 4


def test_empty_tensors_are_kept(tmp_path: Path) -> None:
    x = torch.randn(0, 5, requires_grad=True)
    with ActivationSpill(None, "1MiB", tmp_path, 1) as spill:
        x.exp().sum().backward()
    spill.close()
    assert spill.report.kept == {"empty": 1}
    assert x.grad.shape == (0, 5)
