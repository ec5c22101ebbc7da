"""SpillCallback: activations on disk for transformers' Trainer and those built upon it, such as TRL's.

It knows the Trainer's callbacks and its `training_step`; nothing of how spilling works. Invariants: the
spill is active inside `training_step` only, so that evaluation, saving and whatever follows an error run
without it; when a run ends, well or not, the trainer is as it was.

A callback hears of the beginning of a step and of its end, but not of an exception in between, and hooks of
autograd that stay active would follow the user out of `train()`. So the callback goes around `training_step`
itself, for the length of one run. The Trainer does not introduce itself to its callbacks: the one that calls
us is found among our callers, as the object whose `callback_handler` holds us.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from undercroft.errors import InvalidInput, SpillMisuse
from undercroft.training.report import SpillReport
from undercroft.training.spill import ActivationSpill
from undercroft.units import parse_size

_log = logging.getLogger(__name__)


class SpillCallback(TrainerCallback):
    """Spills activations: ``Trainer(..., callbacks=[SpillCallback(budget="2GiB")])``.

    Losses and weights are bit-identical to the same Trainer without it. One callback serves one trainer at a
    time. At the end of training the report is logged (logger "undercroft.training.trainer", level INFO) and
    the spill closed.

    Args:
        budget: the most bytes of activations to hold in memory.
        directory: where to spill, or several on several disks; a directory below Undercroft's home if None.
        min_bytes: tensors smaller than this are not spilled.
        capacity: the most bytes of disk to occupy.
        write_cap: the most bytes ever to write, to spare an SSD.
        checksums: verify what comes back.

    Raises:
        InvalidInput: a size that cannot be meant.
        UnsafeDirectory: when training begins; the directory cannot hold private bytes.
        SpillMisuse: when training begins outside a Trainer, or with one that takes no `training_step`.
    """

    def __init__(
        self,
        budget: int | str = "512MiB",
        directory: str | Path | list[str | Path] | None = None,
        min_bytes: int | str = "1MiB",
        *,
        capacity: int | str | None = None,
        write_cap: int | str | None = None,
        checksums: bool = False,
    ) -> None:
        if parse_size(budget) == 0:
            raise InvalidInput('a spill needs a budget of more than 0 bytes, such as "512MiB"')
        self._options: dict[str, Any] = {
            "budget": budget,
            "directory": directory,
            "min_bytes": parse_size(min_bytes),
            "capacity": None if capacity is None else parse_size(capacity),
            "write_cap": None if write_cap is None else parse_size(write_cap),
            "checksums": checksums,
        }
        self._spill: ActivationSpill | None = None
        self._report: SpillReport | None = None
        self._trainer: Any = None
        self._step_before: Callable[..., Any] | None = None
        self._entered = 0

    @property
    def report(self) -> SpillReport | None:
        """What was done in the present run, or in the last one; None before the first."""
        return self._report if self._spill is None else self._spill.report

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Open the spill and go around the trainer's steps."""
        self._finish()  # a run before this one may have ended in an error between two steps
        self._trainer = self._find_trainer(sys._getframe())  # pyright: ignore[reportPrivateUsage]
        self._spill = ActivationSpill(model, **self._options)
        self._entered = 0
        self._step_before = vars(self._trainer).get("training_step")
        self._trainer.training_step = self._around(self._trainer.training_step, self._spill)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a trainer whose steps went past us."""
        if self._spill is not None and not self._entered:
            name = type(self._trainer).__name__
            self._finish()
            raise SpillMisuse(
                f"{name} has a training loop of its own, in which nothing would be spilled; "
                "put ActivationSpill around its forward and backward instead"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the spill and log its report."""
        self._finish()
        _log.info("activation spill: %s", self._report)

    def _around(self, step: Callable[..., Any], spill: ActivationSpill) -> Callable[..., Any]:
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._entered += 1
            try:
                with spill:
                    return step(*args, **kwargs)
            except BaseException:
                self._finish()
                raise

        return training_step

    def _finish(self) -> None:
        """Give the trainer its step back, keep the report and close the spill; again is allowed."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            del trainer.training_step
            if self._step_before is not None:
                trainer.training_step = self._step_before
        if self._spill is not None:
            self._report = self._spill.report
            self._spill.close()
            self._spill = None

    def _find_trainer(self, frame: FrameType | None) -> Any:
        while frame is not None:
            owner = frame.f_locals.get("self")
            handler = getattr(owner, "callback_handler", None)
            if self in getattr(handler, "callbacks", ()):
                return owner
            frame = frame.f_back
        raise SpillMisuse("SpillCallback was not called by a Trainer; pass it to one with callbacks=[...]")
