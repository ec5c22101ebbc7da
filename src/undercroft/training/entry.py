"""One storage that autograd saved: where its bytes are now.

An entry is plain data; `Residency` moves it through its states under its lock:

    held ──▶ held, writing ──▶ stored ──▶ stored, reading ──▶ held, stored ──▶ stored …

Bytes may also be alive without being held: then someone else keeps the storage, and it can be used for nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from undercroft.errors import BudgetExceeded
from undercroft.store.budget import Reservation
from undercroft.store.ranges import BLOCK, round_up
from undercroft.store.scratch import Extent
from undercroft.store.transfer import Transfer
from undercroft.training.carrier import Carrier
from undercroft.training.identity import SavedView, StorageRef


class Entry:
    """A saved storage and its copies.

    Attributes:
        ref: the storage that was saved.
        nbytes: its size when it was saved.
        window: the most room a read of it takes: whole 4096-byte blocks, wherever among them it begins, so that
            what is planned for one step holds for the next, whose addresses differ.
        view: the tensor that was saved first.
        carrier: what carries its bytes between their device and the disk.
        mark: what the carrier noted when it was saved.
        number: its place among the storages first saved in its step, from 0; -1 if it is small.
        step: which step that was.
        can_spill: False for what is smaller than `min_bytes`.
        tokens: how many live saved tensors view it.
        held: a strong reference, while we keep it in memory.
        reservation: its bytes in the budget, while the saved storage itself is held.
        writing: the transfer that writes it, until it has ended.
        extent: its copy on disk.
        reading: the transfer that reads it back, until it has ended.
        lost: why it could not be held; its bytes are gone once nobody else keeps them.
        copy: the storage last read back.
    """

    __slots__ = (
        "can_spill",
        "carrier",
        "copy",
        "extent",
        "held",
        "lost",
        "mark",
        "nbytes",
        "number",
        "reading",
        "ref",
        "reservation",
        "step",
        "tokens",
        "view",
        "window",
        "writing",
    )

    def __init__(
        self,
        storage: torch.UntypedStorage,
        view: SavedView,
        carrier: Carrier,
        *,
        step: int,
        can_spill: bool,
    ) -> None:
        self.ref = StorageRef(storage)
        self.nbytes = storage.nbytes()
        self.window = round_up(BLOCK - 1 + self.nbytes)
        self.view = view
        self.carrier = carrier
        self.mark: Any = None
        self.number = -1
        self.step = step
        self.can_spill = can_spill
        self.tokens = 0
        self.held: torch.UntypedStorage | None = None
        self.reservation: Reservation | None = None
        self.writing: Transfer | None = None
        self.reading: Transfer | None = None
        self.extent: Extent | None = None
        self.copy: StorageRef | None = None
        self.lost: BudgetExceeded | None = None

    def alive(self) -> torch.UntypedStorage | None:
        """The bytes in memory, whoever keeps them; None if they are not in memory, or were taken away by a resize."""
        for ref in (self.ref, self.copy):
            storage = ref.alive() if ref is not None else None
            if storage is not None and storage.nbytes() >= self.nbytes:
                return storage
        return None
