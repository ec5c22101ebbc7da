"""Which copies of experts a quality asks for, against those that there are.

Pure: it knows precisions by name; not files or experts.
"""

from __future__ import annotations

from undercroft.errors import InvalidInput
from undercroft.moe.quality import Quality
from undercroft.moe.stock import Stock

_SERVES = {
    "bfloat16": ("bfloat16", "int8", "int4"),
    "int8": ("int8", "int4"),
    "int4": ("int4",),
}
"""The precisions that a copy is at least as good as; those that are not listed are the checkpoint's own."""


def check_served(quality: Quality, stock: Stock) -> None:
    """See that the copies are there that a quality would serve.

    Raises:
        InvalidInput: they are not.
    """
    if quality.low and quality.low_precision and stock.low is None:
        raise InvalidInput(
            "this quality serves experts in low precision too, and here they have no such copies; "
            "write them first (undercroft pack SRC DST), and name what it wrote"
        )
    if quality.low and quality.low_precision == "int4" and stock.low == "int2":
        raise InvalidInput(
            "these experts have low copies in int2, and this quality asks for int4; choose another quality, or pack "
            "again with --low int4"
        )
    if stock.high in _SERVES and quality.high not in _SERVES[stock.high]:
        raise InvalidInput(
            f"these experts were packed as {stock.high}, and this quality asks for {quality.high} at least; choose "
            f"another quality, or pack again with --high {quality.high}"
        )
