"""One storage that autograd saved: where its bytes are now.

An entry is plain data; `Residency` moves it through its states under its lock:

    held ──▶ held, writing ──▶ stored ──▶ stored, reading ──▶ held, stored ──▶ stored …

Bytes may also be alive without being held: then someone else keeps the storage, and it can be used for nothing.
"""

from __future__ import annotations

import torch

from undercroft.store.budget import Reservation
from undercroft.store.scratch import Extent
from undercroft.store.slab import Lease
from undercroft.store.transfer import Transfer
from undercroft.training.identity import SavedView, StorageRef


class Entry:
    """A saved storage and its copies.

    Attributes:
        ref: the storage that was saved.
        nbytes: its size when it was saved.
        view: the tensor that was saved first.
        number: its place among the storages first saved in its step, from 0.
        step: which step that was.
        can_spill: False for what is smaller than `min_bytes`.
        tokens: how many live saved tensors view it.
        held: a strong reference, while we keep it in memory.
        reservation: its bytes in the budget, while the saved storage itself is held.
        writing: the transfer that writes it, until it has ended.
        extent: its copy on disk.
        reading: the transfer that reads it back, until it has ended.
        lease: where that read arrives.
        copy: the storage last read back.
    """

    __slots__ = (
        "can_spill",
        "copy",
        "extent",
        "held",
        "lease",
        "nbytes",
        "number",
        "reading",
        "ref",
        "reservation",
        "step",
        "tokens",
        "view",
        "writing",
    )

    def __init__(
        self, storage: torch.UntypedStorage, view: SavedView, *, number: int, step: int, can_spill: bool
    ) -> None:
        self.ref = StorageRef(storage)
        self.nbytes = storage.nbytes()
        self.view = view
        self.number = number
        self.step = step
        self.can_spill = can_spill
        self.tokens = 0
        self.held: torch.UntypedStorage | None = None
        self.reservation: Reservation | None = None
        self.writing: Transfer | None = None
        self.reading: Transfer | None = None
        self.extent: Extent | None = None
        self.lease: Lease | None = None
        self.copy: StorageRef | None = None

    def alive(self) -> torch.UntypedStorage | None:
        """The bytes in memory, whoever keeps them; None if they are not in memory, or were taken away by a resize."""
        for ref in (self.ref, self.copy):
            storage = ref.alive() if ref is not None else None
            if storage is not None and storage.nbytes() >= self.nbytes:
                return storage
        return None
