"""Attention of one token in bfloat16 with the bits of PyTorch's own, many times as fast.

On processors that it knows no better kernel for, which are AMD's, MKL multiplies for PyTorch's attention a number at a
time. A kernel of ours does the same sums in the same order, many at a time. That is seen, not believed: each number of
heads and each width is tried first, on numbers of keys around those at which PyTorch does something else, and on sums
that cancel, so that another order of addition gives other numbers. It knows the C function of `bitwise_attention.cpp`.
Invariants: what was not seen to have PyTorch's bits is refused; sizes, types and devices were checked before an address
goes out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import Array, c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from undercroft.errors import InvalidInput
from undercroft.kernels import bitwise, library
from undercroft.kernels.bound import Call
from undercroft.kernels.linear import is_plain

STEP = 16
"""What the width of a head is a multiple of."""
WIDEST = 256
"""The most that it can be: PyTorch's attention, as transformers calls it, does something else with wider ones."""
_KEYS = (*range(1, 10), 15, 16, 17, 26, 27, 31, 32, 33, 46, 47, 63, 100, 511, 512, 513, 1025)
_TOKENS = 2  # where in the fields it is
_FAR = 1 << 31  # MKL's numbers end there
_SPREAD = 128.0  # makes scores of some size of what rounding leaves of a sum


class BitwiseAttention:
    """The compiled kernel."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        self._attend = compiled.undercroft_bitwise_attention_attend
        self._attend.argtypes = (c_int, c_float, c_void_p)
        self._attend.restype = None

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, sums: Tensor | None = None
    ) -> Tensor:
        """As the function of that name has checked them; sums, if any, get each head's log(sum(exp(scores)))."""
        _, heads, _, width = query.shape
        query, out = query.contiguous(), query.new_empty(1, 1, heads, width)
        fields = _fields(query, keys, values, out, sums=sums)
        self._attend(torch.get_num_threads(), scale, fields)
        return out

    def attending(
        self, query: Tensor, states: Tensor, both: Tensor, scale: float, out: Tensor
    ) -> Callable[[int], None]:
        """As `trunk.Trunk.attending`, in bfloat16."""
        keys, values = both[:1], both[1:]
        fields = _fields(query, keys, values, out, last=states)
        attend = Call(self._attend, (torch.get_num_threads(), scale, fields), (query, states, both, out))

        def attend_to(before: int) -> None:
            fields[_TOKENS] = before + 1
            attend.function(*attend.arguments)

        return attend_to


def _fields(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    *,
    sums: Tensor | None = None,
    last: Tensor | None = None,
) -> Array[c_int64]:
    """As `bitwise_attention.cpp` takes them."""
    fields = [query.shape[1], *keys.shape[1:], query.data_ptr()]
    for each in (keys, values):
        fields += (each.data_ptr(), each.stride(1), each.stride(2))
    fields += (out.data_ptr(), *(0 if each is None else each.data_ptr() for each in (sums, last)))
    return (c_int64 * len(fields))(*fields)


@cache
def attends(heads: int, key_heads: int, width: int) -> bool:
    """Whether `attend` takes so many heads of such a width: it was seen to have PyTorch's bits on this machine.

    The first call for a shape compares, in half a second; PyTorch's random numbers stay as they are.
    A single head is refused: PyTorch would add up its values in an order that depends on the number of threads.
    """
    if load() is None or key_heads < 1 or heads < 2 or heads % key_heads:
        return False
    if width % STEP or not 0 < width <= WIDEST:
        return False
    draw = torch.Generator("cpu").manual_seed(width)
    return all(_agree(heads, key_heads, keys, width, draw) for keys in _KEYS)


