"""Attention of one token: bit for bit what PyTorch and transformers compute, or refused."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from undercroft.errors import InvalidInput
from undercroft.kernels import bitwise_attention
from undercroft.kernels.bitwise_attention import attend, attends, takes
from undercroft.kernels.library import Library

BF16 = torch.bfloat16
HEADS = [(32, 4, 128), (16, 16, 64), (32, 8, 96), (40, 2, 128), (3, 3, 16), (6, 1, 256), (18, 2, 80)]
KEYS = [*range(1, 18), 23, 24, 31, 32, 33, 63, 100, 255, 511, 512, 513, 519, 520, 528, 1023, 1024, 1025, 1600]
EXTREMES = [torch.inf, -torch.inf, torch.nan, 3.38e38, -3.38e38, 1e-40, 1e30, 1e-30, 0.0, -0.0]


@pytest.fixture(autouse=True)
def _in_one_thread_without_gradients(native: Library) -> Iterator[None]:
    torch.manual_seed(0)
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if not attends(8, 2, 64):
            pytest.skip("PyTorch attends in another way on this processor")
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(number)


def states(heads: int, key_heads: int, width: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries some of which attend to all keys, others to few; values of many sizes."""
    query = torch.randn(1, heads, 1, width) * torch.exp(torch.randn(heads, 1, 1))
    key, value = torch.randn(2, 1, key_heads, keys, width)
    return query.to(BF16), key.to(BF16), (value * torch.exp(torch.randn_like(value))).to(BF16)


def pytorchs(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    grouped = query.shape[1] != keys.shape[1]
    return scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=grouped).transpose(1, 2)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype is expected.dtype is BF16
    assert found.shape == expected.shape
    assert torch.equal(*(each.contiguous().view(torch.int16) for each in (found, expected)))


@pytest.mark.parametrize(("heads", "key_heads", "width"), HEADS)
def test_a_token_sees_any_number_of_keys_with_pytorchs_bits(heads: int, key_heads: int, width: int) -> None:
    assert attends(heads, key_heads, width)
    for keys in KEYS:
        each = states(heads, key_heads, width, keys)
        assert takes(*each)
        assert_same_bits(attend(*each, width**-0.5), pytorchs(*each, width**-0.5))


@pytest.mark.parametrize(("heads", "key_heads", "width"), HEADS[:3])
def test_it_is_what_transformers_computes(heads: int, key_heads: int, width: int) -> None:
    module: Any = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)
    for keys in (1, 9, 100, 700):
        each = states(heads, key_heads, width, keys)
        for scaling in (width**-0.5, 0.3):
            expected, _ = sdpa_attention_forward(module, *each, None, dropout=0.0, scaling=scaling)
            assert_same_bits(attend(*each, scaling), expected)


@pytest.mark.parametrize("keys", [1, 7, 8, 9, 16, 33, 100, 512, 521, 1030])
def test_numbers_at_the_ends_of_what_there_is_keep_their_bits(keys: int) -> None:
    some = torch.tensor(EXTREMES)
    for share in (0.001, 0.1, 1.0):
        for which in range(3):
            each = [part.float() for part in states(6, 3, 64, keys)]
            drawn = torch.rand_like(each[which]) < share
            each[which][drawn] = some[torch.randint(len(some), (int(drawn.sum()),))]
            query, key, value = (part.to(BF16) for part in each)
            for scale in (0.125, -1.0, 0.0, 1e30, torch.inf):
                assert_same_bits(attend(query, key, value, scale), pytorchs(query, key, value, scale))


@pytest.mark.parametrize("sizes", [(1e19, 1e19, 1.0), (1e-20, 1e-20, 1e-38), (30.0, 1.0, 1e-38)], ids=str)
def test_products_that_overflow_or_vanish_keep_their_bits(sizes: tuple[float, float, float]) -> None:
    for keys in (5, 24, 700):
        drawn = zip(states(8, 4, 96, keys), sizes, strict=True)
        query, key, value = ((part.float() * size).to(BF16) for part, size in drawn)
        assert_same_bits(attend(query, key, value, 0.1), pytorchs(query, key, value, 0.1))


def test_a_part_of_the_keys_that_nothing_is_seen_of_keeps_its_bits() -> None:
    query, key, value = states(8, 2, 64, 1100)
    for first, last in ((0, 512), (512, 1024), (1024, 1100), (0, 1100)):
        hidden = key.clone()
        query[:], hidden[:, :, first:last] = 3e38, -3e38
        assert_same_bits(attend(query, hidden, value, 1.0), pytorchs(query, hidden, value, 1.0))


