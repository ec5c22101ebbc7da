"""Linear layers, and whole experts, over packed weights: what models call.

It checks arguments and chooses who computes: the native kernels on a CPU, plain torch elsewhere. Both are torch
operators (`torch.ops.undercroft.linear` and `.expert`) with fake kernels, without gradients. Invariant: whoever
computes has been given sizes that fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from undercroft.errors import InvalidInput
from undercroft.kernels import library, reference
from undercroft.kernels.bound import Call
from undercroft.kernels.format import BLOCK_ROWS, Format
from undercroft.kernels.quantise import require_packed

DTYPES = (torch.float32, torch.bfloat16)
"""Types that activations may have."""


def linear(x: Tensor, packed: Tensor, format: Format, rows: int) -> Tensor:
    """A linear layer without bias.

    The native kernels quantise each group of activations of a row to int8, so their results differ from products with
    the dequantised weights by about 0.6 % of what the terms of a sum contribute; each row's result is the same
    bits whatever the other rows, the number of threads and the instruction set. See docs/kernels.md.

    Args:
        x: [M, K], float32 or bfloat16.
        packed: the weight [rows, K] as `quantise` gives it, on the device of x.
        format: of the weight.
        rows: outputs of the layer.

    Returns:
        [M, rows], in the dtype of x. A row with an activation that is not finite is NaN throughout.

    Raises:
        InvalidInput: shapes, dtypes, sizes or devices that do not fit.
    """
    if is_plain(x):
        return _multiply(x, packed, format, rows)
    return torch.ops.undercroft.linear(x, packed, format.bits, format.group, rows)


class Weight:
    """A packed weight whose size was checked, for many products.

    Args:
        packed: [rows, columns] as `quantise` gives it.
        format: of it.
        rows: outputs.
        columns: inputs.

    Raises:
        InvalidInput: sizes that do not fit.
    """

    def __init__(self, packed: Tensor, format: Format, rows: int, columns: int) -> None:
        require_packed(packed, format, rows, columns)
        self.packed, self.format, self.rows, self.columns = packed, format, rows, columns

    @staticmethod
    def joined(parts: Sequence[Weight]) -> Weight:
        """One weight with the rows of several, which use its memory from now on.

        Raises:
            InvalidInput: other columns or formats, or a part whose rows do not fill its blocks.
        """
        first = parts[0]
        if any(
            (each.columns, each.format) != (first.columns, first.format) or each.rows % BLOCK_ROWS
            for each in parts
        ):
            raise InvalidInput(
                f"only weights with equal columns and formats, and rows in blocks of {BLOCK_ROWS}, are joined"
            )
        packed = torch.cat([each.packed for each in parts])
        end = 0
        for each in parts:
            start, end = end, end + each.packed.numel()
            each.packed = packed[start:end]
        return Weight(packed, first.format, sum(each.rows for each in parts), first.columns)

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ weight.t()``: (..., columns), float32 or bfloat16, to (..., rows) in its dtype; see `linear`.

        Raises:
            InvalidInput: x is not so.
        """
        fits = x.shape[-1] == self.columns and x.dtype in DTYPES and x.is_cpu
        native = library.load() if fits and self.packed.is_cpu and is_plain(x) else None
        if native is not None:
            return native.linear(x.contiguous(), self.packed, self.format, self.rows)
        rows = x.reshape(-1, x.shape[-1])
        return linear(rows, self.packed, self.format, self.rows).view(*x.shape[:-1], self.rows)

    def multiplying(self, x: Tensor, out: Tensor) -> Call:
        """The same of an x that fits, on the CPU and contiguous, into `out`, where something compiled the kernels."""
        native = library.load()
        assert native is not None, "asked for where nothing compiled them"
        return native.multiplying(x, self.packed, self.format, self.rows, out)


