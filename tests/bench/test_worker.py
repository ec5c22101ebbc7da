"""A training process at arm's length."""

import pytest

from undercroft.bench.gpt import Shape
from undercroft.bench.training_worker import Settings
from undercroft.bench.worker import Worker, WorkerEnded

SHAPE = Shape(layers=1, hidden=64, heads=1, vocabulary=64, sequence=16, batch=1)

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_a_worker_takes_steps_and_tells_what_is_idle() -> None:
    with Worker(Settings(shape=SHAPE)) as worker:
        first, second = worker.step(), worker.step(measure_idle=True)
    assert first.idle is None
    assert second.idle is not None
    assert second.peak >= second.holds.resident > 0
    assert first.loss != second.loss
    assert first.report is None


def test_a_worker_that_fails_says_why() -> None:
    with Worker(Settings(mode="spill", budget=0, shape=SHAPE)) as worker:
        with pytest.raises(WorkerEnded, match="a spill needs a budget") as raised:
            worker.step()
        assert raised.value.code == 1
