"""The ways to train that are compared, and what is known of each once it has taken its steps.

Invariant: what is measured of two modes is measured under the same rules: the peak from the third step on,
above what was resident after the second backward with gradients, optimizer state and a trimmed heap.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from undercroft.bench.gpt import Shape
from undercroft.bench.training_worker import Settings, Step
from undercroft.bench.worker import Worker
from undercroft.errors import InvalidInput
from undercroft.units import MIB

WARM_UPS = 3
_IDLE_STEP, _PEAK_STEP = 1, 2

PLAIN, TUNED, CHECKPOINT, SPILL = "plain", "plain, tuned heap", "checkpoint", "spill"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """How to measure training.

    Attributes:
        shape: of the model and its batches.
        budget: of the spill, bytes.
        directory: where to spill; None for Undercroft's own.
        min_bytes: storages below are not spilled.
        rounds: measured steps of each mode.
        attempts: how often rounds are taken until plain training is steady.
        threads: of PyTorch.
    """

    shape: Shape = field(default_factory=Shape)
    budget: int = 160 * MIB
    directory: Path | None = None
    min_bytes: int = MIB
    rounds: int = 7
    attempts: int = 3
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))

    def __post_init__(self) -> None:
        if min(self.rounds, self.attempts, self.threads, self.budget) < 1:
            raise InvalidInput("rounds, attempts, threads and budget must be at least 1")

    def worker(self, mode: str, *, budget: int | None = None) -> Settings:
        """What a worker of one of the modes is given."""
        kind = {PLAIN: "plain", TUNED: "plain", CHECKPOINT: "checkpoint", SPILL: "spill"}[mode]
        plain = Settings(mode=kind, shape=self.shape, settle_heap=mode != PLAIN, threads=self.threads)
        if mode != SPILL:
            return plain
        return replace(
            plain,
            budget=self.budget if budget is None else budget,
            directory=str(self.directory) if self.directory else None,
            min_bytes=self.min_bytes,
        )


@contextmanager
def workers(settings: TrainingSettings) -> Generator[dict[str, Worker]]:
    """A process for each mode, all with the heap that the spill has, except plain training as anyone runs it."""
    with ExitStack() as stack:
        modes = (PLAIN, TUNED, CHECKPOINT, SPILL)
        yield {mode: stack.enter_context(Worker(settings.worker(mode))) for mode in modes}


def warm_up(running: Mapping[str, Worker]) -> dict[str, list[Step]]:
    """The first three steps of each mode; the second tells what is resident without activations."""
    steps: dict[str, list[Step]] = {mode: [] for mode in running}
    for number in range(WARM_UPS):
        for mode, worker in running.items():
            steps[mode].append(worker.step(measure_idle=number == _IDLE_STEP))
    return steps


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The steps that one mode took, from its first."""

    steps: tuple[Step, ...]

    @property
    def idle(self) -> int:
        """Bytes resident that are not activations."""
        idle = self.steps[_IDLE_STEP].idle
        assert idle is not None
        return idle

    @property
    def peak(self) -> int:
        """The most bytes resident in the third step."""
        return self.steps[_PEAK_STEP].peak

    @property
    def highest_peak(self) -> int:
        """The most bytes resident in any step from the third on."""
        return max(step.peak for step in self.steps[_PEAK_STEP:])

    @property
    def losses(self) -> tuple[float, ...]:
        """Exact, in nats."""
        return tuple(step.loss for step in self.steps)

    def per_step(self, name: str) -> list[int]:
        """By how much a total of the spill's report rose in each step from the second on."""
        totals = [step.report[name] for step in self.steps if step.report is not None]
        return [after - before for before, after in pairwise(totals)]

    def last(self, name: str) -> float | None:
        """A field of the spill's last report."""
        report = self.steps[-1].report
        return None if report is None else report[name]


def wall(step: Step) -> float:
    """Seconds of forward and backward."""
    return step.used.wall


def cpu(step: Step) -> float:
    """CPU seconds of forward and backward, all threads together."""
    return step.used.cpu


def differing(one: History, other: History) -> int:
    """How many losses of two modes are not the same bits, of the steps that both took."""
    pairs = zip(one.losses, other.losses, strict=False)
    return sum(ours != theirs for ours, theirs in pairs)
