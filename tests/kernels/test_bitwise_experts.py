"""A token's experts in one call: bit for bit what PyTorch makes of them, one after another."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from undercroft.errors import CorruptRecord
from undercroft.kernels.bitwise_experts import BitwiseExperts, PlainBlock, SqueezedBlock, exact_kernel
from undercroft.kernels.bitwise_lossless import Squeezed
from undercroft.kernels.library import Library

BF16 = torch.bfloat16
SIZES = [(64, 64), (128, 192), (192, 64), (2048, 768)]
EXTREMES = [torch.inf, -torch.inf, torch.nan, 3.38e38, -3.38e38, 1e-40, -0.0, 100.0, -100.0]
Expert = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _without_gradients(native: Library) -> Iterator[None]:
    torch.manual_seed(0)
    if not all(BitwiseExperts(64, 64, squeezed).reproduces for squeezed in (False, True)):
        pytest.skip("PyTorch multiplies bfloat16 in another way on this processor")
    with torch.no_grad():
        yield


def drawn(width: int, inner: int, count: int) -> list[Expert]:
    return [
        (
            (torch.randn(2 * inner, width) / width**0.5).to(BF16),
            (torch.randn(width, inner) / inner**0.5).to(BF16),
        )
        for _ in range(count)
    ]


def pytorchs(x: Tensor, expert: Expert) -> Tensor:
    gate, up = linear(x, expert[0]).chunk(2, dim=-1)
    return linear(silu(gate) * up, expert[1])


def mixed(x: Tensor, experts: list[Expert], terms: list[tuple[int, float]]) -> Tensor:
    out = torch.zeros_like(x)
    for row, share in terms:
        out.add_(pytorchs(x, experts[row]) * torch.tensor(share, dtype=BF16))
    return out


def bits(x: Tensor) -> list[int]:
    return x.contiguous().view(torch.int16).flatten().tolist()


def in_both_forms(
    experts: list[Expert], width: int, inner: int
) -> Iterator[tuple[BitwiseExperts, list[tuple[int, ...]]]]:
    yield BitwiseExperts(width, inner, squeezed=False), [PlainBlock.of(*each) for each in experts]
    squeezed = [tuple(map(Squeezed.of, each)) for each in experts]
    yield BitwiseExperts(width, inner, squeezed=True), [SqueezedBlock.of(*each) for each in squeezed]
    del squeezed


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("width", "inner"), SIZES)
def test_a_token_is_what_pytorch_makes_of_it(width: int, inner: int, threads: int) -> None:
    experts, before = drawn(width, inner, 5), torch.get_num_threads()
    x = torch.randn(1, width).to(BF16)
    terms = [(3, 0.25), (0, 0.5), (4, 0.125)]
    torch.set_num_threads(threads)
    try:
        for kernel, blocks in in_both_forms(experts, width, inner):
            assert kernel.reproduces
            taken = kernel.taken(x)
            assert taken is not None
            rows = kernel.feed_forwards(taken, blocks)
            assert bits(rows) == bits(torch.cat([pytorchs(x, each) for each in experts]))
            assert bits(kernel.mix(taken, blocks, terms)) == bits(mixed(x, experts, terms))
            assert bits(kernel.add_up([rows[:2], rows[2:]], terms, BF16)) == bits(mixed(x, experts, terms))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", EXTREMES)
def test_extreme_numbers_become_what_pytorch_makes_of_them(value: float) -> None:
    (gate_up, down), other = drawn(128, 64, 2)
    gate_up[5] *= value
    gate_up[70, 3] = value
    down[9, 1] = value
    x = torch.randn(1, 128).to(BF16)
    experts, terms = [(gate_up, down), other], [(0, 0.75), (1, 0.25)]
    for kernel, blocks in in_both_forms(experts, 128, 64):
        assert bits(kernel.mix(x, blocks, terms)) == bits(mixed(x, experts, terms))


def test_every_number_is_activated_as_by_pytorch() -> None:
    """Of gates that are each number of bfloat16 in turn, by weights that pick them out of the token."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)
    numbers = numbers[numbers.isfinite() & (numbers.abs() >= 2.0**-126)]
    gate_up, down = torch.zeros(128, 64, dtype=BF16), torch.eye(64, dtype=BF16)
    gate_up[:64] = torch.eye(64, dtype=BF16)
    gate_up[64:, 0] = 1.0
    kernel = BitwiseExperts(64, 64, squeezed=False)
    for piece in numbers[: len(numbers) // 63 * 63].view(-1, 63)[::7]:
        x = torch.cat([torch.ones(1, dtype=BF16), piece])[None]
        assert bits(kernel.feed_forwards(x, [PlainBlock.of(gate_up, down)])) == bits(
            pytorchs(x, (gate_up, down))
        )


def test_bytes_that_nobody_squeezed_are_refused() -> None:
    gate_up, down = (Squeezed.of(each) for each in drawn(128, 64, 1)[0])
    gate_up.packed[gate_up.form.codes : gate_up.form.rests] = 0xFF  # all exponents are said to be rare
    with pytest.raises(CorruptRecord, match="rare exponents"):
        BitwiseExperts(128, 64, squeezed=True).mix(
            torch.ones(1, 128, dtype=BF16), [SqueezedBlock.of(gate_up, down)], [(0, 1.0)]
        )


def test_what_pytorch_has_to_compute_is_not_taken() -> None:
    kernel, x = BitwiseExperts(64, 64, squeezed=False), torch.ones(1, 64, dtype=BF16)
    assert kernel.taken(x) is x
    assert kernel.taken(x.float()) is None
    with torch.autocast("cpu", dtype=BF16):
        assert kernel.taken(x) is None
    with torch.enable_grad():
        assert kernel.taken(x) is None


@pytest.mark.parametrize(
    ("gate_up", "down"),
    [((128, 63), (63, 64)), ((128, 64), (64, 63)), ((2, 128, 64), (64, 64)), ((64, 64), (64, 64))],
)
def test_other_shapes_have_no_kernel(gate_up: tuple[int, ...], down: tuple[int, ...]) -> None:
    assert exact_kernel(gate_up, down, squeezed=False) is None
    assert exact_kernel((128, 64), (64, 64), squeezed=False) == BitwiseExperts(64, 64, squeezed=False)


@pytest.mark.parametrize("shares", [torch.bfloat16, torch.float32])
def test_those_that_a_token_chose_are_mixed_where_they_are_there(shares: torch.dtype) -> None:
    experts, x = drawn(128, 192, 4), torch.randn(1, 128).to(BF16)
    chosen, given = torch.tensor([[6, 0, 9, 3]]), torch.tensor([[0.5, 0.25, 0.125, 0.0625]], dtype=shares)
    for kernel, blocks in in_both_forms(experts, 128, 192):
        table, out = np.zeros((7, kernel.fields), dtype=np.int64), torch.full_like(x, 7)
        mix = kernel.mixing(x, table, chosen, given, out)
        table[[0, 3]] = blocks[0], blocks[1]
        assert not mix()
        assert torch.equal(out, torch.full_like(x, 7))
        table[6] = blocks[2]
        assert mix()
        assert bits(out) == bits(kernel.mix(x, blocks, [(0, 0.25), (1, 0.0625), (2, 0.5)]))
        chosen[:] = 99  # none
        assert not mix()
        chosen[:] = torch.tensor([[6, 0, 9, 3]])
