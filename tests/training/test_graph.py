"""What an autograd graph will ask for can be read before it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from undercroft.training.graph import packed_by_node, running_node


class Packed:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def packing(seen: list[object]) -> Iterator[None]:
    def unpack(packed: Packed) -> Tensor:
        seen.append((running_node(), [list(each) for each in packed_by_node(running_node())]))
        return packed.tensor

    with torch.autograd.graph.saved_tensors_hooks(Packed, unpack):
        yield


class Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return gradient * y, gradient * x


def counts(root: object) -> list[int]:
    return sorted(len(packed) for packed in packed_by_node(root))


def test_every_node_is_seen_once_with_what_it_saved() -> None:
    x = torch.randn(4, requires_grad=True)
    with packing([]):
        shared = x.exp()
        loss = (Pair.apply(shared, shared.sin()) + shared).sum()
    # sum and add save nothing, nor does the leaf; the pair saved two, sin its input, exp its result
    assert counts(loss.grad_fn) == [0, 0, 0, 1, 1, 2]


def test_tuples_of_saved_tensors_are_seen() -> None:
    x = torch.randn(4, requires_grad=True)
    indices = torch.tensor([0, 2])
    with packing([]):
        picked = x[indices]
    assert counts(picked.grad_fn) == [0, 1]


def test_in_the_middle_of_backward_the_rest_is_still_there() -> None:
    seen: list[Any] = []
    x = torch.randn(4, requires_grad=True)
    with packing(seen):
        x.exp().sin().cos().sum().backward()
    names = [node.name() for node, _ in seen]
    assert names == ["CosBackward0", "SinBackward0", "ExpBackward0"]
    assert [sum(map(len, packed)) for _, packed in seen] == [3, 2, 1]


def test_nothing_runs_outside_backward() -> None:
    assert running_node() is None


def test_deep_graphs_need_no_recursion() -> None:
    x = torch.ones(1, requires_grad=True)
    y = x
    with packing([]):
        for _ in range(3000):
            y = y.sin()
    assert counts(y.grad_fn)[-1] == 1
    assert len(counts(y.grad_fn)) == 3001
