"""The same run with activations kept, recomputed per layer, and spilled: what each costs, and if it is equal.

It knows reports and ratios, not how a run is made. Two runs are equal if every loss and every trained weight
has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from undercroft.training.finetune_report import FinetuneReport
from undercroft.training.settings import Activations, FinetuneSettings
from undercroft.training.trial import OnTrialStep, Trial, run_trial

WAYS: tuple[Activations, ...] = ("keep", "recompute", "spill")
_NAMES: dict[Activations, str] = {"keep": "plain", "recompute": "checkpointed", "spill": "spilled"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to run, beside the plain one.

    Attributes:
        name: "plain", "checkpointed" or "spilled".
        failure: why there are no numbers, or None.
        peak_nbytes: memory above what is held between steps.
        fraction: of plain's.
        seconds_per_step, cpu_seconds_per_step: medians.
        equal: whether all losses and trained weights have the bits of plain's; None without both.
        spilled_nbytes: written over the whole run.
        stall_fraction: share of the time that was spent waiting for the disk.
    """

    name: str
    failure: str | None
    peak_nbytes: int | None = None
    fraction: float | None = None
    seconds_per_step: float | None = None
    cpu_seconds_per_step: float | None = None
    equal: bool | None = None
    spilled_nbytes: int | None = None
    stall_fraction: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def compare(
    settings: FinetuneSettings,
    *,
    ways: Sequence[Activations] = WAYS,
    known: FinetuneReport | None = None,
    watch: Callable[[str], OnTrialStep | None] | None = None,
) -> tuple[Row, ...]:
    """Run the same settings in several ways, one process after the other, and write nothing.

    Args:
        settings: the run; `activations`, `output` and `resume` do not matter.
        ways: which ways to run.
        known: a run of the way "spill" that was made already, with memory measured.
        watch: called with a way's name before it runs; gives what is called after each of its steps.

    Returns:
        A row for each way, and for `known`.
    """
    trials: dict[Activations, Trial] = {}
    for way in ways:
        asked = replace(
            settings, activations=way, output=None, resume=False, save_every=0, measure_memory=True
        )
        trials[way] = run_trial(asked, on_step=watch(_NAMES[way]) if watch is not None else None)
    if known is not None:
        trials["spill"] = Trial(settings=settings, report=known, failure=None)
    plain = trials["keep"].report if "keep" in trials else None
    return tuple(_row(way, trial, plain) for way, trial in trials.items())


def _row(way: Activations, trial: Trial, plain: FinetuneReport | None) -> Row:
    report = trial.report
    if report is None:
        return Row(name=_NAMES[way], failure=trial.failure)
    spill = report.spill
    return Row(
        name=_NAMES[way],
        failure=None,
        peak_nbytes=report.peak_nbytes,
        fraction=_ratio(report.peak_nbytes, plain and plain.peak_nbytes),
        seconds_per_step=report.seconds_per_step,
        cpu_seconds_per_step=report.cpu_seconds_per_step,
        equal=_equal(report, plain),
        spilled_nbytes=spill and spill.spilled_nbytes,
        stall_fraction=spill and spill.stall_fraction,
    )


def _ratio(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def _equal(report: FinetuneReport, plain: FinetuneReport | None) -> bool | None:
    if plain is None:
        return None
    return report.losses == plain.losses and report.weights == plain.weights
