"""What a token needs beside its linear layers, with PyTorch's own bits, in one call each: RMSNorm and rotary embedding.

Eager PyTorch makes eight and twelve calls of these. It rounds after each, and sums in an order that belongs to its
version and this CPU: vectors of 8 or 16 lanes. Which of them, if any, gives its bits here is found by comparing, once
for a shape; a shape that was not compared is not computed. It knows the C functions of `bitwise_trunk.cpp`, and
bfloat16 alone. Invariant: a result is, bit for bit, what Llama's modules give in eager mode, and sizes, types and
devices were checked before an address goes out. NaNs too have PyTorch's bits where it was built for AVX2 or less;
elsewhere they are NaNs in the same places.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from undercroft.errors import InvalidInput
from undercroft.kernels import library
from undercroft.kernels.bound import Call

_LANES = (8, 16)
_LEAST_COLUMNS = max(_LANES)
_MOST = 1 << 15  # numbers; so many or more, PyTorch sums in parallel
_COMPARED = 64  # sums; another order gives other bits in a quarter of them, or more
_LEAST = 1e-6


class BitwiseTrunk:
    """The compiled kernels. Arguments of its methods are as the functions of those names have checked them.

    Args:
        compiled: `bitwise_trunk.cpp`.
        products: the other kernels, which know the instruction sets of this CPU.
    """

    def __init__(self, compiled: ctypes.CDLL, products: library.Library) -> None:
        self._inverse_root = compiled.undercroft_bitwise_trunk_inverse_root
        self._normalise = compiled.undercroft_bitwise_trunk_normalise
        self._add = compiled.undercroft_bitwise_trunk_add
        self._turn = compiled.undercroft_bitwise_trunk_turn
        sums, sizes = (c_int, c_int), (c_int64, c_int64, c_int64)
        self._inverse_root.argtypes = (*sums, c_int64, c_float, c_void_p)
        self._normalise.argtypes = (*sums, *sizes, c_float, *(c_void_p,) * 3)
        self._add.argtypes = (c_int, c_int64, c_int64, *(c_void_p,) * 3)
        self._turn.argtypes = (*sums, *sizes, c_int64, c_float, *(c_void_p,) * 5)
        self._inverse_root.restype = c_float
        self._normalise.restype = self._add.restype = self._turn.restype = c_bool
        self._number = products.number

    def inverse_root(
        self, row: Tensor, least: float, lanes: int, *, instructions: str | None = None
    ) -> float:
        """1 / sqrt(mean(row²) + least) of a contiguous float32 row, as the other methods compute with it."""
        return self._inverse_root(self._number(instructions), lanes, row.numel(), least, row.data_ptr())

    def rms_norm(
        self, x: Tensor, weight: Tensor, least: float, lanes: int, *, instructions: str | None = None
    ) -> Tensor:
        """As the function of that name, with sums of so many lanes."""
        out = torch.empty_like(x)
        self.normalising(x, weight, least, lanes, out, instructions=instructions)()
        return out

    def normalising(
        self,
        x: Tensor,
        weight: Tensor,
        least: float,
        lanes: int,
        out: Tensor,
        *,
        instructions: str | None = None,
    ) -> Call:
        """The same into `out`, which is like x."""
        columns = weight.numel()
        sizes = (_run(), x.numel() // columns, columns, least)
        tensors = (x, weight, out)
        addresses = (each.data_ptr() for each in tensors)
        return Call(self._normalise, (self._number(instructions), lanes, *sizes, *addresses), tensors)

    def adding(self, x: Tensor, y: Tensor, out: Tensor) -> Call:
        """X + y, all of as many numbers, contiguous."""
        tensors = (x, y, out)
        addresses = (each.data_ptr() for each in tensors)
        return Call(self._add, (self._number(None), _run(), x.numel(), *addresses), tensors)

    def turning(
        self,
        x: Tensor,
        heads: tuple[int, int],
        cosines: Tensor,
        sines: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        least: float,
        lanes: int,
        *,
        instructions: str | None = None,
    ) -> Call:
        """What `turn` does, with sums of so many lanes."""
        weights = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
        sizes = (_run(), *heads, cosines.numel(), least)
        addresses = (*weights, cosines.data_ptr(), sines.data_ptr(), x.data_ptr())
        tensors = (*(norms or ()), cosines, sines, x)
        return Call(self._turn, (self._number(instructions), lanes, *sizes, *addresses), tensors)


@cache
def load() -> BitwiseTrunk | None:
    """The native kernels; None where they cannot be compiled. See `library.load`."""
    products = library.load()
    compiled = library.compiled("bitwise_trunk", "bitwise_trunk.inc")
    return None if products is None or compiled is None else BitwiseTrunk(compiled, products)


def normalises(columns: int, rows: int = 1) -> bool:
    """Whether `rms_norm` takes so many rows of so many columns: it was seen to give PyTorch's bits of them.

    The first call for a shape compares, in up to a tenth of a second; PyTorch's random numbers stay as they are.
    """
    return lanes_of(columns, rows) is not None


def rms_norm(x: Tensor, weight: Tensor, least: float) -> Tensor:
    """Llama's RMSNorm of one token over the last dimension, without gradients.

    ``x / sqrt(mean(x²) + least)`` in float32, rounded to bfloat16, times the weight, rounded again.

    Args:
        x: [..., columns], bfloat16 on the CPU, contiguous; rows and columns are what `normalises` says yes to.
        weight: [columns], likewise.
        least: what is added to the mean, so that zeros can be divided.

    Returns:
        Of the shape of x, bfloat16.

    Raises:
        InvalidInput: they are not so.
    """
    columns = weight.numel()
    fits = weight.shape == x.shape[-1:] and _is_known(x) and _is_known(weight)
    lanes = lanes_of(columns, x.numel() // columns) if fits and columns else None
    found = load()
    if lanes is None or found is None:
        raise InvalidInput(
            f"no rows to normalise with PyTorch's bits: {list(x.shape)} of {x.dtype} on {x.device} and "
            f"{list(weight.shape)} of {weight.dtype} on {weight.device}"
        )
    return found.rms_norm(x, weight, least, lanes)


@cache
def turns(width: int) -> bool:
    """Whether `turn` takes heads of so many numbers: it was seen to give PyTorch's bits of them.

    Norms are another matter: with them, `normalises` is asked too, for queries and for keys.
    """
    found = load()
    if found is None or width < 2 or width % 2:
        return False
    drawn = _drawn(6, width).bfloat16()
    x, cosines, sines = drawn[:4], drawn[4], drawn[5]
    expected = x * cosines + torch.cat([-x[:, width // 2 :], x[:, : width // 2]], -1) * sines
    found.turning(x, (3, 1), cosines, sines, None, 0.0, _LANES[0])()
    return torch.equal(_bits(x), _bits(expected))


def turn(
    x: Tensor,
    heads: tuple[int, int],
    cosines: Tensor,
    sines: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    least: float = 0.0,
) -> None:
    """Normalise the heads of one token, and turn them by its place in the text, in place, without gradients.

    Head by head: `rms_norm`, where there are norms, then ``head * cosines + rotate_half(head) * sines`` as Llama does
    it (rotary position embedding, arXiv 2104.09864), both products rounded before they are added.

    Args:
        x: [at least (heads[0] + heads[1]) * width], contiguous, bfloat16 on the CPU; what lies behind the heads stays.
        heads: how many queries, and how many keys behind them.
        cosines: [width], contiguous, bfloat16 on the CPU, for which `turns` says yes.
        sines: likewise.
        norms: weights of the norms of queries and of keys, likewise; `normalises` says yes to (width, each of heads).
        least: as in `rms_norm`.

    Raises:
        InvalidInput: they are not so.
    """
    width = cosines.numel()
    others = (cosines, sines, *(norms or ()))
    fits = all(each.numel() == width and _is_known(each) for each in others)
    is_long = x.numel() >= sum(heads) * width and min(heads) >= 0 and _is_known(x)
    lanes = _LANES[0] if norms is None else lanes_of_heads(width, heads)
    found = load()
    if not (fits and is_long and turns(width)) or lanes is None or found is None:
        raise InvalidInput(
            f"no heads to turn with PyTorch's bits: {list(x.shape)} of {x.dtype} for {heads} heads of {width}, with "
            f"weights and turns {[(each.numel(), each.dtype) for each in others]}"
        )
    found.turning(x, heads, cosines, sines, norms, least, lanes)()


def _is_known(x: Tensor) -> bool:
    return x.dtype is torch.bfloat16 and x.is_cpu and x.is_contiguous()


def lanes_of_heads(width: int, heads: tuple[int, int]) -> int | None:
    """The same of queries and keys; None too where one number does not do for both."""
    lanes = {lanes_of(width, each) for each in heads if each}
    return lanes.pop() if len(lanes) == 1 else None


@cache
def lanes_of(columns: int, rows: int) -> int | None:
    """How many lanes give PyTorch's bits of rows of one token; None if no number does."""
    found = load()
    if found is None or columns < _LEAST_COLUMNS or not 0 < rows * columns < _MOST:
        return None
    return next((lanes for lanes in _LANES if _agrees(found, columns, rows, lanes)), None)