def expert(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    format_gate_up: Format,
    format_down: Format,
    intermediate: int,
    activation: str = "silu",
) -> Tensor:
    """A gated feed-forward block in one call: down(silu(gate(x)) * up(x)).

    Args:
        x: [M, H], float32 or bfloat16.
        gate_up: packed [2 * intermediate, H]: the rows of gate, then those of up.
        down: packed [H, intermediate].
        format_gate_up: of the first.
        format_down: of the second.
        intermediate: outputs of gate.
        activation: "silu" is the only one.

    Returns:
        [M, H], in the dtype of x; what lies between is float32.

    Raises:
        InvalidInput: another activation, or shapes, dtypes, sizes or devices that do not fit.
    """
    if activation != "silu":
        raise InvalidInput(
            f'an expert in one call has the activation "silu", not {activation!r}; call linear twice'
        )
    if is_plain(x):
        return _feed_forward(x, (gate_up, format_gate_up), (down, format_down), intermediate)
    first, second = (format_gate_up.bits, format_gate_up.group), (format_down.bits, format_down.group)
    return torch.ops.undercroft.expert(x, gate_up, down, *first, *second, intermediate)


def backend() -> str:
    """Who computes on this CPU: such as "native (avx512vnni)", or "torch" where nothing could be compiled."""
    found = library.load()
    if found is None:
        return "torch"
    return f"native ({found.instructions[-1]}{'' if found.threaded else ', one thread'})"


@torch.library.custom_op("undercroft::linear", mutates_args=())
def _linear(x: Tensor, packed: Tensor, bits: int, group: int, rows: int) -> Tensor:
    return _multiply(x, packed, Format(bits, group), rows)


@_linear.register_fake
def _(x: Tensor, packed: Tensor, bits: int, group: int, rows: int) -> Tensor:
    _require(x, packed, Format(bits, group), rows, x.shape[-1])
    return x.new_empty(x.shape[0], rows)


@torch.library.custom_op("undercroft::expert", mutates_args=())
def _expert(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    bits: int,
    group: int,
    down_bits: int,
    down_group: int,
    intermediate: int,
) -> Tensor:
    return _feed_forward(
        x, (gate_up, Format(bits, group)), (down, Format(down_bits, down_group)), intermediate
    )


@_expert.register_fake
def _(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    bits: int,
    group: int,
    down_bits: int,
    down_group: int,
    intermediate: int,
) -> Tensor:
    _require_expert(x, (gate_up, Format(bits, group)), (down, Format(down_bits, down_group)), intermediate)
    return x.new_empty(x.shape)


def is_plain(x: Tensor) -> bool:
    """Whether nobody traces, records or differentiates: then the operator's own 30 microseconds are saved."""
    modes = torch._C._len_torch_dispatch_stack()  # pyright: ignore[reportPrivateUsage]
    traced = torch._C._get_tracing_state()  # pyright: ignore
    seen = modes or traced or torch.is_grad_enabled() or torch.compiler.is_compiling()
    return type(x) is Tensor and not seen


def _multiply(x: Tensor, packed: Tensor, format: Format, rows: int) -> Tensor:
    _require(x, packed, format, rows, x.shape[-1])
    found = library.load() if x.is_cpu else None
    if found is None:
        return reference.linear(x, packed, format, rows)
    return found.linear(x.contiguous(), packed, format, rows)


def _feed_forward(
    x: Tensor, gate_up: tuple[Tensor, Format], down: tuple[Tensor, Format], intermediate: int
) -> Tensor:
    _require_expert(x, gate_up, down, intermediate)
    found = library.load() if x.is_cpu else None
    if found is None:
        return reference.expert(x, gate_up, down, intermediate)
    return found.expert(x.contiguous(), gate_up, down, intermediate)


def _require_expert(
    x: Tensor, gate_up: tuple[Tensor, Format], down: tuple[Tensor, Format], intermediate: int
) -> None:
    width = x.shape[-1]
    _require(x, *gate_up, 2 * intermediate, width)
    _require(x, *down, width, intermediate)


def _require(x: Tensor, packed: Tensor, format: Format, rows: int, columns: int) -> None:
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise InvalidInput(f"activations are [M, K] of float32 or bfloat16, not {list(x.shape)} of {x.dtype}")
    if packed.device != x.device:
        raise InvalidInput(f"the weight is on {packed.device}, the activations on {x.device}")
    require_packed(packed, format, rows, columns)
