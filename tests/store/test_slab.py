"""The arena: leases last exactly as long as their views, and committed bytes are always reserved."""

import ctypes
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from undercroft.errors import BudgetExceeded, SpillMisuse
from undercroft.store.budget import Budget
from undercroft.store.slab import HUGE_PAGE, Lease, Slab

BLOCK = 4096


def taken(slab: Slab, nbytes: int) -> Lease:
    lease = slab.lease(nbytes)
    assert lease is not None
    return lease


def bytes_of(lease: Lease) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(lease.storage(0, lease.nbytes))


def resident(address: int, nbytes: int) -> int:
    """Bytes of a range of this process that occupy RAM."""
    pages = -(-nbytes // BLOCK)
    present = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), present) == 0
    return sum(page & 1 for page in present) * BLOCK


def is_mapped(address: int) -> bool:
    """Whether this process has memory at an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


@pytest.fixture
def slab() -> Slab:
    return Slab(4 * HUGE_PAGE)


def test_a_lease_is_aligned_and_whole_blocks_long(slab: Slab) -> None:
    leases = [taken(slab, nbytes) for nbytes in (1, BLOCK, BLOCK + 1)]
    assert [lease.nbytes for lease in leases] == [BLOCK, BLOCK, 2 * BLOCK]
    assert all(lease.address % BLOCK == 0 for lease in leases)
    assert slab.leased == 4 * BLOCK


def test_leases_do_not_overlap(slab: Slab) -> None:
    leases = [taken(slab, 3 * BLOCK) for _ in range(10)]
    for number, lease in enumerate(leases):
        bytes_of(lease).fill_(number)
    for number, lease in enumerate(leases):
        assert bool((bytes_of(lease) == number).all())


def test_a_storage_covers_exactly_the_bytes_asked_for(slab: Slab) -> None:
    lease = taken(slab, 2 * BLOCK)
    bytes_of(lease).copy_(torch.arange(2 * BLOCK) % 251)
    storage = lease.storage(100, 50)
    assert storage.nbytes() == 50
    assert storage.data_ptr() == lease.address + 100
    assert list(storage) == [n % 251 for n in range(100, 150)]


def test_the_bytes_return_when_the_last_view_dies_and_not_before(slab: Slab) -> None:
    lease = taken(slab, BLOCK)
    view = bytes_of(lease)[100:].view(torch.int32)
    del lease
    gc.collect()
    assert slab.leased == BLOCK
    other = view[3:]
    del view
    assert slab.leased == BLOCK
    del other
    assert slab.leased == 0


def test_bytes_that_returned_are_leased_again(slab: Slab) -> None:
    address = taken(slab, BLOCK).address
    assert taken(slab, BLOCK).address == address


def test_a_view_that_is_used_after_its_lease_is_gone_keeps_its_content(slab: Slab) -> None:
    view = bytes_of(taken(slab, BLOCK)).fill_(7)
    for _ in range(5):
        bytes_of(taken(slab, BLOCK)).fill_(8)
    assert bool((view == 7).all())


def test_a_full_slab_has_no_lease_until_one_dies(slab: Slab) -> None:
    lease = taken(slab, 4 * HUGE_PAGE)
    assert slab.lease(1) is None
    del lease
    taken(slab, 4 * HUGE_PAGE)


def test_a_pin_keeps_the_bytes_and_tells_of_its_death(slab: Slab) -> None:
    deaths: list[str] = []
    lease = taken(slab, BLOCK)
    bytes_of(lease).fill_(5)
    pin = lease.pin(lambda: deaths.append("pin"))
    assert (pin.address, pin.nbytes) == (lease.address, lease.nbytes)
    view = bytes_of(pin)[:10]
    del pin, lease
    gc.collect()
    assert deaths == []
    assert slab.leased == BLOCK
    assert bool((view == 5).all())
    del view
    assert deaths == ["pin"]
    assert slab.leased == 0


def test_pins_of_one_lease_die_one_by_one(slab: Slab) -> None:
    deaths: list[int] = []
    lease = taken(slab, BLOCK)
    first, second = (lease.pin(lambda number=number: deaths.append(number)) for number in range(2))
    twice_removed = second.pin(lambda: deaths.append(2))
    del second
    assert deaths == []  # its own pin uses it
    del twice_removed
    assert deaths == [2, 1]
    del first
    assert deaths == [2, 1, 0]
    assert slab.leased == BLOCK


def test_ram_is_committed_by_the_page_and_stays_until_it_is_trimmed() -> None:
    budget = Budget(host=4 * HUGE_PAGE)
    slab = Slab(4 * HUGE_PAGE, budget=budget)
    assert slab.committed == budget.held("host") == 0
    lease = taken(slab, HUGE_PAGE + 1)
    assert slab.committed == budget.held("host") == 2 * HUGE_PAGE
    del lease
    assert slab.committed == budget.held("host") == 2 * HUGE_PAGE
    assert slab.trim() == 2 * HUGE_PAGE
    assert slab.committed == budget.held("host") == 0


def test_trimming_gives_idle_pages_back_and_leaves_the_others_alone() -> None:
    slab = Slab(4 * HUGE_PAGE)
    idle, used = taken(slab, HUGE_PAGE), taken(slab, BLOCK)
    bytes_of(idle).fill_(1)
    bytes_of(used).fill_(2)
    address = idle.address
    del idle
    assert resident(address, HUGE_PAGE) == HUGE_PAGE
    assert slab.trim() == HUGE_PAGE
    assert resident(address, HUGE_PAGE) == 0
    assert bool((bytes_of(used) == 2).all())


def test_the_budget_refuses_a_lease_and_loses_nothing_by_it() -> None:
    budget = Budget(host=2 * HUGE_PAGE)
    slab = Slab(8 * HUGE_PAGE, budget=budget)
    first = taken(slab, BLOCK)
    assert slab.lease(3 * HUGE_PAGE) is None
    assert slab.leased == BLOCK
    assert budget.held("host") == HUGE_PAGE
    del first
    taken(slab, 2 * HUGE_PAGE)


def test_a_small_page_suits_a_small_budget() -> None:
    budget = Budget(host=3 * BLOCK)
    slab = Slab(64 * BLOCK, budget=budget, page=BLOCK)
    lease = taken(slab, 3 * BLOCK)
    assert slab.lease(1) is None
    del lease
    assert slab.trim() == 3 * BLOCK


def test_prefaulting_commits_everything_at_once() -> None:
    budget = Budget(host=2 * HUGE_PAGE)
    slab = Slab(2 * HUGE_PAGE, budget=budget, prefault=True, holder="arena")
    assert budget.holders("host") == {"arena": 2 * HUGE_PAGE}
    lease = taken(slab, 2 * HUGE_PAGE)
    assert resident(lease.address, lease.nbytes) == 2 * HUGE_PAGE


def test_prefaulting_beyond_the_budget_is_refused_and_reserves_nothing() -> None:
    budget = Budget(host=HUGE_PAGE)
    with pytest.raises(BudgetExceeded):
        Slab(2 * HUGE_PAGE, budget=budget, prefault=True)
    assert budget.held("host") == 0


def test_closing_returns_the_memory() -> None:
    budget = Budget(host=HUGE_PAGE)
    slab = Slab(HUGE_PAGE, budget=budget)
    address = taken(slab, BLOCK).address
    slab.close()
    assert budget.held("host") == 0
    assert not is_mapped(address)
    with pytest.raises(SpillMisuse, match="closed"):
        slab.lease(1)
    slab.close()


def test_a_lease_outlives_its_slab() -> None:
    budget = Budget(host=4 * HUGE_PAGE)
    slab = Slab(4 * HUGE_PAGE, budget=budget)
    other, lease = taken(slab, 2 * HUGE_PAGE), taken(slab, BLOCK)
    address = lease.address
    view = bytes_of(lease).fill_(3)
    del lease, other
    slab.close()
    assert budget.held("host") == HUGE_PAGE  # its page, and no other
    with pytest.raises(SpillMisuse, match="closed"):
        slab.lease(1)
    assert bool((view == 3).all())
    del view
    slab.close()
    assert budget.held("host") == 0
    assert not is_mapped(address)


def test_a_dropped_slab_lives_until_its_last_lease_is_gone() -> None:
    budget = Budget(host=HUGE_PAGE)
    lease = taken(Slab(HUGE_PAGE, budget=budget), BLOCK)
    gc.collect()
    view = bytes_of(lease).fill_(9)
    assert bool((view == 9).all())
    address = lease.address
    del lease, view
    gc.collect()
    assert budget.held("host") == 0
    assert not is_mapped(address)


def test_a_forked_child_does_not_get_the_slab(slab: Slab) -> None:
    lease = taken(slab, HUGE_PAGE)
    bytes_of(lease).fill_(1)
    assert is_mapped(lease.address)
    child = os.fork()
    if child == 0:  # it must not come back to pytest, whatever happens
        try:
            os._exit(10 + is_mapped(lease.address))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 10


def test_the_kernel_is_asked_for_huge_pages_and_for_no_inheritance(slab: Slab) -> None:
    address = taken(slab, BLOCK).address
    flags = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head:
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= address < end
        elif head == "VmFlags:" and inside:
            flags = line
    assert {"dc", "hg"} <= set(flags.split())


def test_leases_may_die_on_any_thread(slab: Slab) -> None:
    leases = [taken(slab, BLOCK) for _ in range(64)]

    def drop(own: list[Lease]) -> None:
        own.clear()

    parts = [leases[n::4] for n in range(4)]
    del leases
    threads = [threading.Thread(target=drop, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slab.leased == 0


def test_threads_lease_and_drop_without_sharing_a_byte(slab: Slab) -> None:
    mixed_up: list[int] = []

    def take_turns(number: int) -> None:
        for turn in range(200):
            lease = slab.lease((1 + turn % 5) * BLOCK)
            if lease is None:
                continue
            view = bytes_of(lease).fill_(number)
            if not bool((view == number).all()):
                mixed_up.append(number)

    threads = [threading.Thread(target=take_turns, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mixed_up == []
    assert slab.leased == 0


class Cycle:
    """A lease that only the garbage collector can free."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.me = self


