"""One optimizer step after another on one model: forward, backward, clip, AdamW.

It knows the model and its numbers; not files, progress or why it stops. Invariant: what it will compute
depends on the weights, the moments, the random generators, the seed and the number of the step only, so that
a restored learner goes on bit by bit as the first would have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import lru_cache

import torch
from torch.nn.functional import cross_entropy

from undercroft.errors import CorruptRecord, InvalidInput
from undercroft.models.causal import CausalModel
from undercroft.training.corpus import IGNORED, Corpus
from undercroft.training.fingerprint import fingerprint
from undercroft.training.schedule import learning_rate_at
from undercroft.training.settings import FinetuneSettings
from undercroft.training.spill import ActivationSpill

_BETAS = (0.9, 0.95)
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Learner:
    """Trains a model on a corpus.

    Args:
        model: what is trained, on its device.
        corpus: what on.
        settings: how.
        steps: how many steps the learning rate is planned for.
        around: entered around each forward and backward, such as a spill.
    """

    def __init__(
        self,
        model: CausalModel,
        corpus: Corpus,
        settings: FinetuneSettings,
        *,
        steps: int,
        around: AbstractContextManager[object],
    ) -> None:
        self.live_nbytes = 0
        self._model, self._corpus, self._settings, self._steps = model, corpus, settings, steps
        self._around = around
        self._weights = model.trainable()
        self._device = next(iter(self._weights.values())).device
        self._optimizer = torch.optim.AdamW(
            self._weights.values(),
            lr=settings.learning_rate,
            betas=_BETAS,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        model.module.train()

    def learn(self, step: int) -> float:
        """Take step number `step`, from 0; returns its loss, in nats per counted token.

        Raises:
            InvalidInput: the loss is no number any more; the weights are as they were.
        """
        batches = [self._corpus.batch(chosen) for chosen in self._choose(step)]
        counted = sum(int((labels != IGNORED).sum()) for _, labels in batches)
        loss = sum(self._accumulate(ids, labels, max(counted, 1)) for ids, labels in batches)
        norm = torch.nn.utils.clip_grad_norm_(self._weights.values(), self._settings.clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InvalidInput(
                f"the loss is {loss} and the gradient's norm {norm:.3g} in step {step + 1}: training "
                f"diverged; lower the learning rate (it was {self._rate(step):.3g}), or look at the data"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        return loss

    def weights(self) -> dict[str, torch.Tensor]:
        """What is trained, by name."""
        return {name: weight.detach() for name, weight in self._weights.items()}

    def moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's state, by kind and name; empty before the first step."""
        state = self._optimizer.state
        return {
            f"{kind}.{name}": state[weight][kind]
            for name, weight in self._weights.items()
            if weight in state
            for kind in _MOMENTS
        }

    def restore(self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> None:
        """Become the learner that gave these.

        Raises:
            CorruptRecord: they belong to another model.
        """
        expected = {f"{kind}.{name}" for kind in _MOMENTS for name in self._weights}
        if weights.keys() != self._weights.keys() or moments.keys() != expected:
            raise CorruptRecord(
                f"the checkpoint holds other weights than {self._model.source} trains; start anew"
            )
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(weights[name])
                self._optimizer.state[weight] = {
                    kind: moments[f"{kind}.{name}"].to(weight.device) for kind in _MOMENTS
                }

    def fingerprint(self) -> str:
        """A hash of all trained weights."""
        return fingerprint(self.weights().values())

    def _accumulate(self, ids: torch.Tensor, labels: torch.Tensor, counted: int) -> float:
        with self._around:
            logits = self._model.logits(ids.to(self._device))
            labels = labels.to(self._device).flatten()
            total = cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="sum")
            loss = total / counted
            del logits, total
            if isinstance(self._around, ActivationSpill):
                self.live_nbytes = self._around.report.live_nbytes
            loss.backward()
        return loss.item()

    def _rate(self, step: int) -> float:
        settings = self._settings
        warmup = self._steps // 20 if settings.warmup is None else settings.warmup
        return learning_rate_at(step, steps=self._steps, peak=settings.learning_rate, warmup=warmup)

    def _choose(self, step: int) -> Iterator[list[int]]:
        """The blocks of each forward pass of a step; each epoch takes all, in an order of its own."""
        settings, number = self._settings, len(self._corpus.blocks)
        size = settings.batch_size * settings.accumulate
        places = range(step * size, (step + 1) * size)
        orders = {
            epoch: _shuffled(number, settings.seed, epoch) for epoch in {place // number for place in places}
        }
        chosen = [orders[place // number][place % number] for place in places]
        for start in range(0, size, settings.batch_size):
            yield chosen[start : start + settings.batch_size]


@lru_cache(maxsize=2)
def _shuffled(number: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return [int(index) for index in torch.randperm(number, generator=generator)]
