"""Norms and turns of one token: bit for bit what eager transformers computes, or refused."""

import platform
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3 import modeling_qwen3

from undercroft.errors import InvalidInput
from undercroft.kernels import bitwise_trunk
from undercroft.kernels.library import Library

WIDTHS = [
    64,
    96,
    128,
    192,
    256,
    512,
    768,
    1024,
    1536,
    2048,
    2880,
    4096,
    5120,
    7168,
    8192,
    12288,
    16384,
    16,
    80,
    208,
    1040,
]
UNEVEN = [17, 100, 1023, 4099]
ROWS = [(64, 1), (64, 16), (128, 4), (128, 32), (192, 128), (256, 127), (80, 3), (48, 5)]
HEADS = [(128, 32, 4), (64, 16, 16), (80, 3, 1), (48, 5, 5), (96, 32, 8), (256, 8, 1)]
CAPABILITY = torch.backends.cpu.get_cpu_capability()
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _ready(native: Library) -> None:
    if platform.machine() not in ("x86_64", "AMD64") or CAPABILITY not in ("DEFAULT", "AVX2", "AVX512"):
        pytest.skip(f"nobody has seen PyTorch's order of sums on {platform.machine()} ({CAPABILITY})")
    torch.manual_seed(0)


def require(seen: bool) -> None:
    """That PyTorch's order of sums was found; it is known without AVX-512, and with it only looked for."""
    if not seen and CAPABILITY == "AVX512":
        pytest.skip("PyTorch adds up in another order on this processor")
    assert seen


def compiled() -> bitwise_trunk.BitwiseTrunk:
    found = bitwise_trunk.load()
    assert found is not None
    return found


def drawn(*shape: int) -> Tensor:
    """Of many sizes, within a row and between rows."""
    return (torch.randn(shape) * torch.exp(torch.randn(shape) + 2 * torch.randn(*shape[:-1], 1))).to(BF16)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype is expected.dtype is BF16
    assert found.shape == expected.shape
    one, two = (each.contiguous().view(torch.int16) for each in (found, expected))
    if CAPABILITY == "AVX512":  # whose NaNs were not seen
        assert torch.equal(found.isnan(), expected.isnan())
        one, two = (each.masked_fill(expected.isnan(), 0) for each in (one, two))
    assert torch.equal(one, two)


def norm_of(columns: int, least: float = 1e-6) -> Any:
    norm = LlamaRMSNorm(columns, least).to(BF16)
    norm.weight.data.copy_(torch.randn(columns))
    return norm.requires_grad_(False)


