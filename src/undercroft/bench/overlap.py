"""Question: while experts are streamed, does the machine read and compute at the same time, and pay for nothing else?

It measures and judges; what is driven is in `workload`, the ways to go through it in `driving`. There is no
attention and no other dense part, so that nothing but experts is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from undercroft import kernels, machine
from undercroft.bench.answer import Answer
from undercroft.bench.driving import DOCTOR, IN_MEMORY, READS, RESIDENT, STREAMED, Pass, driving
from undercroft.bench.rounds import Turns, take_turns, until_steady
from undercroft.bench.verdict import Line
from undercroft.bench.workload import SKEW, STICKINESS, Workload, plan_workload
from undercroft.errors import InvalidInput
from undercroft.moe.random_experts import ExpertShape, random_experts
from undercroft.moe.trace import Trace
from undercroft.units import GIB, MIB, format_rate, format_size

_OVER_LONGER = 1.15
_OF_CEILING = 0.85
_OVER_RESIDENT = 1.10
_HITS = (0.45, 0.55)
_LONGER = "the longer of reading and computing"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapSettings:
    """How to measure.

    Attributes:
        directory: on the disk to read from.
        trace: path of a CSV file whose decoding is driven; None for a synthetic one.
        kinds: of the experts, each measured by itself: "bfloat16", "int8" or "int4".
        hidden: width of the activations.
        intermediate: width within an expert.
        layers: at most; fewer where more would exceed `nbytes`.
        experts: in a layer of the synthetic trace.
        used: by a token of the synthetic trace.
        tokens: decoded in a pass.
        nbytes: of the experts of a kind, at most; so much memory is needed, and the budget besides.
        policy: which expert leaves first.
        rounds: passes of each way.
        attempts: how often rounds are taken until the reads alone are steady.
    """

    directory: Path
    trace: str | os.PathLike[str] | None = None
    kinds: tuple[str, ...] = ("bfloat16", "int4")
    hidden: int = 2048
    intermediate: int = 768
    layers: int = 8
    experts: int = 64
    used: int = 8
    tokens: int = 32
    nbytes: int = 2 * GIB
    policy: str = "expected-use"
    rounds: int = 5
    attempts: int = 2

    def __post_init__(self) -> None:
        if min(self.tokens, self.rounds, self.attempts, self.used) < 1 or self.layers < 2:
            raise InvalidInput("tokens, rounds, attempts and used must be at least 1, layers at least 2")


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What was measured, and on what."""

    work: Workload
    direct: bool
    turns: Turns[Pass]

    @property
    def hit_rate(self) -> float:
        """Median of the streamed passes."""
        return self.turns.spread(STREAMED, _hit_rate).median


def measure_overlap(settings: OverlapSettings, progress: Progress) -> Answer:
    """Measure each kind; takes two minutes on two cores and a disk of 1.5 GB/s.

    Raises:
        InvalidInput: settings, or a trace, that cannot be meant.
        UnsafeDirectory, TierFull, TransferFailed: the disk cannot be used.
    """
    machine.disk(settings.directory)
    given = None if settings.trace is None else Trace.read(settings.trace)
    return _answer(settings, [_measure(settings, kind, given, progress) for kind in settings.kinds])


def _measure(settings: OverlapSettings, kind: str, given: Trace | None, progress: Progress) -> Measured:
    work = _workload(settings, kind, given)
    progress(f"{kind}: {format_size(work.shape.nbytes)} of experts, {format_size(work.budget)} in memory")
    with (
        TemporaryDirectory(prefix="bench-", dir=settings.directory) as place,
        random_experts(Path(place) / "experts", work.shape) as experts,
        driving(
            experts,
            work,
            policy=settings.policy,
            directory=settings.directory,
        ) as ways,
    ):
        take = partial(_take, ways, settings, progress)
        turns = until_steady(take, READS, _wall, attempts=settings.attempts)
        return Measured(work=work, direct=all(file.direct for file in experts.files), turns=turns)


def _workload(settings: OverlapSettings, kind: str, given: Trace | None) -> Workload:
    like = ExpertShape(
        layers=settings.layers,
        experts=settings.experts,
        hidden=settings.hidden,
        intermediate=settings.intermediate,
        high=kind,
    )
    return plan_workload(
        like,
        given,
        used=settings.used,
        tokens=settings.tokens,
        nbytes=settings.nbytes,
        policy=settings.policy,
    )


def _take(ways: dict[str, Callable[[], Pass]], settings: OverlapSettings, progress: Progress) -> Turns[Pass]:
    return take_turns(
        ways,
        rounds=settings.rounds,
        on_round=lambda number: progress(f"round {number}/{settings.rounds}"),
    )


def _answer(settings: OverlapSettings, measured: list[Measured]) -> Answer:
    return Answer(
        theme="overlap",
        question="Does streaming experts take as long as the longer of reading and computing, and no longer?",
        falsified_by="a trace that hits every other expert and takes 1.15 times the longer of its reads alone and its "
        "products alone; reads slower than the disk allows; or products that cost more CPU because an engine serves.",
        head=("", "way", "seconds", "p10", "p90", "CPU s", "GB read", "GB/s while reading", "hits"),
        rows=tuple(_row(each, way) for each in measured for way in each.turns.samples if way != DOCTOR),
        lines=tuple(line for each in measured for line in _lines(each)),
        notes=(*map(_note, measured), _conditions(settings, measured)),
        figures=_figures(settings, measured),
    )


