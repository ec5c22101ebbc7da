"""What a spill did, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from undercroft.units import format_seconds, format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class SpillReport:
    """Totals since the spill was made. Bytes unless the name says otherwise.

    Attributes:
        steps: finished steps.
        saved_nbytes: bytes of all tensors that autograd saved, as if each view were a copy.
        unique_nbytes: bytes of the different storages behind them, without what was excluded.
        excluded_nbytes: bytes of saved views over parameters, buffers and what outlives steps: never written.
        kept: saved tensors kept by reference, by reason.
        spilled_nbytes: bytes of storages written.
        written_nbytes: bytes that went to the disk for them, alignment included.
        read_nbytes: bytes of storages read back.
        forwarded_nbytes: bytes handed back from memory without a read.
        live_nbytes: bytes held now: activations, writes in flight and read buffers.
        peak_nbytes: the most ever held at once.
        budget: the most allowed.
        stall_seconds: time that training waited for the disk.
        step_seconds: time of all finished steps, stalls included.
        planned_peak_nbytes: the most bytes the plan expects to hold, or None before there is a plan.
        planned_stall_seconds: how long the plan expects a step to wait for the disk, or None likewise.
        least_budget: the smallest budget the recorded step could be trained with, or None before one was recorded.
        plans: how often a plan was made.
    """

    steps: int
    saved_nbytes: int
    unique_nbytes: int
    excluded_nbytes: int
    kept: dict[str, int]
    spilled_nbytes: int
    written_nbytes: int
    read_nbytes: int
    forwarded_nbytes: int
    live_nbytes: int
    peak_nbytes: int
    budget: int
    stall_seconds: float
    step_seconds: float
    planned_peak_nbytes: int | None
    planned_stall_seconds: float | None
    least_budget: int | None
    plans: int

    @property
    def shared_fraction(self) -> float:
        """Share of the saved bytes that needed no copy because another view of the same storage was saved."""
        saved = self.saved_nbytes - self.excluded_nbytes
        return 1 - self.unique_nbytes / saved if saved else 0.0

    @property
    def stall_fraction(self) -> float:
        """Share of the time of finished steps that was spent waiting for the disk."""
        return self.stall_seconds / self.step_seconds if self.step_seconds else 0.0

    def as_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.steps} steps, saved {format_size(self.saved_nbytes)} "
            f"in {format_size(self.unique_nbytes)} of storage",
            f"spilled {format_size(self.spilled_nbytes)}, read {format_size(self.read_nbytes)}, "
            f"forwarded {format_size(self.forwarded_nbytes)}",
            f"held at most {format_size(self.peak_nbytes)} of {format_size(self.budget)}",
            f"stalled {format_seconds(self.stall_seconds)} ({self.stall_fraction:.2%})",
        ]
        if self.planned_peak_nbytes is not None and self.planned_stall_seconds is not None:
            lines.append(
                f"the plan predicts {format_size(self.planned_peak_nbytes)} held "
                f"and {format_seconds(self.planned_stall_seconds)} stalled per step"
            )
        return "\n".join(lines)
