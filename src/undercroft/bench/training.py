"""Question: what does spilling save, and what does it cost, against plain and checkpointed training?

It measures and judges; the modes are in `modes`. Every mode trains in a process of its own, and they take
steps in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from undercroft.bench.answer import Answer
from undercroft.bench.modes import (
    CHECKPOINT,
    PLAIN,
    SPILL,
    TUNED,
    WARM_UPS,
    History,
    TrainingSettings,
    cpu,
    differing,
    wall,
    warm_up,
    workers,
)
from undercroft.bench.rounds import Turns, take_turns, until_steady
from undercroft.bench.training_worker import Step
from undercroft.bench.verdict import Line
from undercroft.units import MIB, format_seconds, format_size

_MEMORY_ALLOWED = 0.33
_TIME_ALLOWED = 1.05
_STALL_ALLOWED = 0.02
_WRITTEN_ALLOWED = 1.01

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What was measured.

    Attributes:
        settings: how.
        turns: the measured steps.
        histories: mode → all of its steps.
    """

    settings: TrainingSettings
    turns: Turns[Step]
    histories: Mapping[str, History]

    @property
    def spill(self) -> History:
        """The mode in question."""
        return self.histories[SPILL]

    def above_own(self, mode: str) -> int:
        """Bytes of the third step's peak above what the mode itself holds between steps."""
        return self.histories[mode].peak - self.histories[mode].idle

    def above_plain(self, mode: str) -> int:
        """Bytes of the highest peak above what plain training with the same heap holds between steps."""
        return self.histories[mode].highest_peak - self.histories[TUNED].idle

    @property
    def plain_activations(self) -> int:
        """What plain training needs, with whichever heap needs less."""
        return min(self.above_own(PLAIN), self.above_own(TUNED))


def measure_training(settings: TrainingSettings, progress: Progress) -> Answer:
    """Train in every mode; `rounds` + 3 steps each.

    Raises:
        WorkerEnded: a mode could not be trained; a budget too small, for example.
    """
    with workers(settings) as running:
        progress(f"{WARM_UPS} steps of each of {', '.join(running)}, to warm up")
        steps = warm_up(running)
        ways = {mode: worker.step for mode, worker in running.items()}

        def take() -> Turns[Step]:
            turns = take_turns(
                ways,
                rounds=settings.rounds,
                on_round=lambda number: progress(f"training: round {number}/{settings.rounds}"),
            )
            for mode, taken in turns.samples.items():
                steps[mode].extend(taken)
            return turns

        turns = until_steady(take, PLAIN, wall, attempts=settings.attempts)
    histories = {mode: History(steps=tuple(taken)) for mode, taken in steps.items()}
    return _answer(Trained(settings=settings, turns=turns, histories=histories))


def _answer(trained: Trained) -> Answer:
    head = ("", "peak", "of plain", "above plain's idle", "wall", "CPU", "system", "faults", "losses equal")
    return Answer(
        theme="training",
        question="Does training whose activations spill to disk need a fraction of the memory, with the same "
        "losses and no lost time?",
        falsified_by="a loss that differs in one bit, a peak that does not fall with the activations, or a "
        "step that takes longer or costs more CPU than plain training's.",
        head=head,
        rows=tuple(_row(trained, mode) for mode in trained.histories),
        lines=(*_memory_lines(trained), *_time_lines(trained), *_traffic_lines(trained)),
        notes=_notes(trained),
        figures=_figures(trained),
    )


def _memory_lines(trained: Trained) -> list[Line]:
    plain = trained.plain_activations
    own, strict = trained.above_own(SPILL) / plain, trained.above_plain(SPILL) / plain
    plain_losses = trained.histories[PLAIN]
    return [
        Line(
            claim="peak memory of activations over plain, the stricter counting",
            found=max(own, strict),
            bound=_MEMORY_ALLOWED,
            note=f"above its own idle {own:.3f}, highest peak above plain's idle {strict:.3f}",
        ),
        Line(
            claim="most bytes counted at any instant",
            found=(trained.spill.last("peak_nbytes") or 0) / MIB,
            bound=trained.settings.budget / MIB,
            unit=" MiB",
        ),
        Line(
            claim="losses that differ from plain in any bit, all modes and steps",
            found=sum(differing(each, plain_losses) for each in trained.histories.values()),
            bound=0,
            note=f"of {sum(len(each.steps) for each in trained.histories.values())}",
        ),
    ]


