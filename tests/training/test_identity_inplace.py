"""An edit in place after a save raises where plain autograd raises, at the same call, and nowhere else."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from undercroft import ActivationSpill

Context = AbstractContextManager[object]
Edit = Callable[[nn.Module, Tensor], Iterator[Tensor | None]]
"""Computes and edits; yields a loss, then may edit, then is asked again; None after an edit without a loss."""


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("constant", torch.randn(64, 64))


def result_edited(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    h = (x @ module.weight).exp()
    loss = h.square().mean()
    h.add_(1)
    yield loss


def result_edited_unused(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Addition needs nothing of what was edited."""
    h = x @ module.weight + 1
    h.add_(1)
    yield h.sin().mean()


def input_edited(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    h = x @ module.weight
    loss = h.sin().mean()
    h.mul_(2)
    yield loss


def saved_after_edit(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    h = x @ module.weight
    h.mul_(2)
    h.relu_()
    yield h.sin().mean()


def saved_before_and_after_edit(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Two versions of one storage; the unused branch holds the old one."""
    h = (x @ module.weight) * 1
    unused = h.sin()
    h.mul_(2)
    yield h.cos().mean() + 0 * unused.detach().mean()


def both_versions_used(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    h = (x @ module.weight) * 1
    before = h.sin().mean()
    h.mul_(2)
    yield h.cos().mean()
    yield before


def relu_in_place(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    yield (torch.relu_((x @ module.weight).sin()) * x).mean()


def sigmoid_in_place_after_sin(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    h = x @ module.weight
    s = h.sin()
    yield h.sigmoid_().mean() + s.mean()


def view_edited(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    h = (x @ module.weight) * 1
    loss = h.exp().sin().mean() + h.square().mean()
    h[3:5].zero_()
    yield loss


def base_edited_through_chunk(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    h = (x @ module.weight) * 1
    left, right = h.split(32, 1)
    loss = left.sin().mean()
    h.view(-1)[:7].add_(1)
    yield loss + right.detach().mean()


def written_by_rows(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    out = torch.zeros(64, 64)
    for row in range(0, 64, 16):
        out[row : row + 16] = (x @ module.weight)[row : row + 16].sin()
    yield out.exp().mean()


def pieces_with_counters_of_their_own(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """`unsafe_chunk` gives pieces of one storage that do not share a version counter."""
    pieces = torch.cat([x @ module.weight] * 3, 1).unsafe_chunk(3, 1)
    total = torch.zeros(())
    for piece in pieces:
        total = total + piece.sigmoid_().square().mean() + module.weight.exp().mean()
    yield total


def detached_edited(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    h = (x @ module.weight) * 1
    loss = h.sin().mean()
    h.detach().add_(1)
    yield loss


def parameter_edited(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    loss = (x @ module.weight).sin().mean()
    with torch.no_grad():
        module.weight.add_(0.1)
    yield loss


def parameter_edited_between_backwards(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    loss = (x @ module.weight).sin().mean()
    yield loss
    with torch.no_grad():
        module.weight.add_(0.1)
    yield loss


def buffer_edited(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    loss = (x @ module.weight * module.constant).mean()
    module.constant.mul_(2)
    yield loss


def scalar_edited(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    loss = (x * module.scale.exp()).sin().mean()
    with torch.no_grad():
        module.scale.add_(1)
    yield loss


def small_edited(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    small = (x[:2, :2] * module.scale) * 1
    loss = small.sin().mean() + (x @ module.weight).sin().mean()
    small.add_(1)
    yield loss


def input_of_the_step_edited(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    fixed = x.detach()
    loss = (fixed @ module.weight).sin().mean()
    fixed.add_(1)
    yield loss


def edited_in_backward(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """A hook edits, in the middle of backward, what an earlier node still wants."""
    early = (x @ module.weight).exp()
    late = early.sin()

    def edit(_: Tensor) -> None:
        early.data.mul_(1)  # .data has a counter of its own: no node notices
        with torch.no_grad():
            early.mul_(2)

    late.register_hook(edit)
    yield late.square().mean()


def resized(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    h = (x @ module.weight) * 1
    loss = h.detach().mul(x).sum()
    h.detach().resize_(32, 64)
    yield loss


def edited_index(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    rows = torch.arange(64).flip(0)
    loss = (x @ module.weight).index_select(0, rows).sin().mean()
    rows.add_(0)
    yield loss


def edited_mask(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    mask = x > 0
    loss = (x @ module.weight).masked_fill(mask, 0).sin().mean()
    mask.logical_not_()
    yield loss


EDITS: list[Edit] = [
    result_edited,
    result_edited_unused,
    input_edited,
    saved_after_edit,
    saved_before_and_after_edit,
    both_versions_used,
    relu_in_place,
    sigmoid_in_place_after_sin,
    view_edited,
    base_edited_through_chunk,
    written_by_rows,
    pieces_with_counters_of_their_own,
    detached_edited,
    parameter_edited,
    parameter_edited_between_backwards,
    buffer_edited,
    scalar_edited,
    small_edited,
    input_of_the_step_edited,
    edited_in_backward,
    resized,
    edited_index,
    edited_mask,
]


def outcome_of(loss: Tensor) -> str:
    """What a backward did. The texts of the errors may differ: plain autograd has several."""
    try:
        loss.backward(retain_graph=True)
    except RuntimeError as error:
        return "raised" if "modified" in str(error) else str(error)
    return "differentiated"


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edit_raises_where_plain_autograd_raises(bench: Any, edit: Edit) -> None:
    def flow(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
        with context:
            programs = [edit(module, x) for x in inputs]
            outcomes: list[object] = []
            while losses := [loss for program in programs if (loss := next(program, None)) is not None]:
                outcomes += [outcome_of(loss) for loss in reversed(losses)]
        return outcomes

    bench.check(Weights, flow, spills=False)


def test_some_of_these_edits_do_raise(tmp_path: Path) -> None:
    """The table above would prove nothing if no program of it raised, or all did."""
    torch.manual_seed(0)
    outcomes = {
        outcome_of(loss)
        for edit in EDITS
        for loss in edit(Weights(), torch.randn(64, 64).requires_grad_())
        if loss is not None
    }
    assert outcomes == {"differentiated", "raised"}


class GivesSaved(torch.autograd.Function):
    """Its gradient is what it saved, the very tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * weight).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, ctx.saved_tensors[0]


BUDGETS = pytest.mark.parametrize("budget", ["40KiB", "4MiB"], ids=["read back", "forwarded"])


@BUDGETS
def test_a_gradient_that_is_a_saved_tensor_never_changes(tmp_path: Path, budget: str) -> None:
    """Autograd takes such a gradient without a copy: its bytes are its own from then on."""
    module, other, x = Weights(), nn.Parameter(torch.randn(64, 64)), torch.randn(64, 64)
    with ActivationSpill(module, budget, tmp_path, 64) as spill:
        loss = GivesSaved.apply(x.exp(), other)
        (x @ module.weight).exp().sin().square().mean().backward()
        loss.backward()
        for _ in range(20):
            (x @ module.weight).exp().sin().square().mean().backward()
    spill.close()
    assert torch.equal(other.grad, x.exp())


@pytest.mark.parametrize("spilling", [False, True], ids=["plain", "spilling"])
def test_a_gradient_never_shares_the_bytes_of_a_parameter(tmp_path: Path, spilling: bool) -> None:
    """Plain autograd copies a saved leaf that is returned as a gradient; else clearing it would clear the leaf."""
    module, other = Weights(), nn.Parameter(torch.randn(64, 64))
    spill = ActivationSpill(module, directory=tmp_path)
    with spill if spilling else nullcontext():
        GivesSaved.apply(module.weight, other).backward()
    spill.close()
    assert other.grad.untyped_storage().data_ptr() != module.weight.untyped_storage().data_ptr()


@BUDGETS
def test_gradients_that_alias_saved_tensors_accumulate_as_in_plain_training(
    tmp_path: Path, budget: str
) -> None:
    x, weight = torch.randn(64, 64), nn.Parameter(torch.randn(64, 64))
    with ActivationSpill(None, budget, tmp_path, 64) as spill:
        loss = GivesSaved.apply(x.exp(), weight) + (x.exp() * weight).sin().sum() * 0
        for _ in range(4):
            loss.backward(retain_graph=True)
    spill.close()
    assert torch.equal(weight.grad, 4 * x.exp())
