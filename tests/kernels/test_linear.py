"""Products with packed weights: against float64, on every instruction set that this CPU has."""

import ctypes
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from torch import Tensor

from undercroft.errors import InvalidInput
from undercroft.kernels import Weight, backend, dequantise, linear, quantise
from undercroft.kernels.format import Format
from undercroft.kernels.library import Library

ROWS = (1, 15, 16, 17, 100, 768)
BATCHES = (1, 2, 5, 32, 100)
DTYPES = (torch.float32, torch.bfloat16)

Weights = Callable[[int, int], tuple[Tensor, Tensor]]
Bound = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


@pytest.mark.parametrize("rows", ROWS)
def test_every_shape_is_within_the_error_of_quantised_activations(
    rows: int, format: Format, weights: Weights, bound: Bound
) -> None:
    for columns in {format.group, 3 * format.group, 1024}:
        packed, weight = weights(rows, columns)
        for batch in BATCHES:
            for dtype in DTYPES:
                x = torch.randn(batch, columns).to(dtype)
                found = linear(x, packed, format, rows)
                assert found.shape == (batch, rows)
                assert found.dtype == dtype
                exact, most = bound(x, weight, format.group)
                assert bool(((found.double() - exact).abs() <= most).all())


def test_every_instruction_set_gives_the_same_bits(format: Format, weights: Weights, native: Library) -> None:
    for rows, columns in ((17, 5 * format.group), (100, 1024)):
        packed, _ = weights(rows, columns)
        for batch in (1, 7, 13):
            for dtype in DTYPES:
                x = (torch.randn(batch, columns) * torch.logspace(-20, 20, batch).unsqueeze(1)).to(dtype)
                results = [
                    native.linear(x, packed, format, rows, instructions=name) for name in native.instructions
                ]
                assert all(torch.equal(results[0], each) for each in results[1:])
    assert native.instructions[0] == "portable"


def test_the_extremes_of_codes_and_activations_saturate_nowhere(format: Format, native: Library) -> None:
    alternating = torch.ones(32, 256)
    alternating[:, ::2] = -1.0
    packed = quantise(alternating, format)
    if format.bits == 8:  # -128, which `quantise` never gives
        packed.view(-1, format.group_nbytes)[:, format.header_nbytes :] = 128
    weight = dequantise(packed, format, 32, 256)
    for x in (alternating[:1], -alternating[:1], torch.ones(1, 256), -torch.ones(1, 256)):
        for name in native.instructions:
            found = native.linear(x, packed, format, 32, instructions=name)
            torch.testing.assert_close(found, x @ weight.T, rtol=1e-5, atol=1e-3)


def test_a_row_is_the_same_bits_in_any_company(format: Format, weights: Weights) -> None:
    packed, _ = weights(100, 384)
    x = torch.randn(300, 384)
    whole = linear(x, packed, format, 100)
    for first, last in ((0, 1), (7, 9), (31, 64), (250, 300)):
        assert torch.equal(whole[first:last], linear(x[first:last], packed, format, 100))
    assert torch.equal(whole, linear(x.t().contiguous().t(), packed, format, 100))


def test_the_number_of_threads_changes_no_bit(format: Format, weights: Weights) -> None:
    packed, _ = weights(768, 256)
    x, before = torch.randn(40, 256), torch.get_num_threads()
    results: list[Tensor] = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results += [linear(x, packed, format, 768), linear(x[:1], packed, format, 768)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], each) for each in results[2::2])
    assert all(torch.equal(results[1], each) for each in results[3::2])


