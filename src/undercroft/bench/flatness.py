"""Question: does anything grow while training goes on: memory, open files, threads, the spill file?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean, linear_regression

from undercroft.bench.answer import Answer
from undercroft.bench.modes import SPILL, TrainingSettings
from undercroft.bench.training_worker import Step
from undercroft.bench.verdict import Line
from undercroft.bench.worker import Worker
from undercroft.errors import InvalidInput
from undercroft.units import format_size

_SETTLED = 0.2
_PERCENT_ALLOWED = 0.1
_FIGURES: dict[str, Callable[[Step], float]] = {
    "memory between steps": lambda step: step.holds.resident,
    "peak memory": lambda step: step.peak,
    "open files": lambda step: step.holds.descriptors,
    "threads": lambda step: step.holds.threads,
    "spill file": lambda step: step.holds.unnamed,
}
_BYTES = frozenset({"memory between steps", "peak memory", "spill file"})

Progress = Callable[[str], None]


def measure_flatness(settings: TrainingSettings, steps: int, progress: Progress) -> Answer:
    """Train with the spill and look at every step; the first fifth does not count.

    Raises:
        InvalidInput: less than 5 steps.
        WorkerEnded: it could not be trained.
    """
    if steps < 5:
        raise InvalidInput(f"{steps} steps have no slope after their first fifth; take 5 at least")
    taken: list[Step] = []
    with Worker(settings.worker(SPILL)) as worker:
        for number in range(1, steps + 1):
            taken.append(worker.step())
            if number % 10 == 0:
                progress(f"flatness: step {number}/{steps}")
    return _answer(taken)


def slope_percent(values: Sequence[float]) -> float:
    """By how much values rise from one to the next, fitted, in percent of their mean; of zeros, 0."""
    mean = fmean(values)
    return 100 * linear_regression(range(len(values)), values).slope / mean if mean else 0.0


def _answer(taken: Sequence[Step]) -> Answer:
    first = int(len(taken) * _SETTLED)
    settled = {name: [float(figure(step)) for step in taken[first:]] for name, figure in _FIGURES.items()}
    return Answer(
        theme="flatness",
        question="Does anything grow while spilled training goes on?",
        falsified_by=f"a slope of {_PERCENT_ALLOWED} % per step or more over the last four fifths.",
        head=("", f"step {first + 1}", f"step {len(taken)}", "most", "slope per step"),
        rows=tuple(_row(name, values) for name, values in settled.items()),
        lines=tuple(_line(name, values) for name, values in settled.items()),
        figures={"steps": [{"peak": step.peak, **asdict(step.holds)} for step in taken]},
    )


def _line(name: str, values: Sequence[float]) -> Line:
    return Line(
        claim=f"growth of {name} per step", found=slope_percent(values), bound=_PERCENT_ALLOWED, unit=" %"
    )


def _row(name: str, values: Sequence[float]) -> tuple[str, ...]:
    show = format_size if name in _BYTES else "{:.0f}".format
    return (name, *map(show, (values[0], values[-1], max(values))), f"{slope_percent(values):.4f} %")