def test_a_lease_may_die_in_the_middle_of_any_call(slab: Slab) -> None:
    before = gc.get_threshold()
    gc.set_threshold(1)  # a collection at nearly every allocation, those inside the slab's lock among them
    try:
        for _ in range(300):
            Cycle(taken(slab, BLOCK))
            slab.trim()
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert slab.leased == 0


def test_leases_alive_at_the_end_of_the_interpreter_do_no_harm() -> None:
    script = (
        "from undercroft.store.slab import Slab\n"
        "slab = Slab(1 << 22); lease = slab.lease(4096); storage = lease.storage(0, 10)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stderr) == (0, "")


class Leases(RuleBasedStateMachine):
    """Leases of random sizes, each filled with a number of its own that nobody else may overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(host=12 * BLOCK)
        self.slab = Slab(16 * BLOCK, budget=self.budget, page=2 * BLOCK)
        self.live: list[tuple[int, torch.Tensor]] = []
        self.number = 0

    @rule(nbytes=st.integers(1, 6 * BLOCK))
    def lease(self, nbytes: int) -> None:
        lease = self.slab.lease(nbytes)
        if lease is not None:
            self.number = (self.number + 1) % 251
            self.live.append((self.number, bytes_of(lease).fill_(self.number)))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))

    @rule()
    def trim(self) -> None:
        self.slab.trim()

    @invariant()
    def nobody_overwrote_anybody(self) -> None:
        assert all(bool((view == number).all()) for number, view in self.live)

    @invariant()
    def the_books_agree(self) -> None:
        assert self.slab.leased == sum(view.numel() for _, view in self.live)
        assert self.slab.leased <= self.slab.committed == self.budget.held("host") <= 12 * BLOCK

    def teardown(self) -> None:
        self.live.clear()
        self.slab.close()
        assert self.budget.held("host") == 0


TestLeases = Leases.TestCase
