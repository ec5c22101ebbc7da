"""What packing tells while it works, and when it is done.

It knows counts, bytes and seconds; not experts or files.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class PackProgress:
    """How far packing has come.

    Attributes:
        experts: that are packed.
        all_experts: that will be.
        nbytes: written, of experts.
        all_nbytes: that the packed folder will take.
        seconds_left: until the last expert at the pace so far; None before the first.
    """

    experts: int
    all_experts: int
    nbytes: int
    all_nbytes: int
    seconds_left: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """What `pack` did.

    Attributes:
        destination: the packed folder.
        high, low, group: the forms of the experts; see `Forms`.
        layers: that have experts.
        experts: in all of them.
        kept_layers: layers that were there already, from a packing that was interrupted or is complete.
        stored_nbytes: of the experts in the checkpoint.
        high_nbytes, low_nbytes: of their copies.
        dense_nbytes: of all other weights.
        not_quantised: matrices that no group divides, and that are in the checkpoint's precision instead.
        seconds: that it took.
    """

    destination: str
    high: str
    low: str | None
    group: int
    layers: int
    experts: int
    kept_layers: int
    stored_nbytes: int
    high_nbytes: int
    low_nbytes: int
    dense_nbytes: int
    not_quantised: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Its fields, for JSON."""
        return asdict(self)


OnProgress = Callable[[PackProgress], None]


class Amount(NamedTuple):
    """Some experts.

    Attributes:
        experts: how many.
        nbytes: of all their records.
    """

    experts: int
    nbytes: int


class Meter:
    """Tells how far packing has come: at once, and after each expert.

    Args:
        whole: what there is to pack.
        kept: what of it was packed before.
        dense_nbytes: of the weights that are no experts.
        tell: who wants to know.
    """

    def __init__(self, whole: Amount, kept: Amount, dense_nbytes: int, tell: OnProgress) -> None:
        self._whole, self._kept, self._done = whole, kept, kept
        self._dense_nbytes, self._tell = dense_nbytes, tell
        self._started = time.monotonic()
        self._show()

    def advance(self, nbytes: int) -> None:
        """One more expert is packed, in records of so many bytes."""
        self._done = Amount(self._done.experts + 1, self._done.nbytes + nbytes)
        self._show()

    def _show(self) -> None:
        written, left = self._done.nbytes - self._kept.nbytes, self._whole.nbytes - self._done.nbytes
        seconds = time.monotonic() - self._started
        self._tell(
            PackProgress(
                experts=self._done.experts,
                all_experts=self._whole.experts,
                nbytes=self._done.nbytes,
                all_nbytes=self._whole.nbytes + self._dense_nbytes,
                seconds_left=seconds * left / written if written else None,
            )
        )
