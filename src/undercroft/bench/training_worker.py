"""One mode of training in a process of its own, which takes a step whenever it reads a line.

Run as ``python -m undercroft.bench.training_worker SETTINGS``, where SETTINGS is JSON of `Settings`. Processes
of several modes can so take turns, step by step, under the same conditions. Each line read is answered by one
line of JSON, a `Step`; the line "measure idle" has the heap trimmed after the backward, to tell what is not
activations. The end of the input ends the process.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from undercroft import arithmetic
from undercroft.bench import process
from undercroft.bench.gpt import GPT, Shape
from undercroft.bench.process import Holdings, Usage
from undercroft.store import heap

MEASURE_IDLE = "measure idle"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to train and how.

    Attributes:
        mode: "plain", "checkpoint" or "spill".
        shape: of the model and its batches.
        settle_heap: manage freed memory as spilling does, in any mode.
        budget: of the spill, bytes.
        directory: of the spill; None for the default.
        min_bytes: storages below are not spilled.
        threads: of PyTorch.
        seed: of weights and data.
    """

    mode: str = "plain"
    shape: Shape = field(default_factory=Shape)
    settle_heap: bool = False
    budget: int = 0
    directory: str | None = None
    min_bytes: int = 2**20
    threads: int = 2
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step was and used. Memory in bytes of RAM.

    Attributes:
        loss: in nats, exact.
        used: by forward and backward.
        peak: the most that was resident during them.
        holds: what the process held before them.
        idle: resident after the backward, with gradients and optimizer state and a trimmed heap; None unless asked.
        stall: seconds of the step in which training waited for the disk.
        report: the spill's, with the totals so far; None in other modes.
    """

    loss: float
    used: Usage
    peak: int
    holds: Holdings
    idle: int | None = None
    stall: float = 0.0
    report: dict[str, Any] | None = None

    @staticmethod
    def parse(line: str) -> Step:
        """The step of a line that a worker printed."""
        given: dict[str, Any] = json.loads(line)
        used, holds = Usage(**given.pop("used")), Holdings(**given.pop("holds"))
        return Step(used=used, holds=holds, **given)


class Trainer:
    """A model, its optimizer and its data; what is inside the spill is forward and backward."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        torch.set_num_threads(settings.threads)
        self.model = GPT(settings.shape, recompute=settings.mode == "checkpoint")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.spill = _spill(settings, self.model) if settings.mode == "spill" else None
        size = (settings.shape.batch, settings.shape.sequence + 1)
        self._draw: Callable[[], torch.Tensor] = lambda: torch.randint(settings.shape.vocabulary, size)

    def step(self, *, measure_idle: bool) -> Step:
        """Forward, backward, and the optimizer's part; gradients stay allocated."""
        ids = self._draw()
        stalled = self._stall_seconds()
        holds = process.holdings()
        process.forget_peak()
        start = process.usage()
        with self.spill or contextlib.nullcontext():
            loss = self.model(ids[:, :-1], ids[:, 1:])
            loss.backward()
        used, peak = process.usage() - start, process.peak_resident()
        step = Step(
            loss=loss.item(),
            used=used,
            peak=peak,
            holds=holds,
            idle=self._idle() if measure_idle else None,
            stall=self._stall_seconds() - stalled,
            report=self.spill.report.as_dict() if self.spill else None,
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return step

    def _stall_seconds(self) -> float:
        return self.spill.report.stall_seconds if self.spill else 0.0

    def _idle(self) -> int:
        process.trim_heap()
        if self.spill or self.settings.settle_heap:
            heap.trim()
        return process.resident()


def _spill(settings: Settings, model: torch.nn.Module) -> Any:
    from undercroft.training.spill import ActivationSpill

    return ActivationSpill(
        model, budget=settings.budget, directory=settings.directory, min_bytes=settings.min_bytes
    )


def main() -> None:
    """Serve steps until the input ends."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    settings = Settings(shape=Shape(**given.pop("shape")), **given)
    arithmetic.settle()
    if settings.settle_heap:
        heap.settle()
    trainer = Trainer(settings)
    for line in sys.stdin:
        step = trainer.step(measure_idle=line.strip() == MEASURE_IDLE)
        print(json.dumps(asdict(step)), flush=True)


if __name__ == "__main__":
    main()
