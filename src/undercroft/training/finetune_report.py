"""What a fine-tuning run did, in numbers, ready for JSON."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from undercroft.training.report import SpillReport

_PACKAGES = ("undercroft", "torch", "transformers", "peft")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step that has ended.

    Attributes:
        step: its number, from 1.
        steps: how many there will be.
        loss: its loss, in nats per counted token.
        tokens_per_second: tokens of all sequences, by the time of the step.
        live_nbytes: bytes of activations held in memory where forward turned to backward.
        spill: totals of the spill so far, or None where nothing is spilled.
    """

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    live_nbytes: int
    spill: SpillReport | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneReport:
    """A run that has ended.

    Attributes:
        steps: optimizer steps done, those before a resume included.
        losses: the loss of each.
        weights: a hash of all trained weights at the end; equal hashes are equal bits.
        trained: how many parameters were trained.
        tokens_per_second: tokens of all sequences, over the steps of this process.
        seconds_per_step, cpu_seconds_per_step: medians once settled, or None where no step was timed.
        peak_nbytes: memory of the last step above what is held between steps, or None where not measured.
        loss_counts: in words, which tokens the loss counts.
        left_out: tokens at the end of the data that filled no sequence.
        spill: totals of the spill, or None where nothing was spilled.
        settings: as they were given.
        versions: of Python and the packages that matter.
    """

    steps: int
    losses: list[float]
    weights: str
    trained: int
    tokens_per_second: float
    seconds_per_step: float | None
    cpu_seconds_per_step: float | None
    peak_nbytes: int | None
    loss_counts: str
    left_out: int
    spill: SpillReport | None
    settings: dict[str, Any]
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FinetuneReport:
        """The inverse of `as_dict`."""
        spill: dict[str, Any] | None = values["spill"]
        given: dict[str, Any] = {**values, "spill": spill and SpillReport(**spill)}
        return cls(**given)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