def _time_lines(trained: Trained) -> list[Line]:
    against = [
        ("CPU", cpu, PLAIN, _TIME_ALLOWED),
        ("CPU", cpu, TUNED, _TIME_ALLOWED),
        ("wall", wall, PLAIN, _TIME_ALLOWED),
        ("wall", wall, TUNED, _TIME_ALLOWED),
        ("wall", wall, CHECKPOINT, 1.0),
        ("CPU", cpu, CHECKPOINT, 1.0),
    ]
    return [_time_line(trained.turns, *each) for each in against]


def _time_line(
    turns: Turns[Step], name: str, figure: Callable[[Step], float], mode: str, bound: float
) -> Line:
    ratio = turns.ratio(SPILL, mode, figure)
    claim = f"{name} seconds over {mode}"
    return Line(
        claim=claim, found=ratio.median, bound=bound, note=str(ratio), void=turns.why_void(mode, figure)
    )


def _traffic_lines(trained: Trained) -> list[Line]:
    stalled = trained.turns.spread(SPILL, lambda step: step.stall / step.used.wall)
    pairs = zip(
        trained.spill.per_step("written_nbytes"), trained.spill.per_step("unique_nbytes"), strict=True
    )
    return [
        Line(
            claim="share of a step spent waiting for the disk",
            found=stalled.median,
            bound=_STALL_ALLOWED,
            note=str(stalled),
            void=trained.turns.why_void(PLAIN, wall),
        ),
        Line(
            claim="bytes written over unique bytes saved, worst step from the second on",
            found=max(written / unique for written, unique in pairs),
            bound=_WRITTEN_ALLOWED,
        ),
    ]


def _row(trained: Trained, mode: str) -> tuple[str, ...]:
    turns, history = trained.turns, trained.histories[mode]
    same = differing(history, trained.histories[PLAIN]) == 0
    return (
        mode,
        format_size(trained.above_own(mode)),
        f"{trained.above_own(mode) / trained.plain_activations:.0%}",
        format_size(trained.above_plain(mode)),
        format_seconds(turns.spread(mode, wall).median),
        format_seconds(turns.spread(mode, cpu).median),
        format_seconds(turns.spread(mode, lambda step: step.used.system).median),
        f"{turns.spread(mode, lambda step: step.used.faults).median:.0f}",
        "yes" if same else "NO",
    )


def _notes(trained: Trained) -> tuple[str, ...]:
    settings, spill = trained.settings, trained.spill
    shape = settings.shape
    return (
        f"{shape.layers} layers, hidden {shape.hidden}, sequence {shape.sequence}, batch {shape.batch}, "
        f"vocabulary {shape.vocabulary}, fp32, {settings.threads} threads; budget {format_size(settings.budget)}; "
        f"medians of {settings.rounds} steps, forward and backward; peak is above each mode's own idle",
        _saved_note(spill),
        _plan_note(spill),
        _logits_note(trained),
    )


def _saved_note(spill: History) -> str:
    saved, excluded, unique, written = (
        spill.per_step(f"{name}_nbytes")[-1] for name in ("saved", "excluded", "unique", "written")
    )
    shared = 1 - unique / (saved - excluded) if saved > excluded else 0.0
    return (
        f"a step saves {format_size(saved)}: {format_size(excluded)} are parameters, the rest is "
        f"{format_size(unique)} of storage ({shared:.0%} shared); {format_size(written)} are written"
    )


def _plan_note(spill: History) -> str:
    peak, stall = spill.last("planned_peak_nbytes"), spill.last("planned_stall_seconds")
    if peak is None or stall is None:
        return "no plan was made"
    stalled = sorted(step.stall for step in spill.steps[WARM_UPS:])
    return (
        f"planned peak {format_size(peak)}, counted {format_size(spill.last('peak_nbytes') or 0)} (first step "
        f"included); planned stall {format_seconds(stall)} a step, measured "
        f"{format_seconds(stalled[len(stalled) // 2])}; {spill.last('plans')} plans; "
        f"least budget {format_size(spill.last('least_budget') or 0)}"
    )


def _logits_note(trained: Trained) -> str:
    shape = trained.settings.shape
    logits = 4 * shape.batch * shape.sequence * shape.vocabulary
    return (
        f"the logits' tail cannot be spilled: one copy is {format_size(logits)}, "
        f"{logits / trained.plain_activations:.0%} of plain's activations, and the loss's backward holds three"
    )


def _figures(trained: Trained) -> dict[str, Any]:
    settings = asdict(trained.settings)
    return {
        "settings": {**settings, "directory": settings["directory"] and str(settings["directory"])},
        "attempts": trained.turns.attempts,
        "modes": {
            mode: {
                "above_own_idle": trained.above_own(mode),
                "above_plain_idle": trained.above_plain(mode),
                "steps": [asdict(step) for step in history.steps],
            }
            for mode, history in trained.histories.items()
        },
    }