def takes(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `attend` gives here what PyTorch would: nobody differentiates, casts, or forbids its flash attention."""
    return (
        is_plain(query)
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.cuda.flash_sdp_enabled()
        and _fits(query, keys, values)
    )


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """softmax(scale * query @ keys.T) @ values, as `scaled_dot_product_attention` rounds it, without gradients.

    Args:
        query: [1, heads, 1, width], bfloat16 on the CPU; `attends` says yes to heads, key heads and width.
        keys: [1, key heads, tokens, width], likewise, with any strides but the last one's, as long as rows do not
            overlap; as many heads of the query, in a row, share a head of these as there are more of them.
        values: likewise.
        scale: of products.

    Returns:
        [1, 1, heads, width], bfloat16.

    Raises:
        InvalidInput: they are not so.
    """
    native = load()
    if native is None or not _fits(query, keys, values):
        shapes = ", ".join(f"{list(each.shape)} of {each.dtype}" for each in (query, keys, values))
        raise InvalidInput(f"no attention of one query with PyTorch's bits: {shapes}")
    return native.attend(query, keys, values, scale)


def _fits(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    return (
        query.dim() == keys.dim() == 4
        and query.dtype is torch.bfloat16
        and query.is_cpu
        and query.shape[::2] == (1, 1)
        and are_states(keys, values, keys.shape[1], query.shape[3])
        and attends(query.shape[1], keys.shape[1], query.shape[3])
    )


def are_states(keys: Tensor, values: Tensor, key_heads: int, width: int) -> bool:
    """Whether these can be the keys and values of `attend`, with so many heads of such a width."""
    shape = keys.shape
    return (
        shape == values.shape
        and len(shape) == 4
        and shape[::3] == (1, width)
        and shape[1] == key_heads
        and shape[2] > 0
        and all(
            each.dtype is torch.bfloat16 and each.is_cpu and _lies_in_rows(each) for each in (keys, values)
        )
    )


def _lies_in_rows(x: Tensor) -> bool:
    _, _, tokens, width = x.shape
    _, _, row, column = x.stride()
    return column == 1 and (tokens == 1 or width <= row < _FAR)


@cache
def load() -> BitwiseAttention | None:
    """The native kernel; None where there is no AVX2, or nothing compiles. See `library.load`."""
    compiled = library.compiled_with_avx2("bitwise_attention")
    return None if compiled is None else BitwiseAttention(compiled)


_States = tuple[Tensor, Tensor, Tensor, float]


@torch.no_grad()
def _agree(heads: int, key_heads: int, keys: int, width: int, draw: torch.Generator) -> bool:
    sizes = (heads, key_heads, keys, width)
    plain = _plain(*sizes, draw)
    others = (_cancelling_scores(*sizes, draw), _cancelling_values(*sizes, draw))
    return _has_pytorchs_sums(*plain) and all(_has_pytorchs_bits(*states) for states in (plain, *others))


def _has_pytorchs_bits(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> bool:
    native = load()
    assert native is not None
    grouped = query.shape[1] != keys.shape[1]
    wanted = scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=grouped)
    found = native.attend(query, keys, values, scale).transpose(1, 2)
    return torch.equal(found.contiguous().view(torch.int16), wanted.contiguous().view(torch.int16))


def _has_pytorchs_sums(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> bool:
    """Whether weights add up to what PyTorch's do, which results, rounded to bfloat16, would seldom tell."""
    native = load()
    assert native is not None
    sums = torch.empty(query.shape[:-1], device="cpu", dtype=torch.float32)
    native.attend(query, keys, values, scale, sums)
    _, wanted = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values, scale=scale)
    return torch.equal(sums, wanted)


def _plain(heads: int, key_heads: int, keys: int, width: int, draw: torch.Generator) -> _States:
    query = torch.randn(1, heads, 1, width, generator=draw, device="cpu", dtype=torch.float32)
    key, value = torch.randn(
        2, 1, key_heads, keys, width, generator=draw, device="cpu", dtype=torch.float32
    ).bfloat16()
    return query.bfloat16(), key, value, 2 * width**-0.5


def _cancelling_scores(heads: int, key_heads: int, keys: int, width: int, draw: torch.Generator) -> _States:
    """Of whose scores nothing remains but what was rounded off."""
    _, _, value, _ = _plain(heads, key_heads, keys, width, draw)
    query, key = bitwise.cancelling(heads, key_heads * keys, width, draw)
    return query.view(1, heads, 1, width), key.view(1, key_heads, keys, width), value, _SPREAD


def _cancelling_values(heads: int, key_heads: int, keys: int, width: int, draw: torch.Generator) -> _States:
    """Whose weights are alike, and of whose values nothing remains but what was rounded off."""
    query, key, _, scale = _plain(heads, key_heads, keys, width, draw)
    columns, _ = bitwise.cancelling(key_heads * width, 1, keys + keys % 2, draw)
    value = columns.view(1, key_heads, width, -1)[..., :keys].transpose(2, 3).contiguous()
    return torch.zeros_like(query), key, value, scale