def extremes(columns: int) -> list[Tensor]:
    """Rows with numbers whose squares, sums or products overflow, vanish, or are none."""
    plain, rows = torch.randn(columns), []
    for size in (0.0, -0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1e-23, 1e-19, 1e18, 2e19, 1e30, 3.3e38):
        rows.append(plain * size)
    for special in (torch.inf, -torch.inf, torch.nan, 3.38e38, 1e-40, -0.0):
        for place in (0, columns // 2, columns - 1):
            row = plain.clone()
            row[place] = special
            rows.append(row)
    return [row.to(BF16) for row in rows]


def order_of_sums(x: Tensor, lanes: int, least: float) -> float:
    """The inverse root as `bitwise_trunk.inc` describes it, one vector after another."""
    squares = x * x
    whole = len(x) // lanes
    vectors = squares[: whole * lanes].view(whole, lanes)
    levels = [torch.zeros(4, lanes) for _ in range(3)]
    for number, rows in enumerate(vectors[: whole // 4 * 4].view(-1, 4, lanes), 1):
        levels[0] += rows
        for level, full in enumerate((16, 256)):
            if number % full == 0:
                levels[level + 1] += levels[level]
                levels[level].zero_()
    sums = levels[0] + levels[1] + levels[2]
    for vector in vectors[whole // 4 * 4 :]:
        sums[0] += vector
    lane_sums = sums[0] + sums[1] + sums[2] + sums[3]
    total = torch.zeros(())
    for each in (*squares[whole * lanes :], *lane_sums):
        total = total + each
    return torch.rsqrt(total / len(x) + least).item()


@pytest.mark.parametrize("columns", [*WIDTHS, *UNEVEN])
def test_a_norm_has_the_bits_of_llamas(columns: int) -> None:
    require(bitwise_trunk.normalises(columns))
    norm = norm_of(columns)
    for x in drawn(50, 1, 1, columns):
        assert_same_bits(bitwise_trunk.rms_norm(x, norm.weight, 1e-6), norm(x))


@pytest.mark.parametrize("columns", [16, 80, 128, 2048, 1023])
@pytest.mark.parametrize("least", [0.0, 1e-6, 1e-5, 1.0])
def test_numbers_at_the_ends_of_what_there_is_keep_their_bits(columns: int, least: float) -> None:
    norm = norm_of(columns, least)
    norm.weight.data[1::7] = torch.tensor(1e-30)
    for x in extremes(columns):
        x = x.view(1, 1, columns)
        assert_same_bits(bitwise_trunk.rms_norm(x, norm.weight, least), norm(x))
    x = drawn(1, 1, columns)
    norm.weight.data[3::5] = torch.tensor([torch.nan, torch.inf, -0.0, 3e38]).repeat(columns)[
        : len(range(3, columns, 5))
    ]
    assert_same_bits(bitwise_trunk.rms_norm(x, norm.weight, least), norm(x))


@pytest.mark.parametrize(("columns", "rows"), ROWS)
def test_rows_of_one_token_have_the_bits_of_llamas(columns: int, rows: int) -> None:
    require(bitwise_trunk.normalises(columns, rows))
    norm = norm_of(columns)
    for x in drawn(10, rows, columns):
        for shape in ((rows, columns), (1, 1, rows, columns), (1, rows, 1, columns)):
            each = x.view(shape)
            assert_same_bits(bitwise_trunk.rms_norm(each, norm.weight, 1e-6), norm(each))


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("columns", [16, 40, 64, 100, 208, 1023, 2880, 8192, 32767])
def test_sums_have_the_order_that_is_described(columns: int, lanes: int, native: Library) -> None:
    for x in drawn(3, columns).float() * (1 + torch.rand(3, columns)):
        expected = order_of_sums(x, lanes, 1e-6)
        for instructions in native.instructions:
            assert compiled().inverse_root(x, 1e-6, lanes, instructions=instructions) == expected


@pytest.mark.parametrize("columns", WIDTHS)
def test_another_order_is_found_out(columns: int) -> None:
    agreeing = [lanes for lanes in (8, 16) if bitwise_trunk._agrees(compiled(), columns, 1, lanes)]
    assert len(agreeing) == 1
    (other,) = {8, 16} - set(agreeing)
    rows = drawn(200, columns).float() * (1 + torch.rand(200, columns))
    differing = sum(
        compiled().inverse_root(x, 1e-6, other) != compiled().inverse_root(x, 1e-6, *agreeing) for x in rows
    )
    assert differing > 40  # so that 64 rows that are compared all agree by chance once in 10⁶ times


def test_comparing_leaves_random_numbers_alone_and_knows_its_own_dtype() -> None:
    state = torch.get_rng_state()
    torch.set_default_dtype(BF16)
    try:
        require(bitwise_trunk.normalises(336, 7))
        require(bitwise_trunk.turns(336))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(state, torch.get_rng_state())


def test_threads_do_not_matter_up_to_the_most_that_is_normalised() -> None:
    threads = torch.get_num_threads()
    norm = norm_of(32752)
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for x in drawn(5, 1, 1, 32752):
                assert_same_bits(bitwise_trunk.rms_norm(x, norm.weight, 1e-6), norm(x))
    finally:
        torch.set_num_threads(threads)


def test_denormal_numbers_are_flushed_where_pytorch_flushes_them() -> None:
    norm = norm_of(128, 0.0)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormal numbers")
    try:
        for x in extremes(128):
            assert_same_bits(bitwise_trunk.rms_norm(x, norm.weight, 0.0), norm(x))
    finally:
        torch.set_flush_denormal(False)


def test_what_was_not_compared_is_not_computed() -> None:
    for columns, rows in ((0, 1), (8, 1), (64, 0), (128, 256), (32768, 1)):
        assert not bitwise_trunk.normalises(columns, rows)
    zeros = torch.zeros(2, 64, dtype=BF16)
    for x, weight in [
        (zeros[:, :8].contiguous(), zeros[0, :8]),
        (zeros, zeros[0, :32]),
        (zeros, zeros),
        (zeros[:, ::2], zeros[0, :32]),
        (zeros[:0], zeros[0]),
        (zeros[:, :0], zeros[0, :0]),
        (zeros.float(), zeros[0]),
        (zeros, zeros[0].float()),
        (zeros.to("meta"), zeros[0]),
        (torch.zeros(512, 64, dtype=BF16), zeros[0]),
    ]:
        with pytest.raises(InvalidInput, match="no rows to normalise"):
            bitwise_trunk.rms_norm(x, weight, 1e-6)


class Layer:
    """Qwen3's attention, as far as it is turned here."""

    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        config = Qwen3Config(
            hidden_size=64, head_dim=width, num_attention_heads=heads, num_key_value_heads=key_heads
        )
        attention: Any = modeling_qwen3.Qwen3Attention(config, 0).to(BF16).requires_grad_(False)
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.copy_(torch.randn(width))
        self.norms: Any = (attention.q_norm, attention.k_norm)
        self.weights: Any = (attention.q_norm.weight, attention.k_norm.weight)
        self.least = config.rms_norm_eps
        self.shape = (heads, key_heads, width)
        self._rotary: Any = modeling_qwen3.Qwen3RotaryEmbedding(config)

    def angles(self, place: int) -> tuple[Tensor, Tensor]:
        return self._rotary(torch.zeros(1, dtype=BF16), torch.tensor([[place]]))

    def turned(self, x: Tensor, cosines: Tensor, sines: Tensor, *, normed: bool) -> Tensor:
        """What Qwen3 makes of queries and keys that lie one behind another, in one row."""
        heads, key_heads, width = self.shape
        parts = x[: (heads + key_heads) * width].split([heads * width, key_heads * width])
        states = [part.clone().view(1, 1, -1, width) for part in parts]
        if normed:
            states = [norm(each) for norm, each in zip(self.norms, states, strict=True)]
        queries, keys = (each.transpose(1, 2) for each in states)
        both = modeling_qwen3.apply_rotary_pos_emb(queries, keys, cosines, sines)
        return torch.cat([each.flatten() for each in both])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("width", "heads", "key_heads"), HEADS)
def test_heads_are_turned_with_the_bits_of_qwen3s(
    width: int, heads: int, key_heads: int, normed: bool, native: Library
) -> None:
    require(bitwise_trunk.turns(width))
    require(bitwise_trunk.normalises(width, heads))
    require(bitwise_trunk.normalises(width, key_heads))
    layer, used = Layer(width, heads, key_heads), (heads + key_heads) * width
    weights = layer.weights if normed else None
    for place in (0, 1, 17, 1000, 123456):
        x, angles = drawn(heads + 2 * key_heads, width).flatten(), layer.angles(place)
        found = x.clone()
        bitwise_trunk.turn(found, (heads, key_heads), *angles, weights, layer.least)
        assert_same_bits(found[:used], layer.turned(x, *angles, normed=normed))
        assert torch.equal(found[used:], x[used:])
        lanes = bitwise_trunk.lanes_of(width, heads)
        assert lanes is not None
        for instructions in native.instructions:
            again = x.clone()
            compiled().turning(
                again, (heads, key_heads), *angles, weights, layer.least, lanes, instructions=instructions
            )()
            assert torch.equal(found, again)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("width", [48, 128])
def test_heads_with_numbers_at_the_ends_of_what_there_is_are_turned_too(width: int, normed: bool) -> None:
    rows = extremes(width)
    layer = Layer(width, len(rows) - 9, 9)
    angles = layer.angles(7)
    for shift in (0, 5):
        x = torch.cat(rows).roll(shift * width)
        found = x.clone()
        bitwise_trunk.turn(found, layer.shape[:2], *angles, layer.weights if normed else None, layer.least)
        assert_same_bits(found, layer.turned(x, *angles, normed=normed))


def test_no_keys_or_no_queries_may_be_turned() -> None:
    layer = Layer(64, 4, 4)
    x, angles = drawn(4, 64).flatten(), layer.angles(3)
    for heads, weights in (((4, 0), layer.weights), ((0, 4), layer.weights[::-1])):
        found = x.clone()
        bitwise_trunk.turn(found, heads, *angles, weights, layer.least)
        assert_same_bits(found, layer.turned(torch.cat([x, x]), *angles, normed=True)[: x.numel()])


def test_heads_that_do_not_fit_are_refused() -> None:
    assert not bitwise_trunk.turns(0)
    assert not bitwise_trunk.turns(33)
    x, turns = torch.zeros(96, dtype=BF16), torch.zeros(32, dtype=BF16)
    for each in [
        (x[:95], (2, 1), turns, turns),
        (x, (2, 2), turns, turns),
        (x, (2, 1), turns[:16], turns),
        (x, (2, 1), turns.float(), turns.float()),
        (x.float(), (2, 1), turns.float(), turns.float()),
        (torch.zeros(192, dtype=BF16)[::2], (2, 1), turns, turns),
        (x, (2, 1), turns, torch.zeros(64, dtype=BF16)[::2]),
        (x, (2, 1), turns, turns, (turns, turns[:31])),
        (x, (4, -1), turns, turns),
        (x, (1, 1), turns[:31], turns[:31]),
        (x, (2, 1), turns[:8], turns[:8], (turns[:8], turns[:8])),
        (x, (0, 0), turns, turns, (turns, turns)),
        (x, (2, 1), turns, turns.to("meta")),
    ]:
        with pytest.raises(InvalidInput, match="no heads to turn"):
            bitwise_trunk.turn(*each)
