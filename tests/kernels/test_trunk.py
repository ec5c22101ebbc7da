"""Attention of one query, RMSNorm and routers: near to float64, and one token's bits whatever is computed beside it."""

import pytest
import torch
from torch import Tensor

from undercroft.errors import InvalidInput
from undercroft.kernels import trunk
from undercroft.kernels.library import Library

SHAPES = {  # batch, heads, key heads, tokens, width, value width
    "one key": (1, 4, 4, 1, 64, 64),
    "shared heads": (2, 12, 4, 100, 64, 48),
    "one head of keys": (1, 7, 1, 127, 16, 32),
    "just one chunk": (1, 6, 2, 128, 80, 80),
    "a chunk and one": (3, 5, 5, 129, 128, 16),
    "many chunks": (2, 8, 2, 1000, 128, 128),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _seed(native: Library) -> None:
    torch.manual_seed(0)


def drawn(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, key_heads, tokens, width, value_width = SHAPES[name]
    query = torch.randn(batch, heads, 1, width)
    keys = torch.randn(batch, key_heads, tokens, width)
    values = torch.randn(batch, key_heads, tokens, value_width)
    return query.to(dtype), keys.to(dtype), values.to(dtype)


def exact(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    shared = query.shape[1] // keys.shape[1]
    k, v = (each.double().repeat_interleave(shared, 1) for each in (keys, values))
    return ((scale * query.double() @ k.mT).softmax(-1) @ v).transpose(1, 2)


def compiled() -> trunk.Trunk:
    found = trunk.load()
    assert found is not None
    return found


@DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_near_to_float64s(name: str, dtype: torch.dtype) -> None:
    query, keys, values = drawn(name, dtype)
    found = trunk.attend(query, keys, values, 0.3)
    assert found.dtype is dtype
    expected = exact(query, keys, values, 0.3)
    rounding = 2**-8 if dtype is torch.bfloat16 else 0.0
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=1e-5)


@DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_instruction_sets_threads_and_company_change_no_bit_of_attention(
    name: str, dtype: torch.dtype, native: Library
) -> None:
    query, keys, values = drawn(name, dtype)
    whole = trunk.attend(query, keys, values, 0.3)
    for instructions in native.instructions:
        assert torch.equal(whole, compiled().attend(query, keys, values, 0.3, instructions=instructions))
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(whole, trunk.attend(query, keys, values, 0.3))
    finally:
        torch.set_num_threads(threads)
    for row in range(len(query)):
        only = slice(row, row + 1)
        assert torch.equal(whole[only], trunk.attend(query[only], keys[only], values[only], 0.3))


def test_keys_may_lie_in_any_order(native: Library) -> None:
    query, keys, values = drawn("shared heads", torch.bfloat16)
    whole = trunk.attend(query, keys, values, 0.1)
    turned = keys.transpose(1, 2).contiguous().transpose(1, 2)
    longer = torch.cat([values, values], dim=2)[:, :, : values.shape[2]]
    assert not turned.is_contiguous()
    assert not longer.is_contiguous()
    assert torch.equal(whole, trunk.attend(query, turned, longer, 0.1))


def test_large_products_neither_overflow_nor_hide_a_nan() -> None:
    query, keys, values = drawn("many chunks", torch.float32)
    found = trunk.attend(100 * query, keys, values, 1.0)
    torch.testing.assert_close(found.double(), exact(100 * query, keys, values, 1.0), rtol=0, atol=1e-3)
    keys[0, 0, 500, 3] = float("nan")
    found = trunk.attend(query, keys, values, 1.0)
    assert bool(found[0, 0, :4].isnan().all())
    assert bool(found[0, 0, 4:].isfinite().all())
    assert bool(found[1].isfinite().all())


def test_attention_that_does_not_fit_is_refused() -> None:
    query, keys, values = drawn("shared heads", torch.float32)
    wrong = [
        (query.expand(-1, -1, 2, -1), keys, values),
        (query.half(), keys.half(), values.half()),
        (query, keys.bfloat16(), values),
        (query[:, :11], keys, values),
        (query[..., :60], keys[..., :60], values),
        (query[..., :48], keys, values),
        (query, keys[:, :, :0], values[:, :, :0]),
        (query, keys, values[:, :, 1:]),
        (query[:1], keys, values),
        (query, keys.mT.contiguous().mT, values),
        (query[0], keys[0], values[0]),
    ]
    for each in wrong:
        with pytest.raises(InvalidInput, match="no attention of one query"):
            trunk.attend(*each, 1.0)


@DTYPES
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2048), (1, 8, 1, 128), (70, 16), (0, 32)], ids=str)
def test_a_norm_is_near_to_float64s_and_the_same_everywhere(
    shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, native: Library
) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(weight_dtype)
    found = trunk.rms_norm(x, weight, 1e-3)
    assert found.dtype is dtype
    assert found.shape == x.shape
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    rounding = 2**-8 if dtype is torch.bfloat16 else 1e-6
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=1e-6)
    for instructions in native.instructions:
        assert torch.equal(found, compiled().rms_norm(x, weight, 1e-3, instructions=instructions))
    for row in range(len(x)):
        assert torch.equal(found[row], trunk.rms_norm(x[row], weight, 1e-3))


