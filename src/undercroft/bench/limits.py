"""Question: does training with a spill live where the kernel kills plain training?

Every process runs in a control group of its own. First plain training runs without a limit, with both heaps;
the limit is set from the one that needed less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from undercroft.bench.answer import Answer
from undercroft.bench.cgroup import MemoryGroup
from undercroft.bench.modes import PLAIN, SPILL, TUNED, TrainingSettings
from undercroft.bench.training_worker import Settings
from undercroft.bench.verdict import Line
from undercroft.bench.worker import Worker, WorkerEnded
from undercroft.units import format_size

_SHARE = 0.70
_KILLED = 137

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What became of one process in its group.

    Attributes:
        mode: how it trained.
        limit: bytes of its group, or None.
        losses: of the steps it took, exact.
        code: its exit code as a shell shows it, 0 if it was still well at the end.
        peak: the most bytes its group used, page cache included.
        kills: by the kernel, in its group.
        words: its last, if it ended early.
    """

    mode: str
    limit: int | None
    losses: tuple[float, ...]
    code: int
    peak: int
    kills: int
    words: str = ""


def measure_limits(settings: TrainingSettings, steps: int, progress: Progress) -> Answer:
    """Train `steps` steps: plain without and with the limit, then spilled with it.

    Raises:
        NoControlGroup: this process may not limit memory.
    """

    def run(mode: str, limit: int | None) -> Fate:
        allowed = format_size(limit) if limit else "no limit"
        progress(f"limits: {mode}, {allowed}, {steps} steps")
        return _run(mode, settings.worker(mode), limit, steps)

    free = [run(PLAIN, None), run(TUNED, None)]
    limit = int(_SHARE * min(fate.peak for fate in free)) // 4096 * 4096
    bound = [run(PLAIN, limit), run(TUNED, limit), run(SPILL, limit)]
    return _answer(settings, steps, limit, free, bound)


def _run(mode: str, settings: Settings, limit: int | None, steps: int) -> Fate:
    losses: list[float] = []
    code, words = 0, ""
    with MemoryGroup(limit) as group:
        with Worker(settings, group=group.processes) as worker:
            try:
                for _ in range(steps):
                    losses.append(worker.step().loss)
            except WorkerEnded as ended:
                code, words = ended.code, str(ended)
        return Fate(
            mode=mode,
            limit=limit,
            losses=tuple(losses),
            code=code,
            peak=group.peak,
            kills=group.kills,
            words=words,
        )


def _answer(
    settings: TrainingSettings, steps: int, limit: int, free: list[Fate], bound: list[Fate]
) -> Answer:
    *plain, spilled = bound
    expected = free[0].losses
    return Answer(
        theme="limits",
        question=f"Does spilled training live in {_SHARE:.0%} of the memory that plain training needs?",
        falsified_by="plain training that survives the limit, or spilled training that is killed or whose "
        "losses differ from those without a limit.",
        head=("", "limit", "most used", "steps", "exit code", "kernel kills"),
        rows=tuple(map(_row, [*free, *bound])),
        lines=(
            Line(
                claim="plain runs that the kernel killed under the limit",
                found=sum(fate.code == _KILLED and fate.kills > 0 for fate in plain),
                bound=len(plain),
                relation=">=",
            ),
            Line(
                claim="steps of spilled training under the limit",
                found=len(spilled.losses),
                bound=steps,
                relation=">=",
                note=spilled.words,
            ),
            Line(
                claim="its losses that differ from plain training without a limit",
                found=sum(a != b for a, b in zip(spilled.losses, expected, strict=False))
                + abs(len(expected) - len(spilled.losses)),
                bound=0,
            ),
        ),
        notes=(f"the limit is {format_size(limit)}; the spill's budget {format_size(settings.budget)}",),
        figures=_figures(free + bound),
    )


def _row(fate: Fate) -> tuple[str, ...]:
    return (
        fate.mode,
        "none" if fate.limit is None else format_size(fate.limit),
        format_size(fate.peak),
        str(len(fate.losses)),
        str(fate.code),
        str(fate.kills),
    )


def _figures(fates: list[Fate]) -> dict[str, Any]:
    return {"runs": [asdict(fate) for fate in fates]}
