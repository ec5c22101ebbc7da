"""Question: does the memory that training occupies follow the budget, down to the least that can be met?

Each budget has a process of its own, and plain training with the same heap another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import linear_regression
from typing import Any

from undercroft.bench.answer import Answer
from undercroft.bench.modes import SPILL, TUNED, History, TrainingSettings, differing, wall, warm_up
from undercroft.bench.plot import Series, plot
from undercroft.bench.rounds import spread
from undercroft.bench.training_worker import Settings
from undercroft.bench.verdict import Line
from undercroft.bench.worker import Worker
from undercroft.errors import InvalidInput
from undercroft.units import MIB, format_seconds, format_size, round_up_size

_STEPS_AFTER = 2
_LEAST_SLOPE = 0.8

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Training at one budget. Bytes, but for the names that say seconds.

    Attributes:
        budget: allowed.
        counted: the most the spill held by its own count.
        above_idle: the process's peak above what it holds between steps.
        seconds: of a step.
        stall_seconds: of a step.
        differing: losses that are not plain training's.
    """

    budget: int
    counted: int
    above_idle: int
    seconds: float
    stall_seconds: float
    differing: int


def measure_sweep(settings: TrainingSettings, points: int, progress: Progress) -> Answer:
    """Train at `points` budgets, from all activations down to the least.

    Raises:
        InvalidInput: less than 2 points.
        WorkerEnded: training failed at a budget that ought to do.
    """
    if points < 2:
        raise InvalidInput("a sweep needs two points at least: all activations, and the least budget")
    progress("sweep: plain training, and a step that tells sizes")
    plain = _train(settings.worker(TUNED))
    scout = _train(settings.worker(SPILL))
    activations, least = scout.per_step("unique_nbytes")[-1], scout.last("least_budget")
    if least is None:
        raise InvalidInput(f"no plan could be made with {format_size(settings.budget)}; try a larger budget")
    measured: list[Point] = []
    for budget in budgets(activations, int(least), points):
        progress(f"sweep: budget {format_size(budget)}")
        measured.append(_point(budget, _train(settings.worker(SPILL, budget=budget)), plain))
    return _answer(settings, measured, activations, plain.highest_peak - plain.idle)


def budgets(activations: int, least: int, points: int) -> list[int]:
    """Budgets in equal steps, the largest first; the last is `least`, in a size fit to be typed."""
    lowest = min(round_up_size(least), activations)
    step = (activations - lowest) / (points - 1)
    return [round(activations - number * step) for number in range(points - 1)] + [lowest]


def _train(settings: Settings) -> History:
    with Worker(settings) as worker:
        steps = warm_up({settings.mode: worker})[settings.mode]
        steps += [worker.step() for _ in range(_STEPS_AFTER)]
    return History(steps=tuple(steps))


def _point(budget: int, history: History, plain: History) -> Point:
    after = history.steps[-_STEPS_AFTER:]
    return Point(
        budget=budget,
        counted=int(history.last("peak_nbytes") or 0),
        above_idle=history.highest_peak - history.idle,
        seconds=spread([wall(step) for step in after]).median,
        stall_seconds=spread([step.stall for step in after]).median,
        differing=differing(history, plain),
    )


def _answer(settings: TrainingSettings, points: Sequence[Point], activations: int, plain: int) -> Answer:
    slope = linear_regression([each.budget for each in points], [each.above_idle for each in points]).slope
    lowest = points[-1]
    return Answer(
        theme="budget-sweep",
        question="Does the memory that training occupies follow the budget, down to the least that can be met?",
        falsified_by="a peak that stays where it is while the budget falls, a count above the budget, or a "
        "loss that differs.",
        head=("budget", "of activations", "counted", "peak above idle", "beyond budget", "step", "stalled"),
        rows=tuple(_row(each, activations) for each in points),
        lines=(
            Line(
                claim="bytes of measured peak per byte of budget, fitted",
                found=slope,
                bound=_LEAST_SLOPE,
                relation=">=",
            ),
            Line(
                claim="most bytes counted beyond the budget",
                found=max(each.counted - each.budget for each in points) / MIB,
                bound=0,
                unit=" MiB",
            ),
            Line(
                claim="losses that differ from plain in any bit, all budgets",
                found=sum(each.differing for each in points),
                bound=0,
            ),
        ),
        notes=(
            f"all activations are {format_size(activations)}; plain training occupies {format_size(plain)} "
            f"above its idle; beyond the least budget lie {format_size(lowest.above_idle - lowest.budget)}, "
            "which no budget can take away: logits, what is being computed, memory that waits for reuse",
        ),
        figures=_figures(settings, points, activations, plain),
        plot=_plot(points, activations, plain),
    )


def _row(point: Point, activations: int) -> tuple[str, ...]:
    return (
        format_size(point.budget),
        f"{point.budget / activations:.0%}",
        format_size(point.counted),
        format_size(point.above_idle),
        format_size(point.above_idle - point.budget),
        format_seconds(point.seconds),
        format_seconds(point.stall_seconds),
    )


def _figures(
    settings: TrainingSettings, points: Sequence[Point], activations: int, plain: int
) -> dict[str, Any]:
    return {
        "shape": asdict(settings.shape),
        "activations": activations,
        "plain_above_idle": plain,
        "points": [asdict(each) for each in points],
    }


def _plot(points: Sequence[Point], activations: int, plain: int) -> str:
    return plot(
        "Peak memory of a training step against the budget",
        "budget (MiB)",
        "above idle (MiB)",
        [
            Series(
                name="plain training",
                points=((0, plain), (activations, plain)),
                color="#999",
                dashed=True,
            ),
            Series(
                name="measured peak",
                points=tuple((each.budget, each.above_idle) for each in points),
                color="#c0392b",
            ),
            Series(
                name="counted by the spill",
                points=tuple((each.budget, each.counted) for each in points),
                color="#2166ac",
            ),
            Series(
                name="the budget", points=((0, 0), (activations, activations)), color="#2166ac", dashed=True
            ),
        ],
    )
