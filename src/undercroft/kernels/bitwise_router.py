"""Where one token goes, with the bits of PyTorch's own softmax and choice, in one call where it makes six.

PyTorch's exponential is a function of its library that others may call, so that its bits are no question; the order of
its sums, and which of equal experts comes first, are. They are seen, not believed: each number of experts and of those
that are used is tried first. It knows the C function of `bitwise_router.cpp`. Invariants: what was not seen to have
PyTorch's bits is refused; sizes, types and devices were checked before an address goes out.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from undercroft.kernels import library
from undercroft.kernels.bound import Call

MOST_USED = 8
"""Experts of a token: more are added up in an order that nothing here knows."""
_FEWEST = 8  # experts: what a vector holds
_TRIED = 96
_LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
_EXPONENTIAL = "Sleef_expf8_u10"


class _Native:
    """The compiled kernel, and PyTorch's exponential."""

    def __init__(self, compiled: ctypes.CDLL, exponential: c_void_p) -> None:
        self._route, self._exponential = compiled.undercroft_bitwise_router_route, exponential
        sizes, kinds = (c_int64, c_int64), (c_bool, c_bool)
        self._route.argtypes = (c_void_p, *sizes, *kinds, c_void_p, c_void_p, c_void_p)
        self._route.restype = c_bool

    def route(self, logits: Tensor, used: int, *, among: bool, rounded: bool) -> tuple[Tensor, Tensor] | None:
        """As the function of that name."""
        shares = torch.empty(1, used, dtype=torch.bfloat16 if rounded else torch.float32)
        chosen = torch.empty(1, used, dtype=torch.int64)
        call = self.routing(logits, shares, chosen, among=among)
        return (shares, chosen) if call.function(*call.arguments) else None

    def routing(self, logits: Tensor, shares: Tensor, chosen: Tensor, *, among: bool) -> Call:
        """As the function of that name."""
        sizes = (logits.numel(), chosen.numel(), among, shares.dtype is torch.bfloat16)
        tensors = (logits, shares, chosen)
        addresses = (each.data_ptr() for each in tensors)
        return Call(self._route, (self._exponential, *sizes, *addresses), tensors)


@cache
def routes(experts: int, used: int) -> bool:
    """Whether `route` chooses so many of so many as PyTorch does on this machine. It is tried once, in milliseconds."""
    native = _native()
    if native is None or experts < _FEWEST or not 0 < used <= MOST_USED:
        return False
    draw = torch.Generator("cpu").manual_seed(experts)
    return all(_agrees(native, _drawn(experts, steps, draw), used) for steps in (1, 8, 64) * (_TRIED // 3))


def route(logits: Tensor, used: int, *, among: bool, rounded: bool) -> tuple[Tensor, Tensor] | None:
    """The largest of the softmax of some logits in float32.

    Args:
        logits: [1, experts], bfloat16 on the CPU, contiguous; `routes` says yes to the experts and to `used`.
        used: how many are chosen.
        among: shares of the chosen add up to one; else these are shares among all experts.
        rounded: shares are bfloat16; else float32.

    Returns:
        Shares and numbers [1, used], the largest first; None where a logit is not finite.
    """
    native = _native()
    assert native is not None, "asked for where `routes` says no"
    return native.route(logits, used, among=among, rounded=rounded)


def routing(logits: Tensor, shares: Tensor, chosen: Tensor, *, among: bool) -> Call:
    """`route` into memory of the caller's; its function says no where a logit is not finite."""
    native = _native()
    assert native is not None, "asked for where `routes` says no"
    return native.routing(logits, shares, chosen, among=among)


def stock_route(logits: Tensor, used: int, *, among: bool, rounded: bool) -> tuple[Tensor, Tensor]:
    """The same in PyTorch, as Qwen3-MoE's and Mixtral's routers call it."""
    shares, chosen = torch.topk(logits.softmax(-1, dtype=torch.float32), used, dim=-1)
    if among:
        shares /= shares.sum(dim=-1, keepdim=True)
    return shares.to(logits.dtype) if rounded else shares, chosen


@torch.no_grad()
def _agrees(native: _Native, logits: Tensor, used: int) -> bool:
    for among in (True, False):
        found = native.route(logits, used, among=among, rounded=False)
        wanted = stock_route(logits, used, among=among, rounded=False)
        if found is None or not all(map(torch.equal, found, wanted)):
            return False
    return True


def _drawn(experts: int, steps: int, draw: torch.Generator) -> Tensor:
    """Logits, of which the more are equal the fewer steps there are to a unit."""
    numbers = 2 * torch.randn(1, experts, generator=draw, device="cpu", dtype=torch.float32)
    return ((numbers * steps).round() / steps).bfloat16()


@cache
def _native() -> _Native | None:
    compiled = library.compiled_with_avx2("bitwise_router")
    try:
        exponential = getattr(ctypes.CDLL(str(_LIBRARY)), _EXPONENTIAL)
    except (OSError, AttributeError):
        return None
    return None if compiled is None else _Native(compiled, ctypes.cast(exponential, c_void_p))
