"""The record cache: bytes are those written, the budget holds, what is in use stays, errors where due."""

import gc
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from undercroft.errors import (
    BudgetExceeded,
    CorruptRecord,
    InvalidInput,
    SpillMisuse,
    TierFull,
    TransferFailed,
)
from undercroft.events import Recorder
from undercroft.store.cache import RecordCache
from undercroft.store.disk import Iovec, Syscalls
from undercroft.store.policy import EvictionPolicy, Lfu
from undercroft.store.record import Key
from undercroft.store.records import RecordFile, Verify
from undercroft.store.shelf import Hold
from undercroft.store.slab import Lease, Slab
from undercroft.store.transfer import Priority, TransferQueue
from undercroft.store.writer import RecordWriter
from undercroft.testing import FlakyDisk
from undercroft.units import MIB

LARGE = 2 * MIB  # too large to be gathered with its neighbours

BLOCK = 4096

pytestmark = pytest.mark.usefixtures("nothing_left")


def noise(nbytes: int, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).numpy().tobytes()


def key(number: int) -> Key:
    return Key(f"expert.{number}", "int8")


def keys(*numbers: int) -> list[Key]:
    return [key(number) for number in numbers]


def content(number: int, nbytes: int = BLOCK) -> bytes:
    return noise(nbytes, number)


def bytes_of(cache: RecordCache, key: tuple[str, str], lease: Lease) -> bytes:
    return cache.record(key).tensor(lease).numpy().tobytes()


def write(path: Path, *sizes: int) -> Path:
    """A file of records 0, 1, 2, … of these sizes."""
    with RecordWriter(path) as writer:
        for number, nbytes in enumerate(sizes):
            writer.add(*key(number), content(number, nbytes))
    return path


