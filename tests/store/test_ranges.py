"""The allocator of offsets, against a model that marks every block of the space by itself."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from undercroft.store.ranges import BLOCK, FreeRanges, round_up


@given(st.integers(0, 2**60), st.integers(1, 2**40))
def test_rounding_up_is_the_least_multiple_not_below(nbytes: int, granularity: int) -> None:
    rounded = round_up(nbytes, granularity)
    assert rounded % granularity == 0
    assert nbytes <= rounded < nbytes + granularity


def test_the_lowest_place_that_fits_is_taken() -> None:
    ranges = FreeRanges(10 * BLOCK)
    first, second, third = (ranges.take(2 * BLOCK) for _ in range(3))
    assert (first, second, third) == (0, 2 * BLOCK, 4 * BLOCK)
    ranges.give(0, 2 * BLOCK)
    assert ranges.take(3 * BLOCK) == 6 * BLOCK
    assert ranges.take(BLOCK) == 0


def test_a_space_in_pieces_has_no_room_for_the_sum_of_them() -> None:
    ranges = FreeRanges(4 * BLOCK)
    for _ in range(4):
        ranges.take(BLOCK)
    ranges.give(0, BLOCK)
    ranges.give(2 * BLOCK, BLOCK)
    assert ranges.free == 2 * BLOCK
    assert ranges.take(2 * BLOCK) is None


@pytest.mark.parametrize(("granularity", "taken"), [(1, 5), (4096, 4096), (512, 512)])
def test_what_is_taken_is_a_whole_number_of_granules(granularity: int, taken: int) -> None:
    ranges = FreeRanges(8192, granularity=granularity)
    ranges.take(5)
    assert ranges.free == 8192 - taken


class AgainstBlocks(RuleBasedStateMachine):
    """Free ranges and a list with one truth value for each block: whether it is free."""

    @initialize(blocks=st.integers(0, 24))
    def begin(self, blocks: int) -> None:
        self.ranges = FreeRanges(blocks * BLOCK)
        self.is_free = [True] * blocks
        self.taken: list[tuple[int, int]] = []

    @rule(nbytes=st.integers(1, 8 * BLOCK))
    def take(self, nbytes: int) -> None:
        blocks = -(-nbytes // BLOCK)
        places = (n for n in range(len(self.is_free)) if self.is_free[n : n + blocks] == [True] * blocks)
        place = next(places, None)
        assert self.ranges.take(nbytes) == (None if place is None else place * BLOCK)
        if place is not None:
            self.is_free[place : place + blocks] = [False] * blocks
            self.taken.append((place, nbytes))

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        place, nbytes = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.ranges.give(place * BLOCK, nbytes)
        blocks = -(-nbytes // BLOCK)
        self.is_free[place : place + blocks] = [True] * blocks

    @rule(nbytes=st.integers(0, 3 * BLOCK))
    def grow(self, nbytes: int) -> None:
        self.ranges.grow(nbytes)
        self.is_free += [True] * -(-nbytes // BLOCK)

    @rule(keep=st.integers(0, 20))
    def cut_tail(self, keep: int) -> None:
        cut = 0
        while len(self.is_free) > keep and self.is_free[-1]:
            self.is_free.pop()
            cut += BLOCK
        assert self.ranges.cut_tail(keep * BLOCK) == cut

    @invariant()
    def they_agree(self) -> None:
        assert self.ranges.size == len(self.is_free) * BLOCK
        assert self.ranges.free == sum(self.is_free) * BLOCK
        listed = self.ranges.free_ranges()
        blocks = [n for start, length in listed for n in range(start // BLOCK, (start + length) // BLOCK)]
        assert blocks == [n for n, free in enumerate(self.is_free) if free]

    @invariant()
    def no_two_free_ranges_touch(self) -> None:
        listed = self.ranges.free_ranges()
        assert all(start + length < following for (start, length), (following, _) in pairwise(listed))


TestAgainstBlocks = AgainstBlocks.TestCase
