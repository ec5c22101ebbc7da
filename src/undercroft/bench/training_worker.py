"""One mode of training in a process of its own, which takes a step whenever it reads a line.

Run as ``python -m undercroft.bench.training_worker SETTINGS``, where SETTINGS is JSON of `Settings`. Processes of
several modes can so take turns, step by step, under the same conditions. Each line read is answered by one line of
JSON; the line "measure idle" has the heap trimmed after the backward, to tell what is not activations. The end of the
input ends the process.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from undercroft.bench import process
from undercroft.bench.gpt import GPT, Shape
from undercroft.store import heap


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to train and how.

    Attributes:
        mode: "plain", "checkpoint" or "spill".
        shape: of the model and its batches.
        settle_heap: manage freed memory as spilling does, in any mode.
        budget: of the spill, bytes.
        directory: of the spill; None for the default.
        threads: of PyTorch.
        seed: of weights and data.
    """

    mode: str = "plain"
    shape: Shape = field(default_factory=Shape)
    settle_heap: bool = False
    budget: int = 0
    directory: str | None = None
    threads: int = 2
    seed: int = 0


class Trainer:
    """A model, its optimizer and its data; what is inside `around` is forward and backward."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        torch.set_num_threads(settings.threads)
        self.model = GPT(settings.shape, recompute=settings.mode == "checkpoint")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.spill = _spill(settings, self.model) if settings.mode == "spill" else None
        size = (settings.shape.batch, settings.shape.sequence + 1)
        self._draw: Callable[[], torch.Tensor] = lambda: torch.randint(settings.shape.vocabulary, size)

    def step(self) -> dict[str, Any]:
        """One step; returns its loss, what its forward and backward used, and the memory before and at its peak."""
        ids = self._draw()
        before = process.resident()
        process.forget_peak()
        start = process.usage()
        stalled = self.spill.report.stall_seconds if self.spill else 0.0
        with self.spill or contextlib.nullcontext():
            loss = self.model(ids[:, :-1], ids[:, 1:])
            loss.backward()
        used = process.usage() - start
        answer = {"loss": loss.item(), "before": before, "peak": process.peak_resident(), **asdict(used)}
        if self.spill:
            answer["stall"] = self.spill.report.stall_seconds - stalled
            answer["report"] = self.spill.report.as_dict()
        return answer

    def idle(self) -> int:
        """Bytes resident after a backward, with gradients and optimizer state, and the free heap given back."""
        process.trim_heap()
        if self.spill or self.settings.settle_heap:
            heap.trim()
        return process.resident()

    def update(self) -> None:
        """The optimizer's part of a step; gradients stay allocated."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


def _spill(settings: Settings, model: torch.nn.Module) -> Any:
    from undercroft.training.spill import ActivationSpill

    return ActivationSpill(model, budget=settings.budget, directory=settings.directory)


def main() -> None:
    """Serve steps until the input ends."""
    given = json.loads(sys.argv[1])
    settings = Settings(**{**given, "shape": Shape(**given["shape"])})
    if settings.settle_heap:
        heap.settle()
    trainer = Trainer(settings)
    for line in sys.stdin:
        answer = trainer.step()
        if line.strip() == "measure idle":
            answer["idle"] = trainer.idle()
        trainer.update()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
