"""Fewer bytes, every bit: what is restored is what was squeezed, whoever restores it and whatever the numbers are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from undercroft.errors import CorruptRecord, InvalidInput
from undercroft.kernels import lossless
from undercroft.kernels.lossless import BLOCK, CHUNK, Lossless, Restorer, rare_in, restore, squeeze

COUNTS = (1, 7, 63, 64, 65, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 130)


def bell(count: int, seed: int = 0) -> Tensor:
    """Weights as a matrix has them."""
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


def every_number() -> Tensor:
    """All 65536: zeros of both signs, subnormal numbers, infinities, and what is no number."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int16)


def fitting(values: Tensor, spare: int = 0) -> Lossless:
    return Lossless(values.numel(), min(values.numel(), rare_in(values) + spare))


@pytest.fixture
def native() -> Restorer:
    found = lossless.load()
    if found is None:
        pytest.skip("no C++ compiler here, so there are no native loops")
    return found


@pytest.mark.parametrize("make", [bell, lambda count: every_number()[-count:]], ids=["bell", "every number"])
@pytest.mark.parametrize("count", COUNTS)
def test_every_bit_is_kept(native: Restorer, make, count: int) -> None:
    values = make(count)
    form = fitting(values, spare=3)
    squeezed, out = squeeze(values, form), torch.empty_like(values)
    assert squeezed.numel() == form.nbytes
    restore(squeezed, form, out)
    assert torch.equal(bits(out), bits(values))
    for instructions in native.instructions:
        out.zero_()
        assert native.restore(squeezed, form, out, instructions=instructions)
        assert torch.equal(bits(out), bits(values))


@pytest.mark.parametrize("count", COUNTS)
def test_without_a_compiler_it_is_the_same(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless, "load", lambda: None)
    values = bell(count)
    form, out = fitting(values), torch.empty_like(values)
    restore(squeeze(values, form), form, out)
    assert torch.equal(bits(out), bits(values))


def test_weights_take_seven_tenths() -> None:
    values = bell(2048 * 768)
    assert 0.65 < fitting(values).nbytes / values.nbytes < 0.72


def test_shapes_do_not_matter() -> None:
    values = bell(96 * 64).view(96, 64)
    form, out = fitting(values.t()), torch.empty(64, 96, dtype=torch.bfloat16)
    restore(squeeze(values.t(), form), form, out)
    assert torch.equal(bits(out), bits(values.t().contiguous()))


@given(seed=st.integers(0, 2**31), count=st.integers(1, 3 * BLOCK))
def test_any_bytes_are_restored_as_something_or_refused(seed: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    form = Lossless(count, seed % (count + 1))
    squeezed = torch.randint(0, 256, (form.nbytes,), dtype=torch.uint8, generator=draw)
    out, again = torch.empty(count, dtype=torch.bfloat16), torch.empty(count, dtype=torch.bfloat16)
    found = lossless.load()
    plain = lossless._restore(squeezed, form, out)
    if found is not None:
        for instructions in found.instructions:
            assert found.restore(squeezed, form, again, instructions=instructions) == plain
            assert not plain or torch.equal(bits(out), bits(again))


def test_more_rare_exponents_than_there_are_is_refused() -> None:
    values = bell(3 * CHUNK)
    form = fitting(values)
    squeezed, out = squeeze(values, form), torch.empty_like(values)
    squeezed[form.rests - 24 : form.rests] = 255  # a last block in which all are rare
    with pytest.raises(CorruptRecord, match="rare exponents"):
        restore(squeezed, form, out)
    squeezed = squeeze(values, form)
    squeezed[8 : 8 + 4 * form.chunks] = 255  # each chunk's begin beyond the end
    with pytest.raises(CorruptRecord, match="rare exponents"):
        restore(squeezed, form, out)


def test_what_does_not_fit_is_refused() -> None:
    values = bell(1000)
    form = fitting(values)
    squeezed = squeeze(values, form)
    with pytest.raises(InvalidInput, match="rare exponents"):
        squeeze(values, Lossless(1000, form.rare - 1))
    with pytest.raises(InvalidInput, match="no bytes of"):
        restore(squeezed[:-1], form, torch.empty_like(values))
    with pytest.raises(InvalidInput, match="has no room"):
        restore(squeezed, form, torch.empty(999, dtype=torch.bfloat16))
    for count, rare in ((0, 0), (5, 6), (5, -1)):
        with pytest.raises(InvalidInput, match="can be squeezed"):
            Lossless(count, rare)