class WatchedDisk(Syscalls):
    """Notes every read, and holds those at chosen offsets back until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[int, list[int]]] = []
        self._held: set[int] = set()
        self._changed = threading.Condition()

    def preadv(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        with self._changed:
            self.reads.append((offset, [nbytes for _, nbytes in iovecs]))
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: offset not in self._held, 30)
        return super().preadv(fd, iovecs, offset)

    def hold(self, *offsets: int) -> None:
        self._held = set(offsets)

    def let_go(self) -> None:
        with self._changed:
            self._held.clear()
            self._changed.notify_all()

    def wait_for_read(self, offset: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: offset in self.offsets, 30)

    @property
    def offsets(self) -> list[int]:
        return [offset for offset, _ in self.reads]


class House:
    """A cache and everything it stands on; counts bytes of `room` in blocks of 4096."""

    def __init__(
        self,
        path: Path,
        room: int,
        *,
        disk: Syscalls | None = None,
        workers: int = 2,
        policy: EvictionPolicy[Key] | None = None,
        patience: float = 0.0,
        slab_room: int | None = None,
        verify: Verify = "once",
    ) -> None:
        self.disk = disk
        self.file = RecordFile.open(path, syscalls=disk, verify=verify)
        if isinstance(disk, WatchedDisk):
            disk.reads.clear()
        self.recorder = Recorder(enabled=False)
        self.slab = Slab((room if slab_room is None else slab_room) * BLOCK, page=BLOCK)
        self.queue = TransferQueue(workers=workers)
        self.cache = RecordCache(
            [self.file],
            room * BLOCK,
            self.slab,
            self.queue,
            policy=policy,
            patience=patience,
            recorder=self.recorder,
        )

    def count(self, name: str) -> float:
        return self.recorder.counters.get(name, 0)

    def take(self, number: int) -> Lease:
        """The lease of one record."""
        ((_, lease),) = self.cache.fetch(keys(number))
        return lease

    def use(self, *numbers: int) -> None:
        """Fetch records one after another, and drop them."""
        for number in numbers:
            self.take(number)

    def resident(self) -> set[int]:
        return {n for n in range(len(self.file)) if key(n) in self.cache}

    def settle(self) -> None:
        assert self.queue.drain(30)

    def close(self) -> None:
        self.cache.close()
        self.queue.close()
        self.file.close()


Build = Callable[..., House]


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """``build(sizes, room, **options)`` makes a `House` over a new file, torn down in the right order."""
    houses: list[House] = []

    def make(sizes: Sequence[int], room: int, **options) -> House:
        path = write(tmp_path / f"file{len(houses)}", *sizes)
        houses.append(House(path, room, **options))
        return houses[-1]

    yield make
    for house in houses:
        if isinstance(house.disk, WatchedDisk):
            house.disk.let_go()
        house.close()


class TestFetching:
    def test_the_bytes_are_those_written(self, build: Build) -> None:
        sizes = [1, BLOCK - 1, BLOCK, BLOCK + 1, MIB, 5 * MIB + 3]
        house = build(sizes, 2000)
        found = {k: bytes_of(house.cache, k, lease) for k, lease in house.cache.fetch(keys(*range(6)))}
        assert found == {key(n): content(n, nbytes) for n, nbytes in enumerate(sizes)}

    def test_what_is_in_memory_is_not_read_again_and_comes_first(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([BLOCK] * 4, 4, disk=disk)
        house.use(2)
        assert house.resident() == {2}
        order = [k for k, _ in house.cache.fetch(keys(0, 1, 2))]
        assert order[0] == key(2)
        assert set(order) == set(keys(0, 1, 2))
        assert disk.offsets.count(2 * BLOCK) == 1
        assert (house.count("hits"), house.count("misses")) == (1, 3)
        assert house.count("read_bytes") == 3 * BLOCK

    def test_records_come_as_they_arrive(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([BLOCK] * 3, 3, disk=disk)
        disk.hold(0)
        fetched = house.cache.fetch(keys(0, 2))
        assert next(fetched)[0] == key(2)
        disk.let_go()
        assert next(fetched)[0] == key(0)
        assert list(fetched) == []

    def test_reads_begin_when_they_are_asked_for(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([BLOCK], 1, disk=disk)
        fetched = house.cache.fetch(keys(0))
        disk.wait_for_read(0)
        assert [k for k, _ in fetched] == keys(0)

    def test_a_key_asked_for_twice_comes_once(self, build: Build) -> None:
        house = build([BLOCK] * 2, 2)
        assert sorted(k for k, _ in house.cache.fetch(keys(1, 0, 1))) == keys(0, 1)
        assert list(house.cache.fetch([])) == []

    def test_a_plain_tuple_is_a_key(self, build: Build) -> None:
        house = build([BLOCK], 1)
        assert [k.name for k, _ in house.cache.fetch([("expert.0", "int8")])] == ["expert.0"]
        assert ("expert.0", "int8") in house.cache

    def test_a_key_that_no_file_has(self, build: Build) -> None:
        house = build([BLOCK], 1)
        for ask in (lambda: house.cache.fetch([key(0), key(9)]), lambda: house.cache.foresee([key(9)])):
            with pytest.raises(InvalidInput, match=r"has \('expert.9', 'int8'\)"):
                ask()
        with pytest.raises(InvalidInput):
            house.cache.record(key(9))
        assert house.cache.held == 0

    def test_two_requests_for_one_record_read_it_once(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([BLOCK], 1, disk=disk)
        disk.hold(0)
        first, second = house.cache.fetch(keys(0)), house.cache.fetch(keys(0))
        disk.let_go()
        ((_, one),), ((_, other),) = list(first), list(second)
        assert one.address == other.address
        assert disk.offsets == [0]
        assert house.count("waits") == 1

    def test_several_files_are_one_cache(self, build: Build, tmp_path: Path) -> None:
        house = build([BLOCK], 4)
        with RecordWriter(tmp_path / "other") as writer:
            writer.add("trunk", "bfloat16", b"other")
        with RecordFile.open(tmp_path / "other") as other:
            cache = RecordCache([house.file, other], 4 * BLOCK, house.slab, house.queue)
            found = {
                k.name: bytes_of(cache, k, lease) for k, lease in cache.fetch([("trunk", "bfloat16"), key(0)])
            }
            assert found == {"trunk": b"other", "expert.0": content(0)}
            cache.close()

    def test_one_record_in_two_files_is_refused(self, build: Build, tmp_path: Path) -> None:
        house = build([BLOCK], 1)
        with (
            RecordFile.open(write(tmp_path / "copy", BLOCK)) as copy,
            pytest.raises(InvalidInput, match="both have a record"),
        ):
            RecordCache([house.file, copy], BLOCK, house.slab, house.queue)


class TestRoom:
    def test_more_than_fits_streams_through(self, build: Build) -> None:
        house = build([BLOCK] * 10, 2)
        seen: list[Key] = []
        for k, lease in house.cache.fetch(keys(*range(10))):
            assert bytes_of(house.cache, k, lease) == content(int(k.name.split(".")[1]))
            assert house.cache.held <= 2 * BLOCK
            seen.append(k)
        assert sorted(seen) == sorted(keys(*range(10)))
        assert house.count("evictions") == 8

    def test_room_for_one_is_enough_when_each_is_let_go(self, build: Build) -> None:
        house = build([BLOCK] * 3, 1)
        fetched = house.cache.fetch(keys(0, 1, 2))
        for _ in range(3):
            next(fetched)
        assert house.cache.held == BLOCK

    def test_a_record_in_use_stays(self, build: Build) -> None:
        house = build([BLOCK] * 6, 2)
        lease = house.take(0)
        house.use(1, 2, 3, 4, 5)
        assert house.resident() == {0, 5}
        assert house.cache.pinned == BLOCK
        assert bytes_of(house.cache, key(0), lease) == content(0)

    def test_a_view_alone_keeps_a_record_in_use(self, build: Build) -> None:
        house = build([BLOCK] * 4, 2)
        view = house.cache.record(key(0)).tensor(house.take(0))[7:9]
        house.use(1, 2, 3)
        assert house.resident() == {0, 3}
        assert view.numpy().tobytes() == content(0)[7:9]
        del view
        house.use(1, 2)
        assert house.resident() == {1, 2}

    def test_without_room_the_error_says_who_has_it(self, build: Build) -> None:
        house = build([BLOCK] * 4, 2)
        held = [house.take(0), house.take(1)]
        with pytest.raises(BudgetExceeded, match="records in use 8 KiB") as caught:
            house.take(2)
        assert (caught.value.asked, caught.value.budget) == (BLOCK, 2 * BLOCK)
        held.pop()
        house.use(2)
        assert house.resident() == {0, 2}

    def test_an_error_keeps_nothing_in_use_that_was_not_handed_over(self, build: Build) -> None:
        house = build([BLOCK] * 4, 2)
        lease = house.take(0)
        fetched = house.cache.fetch(keys(1, 2, 3))
        _, other = next(fetched)
        with pytest.raises(BudgetExceeded) as caught:
            next(fetched)
        del other
        assert house.cache.pinned == BLOCK, caught
        del lease

    def test_while_all_keep_still_nothing_leaves(self, build: Build) -> None:
        house = build([BLOCK] * 4, 2)
        house.use(0, 1)
        stills = [house.cache.still(), house.cache.still()]
        with pytest.raises(BudgetExceeded):
            house.take(2)
        assert house.cache.foresee(keys(3)) == []
        house.cache.resize(BLOCK)
        assert house.resident() == {0, 1}
        stills.pop()
        assert house.resident() == {0, 1}
        stills.pop()
        assert house.cache.pinned == 0
        assert len(house.resident()) == 1
        house.use(2)
        assert house.resident() == {2}

    def test_who_is_to_know_of_leaving_does(self, build: Build) -> None:
        house = build([BLOCK] * 4, 2)
        gone: list[tuple[str, str]] = []
        house.cache.tell_of_leaving(gone.append)
        house.use(0, 1, 2)
        assert gone == [key(0)]
        house.cache.resize(BLOCK)
        assert len(gone) == 2
        house.cache.close()
        assert set(gone) == set(keys(0, 1, 2))

    def test_closing_waits_for_those_who_use_all(self, build: Build) -> None:
        house = build([BLOCK] * 2, 2)
        house.use(0, 1)
        still = house.cache.still()
        house.cache.close(timeout=0.1)
        assert house.cache.held == 2 * BLOCK
        del still
        house.cache.close()
        assert house.cache.held == 0

    def test_a_record_beyond_the_budget_is_refused_without_waiting(self, build: Build) -> None:
        house = build([3 * BLOCK, BLOCK], 2, patience=1e9)
        with pytest.raises(BudgetExceeded):
            house.take(0)
        house.use(1)

    def test_a_lease_let_go_elsewhere_makes_room(self, build: Build) -> None:
        house = build([BLOCK] * 2, 1, patience=30.0)
        held = [house.take(0)]
        fetched = house.cache.fetch(keys(1))
        dropper = threading.Thread(target=held.clear)
        dropper.start()
        assert [k for k, _ in fetched] == keys(1)
        dropper.join()

    def test_records_leave_until_the_room_is_in_one_piece(self, build: Build) -> None:
        house = build([BLOCK, BLOCK, BLOCK, 2 * BLOCK], 4, slab_room=3)
        house.use(0, 1, 2)
        lease = house.take(3)
        assert house.resident() <= {2, 3}
        assert bytes_of(house.cache, key(3), lease) == content(3, 2 * BLOCK)

    def test_a_slab_without_room_in_one_piece_is_full(self, build: Build) -> None:
        house = build([BLOCK, BLOCK, BLOCK, 2 * BLOCK], 4, slab_room=3)
        first, middle, last = (house.take(n) for n in range(3))
        del first, last
        with pytest.raises(TierFull, match="in one piece"):
            house.take(3)
        del middle
        house.use(3)

    def test_the_policy_says_who_leaves(self, build: Build) -> None:
        lru, lfu = build([BLOCK] * 4, 3), build([BLOCK] * 4, 3, policy=Lfu())
        for house in (lru, lfu):
            house.use(0, 0, 0, 1, 2, 3)
        assert lru.resident() == {1, 2, 3}
        assert lfu.resident() == {0, 2, 3}

    def test_an_iterator_that_is_dropped_lets_go_of_everything(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([BLOCK] * 4, 4, disk=disk)
        house.use(0)
        disk.hold(2 * BLOCK)
        fetched = house.cache.fetch(keys(0, 2))
        next(fetched)
        del fetched
        disk.let_go()
        house.settle()
        assert house.cache.pinned == 0
        assert house.resident() == {0, 2}


class TestForesight:
    def test_what_was_foreseen_need_not_be_read_again(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([BLOCK] * 3, 3, disk=disk)
        house.cache.foresee(keys(0, 2))
        house.settle()
        assert house.resident() == {0, 2}
        house.use(0, 2)
        assert sorted(disk.offsets) == [0, 2 * BLOCK]
        assert (house.count("foreseen"), house.count("hits"), house.count("misses")) == (2, 2, 0)

    def test_a_hint_beyond_the_room_is_followed_as_far_as_it_goes(self, build: Build) -> None:
        house = build([BLOCK] * 5 + [9 * BLOCK], 2)
        house.cache.foresee(keys(0, 1, 2, 3, 4))
        house.settle()
        assert house.resident() == {0, 1}
        house.cache.foresee(keys(5))
        lease = [house.take(0), house.take(1)]
        house.cache.foresee(keys(3))
        assert house.resident() == {0, 1}
        del lease

    def test_a_hint_takes_the_room_of_what_nobody_uses_only(self, build: Build) -> None:
        house = build([BLOCK] * 6, 4)
        lease = house.take(0)
        house.use(1, 2)
        house.cache.foresee(keys(3))
        house.settle()
        house.cache.foresee(keys(1, 4, 5))  # 0 is in use, 1 is meant too, 3 was foreseen
        house.settle()
        assert house.resident() == {0, 1, 3, 4}
        del lease

    def test_a_demand_takes_back_what_was_foreseen_and_not_yet_used(self, build: Build) -> None:
        house = build([BLOCK] * 4, 2)
        house.cache.foresee(keys(0, 1))
        house.settle()
        house.use(2)
        assert house.resident() == {1, 2}
        assert house.count("useless_prefetches") == 1

    def test_a_demand_cancels_reads_that_only_a_hint_wanted(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([LARGE] * 5, 4 * LARGE // BLOCK, disk=disk, workers=1)
        disk.hold(0)
        house.cache.foresee(keys(0, 1, 2, 3))
        disk.wait_for_read(0)
        fetched = house.cache.fetch(keys(4))
        disk.let_go()
        assert [k for k, _ in fetched] == keys(4)
        assert house.count("cancelled_prefetches") == 1
        house.settle()
        assert 3 * LARGE not in disk.offsets  # the last of the hint gave way
        assert house.resident() == {0, 1, 2, 4}

    def test_a_demand_comes_before_what_was_foreseen(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([LARGE] * 5, 5 * LARGE // BLOCK, disk=disk, workers=1)
        disk.hold(0)
        house.cache.foresee(keys(0, 1, 2))
        disk.wait_for_read(0)
        fetched = house.cache.fetch(keys(2, 4))  # 2 was foreseen: its read is brought forward
        disk.let_go()
        assert [k for k, _ in fetched] == keys(2, 4)
        house.settle()
        assert [offset // LARGE for offset in disk.offsets] == [0, 2, 4, 1]

    def test_a_record_asked_for_while_its_hint_is_being_cancelled_comes_all_the_same(
        self, build: Build
    ) -> None:
        disk = WatchedDisk()
        house = build([MIB] * 4, 2 * MIB // BLOCK, disk=disk, workers=1)
        disk.hold(0)
        house.cache.foresee(keys(0, 1))
        disk.wait_for_read(0)
        first = house.cache.fetch(
            keys(2)
        )  # cancels the read of 1, of which the busy worker knows nothing yet
        second = house.cache.fetch(keys(1))
        disk.let_go()
        assert [k for k, _ in first] == keys(2)
        assert [bytes_of(house.cache, k, lease) for k, lease in second] == [content(1, MIB)]

    def test_what_is_recanted_is_not_read_unless_it_is_under_way(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([LARGE] * 4, 4 * LARGE // BLOCK, disk=disk, workers=1)
        disk.hold(0)
        assert house.cache.foresee(keys(0, 1, 2)) == keys(0, 1, 2)
        disk.wait_for_read(0)
        house.cache.recant(keys(0, 2, 3))
        disk.let_go()
        house.settle()
        assert disk.offsets == [0, LARGE]
        assert house.resident() == {0, 1}
        assert house.count("cancelled_bytes") == LARGE
        house.use(0, 1)
        assert house.count("useful_bytes") == LARGE  # nobody was to ask for 0

    def test_what_is_recanted_may_leave_and_is_read_with_its_neighbours(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([BLOCK] * 3, 2, disk=disk, workers=1)
        disk.hold(0)
        house.cache.foresee(keys(0, 1))  # neighbours, read with one call
        disk.wait_for_read(0)
        house.cache.recant(keys(0))
        disk.let_go()
        house.settle()
        assert house.resident() == {0, 1}
        assert house.cache.foresee(keys(2)) == keys(2)
        house.settle()
        assert house.resident() == {1, 2}

    def test_what_somebody_asked_for_is_not_recanted(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([LARGE] * 2, 2 * LARGE // BLOCK, disk=disk, workers=1)
        disk.hold(0)
        house.cache.foresee(keys(0, 1))
        disk.wait_for_read(0)
        fetched = house.cache.fetch(keys(1))
        house.cache.recant(keys(0, 1))
        disk.let_go()
        assert [k for k, _ in fetched] == keys(1)

    def test_a_hint_spares_what_may_not_leave(self, build: Build) -> None:
        house = build([BLOCK] * 4, 2)
        house.use(0, 1)
        assert house.cache.foresee(keys(2), may_leave=lambda each: each == key(1)) == keys(2)
        house.settle()
        assert house.resident() == {0, 2}
        assert house.cache.foresee(keys(3), may_leave=lambda each: False) == []

    def test_a_demand_takes_other_room_before_that_of_a_hint(self, build: Build) -> None:
        house = build([BLOCK] * 4, 2)
        house.cache.foresee(keys(0))
        house.settle()
        house.use(1, 2)
        assert house.resident() == {0, 2}

    def test_what_was_foreseen_in_vain_is_counted_at_the_end(self, build: Build) -> None:
        house = build([BLOCK] * 2, 2)
        house.cache.foresee(keys(0, 1))
        house.settle()
        house.use(1)
        house.cache.close()
        assert house.count("useless_prefetches") == 1


class TestGathering:
    def test_small_neighbours_are_read_with_one_call(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([100, BLOCK, BLOCK + 1, 5, 6], 8, disk=disk)
        found = {k: bytes_of(house.cache, k, lease) for k, lease in house.cache.fetch(keys(2, 0, 1, 4))}
        assert found == {key(n): content(n, s) for n, s in [(0, 100), (1, BLOCK), (2, BLOCK + 1), (4, 6)]}
        assert sorted(disk.reads) == [(0, [BLOCK, BLOCK, 2 * BLOCK]), (5 * BLOCK, [BLOCK])]

    def test_records_above_a_mib_are_read_alone(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([LARGE, MIB, MIB, LARGE], 2000, disk=disk)
        list(house.cache.fetch(keys(0, 1, 2, 3)))
        assert sorted(disk.reads) == [(0, [LARGE]), (LARGE, [MIB, MIB]), (LARGE + 2 * MIB, [LARGE])]

    def test_larger_ones_are_read_together_while_enough_is_on_its_way(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([4 * MIB] * 10, 24 * MIB // BLOCK, disk=disk, workers=1)
        for _, lease in house.cache.fetch(keys(*range(10))):
            del lease
        assert [len(parts) for _, parts in disk.reads[:6]] == [1] * 6
        assert 2 in [len(parts) for _, parts in disk.reads[6:]]

    def test_one_call_reads_at_most_8_mib(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([MIB] * 10, 2600, disk=disk)
        list(house.cache.fetch(keys(*range(10))))
        assert sorted((offset, len(parts)) for offset, parts in disk.reads) == [(0, 8), (8 * MIB, 2)]

    def test_more_records_than_one_call_takes_come_with_the_next(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([1] * 1030, 1030, disk=disk)
        found = {k: bytes_of(house.cache, k, lease) for k, lease in house.cache.fetch(keys(*range(1030)))}
        assert all(found[key(n)] == content(n, 1) for n in range(1030))
        assert [len(parts) for _, parts in disk.reads] == [1030, 6]

    def test_a_run_ends_where_the_room_ends(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([BLOCK] * 4, 3, disk=disk)
        for _ in house.cache.fetch(keys(0, 1, 2, 3)):
            pass
        assert disk.reads[0] == (0, [BLOCK] * 3)
        assert disk.reads[1] == (3 * BLOCK, [BLOCK])


class FlippingDisk(Syscalls):
    """Flips a bit at one offset in the first so many reads that bring it."""

    def __init__(self, times: int, offset: int) -> None:
        super().__init__()
        self.left, self._offset = times, offset

    def preadv(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        import ctypes

        moved = super().preadv(fd, iovecs, offset)
        place = offset
        for address, nbytes in iovecs:
            if self.left and place <= self._offset < place + nbytes:
                self.left -= 1
                ctypes.c_ubyte.from_address(address + self._offset - place).value ^= 1
            place += nbytes
        return moved


class TestFailures:
    def test_bytes_that_were_wrong_once_are_read_again(self, build: Build) -> None:
        disk = FlippingDisk(1, 5 * BLOCK + 9)
        house = build([2 * BLOCK] * 4, 8, disk=disk)
        found = {k: bytes_of(house.cache, k, lease) for k, lease in house.cache.fetch(keys(0, 1, 2, 3))}
        assert disk.left == 0
        assert found == {key(n): content(n, 2 * BLOCK) for n in range(4)}

    def test_a_corrupt_record_is_named_and_its_neighbours_are_well(self, build: Build) -> None:
        house = build([2 * BLOCK] * 4, 8, disk=FlippingDisk(10**9, 5 * BLOCK + 9))
        fetched = house.cache.fetch(keys(0, 1, 2, 3))
        assert [next(fetched)[0], next(fetched)[0]] == keys(0, 1)
        with pytest.raises(CorruptRecord, match=r"record \('expert.2', 'int8'\)"):
            next(fetched)
        assert house.resident() == {0, 1, 3}
        assert house.cache.pinned == 0
        assert {k: bytes_of(house.cache, k, lease) for k, lease in house.cache.fetch(keys(3))} == {
            key(3): content(3, 2 * BLOCK)
        }
        with pytest.raises(CorruptRecord):
            house.take(2)

    def test_a_corrupt_record_that_was_only_foreseen_troubles_nobody(self, build: Build) -> None:
        house = build([2 * BLOCK] * 2, 4, disk=FlippingDisk(2, 2 * BLOCK))
        house.cache.foresee(keys(0, 1))
        house.settle()
        assert house.resident() == {0}
        assert house.cache.held == 2 * BLOCK
        assert bytes_of(house.cache, key(1), house.take(1)) == content(1, 2 * BLOCK)

    @pytest.mark.parametrize("times", [1, 2, 3])
    def test_a_disk_that_fails_for_a_while_costs_nothing(self, build: Build, times: int) -> None:
        disk = FlakyDisk(at=2, times=times)  # the first read asks whether the file can be read directly
        house = build([BLOCK] * 4, 4, disk=disk, workers=1)
        found = {k: bytes_of(house.cache, k, lease) for k, lease in house.cache.fetch(keys(0, 1, 2, 3))}
        assert found == {key(n): content(n) for n in range(4)}
        assert disk.failed == times

    def test_a_failed_read_is_repeated_also_where_nothing_is_verified(self, build: Build) -> None:
        house = build([BLOCK] * 2, 2, disk=FlakyDisk(at=2, times=2), verify="never")
        assert bytes_of(house.cache, key(1), house.take(1)) == content(1)

    def test_a_disk_that_fails_for_good(self, build: Build) -> None:
        house = build([BLOCK] * 4, 4, disk=FlakyDisk(at=2, times=None))
        with pytest.raises(TransferFailed, match="Input/output error"):
            list(house.cache.fetch(keys(0, 1)))
        house.settle()
        assert house.cache.held == 0
        assert house.slab.leased == 0

    def test_a_failure_reaches_everybody_who_waits(self, build: Build) -> None:
        disk = FlakyDisk(at=2, times=4)
        house = build([BLOCK], 1, disk=disk)
        requests = [house.cache.fetch(keys(0)) for _ in range(2)]
        outcomes = []
        for request in requests:
            try:
                outcomes.append([bytes_of(house.cache, k, lease) for k, lease in request])
            except TransferFailed:
                outcomes.append("failed")
        assert outcomes[0] == "failed"
        assert outcomes[1] in ("failed", [content(0)])  # the second may have come when the first had failed


class TestResizing:
    def test_those_it_has_no_room_for_leave_and_their_memory_with_them(self, build: Build) -> None:
        house = build([BLOCK] * 6, 6)
        house.use(0, 1, 2, 3, 4, 5)
        house.cache.resize(2 * BLOCK)
        assert house.resident() == {4, 5}
        assert (house.cache.budget, house.slab.committed) == (2 * BLOCK, 2 * BLOCK)
        house.use(0, 1, 2)
        assert house.cache.held == 2 * BLOCK
        house.cache.resize(6 * BLOCK)
        house.use(0, 1, 2, 3, 4, 5)
        assert house.resident() == {0, 1, 2, 3, 4, 5}

    def test_one_in_use_stays_and_keeps_others_out(self, build: Build) -> None:
        house = build([BLOCK] * 3, 3)
        lease = house.take(0)
        house.cache.resize(BLOCK)
        assert house.resident() == {0}
        with pytest.raises(BudgetExceeded):
            house.take(1)
        assert bytes_of(house.cache, key(0), lease) == content(0)
        del lease
        house.use(1)
        assert house.resident() == {1}

    def test_a_read_that_only_a_hint_wanted_is_cancelled(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([BLOCK] * 4, 4, disk=disk, workers=1)
        disk.hold(0)
        house.cache.foresee(keys(0, 2))
        resized = threading.Thread(target=house.cache.resize, args=(BLOCK,))
        resized.start()
        disk.let_go()
        resized.join(30)
        assert house.cache.held <= BLOCK
        assert house.slab.committed <= BLOCK

    def test_a_closed_cache_is_not_resized(self, build: Build) -> None:
        house = build([BLOCK], 1)
        house.cache.close()
        with pytest.raises(SpillMisuse):
            house.cache.resize(BLOCK)


class TestClosing:
    def test_every_byte_returns(self, build: Build) -> None:
        house = build([BLOCK] * 4, 4)
        house.use(0, 1)
        house.cache.foresee(keys(2, 3))
        house.cache.close()
        assert (house.cache.held, house.slab.leased) == (0, 0)
        house.cache.close()

    def test_a_lease_in_use_keeps_its_bytes(self, build: Build) -> None:
        house = build([BLOCK] * 2, 2)
        house.use(1)
        lease = house.take(0)
        house.cache.close()
        assert house.slab.leased == BLOCK
        tensor = house.file[key(0)].tensor(lease)
        assert tensor.numpy().tobytes() == content(0)
        del lease, tensor
        assert house.slab.leased == 0

    def test_reads_under_way_are_waited_for(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([MIB] * 3, 1000, disk=disk, workers=1)
        disk.hold(0)
        fetched = house.cache.fetch(keys(0, 1, 2))
        disk.wait_for_read(0)
        closer = threading.Thread(target=house.cache.close)
        closer.start()
        assert house.slab.leased == 3 * MIB  # the system may still write there
        disk.let_go()
        closer.join(30)
        assert not closer.is_alive()
        with pytest.raises(SpillMisuse, match="closed"):
            next(fetched)
        del fetched
        assert house.slab.leased == 0
        assert disk.offsets == [0]

    def test_a_read_that_does_not_come_back_keeps_its_room(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([MIB], 1000, disk=disk)
        disk.hold(0)
        house.cache.foresee(keys(0))
        disk.wait_for_read(0)
        house.cache.close(timeout=0.0)
        assert house.slab.leased == MIB
        disk.let_go()
        house.cache.close()
        assert house.slab.leased == 0

    def test_a_fetch_that_waits_elsewhere_ends(self, build: Build) -> None:
        house = build([BLOCK] * 2, 1, patience=1e9)
        lease = house.take(0)
        errors: list[str] = []

        def wait_for_room() -> None:
            try:
                house.take(1)
            except SpillMisuse as error:
                errors.append(str(error))

        waiting = threading.Thread(target=wait_for_room)
        waiting.start()
        house.cache.close()
        waiting.join(30)
        assert errors == ["this record cache is closed; make a new one"]
        del lease

    def test_a_closed_cache_takes_no_calls(self, build: Build) -> None:
        house = build([BLOCK], 1)
        house.cache.close()
        for ask in (lambda: house.cache.fetch(keys(0)), lambda: house.cache.foresee(keys(0))):
            with pytest.raises(SpillMisuse, match="closed"):
                ask()

    def test_a_closed_queue_is_said_to_be_closed(self, build: Build) -> None:
        house = build([BLOCK] * 3, 3)
        house.queue.close()
        with pytest.raises(SpillMisuse, match="queue is closed"):
            list(house.cache.fetch(keys(0, 2)))
        house.cache.foresee(keys(1))
        assert house.cache.held == 0

    def test_a_forked_child_is_refused(self, build: Build) -> None:
        house = build([BLOCK], 1)
        house.use(0)
        child = os.fork()
        if child == 0:  # it must not come back to pytest, whatever happens
            try:
                house.cache.fetch(keys(0))
            except SpillMisuse:
                os._exit(10)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 10


class TestThreads:
    @pytest.fixture
    def eager_switching(self) -> Iterator[None]:
        """Threads take turns far more often than they otherwise would."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        yield
        sys.setswitchinterval(before)

    @pytest.mark.usefixtures("eager_switching")
    def test_many_threads_share_a_small_cache(self, build: Build) -> None:
        house = build([BLOCK] * 12, 9, patience=30.0)
        wrong: list[object] = []

        def work(seed: int) -> None:
            chance = random.Random(seed)
            try:
                for _ in range(30):
                    wanted = chance.sample(range(12), 3)
                    house.cache.foresee(keys(*chance.sample(range(12), 2)))
                    for k, lease in house.cache.fetch(keys(*wanted)):
                        if bytes_of(house.cache, k, lease) != content(int(k.name.split(".")[1])):
                            wrong.append(k)
                        if house.cache.held > 9 * BLOCK:
                            wrong.append("held")
                        del lease
            except Exception as error:  # the test must see it
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        house.settle()
        assert house.cache.pinned == 0

    def test_leases_may_die_in_the_middle_of_any_call(self, build: Build) -> None:
        class Cycle:
            def __init__(self, lease: Lease) -> None:
                self.lease = lease
                self.me = self

        house = build([BLOCK] * 6, 6)
        before = gc.get_threshold()
        gc.set_threshold(
            1
        )  # a collection at nearly every allocation, those inside the cache's lock among them
        try:
            for turn in range(60):
                Cycle(house.take(turn % 6))
        finally:
            gc.set_threshold(*before)
        gc.collect()
        assert house.cache.pinned == 0


