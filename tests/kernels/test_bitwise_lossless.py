"""Products with squeezed weights: PyTorch's bits, whatever the numbers, and no byte is read that is not theirs."""

import ctypes
import mmap
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.test_lossless import bits, every_number
from torch import Tensor
from torch.nn import functional

from undercroft.errors import CorruptRecord, InvalidInput
from undercroft.kernels import bitwise, bitwise_lossless
from undercroft.kernels.bitwise_lossless import Squeezed
from undercroft.kernels.library import Library
from undercroft.kernels.lossless import CHUNK, Lossless, rare_in, restore, squeeze

BFLOAT16 = torch.bfloat16
SHAPES = ((3, 64), (2, 128), (66, 64), (700, 64), (130, 320), (1536, 2048), (2048, 768), (65, 2880))
"""Among them outputs that begin and end within chunks, and tasks that do."""


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def reproduced(native: Library) -> None:
    if not bitwise_lossless.reproduces(64):
        pytest.skip("PyTorch multiplies bfloat16 in another way on this processor")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=draw) * 0.02
    return torch.randn(1, columns, generator=draw).to(BFLOAT16), weight.to(BFLOAT16)


def cancelling(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return bitwise.cancelling(1, rows, columns, torch.Generator().manual_seed(rows))


def all_rare(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The last outputs have none of the seven exponents that most numbers have."""
    x, weight = drawn(rows, columns)
    weight[rows // 2 :] *= 2.0**-40
    weight[: rows // 2] = weight[: rows // 2].sign()
    return x, weight


def none_rare(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    x, weight = drawn(rows, columns)
    return x, weight.sign()


def any_number(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Zeros, infinities, subnormal numbers and what is no number, of both signs."""
    order = torch.randperm(2**16, generator=torch.Generator().manual_seed(rows))
    numbers = every_number()[order].repeat(-(-rows * columns // 2**16))[: rows * columns]
    return drawn(1, columns)[0], numbers.view(rows, columns)


def rarely_infinite(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    x, weight = drawn(rows, columns)
    for place, number in enumerate((float("inf"), -float("inf"), float("nan"), 3e38, 1e-40, -0.0)):
        weight[place % rows, place::31] = number
    return x, weight


MAKES = (drawn, cancelling, all_rare, none_rare, any_number, rarely_infinite)


@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_have_pytorchs_bits(
    make: Callable[[int, int], tuple[Tensor, Tensor]], shape: tuple[int, int], threads: int, reproduced: None
) -> None:
    x, weight = make(*shape)
    found = bitwise_lossless.linear(x, Squeezed.of(weight))
    assert torch.equal(bits(found), bits(functional.linear(x, weight)))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38, 1e-40, -0.0])
def test_tokens_at_the_edge_have_pytorchs_bits(value: float, reproduced: None) -> None:
    x, weight = drawn(70, 128)
    x[0, 5::31] = value
    assert torch.equal(
        bits(bitwise_lossless.linear(x, Squeezed.of(weight))), bits(functional.linear(x, weight))
    )


def test_room_for_more_rare_exponents_changes_nothing(reproduced: None) -> None:
    x, weight = drawn(130, 320)
    for spare in (0, 1, 2, 3, 1000):
        form = Lossless(weight.numel(), rare_in(weight) + spare)
        found = bitwise_lossless.linear(x, Squeezed(squeeze(weight, form), form, 130, 320))
        assert torch.equal(bits(found), bits(functional.linear(x, weight)))


def whether(x: Tensor, weight: Squeezed) -> Tensor | None:
    try:
        return bitwise_lossless.linear(x, weight)
    except CorruptRecord:
        return None


def restored(weight: Squeezed) -> Tensor | None:
    out = torch.empty(weight.rows, weight.columns, dtype=BFLOAT16)
    try:
        restore(weight.packed, weight.form, out)
    except CorruptRecord:
        return None
    return out


@given(
    seed=st.integers(0, 2**31), rows=st.sampled_from([1, 3, 513, 600]), share=st.sampled_from([0, 1, 8, 64])
)
def test_any_bytes_give_what_they_are_restored_as_or_are_refused(seed: int, rows: int, share: int) -> None:
    if not bitwise_lossless.reproduces(64):
        pytest.skip("PyTorch multiplies bfloat16 in another way on this processor")
    draw = torch.Generator().manual_seed(seed)
    form = Lossless(64 * rows, rows * share)
    packed = torch.randint(0, 256, (form.nbytes,), dtype=torch.uint8, generator=draw)
    if seed % 2:  # where rare exponents begin is right, or nearly
        packed[8 : 8 + 4 * form.chunks] = torch.tensor([0, 0, 0, 0, seed % 7, 16, 0, 0][: 4 * form.chunks])
    weight, x = Squeezed(packed, form, rows, 64), drawn(1, 64)[0]
    plain = restored(weight)
    found = whether(x, weight)
    assert (plain is None) == (found is None)
    assert plain is None or found is None or torch.equal(bits(functional.linear(x, plain)), bits(found))


def at_the_end_of_memory(content: Tensor) -> tuple[Tensor, mmap.mmap]:
    """A copy whose last byte is the last that may be read."""
    size = -(-content.numel() // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    protected = ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0)
    assert protected == 0
    copy = torch.frombuffer(pages, dtype=torch.uint8, count=content.numel(), offset=size - content.numel())
    return copy.copy_(content), pages


@pytest.mark.parametrize("corrupt", ["nothing", "starts", "codes", "every code"])
@pytest.mark.parametrize("spare", [0, 1, 2])
def test_nothing_is_read_beyond_the_bytes(corrupt: str, spare: int, reproduced: None) -> None:
    x, weight = drawn(700, 64)
    form = Lossless(weight.numel(), rare_in(weight) + spare)
    packed = squeeze(weight, form)
    if corrupt == "starts":
        packed[8 : 8 + 4 * form.chunks] = 255
    elif corrupt == "codes":
        packed[form.codes + 24 * (form.blocks - 1) :][:24] = 255  # of the last block
    elif corrupt == "every code":
        packed[form.codes : form.rests] = 255
    copy, pages = at_the_end_of_memory(packed)
    found = whether(x, Squeezed(copy, form, 700, 64))
    if corrupt == "nothing":
        assert found is not None
        assert torch.equal(bits(found), bits(functional.linear(x, weight)))
    else:
        assert found is None
    del copy
    assert pages[0] is not None


def test_what_asks_for_more_rare_exponents_than_there_are_is_refused(reproduced: None) -> None:
    x, weight = drawn(2 * CHUNK // 64, 64)
    squeezed = Squeezed.of(weight)
    squeezed.packed[squeezed.form.rests - 24 : squeezed.form.rests] = (
        255  # a last block in which all are rare
    )
    with pytest.raises(CorruptRecord, match="rare exponents"):
        bitwise_lossless.linear(x, squeezed)


def test_what_is_no_token_is_refused(reproduced: None) -> None:
    x, weight = drawn(4, 128)
    good, other = Squeezed.of(weight), Squeezed.of(weight.view(8, 64))
    for wrong in (x.float(), x[0], x.repeat(2, 1), torch.cat([x, x], 1)[:, ::2]):
        with pytest.raises(InvalidInput, match="is not multiplied with"):
            bitwise_lossless.linear(wrong, good)
    with pytest.raises(InvalidInput, match="is not multiplied with"):
        bitwise_lossless.linear(x, other)


def test_bytes_that_do_not_fit_are_refused() -> None:
    _, weight = drawn(3, 64)
    squeezed = Squeezed.of(weight)
    packed, form = squeezed.packed, squeezed.form
    wrong = [(packed[:-1], 3, 64), (packed, 4, 64), (packed.view(torch.int8), 3, 64)]
    for content, rows, columns in wrong:
        with pytest.raises(InvalidInput, match="are no"):
            Squeezed(content, form, rows, columns)
