"""Question: does the store cost anything over plain system calls, and does a demand overtake what is queued?

It measures and judges; the ways to move bytes are in `sequential`, `records` and `demand`. Raw and stored
bytes move in turns, in one process, through the same buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from undercroft import machine
from undercroft.bench.answer import Answer
from undercroft.bench.demand import FIFO, URGENT, demand
from undercroft.bench.process import Usage, usage_of
from undercroft.bench.records import records
from undercroft.bench.rig import Case, Rig, set_up
from undercroft.bench.rounds import Turns, spread, take_turns, until_steady
from undercroft.bench.sequential import sequential
from undercroft.bench.verdict import Line
from undercroft.errors import InvalidInput
from undercroft.units import GIB, MIB, format_rate, format_seconds

_GB = 1e9
_CPU_ALLOWED = 0.06
_CPU_RATIO_ALLOWED = 1.5
_CHECKSUM_ALLOWED = 0.15
_SOONER = 10.0
_RECORD_SIZES = (16 * MIB, 8 * MIB, 4 * MIB, MIB)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """How to measure the store.

    Attributes:
        directory: on the disk to measure.
        nbytes: that each way moves in a round.
        queued: of prefetch, before a demand.
        rounds: samples of each way.
        attempts: how often rounds are taken until the raw loop is steady.
        depth: I/O threads, of the store and of the raw loop.
    """

    directory: Path
    nbytes: int = 512 * MIB
    queued: int = GIB
    rounds: int = 7
    attempts: int = 3
    depth: int = 2

    def __post_init__(self) -> None:
        if min(self.nbytes, self.queued, self.rounds, self.attempts, self.depth) < 1:
            raise InvalidInput("bytes, rounds, attempts and depth must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A case and what its ways used."""

    case: Case
    turns: Turns[Usage]

    def rate(self, way: str) -> float:
        """Median bytes per second."""
        return self.case.nbytes / self.turns.spread(way, _wall).median

    def cpu(self, way: str) -> float:
        """Median CPU seconds per 10^9 bytes."""
        return self.turns.spread(way, _cpu).median / self.case.nbytes * _GB

    def why_void(self, figure: Callable[[Usage], float]) -> str:
        """Why the raw loop is no yardstick in a figure; empty where it is."""
        if not self.case.direct:
            return "this file system refuses O_DIRECT, so page caches would be compared"
        return self.turns.why_void("raw", figure)


def measure_store(settings: StoreSettings, progress: Progress) -> Answer:
    """Measure everything; takes a minute or two on a disk of 1 GB/s.

    Raises:
        UnsafeDirectory: the directory is missing or cannot be used.
        TierFull: it has no room for three times `nbytes`.
    """
    with set_up(settings.directory, depth=settings.depth) as rig:
        measured = [
            _measure(case, settings, progress) for cases in _all_cases(rig, settings) for case in _each(cases)
        ]
        waits = _measure_demand(rig, settings, progress)
    return _answer(settings, measured, waits)


def _all_cases(rig: Rig, settings: StoreSettings) -> Iterator[AbstractContextManager[tuple[Case, ...]]]:
    yield sequential(rig, settings.nbytes)
    for size in _RECORD_SIZES:
        yield _alone(records(rig, settings.nbytes, size))


@contextmanager
def _alone(case: AbstractContextManager[Case]) -> Generator[tuple[Case]]:
    with case as only:
        yield (only,)


def _each(cases: AbstractContextManager[tuple[Case, ...]]) -> Iterator[Case]:
    with cases as ready:
        yield from ready


def _measure(case: Case, settings: StoreSettings, progress: Progress) -> Measured:
    ways = {name: partial(usage_of, move) for name, move in case.ways.items()}

    def take() -> Turns[Usage]:
        progress(f"{case.name}: warming up")
        take_turns(ways, rounds=1)
        return take_turns(
            ways,
            rounds=settings.rounds,
            on_round=lambda number: progress(f"{case.name}: round {number}/{settings.rounds}"),
        )

    return Measured(case=case, turns=until_steady(take, "raw", _wall, attempts=settings.attempts))


