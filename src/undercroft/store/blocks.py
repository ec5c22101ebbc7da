"""Read buffers out of the tensor pool: what is read back takes the blocks that activations left, and leaves them again.

It knows leases and budgets, not what the bytes mean. A slab of its own would keep other pages than the tensors that
come and go beside it, and each would clear its pages anew in every step (`lab/LOG.md`).
Invariant: the bytes of a lease are reserved in the budget until its last view dies.
"""

from __future__ import annotations

import torch

from undercroft.store import pool
from undercroft.store.budget import Budget
from undercroft.store.ranges import BLOCK, round_up
from undercroft.store.slab import Claim, Lease, Slab


class Blocks:
    """Leases of host memory from PyTorch's allocator, where the pool is in front of it.

    Args:
        budget: where leased bytes are reserved.
        capacity: bytes of address space for leases that are too small for the pool.
        holder: the name they are reserved under.
    """

    def __init__(self, budget: Budget, capacity: int, holder: str) -> None:
        assert pool.install() is not None, "blocks are page-aligned only where the pool is"
        self._budget, self._holder = budget, holder
        self._small = Slab(capacity, budget=budget, holder=holder, page=BLOCK)

    @property
    def leased(self) -> int:
        """Bytes in live leases."""
        reserved = self._budget.holders("host").get(self._holder, 0)
        return reserved - self._small.committed + self._small.leased

    def lease(self, nbytes: int) -> Lease | None:
        """Room for `nbytes` (at least 1), or None where the budget has none at this moment.

        Raises:
            SpillMisuse: it is closed.
        """
        length = round_up(nbytes)
        if length < pool.SMALLEST:
            return self._small.lease(nbytes)
        reservation = self._budget.try_reserve("host", length, self._holder)
        if reservation is None:
            return None
        memory = _block(length)
        return Lease(Claim(memory.data_ptr(), length, memory, reservation.release))

    def trim(self) -> int:
        """Give pages that no small lease touches back to the system; returns their bytes."""
        return self._small.trim()

    def close(self) -> None:
        """Take no more small leases. Those alive keep their memory, and it stays reserved, until they die."""
        self._small.close()


def _block(nbytes: int) -> torch.UntypedStorage:
    """Memory from PyTorch's allocator.

    A new storage would bypass the pool; a tensor of this size would be filled in PyTorch's deterministic mode.
    """
    storage = torch.empty(0, dtype=torch.uint8, device="cpu").untyped_storage()
    storage.resize_(nbytes)
    return storage