class TestHolding:
    def test_what_is_in_memory_is_used_together(self, build: Build) -> None:
        house = build([BLOCK] * 4, 3)
        house.use(0, 1, 2)
        hold = house.cache.hold(keys(2, 0))
        assert hold is not None
        assert [bytes_of(house.cache, k, each) for k, each in zip(keys(2, 0), hold.leases, strict=True)] == [
            content(2),
            content(0),
        ]
        assert house.cache.pinned == 2 * BLOCK
        assert house.count("hits") == 2
        house.use(3)
        assert house.resident() == {0, 2, 3}
        del hold
        assert house.cache.pinned == 0

    def test_nothing_is_asked_for_where_one_is_missing(self, build: Build) -> None:
        house = build([BLOCK] * 3, 2)
        house.use(0, 1)
        assert house.cache.hold(keys(0, 2)) is None
        assert house.cache.pinned == 0
        assert house.count("hits") == 0
        house.use(2)
        assert house.resident() == {1, 2}  # the first was not touched

    def test_what_is_on_its_way_is_missing(self, build: Build) -> None:
        disk = WatchedDisk()
        house = build([BLOCK], 1, disk=disk)
        disk.hold(0)
        fetched = house.cache.fetch(keys(0))
        assert house.cache.hold(keys(0)) is None
        disk.let_go()
        assert [k for k, _ in fetched] == keys(0)

    def test_holding_is_a_use_to_the_policy_and_of_a_hint(self, build: Build) -> None:
        house = build([BLOCK] * 3, 2)
        house.cache.foresee(keys(0))
        house.settle()
        house.use(1)
        assert house.cache.hold(keys(0)) is not None
        assert house.count("useful_bytes") == BLOCK
        house.use(2)
        assert house.resident() == {0, 2}

    def test_what_is_held_when_the_cache_closes_returns_later(self, build: Build) -> None:
        house = build([BLOCK], 1)
        house.use(0)
        hold = house.cache.hold(keys(0))
        house.cache.close()
        assert hold is not None
        assert hold.leases[0].storage(0, BLOCK).nbytes() == BLOCK
        assert house.slab.leased == BLOCK
        del hold
        gc.collect()
        assert house.slab.leased == 0
        with pytest.raises(SpillMisuse):
            house.cache.hold(keys(0))