def test_a_norm_that_does_not_fit_is_refused() -> None:
    for x, weight in [
        (torch.zeros(2, 40), torch.zeros(40)),
        (torch.zeros(2, 32), torch.zeros(16)),
        (torch.zeros(2, 32).half(), torch.zeros(32)),
        (torch.zeros(2, 32), torch.zeros(32).half()),
    ]:
        with pytest.raises(InvalidInput, match="no rows to normalise"):
            trunk.rms_norm(x, weight, 1e-6)


@DTYPES
@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_turned_as_llama_does_it(dtype: torch.dtype, normed: bool, native: Library) -> None:
    width, heads = 48, (5, 2)
    x = torch.randn(1, 1, 9 * width).to(dtype)
    angles = torch.rand(width // 2).repeat(2) * 6
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = (torch.rand(width).to(dtype), torch.rand(width).to(dtype)) if normed else None
    expected = x.double().view(9, width).clone()
    for head in range(7):
        each = expected[head]
        if norms is not None:
            each = each / (each.square().mean() + 1e-3).sqrt() * norms[head >= 5].double()
        half = torch.cat([-each[width // 2 :], each[: width // 2]])
        expected[head] = each * cosines.double() + half * sines.double()
    found = x.clone()
    trunk.turn(found, heads, cosines, sines, norms, 1e-3)
    rounding = 2**-8 if dtype is torch.bfloat16 else 1e-6
    torch.testing.assert_close(found.double().view(9, width), expected, rtol=rounding, atol=1e-6)
    for instructions in native.instructions:
        again = x.clone()
        compiled().turning(again, heads, norms, 1e-3, cosines, sines, instructions=instructions)()
        assert torch.equal(found, again)


def test_heads_that_do_not_fit_are_refused() -> None:
    x, turns = torch.zeros(96), torch.zeros(32)
    for each in [
        (x[:95], (2, 1), turns, turns),
        (x, (2, 2), turns, turns),
        (x, (2, 1), turns[:16], turns),
        (x, (2, 1), turns.bfloat16(), turns),
        (x.half(), (2, 1), turns.half(), turns.half()),
        (torch.zeros(192)[::2], (2, 1), turns, turns),
        (x, (2, 1), turns, turns, (turns, turns[:31])),
        (x, (4, -1), turns, turns),
        (torch.zeros(120), (2, 1), torch.zeros(40), torch.zeros(40)),
    ]:
        with pytest.raises(InvalidInput, match="no heads to turn"):
            trunk.turn(*each)


ROUTERS = {"few": (8, 32, 2), "all": (5, 16, 5), "one": (17, 48, 1), "many": (120, 2048, 8)}


@DTYPES
@pytest.mark.parametrize("among", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_token_goes_where_float64_sends_it(name: str, dtype: torch.dtype, among: bool) -> None:
    experts, columns, used = ROUTERS[name]
    x, weight = torch.randn(1, columns).to(dtype), torch.randn(experts, columns).div(columns**0.5).to(dtype)
    logits, scores, chosen = trunk.route(x, weight, used, among=among, rounded=False)
    expected = x.double() @ weight.double().T
    shares, order = expected.softmax(-1).topk(used)
    rounding = 2**-8 if dtype is torch.bfloat16 else 0.0
    torch.testing.assert_close(logits.double(), expected, rtol=rounding, atol=1e-5)
    assert torch.equal(chosen, order)
    assert (logits.dtype, scores.dtype) == (dtype, torch.float32)
    shares = shares / shares.sum() if among else shares
    torch.testing.assert_close(scores.double(), shares, rtol=1e-5, atol=1e-6)
    rounded = trunk.route(x, weight, used, among=among, rounded=True)[1]
    assert torch.equal(rounded, scores.to(dtype))


@DTYPES
def test_instruction_sets_and_threads_change_no_bit_of_a_way(dtype: torch.dtype, native: Library) -> None:
    experts, columns, used = ROUTERS["many"]
    x, weight = torch.randn(1, columns).to(dtype), torch.randn(experts, columns).to(dtype)
    whole = trunk.route(x, weight, used, among=True, rounded=True)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            for instructions in native.instructions:
                found = compiled().route(x, weight, used, among=True, rounded=True, instructions=instructions)
                assert all(map(torch.equal, whole, found))
    finally:
        torch.set_num_threads(threads)


def test_of_equal_experts_the_first_are_chosen() -> None:
    x, weight = torch.ones(1, 16), torch.ones(9, 16)
    weight[4] = 2.0
    _, scores, chosen = trunk.route(x, weight, 3, among=True, rounded=True)
    assert chosen.tolist() == [[4, 0, 1]]
    assert scores[0, 1] == scores[0, 2]


@pytest.mark.parametrize(
    ("x", "weight", "used"),
    [
        (torch.ones(2, 16), torch.ones(4, 16), 2),
        (torch.ones(1, 16), torch.ones(4, 32), 2),
        (torch.ones(1, 24), torch.ones(4, 24), 2),
        (torch.ones(1, 16), torch.ones(4, 16, dtype=torch.bfloat16), 2),
        (torch.ones(1, 16), torch.ones(16, 4).T, 2),
        (torch.ones(1, 16), torch.ones(4, 16), 5),
        (torch.ones(1, 16), torch.ones(4, 16), 0),
    ],
)
def test_no_way_is_refused(x: Tensor, weight: Tensor, used: int) -> None:
    with pytest.raises(InvalidInput, match="no way"):
        trunk.route(x, weight, used, among=True, rounded=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_put_behind_others_and_attended_to(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    query = torch.randn(1, 4, 1, 32, generator=draw).to(dtype)
    both, states = (torch.randn(2, 2, tokens, 32, generator=draw).to(dtype) for tokens in (150, 1))
    out, native = torch.empty(1, 1, 4, 32, dtype=dtype), trunk.load()
    if native is None:
        pytest.skip("nothing compiles kernels here")
    attend = native.attending(query, states[:, :, 0].contiguous(), both, 0.2, out)
    for before in (0, 1, 127, 128, 149):
        wanted = torch.cat([both[:, :, :before], states], dim=2)
        untouched = both[:, :, before + 1 :].clone()
        attend(before)
        assert torch.equal(out, native.attend(query, wanted[:1], wanted[1:], 0.2))
        assert torch.equal(both[:, :, : before + 1], wanted)
        assert torch.equal(both[:, :, before + 1 :], untouched)
