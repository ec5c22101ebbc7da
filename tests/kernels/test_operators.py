"""The kernels as PyTorch operators: what torch.compile and fake tensors see of them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from undercroft.errors import InvalidInput
from undercroft.kernels import expert, linear, quantise
from undercroft.kernels.format import Format

FORMAT = Format(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_operators_pass_pytorchs_own_checks(batch: int, dtype: torch.dtype) -> None:
    x = torch.randn(batch, 64).to(dtype)
    packed = quantise(torch.randn(64, 64), FORMAT)
    torch.library.opcheck(torch.ops.undercroft.linear.default, (x, packed, 4, 32, 64))
    down = quantise(torch.randn(64, 32), Format(8))
    torch.library.opcheck(torch.ops.undercroft.expert.default, (x, packed, down, 4, 32, 8, 32, 32))


def test_fake_tensors_need_no_bytes_and_are_checked_too() -> None:
    packed = quantise(torch.randn(40, 64), FORMAT)
    with FakeTensorMode() as mode:
        x, weight = mode.from_tensor(torch.zeros(3, 64).bfloat16()), mode.from_tensor(packed)
        found = linear(x, weight, FORMAT, 40)
        assert found.shape == (3, 40)
        assert found.dtype == torch.bfloat16
        with pytest.raises(InvalidInput):
            linear(x, weight, FORMAT, 65)


def test_a_traced_program_calls_the_operators() -> None:
    packed = quantise(torch.randn(64, 64), FORMAT)
    down = quantise(torch.randn(64, 32), FORMAT)

    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return expert(linear(x, packed, FORMAT, 64), packed, down, FORMAT, FORMAT, 32)

    x = torch.randn(3, 64)
    with torch.no_grad():
        program = torch.export.export(Block(), (x,))
        assert torch.equal(program.module()(x), Block()(x))
    called = {str(node.target) for node in program.graph.nodes}
    assert {"undercroft.linear.default", "undercroft.expert.default"} <= called


def test_a_gradient_is_refused_rather_than_missing() -> None:
    packed = quantise(torch.randn(40, 64), FORMAT)
    x = torch.randn(2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="undercroft"):
        linear(x, packed, FORMAT, 40).sum().backward()