def test_calls_from_several_threads_do_not_disturb_each_other(format: Format, weights: Weights) -> None:
    packed, _ = weights(768, 256)
    batches = [torch.randn(rows, 256) for rows in (1, 3, 40, 100)]
    wanted = [linear(x, packed, format, 768) for x in batches]

    def several_times(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [linear(x, packed, format, 768) for _ in range(5)]

    with ThreadPoolExecutor(len(batches)) as pool:
        for results, expected in zip(pool.map(several_times, batches), wanted, strict=True):
            assert all(torch.equal(each, expected) for each in results)


def test_a_row_that_is_not_finite_says_so_and_spoils_no_other() -> None:
    format = Format(4)
    packed = quantise(torch.randn(40, 64), format)
    x = torch.randn(4, 64)
    clean = linear(x, packed, format, 40)
    x[1, 5], x[2, 63] = float("nan"), -float("inf")
    found = linear(x, packed, format, 40)
    assert torch.equal(found[[0, 3]], clean[[0, 3]])
    assert bool(found[1:3].isnan().all())


def test_zeros_and_next_to_nothing_are_zero(format: Format, weights: Weights) -> None:
    packed, _ = weights(33, 256)
    for size in (0.0, 1e-45, 1e-38, 9e-31):
        assert not linear(torch.full((2, 256), size), packed, format, 33).any()


def test_no_rows_give_no_rows(format: Format, weights: Weights) -> None:
    packed, _ = weights(33, 256)
    assert linear(torch.empty(0, 256), packed, format, 33).shape == (0, 33)


def test_nothing_beyond_the_weight_is_read(format: Format, weights: Weights) -> None:
    """The weight ends where memory ends: the page after it may not be touched."""
    packed, _ = weights(33, 3 * format.group)
    pages = -(-packed.numel() // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    bytes_of = numpy.frombuffer(memory, dtype=numpy.uint8)
    guard = bytes_of.ctypes.data + pages * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    at_the_end = torch.from_numpy(bytes_of)[pages * mmap.PAGESIZE - packed.numel() : pages * mmap.PAGESIZE]
    at_the_end.copy_(packed)
    for batch in (1, 8):
        x = torch.randn(batch, 3 * format.group)
        assert torch.equal(linear(x, at_the_end, format, 33), linear(x, packed, format, 33))


@pytest.mark.parametrize(
    ("x", "rows", "what"),
    [
        (torch.zeros(64), 40, "activations are"),
        (torch.zeros(1, 2, 64), 40, "activations are"),
        (torch.zeros(2, 64, dtype=torch.float16), 40, "activations are"),
        (torch.zeros(2, 64, dtype=torch.float64), 40, "activations are"),
        (torch.zeros(2, 63), 40, "do not divide"),
        (torch.zeros(2, 0), 40, "do not divide"),
        (torch.zeros(2, 96), 40, "takes"),
        (torch.zeros(2, 64), 65, "takes"),
        (torch.zeros(2, 64), 0, "nothing to pack"),
        (torch.zeros(2, 64), -40, "nothing to pack"),
        (torch.zeros(2, 64, device="meta"), 40, "is on cpu"),
    ],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_what_does_not_fit_is_refused(x: Tensor, rows: int, what: str, gradients: bool) -> None:
    packed = quantise(torch.randn(40, 64), Format(4))
    with torch.set_grad_enabled(gradients), pytest.raises(InvalidInput, match=what):
        linear(x, packed, Format(4), rows)


def test_bytes_that_are_no_packed_weight_are_refused() -> None:
    packed = quantise(torch.randn(40, 64), Format(4))
    for wrong in (packed[1:], packed.view(2, -1), packed.view(torch.int8), packed.repeat(2)[::2]):
        with pytest.raises(InvalidInput, match="packed"):
            linear(torch.zeros(2, 64), wrong, Format(4), 40)


def test_an_instruction_set_that_is_not_there_is_refused(native: Library) -> None:
    packed = quantise(torch.randn(40, 64), Format(4))
    with pytest.raises(InvalidInput, match="not sse9"):
        native.linear(torch.zeros(2, 64), packed, Format(4), 40, instructions="sse9")


def test_the_backend_names_the_fastest_instruction_set(native: Library) -> None:
    assert native.threaded
    assert backend() == f"native ({native.instructions[-1]})"


@pytest.mark.gpu
def test_on_a_gpu_the_product_is_that_of_the_dequantised_weight(format: Format, weights: Weights) -> None:
    packed, weight = weights(100, 256)
    x = torch.randn(5, 256).bfloat16()
    found = linear(x.cuda(), packed.cuda(), format, 100).cpu().double()
    assert float((found - x.double() @ weight.T).norm() / (x.double() @ weight.T).norm()) < 0.02


def test_weights_are_joined_in_one_memory(native: Library) -> None:
    torch.manual_seed(0)
    format, rows = Format(8, 64), (64, 32, 96)
    parts = [
        Weight(quantise(torch.randn(number, 128), format), format, number, columns=128) for number in rows
    ]
    x = torch.randn(2, 3, 128)
    with torch.no_grad():
        apart = torch.cat([part(x) for part in parts], dim=-1)
        whole = Weight.joined(parts)
        assert torch.equal(whole(x), apart)
        assert torch.equal(torch.cat([part(x) for part in parts], dim=-1), apart)
    memory = whole.packed.untyped_storage().data_ptr()
    assert all(part.packed.untyped_storage().data_ptr() == memory for part in parts)


def test_a_weight_checks_what_it_multiplies(native: Library) -> None:
    format = Format(8)
    part = Weight(quantise(torch.zeros(48, 64), format), format, 48, 64)
    with pytest.raises(InvalidInput, match="rows in blocks"):
        Weight.joined([part, part])
    with pytest.raises(InvalidInput, match="only weights with equal columns"):
        Weight.joined([part, Weight(quantise(torch.zeros(32, 32), format), format, 32, 32)])
    with torch.no_grad():
        for wrong in (torch.zeros(2, 32), torch.zeros(2, 64, dtype=torch.float16)):
            with pytest.raises(InvalidInput):
                part(wrong)
        assert part(torch.zeros(0, 64)).shape == (0, 48)
    with pytest.raises(InvalidInput):
        Weight(torch.zeros(3, dtype=torch.uint8), format, 48, 64)
