"""A recorded step becomes the trace that the planner reads."""

import pytest

from undercroft.training.recording import Recording
from undercroft.training.step import SavedStorage, StepTrace


def test_a_step_of_two_storages() -> None:
    recording = Recording()
    assert recording.add(100, 0.0) == 0
    assert recording.add(200, 1.0) == 1
    recording.save_again(0)
    late = recording.unpack(1, 2.0)
    recording.end_use(1, late, 3.0)
    recording.release(1, 3.0)
    early = recording.unpack(0, 3.5)
    recording.end_use(0, early, 4.0)
    recording.release(0, 4.0)
    assert recording.calls == [0, 1, 0, ~1, ~0]
    assert recording.unpacks == 2
    assert recording.trace() == StepTrace(
        storages=(
            SavedStorage(nbytes=100, packed=0, uses=((5, 6),), released=7),
            SavedStorage(nbytes=200, packed=1, uses=((2, 3),), released=4),
        ),
        times=(0.0, 1.0, 2.0, 3.0, 3.0, 3.5, 4.0, 4.0),
    )


def test_what_is_not_released_lives_to_the_end() -> None:
    recording = Recording()
    recording.add(1, 0.0)
    recording.add(1, 1.0)
    assert [storage.released for storage in recording.trace().storages] == [1, 1]


def test_uses_are_listed_in_the_order_of_unpacking() -> None:
    """Whichever of two backward nodes ends first."""
    recording = Recording()
    recording.add(1, 0.0)
    first, second = recording.unpack(0, 1.0), recording.unpack(0, 2.0)
    recording.end_use(0, second, 3.0)
    recording.end_use(0, first, 4.0)
    assert recording.trace().storages[0].uses == ((1, 4), (2, 3))


def test_an_empty_step() -> None:
    recording = Recording()
    assert recording.trace() == StepTrace(storages=(), times=())
    assert recording.calls == []


def test_numbers_it_was_not_given_are_refused() -> None:
    with pytest.raises(IndexError):
        Recording().release(0, 0.0)
