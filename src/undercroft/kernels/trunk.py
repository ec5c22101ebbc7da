"""What a token needs of a model beside its linear layers: attention of one query, RMSNorm, and a router.

It checks arguments, and knows the C functions of `trunk.cpp`. All sums are float32, so results differ in their last
bits from PyTorch's, mostly by being nearer. Invariants: sizes, types and devices were checked before an address goes
out; a token's result is the same bits whatever the other tokens, the number of threads and the instruction set.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import Array, c_bool, c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from undercroft.errors import InvalidInput
from undercroft.kernels import library
from undercroft.kernels.bound import Call, require_memory
from undercroft.kernels.linear import DTYPES

STEP = 16
"""What widths are multiples of."""
_TOKENS = 3  # where in the shape of attention it is


class Trunk:
    """The compiled kernels.

    Args:
        compiled: `trunk.cpp`.
        products: the other kernels, which know the instruction sets of this CPU.
    """

    def __init__(self, compiled: ctypes.CDLL, products: library.Library) -> None:
        self._attend, self._normalise = compiled.undercroft_trunk_attend, compiled.undercroft_trunk_normalise
        pointers = (c_void_p, c_void_p, c_void_p)
        self._attend.argtypes = (c_int, c_int, c_bool, c_void_p, c_float, *pointers, c_void_p)
        self._normalise.argtypes = (c_int, c_int, c_bool, c_bool, c_int64, c_int64, c_float, *pointers)
        self._turn = compiled.undercroft_trunk_turn
        self._turn.argtypes = (
            c_int,
            c_bool,
            c_int64,
            c_int64,
            c_int64,
            c_float,
            *pointers,
            c_void_p,
            c_void_p,
        )
        self._route = compiled.undercroft_trunk_route
        self._route.argtypes = (
            c_int,
            c_int,
            c_bool,
            c_bool,
            c_bool,
            c_int64,
            c_int64,
            c_int64,
            *pointers,
            c_void_p,
            c_void_p,
        )
        for function in (self._attend, self._normalise, self._turn, self._route):
            function.restype = c_bool
        self._number = products.number

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, *, instructions: str | None = None
    ) -> Tensor:
        """As the function of that name, with the named or the fastest instruction set."""
        batch, heads, _, _ = query.shape
        out = query.new_empty(batch, 1, heads, values.shape[-1])
        shape, bf16 = _shape(query, keys, values), query.dtype is torch.bfloat16
        addresses = (query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr())
        threads = torch.get_num_threads()
        require_memory(self._attend(self._number(instructions), threads, bf16, shape, scale, *addresses))
        return out

    def attending(
        self, query: Tensor, states: Tensor, both: Tensor, scale: float, out: Tensor
    ) -> Callable[[int], None]:
        """A function that puts a token's keys and values behind so many others, and attends to all of them.

        Args:
            query: [1, heads, 1, width], contiguous.
            states: [2, key heads, width], contiguous: the keys and values of the token.
            both: [2, key heads, most tokens, width]: those of all.
            scale: of products.
            out: [1, 1, heads, width], contiguous.
        """
        keys, values = both[:1], both[1:]
        shape = _shape(query, keys, values, states)
        call = (self._number(None), torch.get_num_threads(), query.dtype is torch.bfloat16, shape, scale)
        tensors = (query, keys, values, out)
        attend = Call(self._attend, (*call, *(each.data_ptr() for each in tensors)), (*tensors, states))

        def attend_to(before: int) -> None:
            shape[_TOKENS] = before + 1
            attend()

        return attend_to

    def rms_norm(self, x: Tensor, weight: Tensor, least: float, *, instructions: str | None = None) -> Tensor:
        """As the function of that name, with the named or the fastest instruction set."""
        out = torch.empty_like(x)
        self.normalising(x, weight, least, out, instructions=instructions)()
        return out

    def normalising(
        self, x: Tensor, weight: Tensor, least: float, out: Tensor, *, instructions: str | None = None
    ) -> Call:
        """The same into `out`, which is like x."""
        columns = x.shape[-1]
        call = (self._number(instructions), torch.get_num_threads())
        kinds = (x.dtype is torch.bfloat16, weight.dtype is torch.bfloat16)
        sizes = (x.numel() // columns, columns, least)
        tensors = (x, weight, out)
        addresses = (each.data_ptr() for each in tensors)
        return Call(self._normalise, (*call, *kinds, *sizes, *addresses), tensors)

    def turning(
        self,
        x: Tensor,
        heads: tuple[int, int],
        norms: tuple[Tensor, Tensor] | None,
        least: float,
        cosines: Tensor,
        sines: Tensor,
        *,
        instructions: str | None = None,
    ) -> Call:
        """What `turn` does, with the named or the fastest instruction set."""
        weights = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
        kind = (self._number(instructions), x.dtype is torch.bfloat16)
        addresses = (*weights, cosines.data_ptr(), sines.data_ptr(), x.data_ptr())
        tensors = (*(norms or ()), cosines, sines, x)
        return Call(self._turn, (*kind, *heads, cosines.numel(), least, *addresses), tensors)

    def route(
        self,
        x: Tensor,
        weight: Tensor,
        used: int,
        *,
        among: bool,
        rounded: bool,
        instructions: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the function of that name, with the named or the fastest instruction set."""
        logits = x.new_empty(1, len(weight))
        scores = torch.empty(1, used, dtype=x.dtype if rounded else torch.float32)
        chosen = torch.empty(1, used, dtype=torch.int64)
        self.routing(x, weight, (logits, scores, chosen), among=among, instructions=instructions)()
        return logits, scores, chosen

    def routing(
        self,
        x: Tensor,
        weight: Tensor,
        out: tuple[Tensor, Tensor, Tensor],
        *,
        among: bool,
        instructions: str | None = None,
    ) -> Call:
        """The same into memory of the caller's."""
        call = (self._number(instructions), torch.get_num_threads())
        _, scores, chosen = out
        kinds = (x.dtype is torch.bfloat16, scores.dtype is torch.bfloat16, among)
        tensors = (x, weight, *out)
        addresses = (each.data_ptr() for each in tensors)
        return Call(self._route, (*call, *kinds, *weight.shape, chosen.numel(), *addresses), tensors)


