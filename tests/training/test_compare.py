"""Runs in processes of their own: their errors are answers, and none is left running."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from undercroft import FinetuneSettings
from undercroft.models.fresh import Shape, write_fresh_model
from undercroft.training.compare import compare
from undercroft.training.trial import run_trial


@pytest.fixture
def settings(tmp_path: Path) -> FinetuneSettings:
    write_fresh_model(
        tmp_path / "model", Shape(layers=1, width=32, heads=2, vocabulary=257, longest=32), [""]
    )
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    return FinetuneSettings(
        model=str(tmp_path / "model"),
        data=tmp_path / "text.txt",
        output=None,
        steps=4,
        batch_size=2,
        sequence_length=32,
        device="cpu",
    )


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


@pytest.mark.usefixtures("nothing_left")
def test_two_ways_give_rows_beside_plain(settings: FinetuneSettings, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 800)
    before = sorted(tmp_path.rglob("*"))
    steps: list[tuple[str, int]] = []
    rows = compare(  # large enough that the system's count of resident pages, kept in lumps, sees it
        replace(settings, budget="6MiB", min_bytes="1KiB", batch_size=64),
        ways=("keep", "spill"),
        watch=lambda name: lambda step, steps_, loss: steps.append((name, step)),
    )
    plain, spilled = rows
    assert (plain.name, plain.equal, plain.fraction) == ("plain", True, 1.0)
    assert (spilled.name, spilled.equal) == ("spilled", True)
    assert spilled.spilled_nbytes
    assert plain.peak_nbytes is not None
    assert plain.cpu_seconds_per_step
    assert steps == [(name, step) for name in ("plain", "spilled") for step in (1, 2, 3, 4)]
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_of_the_run_is_its_answer(settings: FinetuneSettings) -> None:
    trial = run_trial(replace(settings, data=Path("/missing.txt")))
    assert trial.report is None
    assert (
        trial.failure
        == "cannot read /missing.txt: No such file or directory; name a file of text or JSON lines"
    )


def test_a_killed_run_is_told(settings: FinetuneSettings) -> None:
    others = children()

    def kill(step: int, steps: int, loss: float) -> None:
        (child,) = set(children()) - set(others)
        os.kill(child, signal.SIGKILL)

    trial = run_trial(settings, on_step=kill)
    assert trial.report is None
    assert trial.failure == "killed by the system, most likely because memory ran out"


@pytest.mark.usefixtures("nothing_left")
def test_no_process_outlives_an_interrupted_parent(settings: FinetuneSettings) -> None:
    others = children()

    def interrupt(step: int, steps: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(replace(settings, steps=1000), on_step=interrupt)
    assert children() == others