SIZES = [1, 2, 1, 3, 2, 1, 4, 1]  # blocks of each record
ROOM = 7


class AgainstTheFile(RuleBasedStateMachine):
    """Random requests, leases held and dropped; whatever is leased equals what is in the file.

    What is drawn never depends on what is held, for that may depend on which record arrived first.
    """

    @initialize(policy=st.sampled_from(["lru", "lfu"]))
    def begin(self, policy: str) -> None:
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        path = write(Path(self.directory.name) / "file", *(blocks * BLOCK for blocks in SIZES))
        self.house = House(path, ROOM, policy=Lfu() if policy == "lfu" else None, slab_room=100)
        self.leases: list[tuple[int, Lease]] = []
        self.holds: list[tuple[list[int], Hold]] = []
        self.room = ROOM

    def in_use(self) -> set[int]:
        return {number for number, _ in self.leases} | {each for numbers, _ in self.holds for each in numbers}

    @rule(wanted=st.lists(st.integers(0, len(SIZES) - 1), max_size=5), priority=st.sampled_from(Priority))
    def fetch_and_hold(self, wanted: list[int], priority: Priority) -> None:
        together = sum(SIZES[n] for n in self.in_use() | set(wanted))
        arrived: list[tuple[int, Lease]] = []
        try:
            for k, lease in self.house.cache.fetch(keys(*wanted), priority=priority):
                arrived.append((int(k.name.split(".")[1]), lease))
        except BudgetExceeded:
            assert together > self.room
        else:
            assert together <= self.room or set(wanted) <= self.in_use()
            self.leases += arrived

    @rule(wanted=st.lists(st.integers(0, len(SIZES) - 1), max_size=5))
    def fetch_and_let_go(self, wanted: list[int]) -> None:
        most = sum(SIZES[n] for n in self.in_use()) + max((SIZES[n] for n in wanted), default=0)
        seen: set[int] = set()
        fetched = self.house.cache.fetch(keys(*wanted))
        try:
            while True:
                k = next(fetched)[0]
                seen.add(int(k.name.split(".")[1]))
        except StopIteration:
            assert seen == set(wanted)
        except BudgetExceeded:
            assert most > self.room

    @rule(wanted=st.lists(st.integers(0, len(SIZES) - 1), max_size=3, unique=True))
    def hold(self, wanted: list[int]) -> None:
        self.house.settle()
        resident = self.house.resident()
        found = self.house.cache.hold(keys(*wanted))
        assert (found is not None) == resident.issuperset(wanted)
        if found is not None:
            self.holds.append((wanted, found))

    @rule(which=st.integers(0, 63))
    def let_go(self, which: int) -> None:
        if self.holds:
            self.holds.pop(which % len(self.holds))

    @rule(wanted=st.lists(st.integers(0, len(SIZES) - 1), max_size=3))
    def ask_and_turn_away(self, wanted: list[int]) -> None:
        self.house.cache.fetch(keys(*wanted))

    @rule(wanted=st.lists(st.integers(0, len(SIZES) - 1), max_size=5))
    def foresee(self, wanted: list[int]) -> None:
        self.house.cache.foresee(keys(*wanted))

    @rule(room=st.integers(0, 12))
    def resize(self, room: int) -> None:
        self.room = room
        self.house.cache.resize(room * BLOCK)
        assert self.house.slab.committed <= max(room, sum(SIZES[n] for n in self.in_use())) * BLOCK

    @rule(which=st.integers(0, 63))
    def drop(self, which: int) -> None:
        if self.leases:
            self.leases.pop(which % len(self.leases))

    @invariant()
    def what_is_leased_is_what_was_written(self) -> None:
        for number, lease in self.leases:
            assert bytes_of(self.house.cache, key(number), lease) == content(number, SIZES[number] * BLOCK)
        for numbers, hold in self.holds:
            for number, lease in zip(numbers, hold.leases, strict=True):
                assert bytes_of(self.house.cache, key(number), lease) == content(
                    number, SIZES[number] * BLOCK
                )

    @invariant()
    def the_budget_holds_and_what_is_in_use_is_there(self) -> None:
        assert self.house.cache.held <= max(self.room, sum(SIZES[n] for n in self.in_use())) * BLOCK
        assert self.in_use() <= self.house.resident()

    def teardown(self) -> None:
        self.leases.clear()
        self.holds.clear()
        self.house.settle()
        gc.collect()
        assert self.house.cache.pinned == 0
        assert self.house.slab.leased == self.house.cache.held
        self.house.close()
        assert self.house.slab.leased == 0
        self.directory.cleanup()


AgainstTheFile.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAgainstTheFile = AgainstTheFile.TestCase