def test_keys_may_lie_in_a_longer_cache_or_heads_side_by_side() -> None:
    query, key, value = states(8, 2, 64, 600)
    for keys in (1, 30, 600):
        longer = key[:, :, :keys], value[:, :, :keys]
        beside = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in longer]
        wider = torch.cat(longer, -1).tensor_split(2, -1)
        for each in (longer, beside, wider):
            assert takes(query, *each)
            assert_same_bits(attend(query, *each, 0.2), pytorchs(query, *each, 0.2))
    alike = key[:, :1].expand(1, 8, 600, 64)
    assert_same_bits(attend(query, alike, alike, 0.2), pytorchs(query, alike, alike, 0.2))
    apart = torch.cat([query, query], -1)[..., :64]
    assert_same_bits(attend(apart, key, value, 0.2), pytorchs(query, key, value, 0.2))


def test_threads_do_not_matter() -> None:
    of_all = [states(*heads, 900) for heads in ((2, 1, 128), (16, 4, 64), (40, 2, 128))]
    for each, expected in [(each, pytorchs(*each, 0.1)) for each in of_all]:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            assert_same_bits(pytorchs(*each, 0.1), expected)
            assert_same_bits(attend(*each, 0.1), expected)


def test_denormal_numbers_are_flushed_where_pytorch_flushes_them() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormal numbers")
    try:
        for keys in (5, 100):
            query, key, value = states(8, 4, 64, keys)
            query, value = 30 * query, (value.float() * 1e-38).to(BF16)
            assert_same_bits(attend(query, key, value, 0.1), pytorchs(query, key, value, 0.1))
    finally:
        torch.set_flush_denormal(False)


def test_another_order_of_addition_would_be_found_out() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value, scale = bitwise_attention._cancelling_scores(4, 2, 100, 64, draw)
    columns = torch.randperm(64, generator=draw)
    shuffled = pytorchs(query[..., columns], key[..., columns], value, scale)
    assert (shuffled != pytorchs(query, key, value, scale)).float().mean() > 0.5
    query, key, value, scale = bitwise_attention._cancelling_values(4, 2, 100, 64, draw)
    order = torch.randperm(100, generator=draw)
    shuffled = pytorchs(query, key[:, :, order], value[:, :, order], scale)
    assert (shuffled != pytorchs(query, key, value, scale)).float().mean() > 0.5


def test_comparing_leaves_random_numbers_alone_and_knows_its_own_dtype() -> None:
    state = torch.get_rng_state()
    torch.set_default_dtype(BF16)
    try:
        assert attends(5, 5, 48)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(state, torch.get_rng_state())


def test_it_is_not_taken_where_pytorch_would_do_something_else() -> None:
    each = states(8, 2, 64, 20)
    assert takes(*each)
    with torch.enable_grad():
        assert not takes(*each)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not takes(*each)
    with sdpa_kernel(SDPBackend.MATH):
        assert not takes(*each)


def test_what_was_not_compared_is_not_computed() -> None:
    for heads, key_heads, width in ((1, 1, 64), (4, 3, 64), (4, 0, 64), (4, 4, 0), (4, 4, 72), (4, 4, 272)):
        assert not attends(heads, key_heads, width)
    query, key, value = states(8, 2, 64, 20)
    for each in [
        (query[0], key, value),
        (query.float(), key.float(), value.float()),
        (query, key, value.float()),
        (query.to("meta"), key, value),
        (query, key, value.to("meta")),
        (torch.cat([query, query], 2), key, value),
        (torch.cat([query, query]), torch.cat([key, key]), torch.cat([value, value])),
        (query, key, value[:, :, 1:]),
        (query, key[:, :, :0], value[:, :, :0]),
        (query[..., :48], key, value),
        (query[:, :7], key, value),
        (query, key.transpose(2, 3).contiguous().transpose(2, 3), value),
        (query, key, value[:, :, :1].expand(1, 2, 20, 64)),
    ]:
        assert not takes(*each)
        with pytest.raises(InvalidInput, match="no attention of one query"):
            attend(*each, 0.1)


def test_a_token_is_put_behind_others_and_attended_to() -> None:
    draw = torch.Generator().manual_seed(3)
    query = torch.randn(1, 4, 1, 32, generator=draw).bfloat16()
    both, states = (torch.randn(2, 2, tokens, 32, generator=draw).bfloat16() for tokens in (600, 1))
    out, native = torch.empty(1, 1, 4, 32, dtype=torch.bfloat16), bitwise_attention.load()
    if native is None:
        pytest.skip("nothing compiles kernels here")
    attend = native.attending(query, states[:, :, 0].contiguous(), both, 0.2, out)
    for before in (0, 1, 127, 512, 599):
        wanted = torch.cat([both[:, :, :before], states], dim=2)
        untouched = both[:, :, before + 1 :].clone()
        attend(before)
        assert torch.equal(out, native.attend(query, wanted[:1], wanted[1:], 0.2))
        assert torch.equal(both[:, :, : before + 1], wanted)
        assert torch.equal(both[:, :, before + 1 :], untouched)