def _shape(query: Tensor, keys: Tensor, values: Tensor, last: Tensor | None = None) -> Array[c_int64]:
    """As `trunk.cpp` takes it."""
    size = keys.element_size()
    strides = [size * stride for each in (keys, values) for stride in each.stride()[:-1]]
    sizes = (*query.shape[:2], *keys.shape[1:3], query.shape[3], values.shape[3], *strides)
    return (c_int64 * 13)(*sizes, 0 if last is None else last.data_ptr())


@cache
def load() -> Trunk | None:
    """The native kernels; None where they cannot be compiled. See `library.load`."""
    products = library.load()
    compiled = library.compiled("trunk", "trunk.inc")
    return None if products is None or compiled is None else Trunk(compiled, products)


def available() -> bool:
    """Whether the functions here can be called: something compiled the native kernels."""
    return load() is not None


def _native() -> Trunk:
    found = load()
    assert found is not None, "asked for where `available` says no"
    return found


def attends(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `attend` takes these: one query of each head, and widths and types that it knows."""
    return (
        query.dim() == keys.dim() == values.dim() == 4
        and query.shape[2] == 1
        and query.dtype in DTYPES
        and query.dtype is keys.dtype is values.dtype
        and query.is_cpu
        and keys.is_cpu
        and values.is_cpu
        and query.shape[0] == keys.shape[0]
        and keys.shape[:3] == values.shape[:3]
        and keys.shape[2] > 0
        and query.shape[1] % keys.shape[1] == 0
        and query.shape[3] == keys.shape[3]
        and keys.shape[3] % STEP == values.shape[3] % STEP == 0
        and keys.stride(3) == values.stride(3) == 1
    )


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """softmax(scale * query @ keys.T) @ values, of one token and all keys.

    Args:
        query: [batch, heads, 1, width], float32 or bfloat16; width is a multiple of 16.
        keys: [batch, key heads, tokens, width], of the same dtype, with any strides but the last one's; as many
            heads of the query, in a row, share a head of these as there are more of them.
        values: [batch, key heads, tokens, value width], likewise.
        scale: of products.

    Returns:
        [batch, 1, heads, value width], in the dtype of the query.

    Raises:
        InvalidInput: they are not so.
    """
    if not attends(query, keys, values):
        shapes = ", ".join(f"{list(each.shape)} of {each.dtype}" for each in (query, keys, values))
        raise InvalidInput(f"no attention of one query: {shapes}")
    return _native().attend(query.contiguous(), keys, values, scale)


def rms_norm(x: Tensor, weight: Tensor, least: float) -> Tensor:
    """X / sqrt(mean(x²) + least) * weight, over the last dimension, rounded once.

    Args:
        x: [..., columns], float32 or bfloat16 on the CPU; columns is a multiple of 16.
        weight: [columns], either.
        least: what is added to the mean, so that zeros can be divided.

    Raises:
        InvalidInput: they are not so.
    """
    fits = x.shape[-1] % STEP == 0 and weight.shape == x.shape[-1:] and x.is_cpu and weight.is_cpu
    if not fits or x.dtype not in DTYPES or weight.dtype not in DTYPES:
        raise InvalidInput(
            f"no rows to normalise: {list(x.shape)} of {x.dtype} on {x.device} and {list(weight.shape)} of "
            f"{weight.dtype} on {weight.device}"
        )
    return _native().rms_norm(x.contiguous(), weight.contiguous(), least)


def turn(
    x: Tensor,
    heads: tuple[int, int],
    cosines: Tensor,
    sines: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    least: float = 0.0,
) -> None:
    """Normalise the heads of one token, and turn them by its place in the text, in place.

    Head by head: RMSNorm, where there are norms, then ``head * cosines + rotate_half(head) * sines`` as Llama does it
    (rotary position embedding, arXiv 2104.09864).

    Args:
        x: [at least (heads[0] + heads[1]) * width], contiguous, float32 or bfloat16 on the CPU; what lies behind the
            heads stays.
        heads: how many queries, and how many keys behind them.
        cosines: [width], of the dtype of x; width is a multiple of 16.
        sines: likewise.
        norms: weights of the norms of queries and of keys, likewise.
        least: as in `rms_norm`.

    Raises:
        InvalidInput: they are not so.
    """
    width = cosines.numel()
    others = (cosines, sines, *(norms or ()))
    fits = all(
        each.numel() == width and each.dtype is x.dtype and each.is_cpu and each.is_contiguous()
        for each in others
    )
    is_long = x.numel() >= sum(heads) * width and min(heads) >= 0 and width % STEP == 0
    if not (fits and is_long and x.is_contiguous() and x.is_cpu and x.dtype in DTYPES):
        raise InvalidInput(
            f"no heads to turn: {list(x.shape)} of {x.dtype} for {heads} heads of {width}, with weights and turns "
            f"{[(each.numel(), each.dtype) for each in others]}"
        )
    _native().turning(x, heads, norms, least, cosines, sines)()


def route(
    x: Tensor, weight: Tensor, used: int, *, among: bool, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Where one token goes: softmax(weight @ x), of which the largest are chosen.

    Args:
        x: [1, columns], contiguous, float32 or bfloat16 on the CPU; columns is a multiple of 16.
        weight: [experts, columns], likewise, of the same dtype.
        used: how many are chosen, 1 to experts.
        among: shares of the chosen add up to one; else these are shares among all experts.
        rounded: shares are of the dtype of x; else float32.

    Returns:
        Logits [1, experts] in the dtype of x; shares and numbers [1, used], the largest first.

    Raises:
        InvalidInput: they are not so.
    """
    fits = x.dim() == weight.dim() == 2 and len(x) == 1 and x.shape[1] == weight.shape[1]
    alike = x.dtype is weight.dtype and x.dtype in DTYPES and x.is_cpu and weight.is_cpu
    whole = x.is_contiguous() and weight.is_contiguous() and x.shape[-1] % STEP == 0
    if not (fits and alike and whole and 1 <= used <= len(weight)):
        raise InvalidInput(
            f"no way for {list(x.shape)} of {x.dtype} to {used} of {list(weight.shape)} of {weight.dtype}"
        )
    return _native().route(x, weight, used, among=among, rounded=rounded)
