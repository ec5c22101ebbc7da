"""Question: do packed weights multiply at the rate at which memory can be read, and faster than PyTorch's own kernels?

It measures and judges; the ways to multiply are in `products`. All ways take turns in one process, on the same number
of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from undercroft import kernels
from undercroft.bench.answer import Answer
from undercroft.bench.products import OURS, READ, Product, Sample, products, sample
from undercroft.bench.rounds import Turns, take_turns, until_steady
from undercroft.bench.verdict import Line
from undercroft.errors import InvalidInput
from undercroft.units import MIB

_OF_READ_RATE = 0.75
# Ours, PyTorch's own of the same bytes, and how many times faster ours must be at batch 1 and at larger batches.
_PEERS = (
    ("int8", "torch int8", 1.1, 2.0),
    ("int4", "torch int4-g32", 1.4, 2.4),
    ("int4-g128", "torch int4-g128", 1.4, 2.4),
)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSettings:
    """How to measure the kernels.

    Attributes:
        shapes: rows and columns of the weights; columns are a multiple of 128, rows of 64.
        batches: rows of activations.
        threads: of every way.
        working_set: bytes of copies of a weight that a way walks through; more than the caches hold.
        rounds: samples of each way.
        attempts: how often rounds are taken until the yardstick is steady.
    """

    shapes: tuple[tuple[int, int], ...] = ((14336, 4096), (2048, 768))
    batches: tuple[int, ...] = (1, 32)
    threads: int = 2
    working_set: int = 160 * MIB
    rounds: int = 11
    attempts: int = 3

    def __post_init__(self) -> None:
        if min(self.threads, self.working_set, self.rounds, self.attempts, *self.batches) < 1:
            raise InvalidInput("threads, batches, bytes, rounds and attempts must be at least 1")
        for rows, columns in self.shapes:
            if rows < 1 or columns < 1 or rows % 64 or columns % 128:
                raise InvalidInput(
                    f"a weight of {rows}x{columns} cannot be compared: torch's int4 wants rows in multiples of 64, "
                    "groups of 128 columns in multiples of 128"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One shape at one batch: what a product took, in each way."""

    rows: int
    columns: int
    batch: int
    turns: Turns[Sample]

    @property
    def name(self) -> str:
        """Shape and batch."""
        return f"{self.rows}x{self.columns}, batch {self.batch}"

    def operations(self, taken: Sample) -> float:
        """Multiplications and additions per second."""
        return 2 * self.batch * self.rows * self.columns / taken.seconds


def measure_kernels(settings: KernelSettings, progress: Progress) -> Answer:
    """Measure every shape at every batch; takes about three minutes on two cores."""
    with _threads(settings.threads):
        return _answer(settings, list(_measure_all(settings, progress)))


@contextmanager
def _threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure_all(settings: KernelSettings, progress: Progress) -> Iterator[Measured]:
    for rows, columns in settings.shapes:
        progress(f"{rows}x{columns}: weights")
        ways = products(rows, columns, settings.working_set)
        for batch in settings.batches:
            take = partial(_take, ways, batch, columns, settings, progress)
            turns = until_steady(take, READ, _seconds, attempts=settings.attempts)
            yield Measured(rows=rows, columns=columns, batch=batch, turns=turns)


def _take(
    ways: dict[str, Product], batch: int, columns: int, settings: KernelSettings, progress: Progress
) -> Turns[Sample]:
    samples = {name: partial(sample, product, batch, columns) for name, product in ways.items()}
    take_turns(samples, rounds=1)
    return take_turns(
        samples,
        rounds=settings.rounds,
        on_round=lambda number: progress(f"batch {batch}: round {number}/{settings.rounds}"),
    )


def _answer(settings: KernelSettings, measured: list[Measured]) -> Answer:
    return Answer(
        theme="kernels",
        question="Do packed weights multiply as fast as memory is read, and faster than PyTorch's own kernels?",
        falsified_by="at batch 1 a rate of weight bytes below 0.75 of what a dense float32 product reads; or, at any "
        "batch, PyTorch's int8 or int4 kernel nearer to ours than the claims allow.",
        head=("", "way", "ms", "p10", "p90", "GB/s", "GFLOP/s", "of read rate"),
        rows=tuple(_row(each, way) for each in measured for way in each.turns.samples),
        lines=tuple(line for each in measured for line in _lines(each)),
        notes=(
            f"{settings.rounds} rounds, {settings.threads} threads, {kernels.backend()}; every way walks through "
            f"copies of {settings.working_set / MIB:.0f} MiB; GB/s counts weights and their scales",
            "PyTorch's own and ours take bfloat16 activations, the dense product float32",
        ),
        figures=_figures(settings, measured),
    )


def _lines(each: Measured) -> Iterator[Line]:
    if each.batch == 1:
        yield from (_of_read_rate(each, way) for way in OURS if way.startswith(("int8", "int4")))
    for ours, peer, alone, together in _PEERS:
        yield _sooner(each, ours, peer, alone if each.batch == 1 else together)


def _of_read_rate(each: Measured, way: str) -> Line:
    ratio = each.turns.ratio(way, READ, _rate)
    return Line(
        claim=f"{each.name}: {way}, bytes per second over a dense product's",
        found=ratio.median,
        bound=_OF_READ_RATE,
        relation=">=",
        note=str(ratio),
        void=each.turns.why_void(READ, _seconds),
    )


def _sooner(each: Measured, ours: str, peer: str, bound: float) -> Line:
    ratio = each.turns.ratio(peer, ours, _seconds)
    return Line(
        claim=f"{each.name}: {ours}, times faster than {peer}",
        found=ratio.median,
        bound=bound,
        relation=">=",
        note=str(ratio),
        void=each.turns.why_void(peer, _seconds),
    )


def _row(each: Measured, way: str) -> tuple[str, ...]:
    seconds = each.turns.spread(way, _seconds)
    times = (f"{value * 1e3:.3f}" for value in (seconds.median, seconds.p10, seconds.p90))
    rate, operations = each.turns.spread(way, _rate), each.turns.spread(way, each.operations)
    share = each.turns.ratio(way, READ, _rate).median
    return (
        each.name,
        way,
        *times,
        f"{rate.median / 1e9:.1f}",
        f"{operations.median / 1e9:.0f}",
        f"{share:.2f}",
    )


def _figures(settings: KernelSettings, measured: list[Measured]) -> dict[str, Any]:
    return {
        "settings": asdict(settings),
        "backend": kernels.backend(),
        "cases": [
            {
                "rows": each.rows,
                "columns": each.columns,
                "batch": each.batch,
                "attempts": each.turns.attempts,
                "nbytes": {way: taken[0].nbytes for way, taken in each.turns.samples.items()},
                "seconds": {way: [one.seconds for one in taken] for way, taken in each.turns.samples.items()},
            }
            for each in measured
        ],
    }


def _seconds(taken: Sample) -> float:
    return taken.seconds


def _rate(taken: Sample) -> float:
    return taken.rate
