"""Which saved storages are in memory: admits them, writes them out, brings them back, under a budget.

It knows entries, the scratch and the budget; not autograd, and not why one entry is wanted before another: that is
what `next_use` answers. Invariants: bytes held never exceed the budget; an entry without a copy on disk is held until
nobody can ask for it; nothing is read that is alive in memory.

Locking: every state of an entry changes under `lock`. Workers take it when a transfer ends, so nobody waits for a
transfer, or submits one (which may wait for room in the queue), while holding it.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping

import torch

from undercroft.errors import BudgetExceeded
from undercroft.events import Recorder
from undercroft.store.budget import Budget
from undercroft.store.heap import Heap
from undercroft.store.scratch import Extent, Scratch
from undercroft.store.slab import Lease, Lender
from undercroft.store.transfer import Cancelled, Priority, Transfer, TransferQueue
from undercroft.training.carrier import Carrier
from undercroft.training.entry import Entry
from undercroft.training.identity import SavedView, StorageRef

NextUse = Callable[[Entry], float]
"""When an entry will be wanted next, on any scale: smaller is sooner, infinity is never."""


class Residency:
    """The entries in memory and on disk.

    Attributes:
        lock: guards every state of an entry.
        stall_seconds: that training has waited for transfers.
        trouble: why the disk took something no more, if it ever did.

    Args:
        budget: bytes that held storages and read buffers may take together, on the host and on the device.
        carriers: what carries the bytes of each device, by its name.
        scratch: where writes go.
        queue: what carries both out.
        next_use: the order in which entries are wanted.
        heap: told of what is let go.
        recorder: counts forwarded_bytes, spilled_bytes and read_bytes.
    """

    def __init__(
        self,
        *,
        budget: Budget,
        carriers: Mapping[torch.device, Carrier],
        scratch: Scratch,
        queue: TransferQueue,
        next_use: NextUse,
        heap: Heap,
        recorder: Recorder,
    ) -> None:
        self.lock = threading.Lock()
        self.stall_seconds = 0.0
        self.trouble: BaseException | None = None
        self._budget, self._carriers, self._scratch, self._queue = budget, carriers, scratch, queue
        self._next_use, self._heap, self._recorder = next_use, heap, recorder
        self._entries: dict[Entry, None] = {}
        self._by_key: dict[int, list[Entry]] = {}
        self._moves: dict[Transfer, None] = {}
        self._ended = 0
        self._told = False

    # -- what the hooks ask -------------------------------------------------------------------------------------

    def find(self, key: int, view: SavedView) -> Entry | None:
        """The entry of a storage with this key, or with a copy in memory that has it, as `view` saw it.

        An entry serves only tensors that share the version counter, at the version, of the one it was made for:
        another counter may count edits of the same bytes that this one does not. The caller has the lock.
        """
        entries = self._by_key.get(key, ())
        return next((entry for entry in entries if entry.view.is_same_version_as(view)), None)

    def add(self, entry: Entry) -> None:
        """Take up a new entry that is about to be admitted. The caller has the lock."""
        self._entries[entry] = None
        self._by_key.setdefault(entry.ref.key, []).append(entry)

    def admit(self, entry: Entry, storage: torch.UntypedStorage) -> None:
        """Hold a storage that was just saved, making room first.

        Raises:
            BudgetExceeded: no room can be made.
        """
        while True:
            ended = self._ended
            reservation = self._budget.try_reserve(entry.carrier.tier, entry.nbytes, "activations")
            if reservation is not None:
                break
            self._make_room(entry, ended)
        with self.lock:
            entry.held, entry.reservation, entry.mark = storage, reservation, entry.carrier.mark()

    def write(self, entry: Entry) -> None:
        """Begin to write an entry out; its bytes are let go when that is done. Nothing if it cannot be written."""
        with self.lock:
            transfer = self._begin_write(entry)
        if transfer is not None:
            self._queue.submit(transfer, Priority.WRITE)

    def write_all_but(self, keep_nbytes: int) -> bool:
        """Begin to write what is wanted last, until at most `keep_nbytes` are neither written nor on their way.

        Returns:
            Whether anything was begun.
        """
        with self.lock:
            dirty = [entry for entry in self._entries if self._can_write(entry)]
            excess = sum(entry.nbytes for entry in dirty) - keep_nbytes
            transfers: list[Transfer] = []
            for entry in sorted(dirty, key=self._next_use, reverse=True) if excess > 0 else ():
                if excess > 0 and (transfer := self._begin_write(entry)) is not None:
                    transfers.append(transfer)
                    excess -= entry.nbytes
        for transfer in transfers:
            self._queue.submit(transfer, Priority.WRITE)
        return bool(transfers)

    def materialise(self, entry: Entry) -> torch.UntypedStorage:
        """The bytes of an entry in memory: forwarded if they are alive anywhere, else read.

        Raises:
            CorruptRecord, TransferFailed: they could not be read.
            BudgetExceeded: no room can be made for them.
        """
        while True:
            ended = self._ended
            with self.lock:
                storage = entry.alive()
                if storage is not None and entry.writing is not None:
                    self._queue.cancel(entry.writing)
                if storage is None and entry.lost is not None:
                    raise entry.lost
                begun = self._begin_read(entry) if storage is None and entry.reading is None else None
                reading = entry.reading
            if storage is not None:
                entry.carrier.hand_out(storage)
                return storage
            if begun is not None:
                self._queue.submit(begun, Priority.DEMAND)
            if reading is None:
                self._make_room(entry, ended)
            else:
                self._queue.promote(reading, Priority.DEMAND)
                self._wait(reading)
                if reading.error is not None and not isinstance(reading.error, Cancelled):
                    raise reading.error

    def prefetch(self, wanted: Iterable[Entry]) -> None:
        """Begin to read entries, in order, until there is no room for the next."""
        for entry in wanted:
            with self.lock:
                if entry.extent is None or entry.reading is not None or entry.alive() is not None:
                    continue
                transfer = self._begin_read(entry)
            if transfer is None:
                return
            self._queue.submit(transfer, Priority.PREFETCH)

    def let_go(self, entry: Entry) -> None:
        """Stop holding an entry that is on disk; whoever uses its bytes keeps them alive. The caller has the lock."""
        if entry.extent is not None:
            entry.held = None
            self._release(entry)

    def retire(self, entry: Entry) -> None:
        """Forget an entry that nobody can ask for; a move of it is cancelled. The caller has the lock."""
        self._entries.pop(entry, None)
        self._forget_key(entry, entry.ref)
        self._forget_key(entry, entry.copy)
        entry.held = None
        for transfer in (entry.writing, entry.reading):
            if transfer is not None:
                self._queue.cancel(transfer)
        self._discard(entry)

    def escaped(self) -> int:
        """Bytes of read buffers that outlived their entries: a gradient may alias the saved tensor it was made of."""
        with self.lock:
            extents = [e.extent for e in self._entries if e.extent is not None and e.alive() is not None]
            leased = sum(lender.leased for lender in self._lenders())
            return max(0, leased - sum(extent.window for extent in extents))

    def tell(self) -> None:
        """Warn once, on the caller's thread, that the disk takes no more."""
        if self.trouble is not None and not self._told:
            self._told = True
            text = (
                f"spilling stopped: {self.trouble}. Activations stay in memory as far as the budget allows."
            )
            warnings.warn(text, RuntimeWarning, stacklevel=4)

    def _forget_key(self, entry: Entry, ref: StorageRef | None) -> None:
        entries = self._by_key.get(ref.key, []) if ref is not None else []
        if ref is not None and entry in entries:
            entries.remove(entry)
            if not entries:
                del self._by_key[ref.key]

    # -- writing ------------------------------------------------------------------------------------------------

    def _can_write(self, entry: Entry) -> bool:
        dirty = entry.held is not None and entry.extent is None and entry.writing is None
        return dirty and entry.can_spill and self._scratch.writable

    def _begin_write(self, entry: Entry) -> Transfer | None:
        if entry.held is None or not self._can_write(entry):
            return None
        parcel = entry.carrier.send(entry.held, entry.mark)
        if parcel is None:
            return None
        try:
            extent, transfer = self._scratch.spill(
                parcel.address,
                entry.nbytes,
                keep=parcel.keep,
                before=parcel.before,
                on_done=lambda ended: self._written(entry, extent, ended),
            )
        except OSError as error:
            self.trouble = error
            return None
        entry.writing = transfer
        self._moves[transfer] = None
        return transfer

    def _written(self, entry: Entry, extent: Extent, transfer: Transfer) -> None:
        with self.lock:
            self._end(transfer)
            entry.writing = None
            resized = entry.held is not None and entry.held.nbytes() != entry.nbytes
            if transfer.error is None:
                entry.extent = extent
            if resized:  # it stays by reference: its owner, such as FSDP, takes and returns its bytes
                entry.can_spill = False
                self._drop_extent(entry)
                self._release(entry)
            elif transfer.error is None:
                self._recorder.count("spilled_bytes", entry.nbytes)
                entry.held = None
                self._release(entry)
            elif not isinstance(transfer.error, Cancelled):
                self.trouble = transfer.error
            self._discard(entry)

    def _discard(self, entry: Entry) -> None:
        """Return what a forgotten entry holds, as soon as no transfer needs it."""
        if entry in self._entries:
            return
        if entry.writing is None:
            self._release(entry)
            if entry.reading is None:
                self._drop_extent(entry)

    def _release(self, entry: Entry) -> None:
        if entry.reservation is not None:
            self._heap.freed(entry.nbytes)
            entry.reservation.release()
            entry.reservation = None

    def _drop_extent(self, entry: Entry) -> None:
        if entry.extent is not None:
            self._scratch.drop(entry.extent)
            entry.extent = None

    # -- reading ------------------------------------------------------------------------------------------------

    def _begin_read(self, entry: Entry) -> Transfer | None:
        assert entry.extent is not None, "a storage that is not on disk must be alive"
        # On the host the read buffer is the storage, and its lease is accounted for.
        if entry.carrier.tier == "device":
            entry.reservation = self._budget.try_reserve("device", entry.nbytes, "activations")
            if entry.reservation is None:
                return None
        transfer = self._fetch(entry, entry.extent)
        # Room may be there, but scattered over idle pages.
        if transfer is None and entry.carrier.buffers.trim():
            transfer = self._fetch(entry, entry.extent)
        if transfer is None:
            self._release(entry)
            return None
        entry.reading = transfer
        self._moves[transfer] = None
        return transfer

    def _fetch(self, entry: Entry, extent: Extent) -> Transfer | None:
        fetched = self._scratch.fetch(
            extent,
            buffers=entry.carrier.buffers,
            on_done=lambda ended: self._read(entry, extent, lease, ended),
        )
        if fetched is None:
            return None
        lease, transfer = fetched
        return transfer

    def _read(self, entry: Entry, extent: Extent, lease: Lease, transfer: Transfer) -> None:
        storage: torch.UntypedStorage | None = None
        try:  # a device may have no room, whatever the budget says; that surfaces at `wait`
            if transfer.error is None:
                storage = entry.carrier.receive(lease, extent.head, extent.nbytes)
        finally:
            with self.lock:
                self._arrived(entry, transfer, storage)

    def _arrived(self, entry: Entry, transfer: Transfer, storage: torch.UntypedStorage | None) -> None:
        """A read has ended, well if there is a storage."""
        self._end(transfer)
        entry.reading = None
        if storage is None:
            self._release(entry)
        elif entry in self._entries:
            self._recorder.count("read_bytes", entry.nbytes)
            self._forget_key(entry, entry.copy)
            entry.held, entry.copy = storage, StorageRef(storage)
            self._by_key.setdefault(entry.copy.key, []).append(entry)
        self._discard(entry)

    def _end(self, transfer: Transfer) -> None:
        del self._moves[transfer]
        self._ended += 1

    def _wait(self, transfer: Transfer) -> None:
        start = time.perf_counter()
        transfer.settle()
        self.stall_seconds += time.perf_counter() - start

    # -- making room --------------------------------------------------------------------------------------------

    def _make_room(self, wanted: Entry, ended: int) -> None:
        """Take one step towards room for an entry: the cheapest that can help. The caller tries again after each.

        Args:
            wanted: the entry.
            ended: how many moves had ended before the caller found no room. If more have by now, there may be some.

        Raises:
            BudgetExceeded: nothing is left to do.
        """
        if (
            any([lender.trim() for lender in self._lenders()])
            or self._drop_clean(wanted)
            or self._abandon_read(wanted)
        ):
            return
        with self.lock:
            move = next(iter(self._moves), None)
        if move is not None:
            self._wait(move)
        elif not self._write_latest(wanted) and ended == self._ended:
            asked = wanted.nbytes if wanted.extent is None else wanted.extent.window
            tier = wanted.carrier.tier
            raise BudgetExceeded(asked, self._budget.limit(tier) or 0, self._budget.holders(tier), tier=tier)

    def _lenders(self) -> set[Lender]:
        return {carrier.buffers for carrier in self._carriers.values()}

    def _drop_clean(self, wanted: Entry) -> bool:
        with self.lock:
            clean = [
                e for e in self._entries if e.held is not None and e.extent is not None and e is not wanted
            ]
            latest = max(clean, key=self._next_use, default=None)
            if latest is not None:
                self.let_go(latest)
        return latest is not None

    def _abandon_read(self, wanted: Entry) -> bool:
        """Cancel the prefetch of what is wanted last, and see it end."""
        with self.lock:
            reading = [e for e in self._entries if e.reading is not None and e is not wanted]
            latest = max(reading, key=self._next_use, default=None)
            transfer = latest.reading if latest is not None else None
        if transfer is None:
            return False
        self._queue.cancel(transfer)
        self._wait(transfer)
        return True

    def _write_latest(self, wanted: Entry) -> bool:
        with self.lock:
            dirty = [entry for entry in self._entries if self._can_write(entry) and entry is not wanted]
            latest = max(dirty, key=self._next_use, default=None)
            transfer = self._begin_write(latest) if latest is not None else None
        if transfer is not None:
            self._queue.submit(transfer, Priority.WRITE)
        return transfer is not None