def _agrees(found: BitwiseTrunk, columns: int, rows: int, lanes: int) -> bool:
    tokens = -(-_COMPARED // rows)
    weight = _drawn(1, columns)[0].bfloat16()
    for x in _drawn(tokens * rows, columns).view(tokens, 1, 1, rows, columns):
        if [found.inverse_root(row, _LEAST, lanes) for row in x[0, 0]] != _inverse_roots(
            x
        ).flatten().tolist():
            return False
        x = x.bfloat16()
        expected = weight * (x.float() * _inverse_roots(x.float())).bfloat16()
        if not torch.equal(_bits(found.rms_norm(x, weight, _LEAST, lanes)), _bits(expected)):
            return False
    return True


def _inverse_roots(x: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _LEAST)


def _drawn(rows: int, columns: int) -> Tensor:
    """Numbers whose sizes differ by some powers of ten within a row, and by more between rows."""
    random = torch.Generator("cpu").manual_seed(columns)
    x, sizes, of_rows = (
        torch.randn(rows, each, generator=random, dtype=torch.float32, device="cpu")
        for each in (columns, columns, 1)
    )
    return x * torch.exp(sizes + 3 * of_rows)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


@cache
def _run() -> int:
    """How many bfloat16 numbers PyTorch rounds at a time, which makes a NaN of all ones; 0 where it never does."""
    nan = torch.full((64,), torch.nan, dtype=torch.bfloat16, device="cpu")
    return next((run for run in (32, 64) if bool((_bits(nan[:run] + nan[:run]) == -1).all())), 0)
