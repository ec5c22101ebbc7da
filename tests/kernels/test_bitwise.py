"""Products with PyTorch's own bits: where they are taken, they are these; where they are not, PyTorch makes them."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from undercroft.kernels import bitwise
from undercroft.kernels.library import Library

COLUMNS = (64, 128, 320, 768, 1408, 2048, 2880)
BFLOAT16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def reproduced(native: Library) -> None:
    if not bitwise.reproduces(64):
        pytest.skip("PyTorch multiplies bfloat16 in another way on this processor")


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16)


def in_64_places(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `bitwise.cpp` says that PyTorch computes; the product of two bfloat16 is exact in float32."""
    places = torch.zeros(len(x), len(weight), 64)
    for step in range(0, x.shape[1], 64):
        places += x[:, None, step : step + 64].float() * weight[None, :, step : step + 64].float()
    while places.shape[-1] > 1:
        places = places[..., : places.shape[-1] // 2] + places[..., places.shape[-1] // 2 :]
    sums = places[..., 0]
    return (sums if bias is None else sums + bias.float()).to(BFLOAT16)


@pytest.mark.parametrize("columns", COLUMNS)
def test_a_linear_layer_has_pytorchs_bits(columns: int) -> None:
    draw = torch.Generator().manual_seed(1)
    for rows in (1, 2, 3, 4, 5, 8, 31):
        for outputs in (1, 2, 31, 33, 100):
            x, weight = bitwise.cancelling(rows, outputs, columns, draw)
            for bias in (None, torch.randn(outputs).to(BFLOAT16)):
                assert torch.equal(bits(bitwise.linear(x, weight, bias)), bits(linear(x, weight, bias)))


@pytest.mark.parametrize("columns", COLUMNS)
def test_sums_are_added_up_in_64_places(columns: int, reproduced: None) -> None:
    draw = torch.Generator().manual_seed(2)
    x, weight = bitwise.cancelling(7, 33, columns, draw)
    bias = torch.randn(33).to(BFLOAT16)
    assert bitwise.takes(x, weight, bias)
    for each in (None, bias):
        assert torch.equal(bits(bitwise.linear(x, weight, each)), bits(in_64_places(x, weight, each)))


def test_what_is_tried_shows_another_order_of_addition() -> None:
    draw = torch.Generator().manual_seed(3)
    for columns in COLUMNS[1:]:
        x, weight = bitwise.cancelling(2, 130, columns, draw)
        ours, order = in_64_places(x, weight), torch.randperm(columns)
        assert (ours != in_64_places(x[:, order], weight[:, order])).float().mean() > 0.5
        assert (ours != linear(x.float(), weight.float()).to(BFLOAT16)).float().mean() > 0.5


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38, 1e-40, -0.0])
def test_numbers_at_the_edge_have_pytorchs_bits(value: float) -> None:
    x, weight = torch.randn(3, 128).to(BFLOAT16), torch.randn(40, 128).to(BFLOAT16)
    for where in (x, weight):
        where[1, 5::31] = value
        assert torch.equal(bits(bitwise.linear(x, weight)), bits(linear(x, weight)))


def test_threads_change_no_bit(reproduced: None) -> None:
    draw = torch.Generator().manual_seed(4)
    x, weight = bitwise.cancelling(9, 500, 1024, draw)
    whole, threads = bitwise.linear(x, weight), torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(bits(whole), bits(bitwise.linear(x, weight)))
    finally:
        torch.set_num_threads(threads)


def test_dimensions_before_the_last_are_rows(reproduced: None) -> None:
    x, weight = torch.randn(2, 3, 128).to(BFLOAT16), torch.randn(40, 128).to(BFLOAT16)
    assert bitwise.takes(x, weight)
    assert torch.equal(bits(bitwise.linear(x, weight)), bits(linear(x, weight)))


def traced(x: Tensor, weight: Tensor) -> Tensor:
    function = torch.jit.trace(bitwise.linear, (x + 1, weight), check_trace=False)  # pyright: ignore
    return function(x, weight)


LEFT: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "other columns": lambda x, weight: (x[:, :100].contiguous(), weight[:, :100].contiguous()),
    "float32": lambda x, weight: (x.float(), weight.float()),
    "turned": lambda x, weight: (x.t().contiguous().t(), weight),
    "turned weight": lambda x, weight: (x, weight.t().contiguous().t()),
    "a row": lambda x, weight: (x[0], weight),
    "no rows": lambda x, weight: (x[:0], weight),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_was_not_tried_is_left_to_pytorch(name: str) -> None:
    x, weight = LEFT[name](torch.randn(4, 128).to(BFLOAT16), torch.randn(8, 128).to(BFLOAT16))
    assert not bitwise.takes(x, weight)
    assert torch.equal(bitwise.linear(x, weight), linear(x, weight))


def test_a_bias_that_does_not_fit_is_pytorchs_error() -> None:
    with pytest.raises(RuntimeError):
        bitwise.linear(
            torch.randn(4, 128).to(BFLOAT16), torch.randn(8, 128).to(BFLOAT16), torch.zeros(7).to(BFLOAT16)
        )


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_whoever_differentiates_traces_or_casts_gets_pytorchs_product() -> None:
    x, weight = torch.randn(4, 128).to(BFLOAT16), torch.randn(8, 128).to(BFLOAT16)
    expected = linear(x, weight)
    assert torch.equal(traced(x, weight), expected)
    with torch.autocast("cpu", dtype=torch.float16):
        assert bitwise.linear(x, weight).dtype is torch.float16
    with torch.enable_grad():
        out = bitwise.linear(x.requires_grad_(), weight)
        assert torch.equal(out, expected)
        assert out.grad_fn is not None


@pytest.mark.parametrize("experts", [1, 2, 9])
def test_many_weights_in_one_call_are_as_one_after_the_other(experts: int, reproduced: None) -> None:
    draw = torch.Generator().manual_seed(5)
    x, stacked = bitwise.cancelling(1, experts * 2 * 192, 256, draw)
    weights = list(stacked.split(2 * 192))
    gates, ups = bitwise.gates_and_ups(x, weights)
    for row, weight in enumerate(weights):
        gate, up = linear(x, weight).chunk(2, -1)
        assert torch.equal(bits(gates[row : row + 1]), bits(gate))
        assert torch.equal(bits(ups[row : row + 1]), bits(up))
    rows, stacked = bitwise.cancelling(experts, experts * 70, 192, draw)
    found = bitwise.row_by_row(rows, list(stacked.split(70)))
    for row, weight in enumerate(stacked.split(70)):
        assert torch.equal(bits(found[row : row + 1]), bits(linear(rows[row : row + 1], weight)))


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1, 16, 100, 2048])
def test_rows_are_added_up_as_pytorch_does(width: int, dtype: torch.dtype, native: Library) -> None:
    rows, shares, order = torch.randn(9, width).to(BFLOAT16), torch.rand(1, 9).to(dtype), [3, 1, 8, 0]
    if not bitwise.adds(rows, shares):
        pytest.skip("this processor has no AVX2")
    out = torch.zeros(1, width, dtype=BFLOAT16)
    for row in order:
        out.add_((rows[row : row + 1] * shares[:, row : row + 1]).to(BFLOAT16))
    found = bitwise.add_up(rows, order, [shares[0, row].item() for row in order])
    assert torch.equal(bits(found), bits(out))
