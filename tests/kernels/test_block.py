"""Blocks by address, many in one call: each as it is by itself."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from undercroft.errors import InvalidInput
from undercroft.kernels import Block, Format, Gated, add_up, expert, feed_forwards, mix, quantise
from undercroft.kernels.library import Library
from undercroft.moe.levels import factors

SIZES = Gated(width=128, intermediate=192)
FORMATS = [
    (Format(8), Format(8)),
    (Format(4, 64), Format(8)),
    (Format(2), Format(4)),
    (Format(4), Format(2, 64)),
]
NO_LEVELS = torch.zeros(0, dtype=torch.int8)


class Packed:
    """A block that holds what its addresses say."""

    def __init__(
        self, formats: tuple[Format, Format], levels: Sequence[Tensor] = (NO_LEVELS, NO_LEVELS)
    ) -> None:
        shapes = (2 * SIZES.intermediate, SIZES.width), (SIZES.width, SIZES.intermediate)
        self.formats, self.levels = formats, levels
        self.weights = [
            quantise(torch.randn(shape) / shape[1] ** 0.5, each)
            for shape, each in zip(shapes, formats, strict=True)
        ]

    @property
    def block(self) -> Block:
        fields = [
            (weight.data_ptr(), level.data_ptr() if len(level) else 0, each.bits, each.group)
            for weight, level, each in zip(self.weights, self.levels, self.formats, strict=True)
        ]
        return Block(*fields[0], *fields[1])

    def alone(self, x: Tensor) -> Tensor:
        return expert(x.float(), *self.weights, *self.formats, SIZES.intermediate)


@pytest.fixture
def packed(native: Library) -> list[Packed]:
    torch.manual_seed(0)
    return [Packed(formats) for formats in FORMATS * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_is_bit_for_bit_what_it_is_alone(packed: list[Packed], dtype: torch.dtype) -> None:
    x = torch.randn(1, SIZES.width).to(dtype)
    with torch.no_grad():
        found = feed_forwards(x, [each.block for each in packed], SIZES)
        assert found.dtype == torch.float32
        for row, each in zip(found, packed, strict=True):
            assert torch.equal(row[None], each.alone(x))
            assert torch.equal(row[None], feed_forwards(x, [each.block], SIZES))


def test_instruction_sets_and_threads_change_no_bit(packed: list[Packed], native: Library) -> None:
    x, blocks = torch.randn(1, SIZES.width), [each.block for each in packed]
    found = [native.blocks(x, blocks, SIZES.intermediate, instructions=name) for name in native.instructions]
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(native.blocks(x, blocks, SIZES.intermediate))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], each) for each in found[1:])


def test_levels_double_what_meets_a_column(native: Library) -> None:
    levels = torch.zeros(SIZES.width, dtype=torch.int8)
    levels[[3, 70]] = torch.tensor([2, 5], dtype=torch.int8)
    torch.manual_seed(0)
    plain = Packed((Format(8), Format(8)))
    levelled = Packed((Format(8), Format(8)), [levels, NO_LEVELS])
    levelled.weights = plain.weights
    x = torch.randn(1, SIZES.width)
    with torch.no_grad():
        found = feed_forwards(x, [levelled.block], SIZES)
        assert torch.equal(found, plain.alone(x * factors(levels)))


def test_levels_of_the_second_matrix_undo_a_division(native: Library) -> None:
    torch.manual_seed(0)
    down = torch.randn(SIZES.width, SIZES.intermediate)
    levels = torch.zeros(SIZES.intermediate, dtype=torch.int8)
    levels[7] = 4
    plain, levelled = Packed((Format(8), Format(8))), Packed((Format(8), Format(8)), [NO_LEVELS, levels])
    plain.weights[1] = quantise(down, Format(8))
    levelled.weights = [plain.weights[0], quantise(down / factors(levels), Format(8))]
    x = torch.randn(1, SIZES.width)
    with torch.no_grad():
        found, wanted = feed_forwards(x, [levelled.block], SIZES), plain.alone(x)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_a_token_that_is_not_finite_is_nan(packed: list[Packed]) -> None:
    x = torch.randn(1, SIZES.width)
    x[0, 5] = float("inf")
    assert feed_forwards(x, [each.block for each in packed], SIZES).isnan().all()


@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 128), torch.randn(128), torch.randn(1, 64), torch.randn(1, 128).double()],
    ids=["two tokens", "no row", "another width", "float64"],
)
def test_what_is_no_token_is_refused(x: Tensor, packed: list[Packed]) -> None:
    with pytest.raises(InvalidInput, match="one token"):
        feed_forwards(x, [packed[0].block], SIZES)


def test_no_blocks_are_refused(native: Library) -> None:
    with pytest.raises(InvalidInput, match="0 blocks"):
        feed_forwards(torch.randn(1, SIZES.width), [], SIZES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_added_up_in_the_order_of_the_terms(native: Library, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 300)
    terms = [(4, 0.5), (0, -1.25), (4, 2.0), (2, 0.125)]
    expected = torch.zeros(300)
    for row, share in terms:
        expected += share * rows[row]
    assert torch.equal(add_up([rows], terms, dtype), expected[None].to(dtype))
    assert torch.equal(add_up([rows[:1], rows[1:4], rows[4:]], terms, dtype), expected[None].to(dtype))
    assert not add_up([rows], [], dtype).any()


def test_a_row_that_is_not_there_is_refused(native: Library) -> None:
    for row in (-1, 5):
        with pytest.raises(InvalidInput, match="are asked for"):
            add_up([torch.zeros(5, 32)], [(row, 1.0)], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mix_is_the_sum_of_its_blocks_to_the_bit(packed: list[Packed], dtype: torch.dtype) -> None:
    x, blocks = torch.randn(1, SIZES.width).to(dtype), [each.block for each in packed]
    terms = [(3, 0.5), (0, 0.25), (7, -2.0)]
    assert torch.equal(mix(x, blocks, SIZES, terms), add_up([feed_forwards(x, blocks, SIZES)], terms, dtype))
    with pytest.raises(InvalidInput, match="are asked for"):
        mix(x, blocks, SIZES, [(8, 1.0)])
    with pytest.raises(InvalidInput, match="meets blocks"):
        mix(x[:, 1:], blocks, SIZES, terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_those_that_a_token_chose_are_mixed_where_they_are_there(
    packed: list[Packed], dtype: torch.dtype
) -> None:
    x, out = torch.randn(1, SIZES.width).to(dtype), torch.empty(1, SIZES.width, dtype=dtype)
    chosen, shares = torch.tensor([[6, 0, 9, 3]]), torch.tensor([[0.5, 0.25, 0.125, 0.0625]], dtype=dtype)
    table = np.zeros((8, SIZES.fields), dtype=np.int64)
    mixing = SIZES.mixing(x, table, chosen, shares, out)
    assert not mixing()
    table[[0, 3, 6]] = [packed[number].block for number in (0, 3, 6)]
    assert mixing()
    terms = [(0, 0.25), (1, 0.0625), (2, 0.5)]
    assert torch.equal(out, mix(x, [packed[number].block for number in (0, 3, 6)], SIZES, terms))