def _measure_demand(rig: Rig, settings: StoreSettings, progress: Progress) -> Turns[float]:
    with demand(rig, settings.queued) as ways:

        def take() -> Turns[float]:
            progress("a demand behind queued prefetch")
            return take_turns(ways, rounds=settings.rounds)

        return until_steady(take, FIFO, float, attempts=settings.attempts)


def _answer(settings: StoreSettings, measured: list[Measured], waits: Turns[float]) -> Answer:
    sooner = waits.ratio(FIFO, URGENT, float)
    lines = [line for each in measured for line in (_rate(each), _cpu_line(each), _checksums(each))]
    lines.append(
        Line(
            claim="a demand read behind queued prefetch completes sooner, times",
            found=sooner.median,
            bound=_SOONER,
            relation=">=",
            note=str(sooner),
            void=waits.why_void(FIFO, float),
        )
    )
    return Answer(
        theme="store",
        question="Does the store move bytes as fast, and with as little CPU, as plain O_DIRECT system calls?",
        falsified_by="a raw loop with the same buffers, chunks and calls in flight that is faster by more "
        "than the claims allow, or a demand that waits its turn behind prefetch.",
        head=("", "raw", "one call", "store", "checksums", "store/raw", "CPU raw", "CPU store", "CPU checks"),
        rows=tuple(map(_row, measured)),
        lines=tuple(lines),
        notes=(
            f"{settings.rounds} rounds of {settings.nbytes / MIB:.0f} MiB, {settings.depth} calls in flight, "
            f"on {settings.directory} ({machine.disk(settings.directory).file_system}); CPU seconds per GB",
            f"a demand behind {settings.queued / MIB:.0f} MiB of prefetch waits "
            f"{format_seconds(waits.spread(URGENT, float).median)}; first in, first out "
            f"{format_seconds(waits.spread(FIFO, float).median)}",
        ),
        figures=_figures(settings, measured, waits),
    )


def _rate(each: Measured) -> Line:
    ratio = each.turns.ratio("raw", "store", _wall)
    return Line(
        claim=f"{each.case.name}: rate over raw",
        found=ratio.median,
        bound=each.case.enough,
        relation=">=",
        note=str(ratio),
        void=each.why_void(_wall),
    )


def _cpu_line(each: Measured) -> Line:
    found, raw = each.cpu("store"), each.cpu("raw")
    allowed_by_raw = _CPU_RATIO_ALLOWED * raw
    return Line(
        claim=f"{each.case.name}: own CPU",
        found=found,
        bound=max(_CPU_ALLOWED, allowed_by_raw),
        unit=" s/GB",
        note=f"raw {raw:.3f}",
        void=each.why_void(_cpu) if max(found, allowed_by_raw) > _CPU_ALLOWED else "",
    )


def _checksums(each: Measured) -> Line:
    pairs = zip(each.turns.samples["checksums"], each.turns.samples["store"], strict=True)
    more = spread([(checked.cpu - plain.cpu) / each.case.nbytes * _GB for checked, plain in pairs])
    return Line(
        claim=f"{each.case.name}: CPU that checksums add",
        found=more.median,
        bound=_CHECKSUM_ALLOWED,
        unit=" s/GB",
        note=str(more),
    )


def _row(each: Measured) -> tuple[str, ...]:
    rates = [
        format_rate(each.rate(way)) if way in each.turns.samples else ""
        for way in ("raw", "one call", "store", "checksums")
    ]
    ratio = f"{each.turns.ratio('raw', 'store', _wall).median:.2f}"
    cpu = [f"{each.cpu(way):.3f}" for way in ("raw", "store", "checksums")]
    return (each.case.name, *rates, ratio, *cpu)


def _figures(settings: StoreSettings, measured: list[Measured], waits: Turns[float]) -> dict[str, Any]:
    return {
        "settings": {**asdict(settings), "directory": str(settings.directory)},
        "cases": [
            {
                "name": each.case.name,
                "nbytes": each.case.nbytes,
                "attempts": each.turns.attempts,
                "ways": {way: [asdict(used) for used in taken] for way, taken in each.turns.samples.items()},
            }
            for each in measured
        ],
        "demand_seconds": {way: list(taken) for way, taken in waits.samples.items()},
    }


def _wall(used: Usage) -> float:
    return used.wall


def _cpu(used: Usage) -> float:
    return used.cpu
