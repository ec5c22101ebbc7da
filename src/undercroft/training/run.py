"""One fine-tuning run: its steps, until there are enough or someone interrupts.

It knows a learner, a meter and where checkpoints go; not how a model is opened. Invariant: what a checkpoint
holds was true after a whole step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from undercroft.models.causal import CausalModel
from undercroft.training.checkpoint import (
    Checkpoint,
    State,
    check_resumable,
    load_checkpoint,
    save_checkpoint,
)
from undercroft.training.corpus import Corpus
from undercroft.training.finetune_report import FinetuneReport, StepReport, versions
from undercroft.training.interrupt import Interrupted, Interruption
from undercroft.training.learner import Learner
from undercroft.training.meter import Meter
from undercroft.training.settings import FinetuneSettings
from undercroft.training.spill import ActivationSpill

OnStep = Callable[[StepReport], None]


class Run:
    """Steps, until there are enough or someone interrupts."""

    def __init__(
        self,
        settings: FinetuneSettings,
        corpus: Corpus,
        model: CausalModel,
        spill: ActivationSpill | None,
        on_step: OnStep | None,
    ) -> None:
        self._settings, self._corpus, self._spill, self._on_step = settings, corpus, spill, on_step
        self._steps = _steps(settings, corpus)
        self._around: AbstractContextManager[object] = nullcontext() if spill is None else spill
        self._learner = Learner(model, corpus, settings, steps=self._steps, around=self._around)
        self._device = next(model.module.parameters()).device
        self._meter = Meter(self._device)
        self._losses: list[float] = []
        self._seconds = 0.0
        self._resumed_at = 0

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            InvalidInput: it was made under other settings, or from other data.
            CorruptRecord, WrongVersion: it cannot be read.
        """
        checkpoint = load_checkpoint(folder)
        check_resumable(checkpoint.state, self._settings.decisive(), self._corpus.fingerprint, folder)
        self._learner.restore(checkpoint.weights, checkpoint.moments)
        self._losses = list(checkpoint.state.losses)
        self._resumed_at = checkpoint.state.step
        _set_random(checkpoint.state.random)

    def train(self, interruption: Interruption) -> FinetuneReport:
        """Take all steps that are left.

        Raises:
            Interrupted: it was asked for; the steps taken are saved.
        """
        for step in range(len(self._losses), self._steps):
            self._take(step)
            done, every = step + 1, self._settings.save_every
            if done == self._steps:
                break
            if interruption.asked:
                raise Interrupted(done, self._save())
            if every and done % every == 0:
                self._save()
        return self._report()

    def _take(self, step: int) -> None:
        start = time.perf_counter()
        with self._meter.step(memory=self._settings.measure_memory and step + 1 == self._steps):
            self._losses.append(self._learner.learn(step))
        seconds = time.perf_counter() - start
        self._seconds += seconds
        if self._on_step is not None:
            self._on_step(self._step_report(step, seconds))

    def _step_report(self, step: int, seconds: float) -> StepReport:
        return StepReport(
            step=step + 1,
            steps=self._steps,
            loss=self._losses[-1],
            tokens_per_second=self._tokens_per_step / seconds,
            live_nbytes=self._learner.live_nbytes,
            spill=self._spill and self._spill.report,
        )

    @property
    def _tokens_per_step(self) -> int:
        settings = self._settings
        return settings.batch_size * settings.accumulate * settings.sequence_length

    def _save(self) -> Path | None:
        if self._settings.output is None:
            return None
        state = State(
            step=len(self._losses),
            losses=self._losses,
            random=_random(self._device),
            settings=self._settings.decisive(),
            data=self._corpus.fingerprint,
        )
        checkpoint = Checkpoint(state=state, weights=self._learner.weights(), moments=self._learner.moments())
        return save_checkpoint(self._settings.output, checkpoint)

    def _report(self) -> FinetuneReport:
        taken = len(self._losses) - self._resumed_at
        return FinetuneReport(
            steps=len(self._losses),
            losses=self._losses,
            weights=self._learner.fingerprint(),
            trained=sum(weight.numel() for weight in self._learner.weights().values()),
            tokens_per_second=taken * self._tokens_per_step / self._seconds if self._seconds else 0.0,
            seconds_per_step=self._meter.seconds_per_step,
            cpu_seconds_per_step=self._meter.cpu_seconds_per_step,
            peak_nbytes=self._meter.peak_nbytes,
            loss_counts=self._corpus.loss_counts,
            left_out=self._corpus.left_out,
            spill=self._spill and self._spill.report,
            settings=self._settings.as_dict(),
            versions=versions(),
        )


def _steps(settings: FinetuneSettings, corpus: Corpus) -> int:
    if settings.steps is not None:
        return settings.steps
    sequences = settings.epochs * len(corpus.blocks)
    return max(-(-int(sequences) // (settings.batch_size * settings.accumulate)), 1)


def _random(device: torch.device) -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: state.numpy().tobytes().hex() for name, state in states.items()}


def _set_random(states: dict[str, str]) -> None:
    for name, text in states.items():
        state = torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
        if name == "cuda":
            torch.cuda.set_rng_state(state)
        else:
            torch.set_rng_state(state)
