"""Brings records into the room that was made for them.

It knows how entries become transfers and when one has really arrived; not why it was wanted. Invariants:
every entry that was given to `prepare`, and then to `submit`, is reported exactly once; one reported
without an error holds the bytes that were written.

Neighbours in the file that are small are read with one system call, scattered over their leases: a disk is
slow at many small reads. A record that did not arrive well is read once more by itself, so that neither a
transient failure nor a broken neighbour costs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial

from undercroft.errors import SpillMisuse
from undercroft.store.shelf import Entry
from undercroft.store.transfer import CHUNK, Cancelled, Priority, Transfer, TransferQueue
from undercroft.units import MIB

_SMALL = MIB
Arrival = tuple[Entry, Exception | None]


class Loader:
    """Reads entries.

    Args:
        queue: what moves the bytes.
        on_arrival: told which entries have arrived, or why not: on a worker, or by a refused `submit`.
    """

    def __init__(self, queue: TransferQueue, on_arrival: Callable[[list[Arrival]], None]) -> None:
        self._queue, self._on_arrival = queue, on_arrival

    def prepare(self, entries: Sequence[Entry], *, is_busy: bool = False) -> list[Transfer]:
        """The transfers that bring entries, which are marked as on their way; in the order of the entries.

        Args:
            entries: what to bring.
            is_busy: the disk has enough to do, so that calls are better few than many at once.
        """
        return [self._transfer(run) for run in gather(entries, CHUNK // 2 if is_busy else _SMALL)]

    def submit(self, transfers: Iterable[Transfer], priority: Priority) -> None:
        """Queue transfers; may wait for room in the queue. If that is closed, the entries are reported so."""
        for transfer in transfers:
            with suppress(SpillMisuse):
                self._queue.submit(transfer, priority)

    def hasten(self, entry: Entry, priority: Priority) -> None:
        """Let an entry that is on its way come before others."""
        if entry.transfer is not None:
            self._queue.promote(entry.transfer, priority)

    def cancel(self, entry: Entry) -> None:
        """Stop what brings an entry, and whichever come with it, unless it is under way."""
        if entry.transfer is not None:
            self._queue.cancel(entry.transfer)

    def _transfer(self, run: list[Entry]) -> Transfer:
        chunks = run[0].file.chunks([(entry.record, entry.address) for entry in run])
        transfer = Transfer("read", chunks, on_done=partial(self._done, run))
        for entry in run:
            entry.transfer = transfer
        return transfer

    def _done(self, run: list[Entry], transfer: Transfer) -> None:
        self._on_arrival([(entry, _settle(entry, transfer.error)) for entry in run])


def gather(entries: Sequence[Entry], small: int) -> list[list[Entry]]:
    """Entries in runs that one call can read: neighbours in a file, each of at most `small` bytes, in all a chunk.

    Runs come in the order in which the first entry of each was given.
    """
    if len(entries) < 2:
        return [list(entries)] if entries else []
    in_file_order = sorted(entries, key=lambda entry: (id(entry.file), entry.record.offset))
    runs: list[list[Entry]] = []
    for entry in in_file_order:
        if runs and _joins(runs[-1], entry, small):
            runs[-1].append(entry)
        else:
            runs.append([entry])
    if in_file_order == list(entries):
        return runs
    places = {entry.key: place for place, entry in enumerate(entries)}
    return sorted(runs, key=lambda run: min(places[entry.key] for entry in run))


def _joins(run: list[Entry], entry: Entry, small: int) -> bool:
    last = run[-1]
    return (
        entry.file is last.file
        and entry.record.offset == last.record.end
        and max(entry.nbytes, last.nbytes) <= small
        and entry.record.end - run[0].record.offset <= CHUNK
    )


def _settle(entry: Entry, error: BaseException | None) -> Exception | None:
    if error is not None and isinstance(error, Cancelled | SpillMisuse):
        return error
    try:
        entry.file.settle(entry.record, entry.address, moved=error is None)
    except Exception as failure:  # whatever it is, it must reach who waits for the entry
        return failure
    return None