def _lines(found: Measured) -> Iterator[Line]:
    for bound, relation in zip(_HITS, (">=", "<="), strict=True):
        yield Line(claim=f"{found.work.name}: hit rate", found=found.hit_rate, bound=bound, relation=relation)
    beside = _beside_longer(found.turns)
    ratio = beside.ratio(STREAMED, _LONGER, float)
    yield Line(
        claim=f"{found.work.name}: seconds over {_LONGER}",
        found=ratio.median,
        bound=_OVER_LONGER,
        note=str(ratio),
        void=_why_void(found) or beside.why_void(_LONGER, float),
    )
    efficiency = found.turns.ratio(STREAMED, DOCTOR, _rate)
    yield Line(
        claim=f"{found.work.name}: bytes per second while reading, of what doctor finds in the same round",
        found=efficiency.median,
        bound=_OF_CEILING,
        relation=">=",
        note=str(efficiency),
        void=_why_void(found) or found.turns.why_void(DOCTOR, _rate),
    )
    cpu = found.turns.ratio(IN_MEMORY, RESIDENT, _cpu)
    yield Line(
        claim=f"{found.work.name}: CPU with everything in memory, over the same products without an engine",
        found=cpu.median,
        bound=_OVER_RESIDENT,
        note=str(cpu),
        void=found.turns.why_void(RESIDENT, _cpu),
    )


def _beside_longer(turns: Turns[Pass]) -> Turns[float]:
    """Seconds of the streamed passes, and of the longer of the two things that they do."""
    alone = zip(turns.samples[READS], turns.samples[RESIDENT], strict=True)
    longer = tuple(max(reads.wall, products.wall) for reads, products in alone)
    streamed = tuple(each.wall for each in turns.samples[STREAMED])
    return Turns(samples={STREAMED: streamed, _LONGER: longer}, attempts=turns.attempts)


def _why_void(found: Measured) -> str:
    if not found.direct:
        return "this file system refuses O_DIRECT, so a page cache would be measured"
    if found.work.record_nbytes < MIB:
        return f"experts of {format_size(found.work.record_nbytes)} are below 1 MiB"
    return "" if _HITS[0] <= found.hit_rate <= _HITS[1] else "the hit rate is not near one half"


def _row(found: Measured, way: str) -> tuple[str, ...]:
    turns = found.turns
    wall, rate = turns.spread(way, _wall), turns.spread(way, _rate).median
    return (
        found.work.name,
        way,
        *(f"{value:.3f}" for value in (wall.median, wall.p10, wall.p90)),
        f"{turns.spread(way, _cpu).median:.3f}",
        f"{turns.spread(way, _nbytes).median / 1e9:.2f}",
        f"{rate / 1e9:.2f}" if rate else "",
        f"{turns.spread(way, _hit_rate).median:.1%}",
    )


def _note(found: Measured) -> str:
    work, shape, ceiling = found.work, found.work.shape, found.turns.spread(DOCTOR, _rate)
    return (
        f"{work.name}: {shape.layers} layers of {shape.experts} random experts of {shape.hidden} x "
        f"{shape.intermediate}, {format_size(work.record_nbytes)} each; {work.tokens} tokens use {work.trace.used} of "
        f"a layer; a budget of {format_size(work.budget)} for {format_size(shape.nbytes)}; doctor finds "
        f"{format_rate(ceiling.median)}"
    )


def _conditions(settings: OverlapSettings, measured: list[Measured]) -> str:
    made = f"a synthetic trace (skew {SKEW}, stickiness {STICKINESS})"
    origin = made if settings.trace is None else f"the trace {Path(settings.trace).name}"
    return (
        f"routed by {origin}, {settings.policy}; {settings.rounds} rounds, {torch.get_num_threads()} threads, "
        f"{machine.readers(settings.directory)} readers, {kernels.backend()}; there is no dense part"
    )


def _figures(settings: OverlapSettings, measured: list[Measured]) -> dict[str, Any]:
    stated = asdict(settings)
    return {
        "settings": {**stated, "directory": None, "trace": settings.trace and Path(settings.trace).name},
        "kinds": {
            each.work.name: {
                "layers": each.work.shape.layers,
                "budget": each.work.budget,
                "record_nbytes": each.work.record_nbytes,
                "experts_nbytes": each.work.shape.nbytes,
                "attempts": each.turns.attempts,
                "passes": {way: [asdict(one) for one in taken] for way, taken in each.turns.samples.items()},
            }
            for each in measured
        },
    }


def _wall(taken: Pass) -> float:
    return taken.wall


def _cpu(taken: Pass) -> float:
    return taken.cpu


def _rate(taken: Pass) -> float:
    return taken.rate


def _nbytes(taken: Pass) -> float:
    return taken.nbytes


def _hit_rate(taken: Pass) -> float:
    return taken.hit_rate
