"""Question: when does it pay to read experts before they are wanted?

A model writes the same text with prediction and without, in turns, from disks that are slowed down until their reads
take so many times as long as everything else does. It knows models and disks; not how predictions are made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from undercroft.bench.answer import Answer
from undercroft.bench.rounds import Turns, take_turns
from undercroft.bench.verdict import Line
from undercroft.bundled import model_folder
from undercroft.errors import InvalidInput
from undercroft.moe.engine import ExpertReport
from undercroft.moe.governor import Governor, Totals
from undercroft.moe.load import engine_of, expert_report, load_moe
from undercroft.testing import SlowDisk
from undercroft.units import format_size

COMPARABLE, SATURATED = 1.0, 20.0
_MOST_WHERE_COMPARABLE = 0.95
_MOST_WHERE_SATURATED = 1.03
_MOST_LOOKING = 0.25
_PROMPT = tuple(range(10, 26))

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchSettings:
    """What to measure.

    Attributes:
        model: folder of a checkpoint, or its name on the hub; None for the bundled one.
        share: of the bytes of all experts that may be in memory.
        reads: seconds that the reads of a token take, for each second of everything else: a disk each.
        tokens: that are written in a sample.
        rounds: samples of each way, from each disk.
    """

    model: str | None = None
    share: float = 0.3
    reads: tuple[float, ...] = (0.3, COMPARABLE, 3.0, SATURATED)
    tokens: int = 96
    rounds: int = 7

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or min(self.reads, default=0) <= 0 or self.tokens < 2 or self.rounds < 1:
            raise InvalidInput(f"nothing can be compared so: {self}")


class Sample(NamedTuple):
    """Some tokens: what each took in seconds, which they were, and the governor's depth at each."""

    seconds: float
    text: tuple[int, ...]
    depths: tuple[int, ...]


class _Noted(Governor):
    """A governor that remembers how deep it looked."""

    def __init__(self) -> None:
        super().__init__()
        self.depths: list[int] = []

    def turn(self, totals: Totals) -> None:
        super().turn(totals)
        self.depths.append(self.depth)


class _Writer:
    """A model that writes."""

    def __init__(self, settings: PrefetchSettings, budget: int, *, rate: float | None, ahead: bool) -> None:
        self._governor, self._tokens = _Noted(), settings.tokens
        self.model: Any = load_moe(
            settings.model or model_folder("moe"),
            budget,
            prefetch=self._governor if ahead else False,
            syscalls=None if rate is None else SlowDisk(rate),
        )

    def __call__(self) -> Sample:
        torch.manual_seed(0)
        self._governor.depths.clear()
        began = time.perf_counter()
        out = self.model.generate(
            torch.tensor([_PROMPT]),
            max_new_tokens=self._tokens,
            min_new_tokens=self._tokens,
            do_sample=True,
            pad_token_id=0,
        )
        seconds = (time.perf_counter() - began) / self._tokens
        return Sample(seconds, tuple(out[0].tolist()), tuple(self._governor.depths))

    def read(self) -> int:
        """Bytes read so far."""
        return expert_report(self.model).read_nbytes


class Found(NamedTuple):
    """What one disk gave."""

    reads: float
    rate: float
    turns: Turns[Sample]
    without: ExpertReport
    ahead: ExpertReport

    @property
    def looking(self) -> float:
        """Share of the tokens before which it looked ahead at all."""
        depths = [depth for sample in self.turns.samples["ahead"] for depth in sample.depths]
        return sum(map(bool, depths)) / len(depths) if depths else 0.0


def measure_prefetch(settings: PrefetchSettings, progress: Progress) -> Answer:
    """Measure with and without prediction, from each disk.

    Raises:
        InvalidInput, UnsupportedModel, BudgetExceeded: see `load_moe`.
    """
    seconds, nbytes, budget = _calibrate(settings)
    progress(f"without reads a token takes {seconds * 1e3:.1f} ms; it reads {format_size(int(nbytes))}")
    found = [
        _measure(settings, budget, reads, nbytes / (reads * seconds), progress) for reads in settings.reads
    ]
    return Answer(
        theme="prefetch",
        question="When does it pay to read experts before they are wanted?",
        falsified_by="a disk from which prediction costs time and is not turned off, or one about as fast as the rest "
        "of a token from which it gains none.",
        head=(
            "reads / rest",
            "disk MB/s",
            "time ahead / without",
            "hits without",
            "looking",
            "useful",
            "wasted",
        ),
        rows=tuple(map(_row, found)),
        lines=tuple(_lines(found)),
        notes=(_note(settings, seconds, nbytes, budget),),
        figures={"disks": [_figures(each) for each in found], "seconds_without_reads": seconds},
    )


def _calibrate(settings: PrefetchSettings) -> tuple[float, float, int]:
    """Seconds of a token whose experts are all in memory, bytes that one reads within the budget, and that budget."""
    probe = _Writer(settings, 2**34, rate=None, ahead=False)
    stock = engine_of(probe.model).stock
    seconds = min(probe().seconds for _ in range(4))  # the first of them reads
    del probe
    budget = int(settings.share * stock.nbytes)
    writer = _Writer(settings, budget, rate=None, ahead=False)
    writer()
    before = writer.read()
    writer()
    return seconds, (writer.read() - before) / settings.tokens, budget


def _measure(settings: PrefetchSettings, budget: int, reads: float, rate: float, progress: Progress) -> Found:
    writers = {
        way: _Writer(settings, budget, rate=rate, ahead=way == "ahead") for way in ("without", "ahead")
    }
    for writer in writers.values():
        writer()  # finds the routers, fills the cache
    turns = take_turns(writers, rounds=settings.rounds)
    progress(f"reads / rest {reads:g}: done")
    return Found(reads, rate, turns, *(expert_report(writers[way].model) for way in ("without", "ahead")))


def _seconds(sample: Sample) -> float:
    return sample.seconds


def _lines(found: Sequence[Found]) -> Iterator[Line]:
    for each in found:
        ratio = each.turns.ratio("ahead", "without", _seconds)
        void = each.turns.why_void("without", _seconds)
        bound = _MOST_WHERE_COMPARABLE if each.reads == COMPARABLE else _MOST_WHERE_SATURATED
        claim = f"time with prediction over without, reads {each.reads:g} times the rest"
        yield Line(claim=claim, found=ratio.median, bound=bound, note=str(ratio), void=void)
        if each.reads >= SATURATED:
            claim = f"share of the tokens before which it looks ahead, reads {each.reads:g} times the rest"
            yield Line(claim=claim, found=each.looking, bound=_MOST_LOOKING)
    samples = [each.turns.samples for each in found]
    differing = sum(
        one.text != other.text
        for ways in samples
        for one, other in zip(ways["ahead"], ways["without"], strict=True)
    )
    yield Line(claim="texts that differ with and without prediction", found=differing, bound=0)


def _row(found: Found) -> tuple[str, ...]:
    predicted = max(found.ahead.predicted, 1)
    return (
        f"{found.reads:g}",
        f"{found.rate / 1e6:.1f}",
        str(found.turns.ratio("ahead", "without", _seconds)),
        f"{found.without.hit_rate:.1%}",
        f"{found.looking:.0%}",
        f"{found.ahead.useful / predicted:.0%}",
        f"{found.ahead.wasted / predicted:.0%}",
    )


def _note(settings: PrefetchSettings, seconds: float, nbytes: float, budget: int) -> str:
    return (
        f"{settings.tokens} tokens a sample, {settings.rounds} rounds; budget {format_size(budget)}, "
        f"{settings.share:.0%} of all experts. A token takes {seconds * 1e3:.1f} ms without reads and reads "
        f"{format_size(int(nbytes))}. Disks are real ones, slowed down. Looking: share of the tokens before which it "
        "looked ahead; useful, wasted: shares of the bytes begun to be read ahead."
    )


def _figures(found: Found) -> dict[str, Any]:
    return {
        "reads": found.reads,
        "bytes_per_second": found.rate,
        "seconds": {way: [each.seconds for each in taken] for way, taken in found.turns.samples.items()},
        "looking": found.looking,
        "hit_rate_without": found.without.hit_rate,
        "hit_rate_ahead": found.ahead.hit_rate,
        "read_nbytes_without": found.without.read_nbytes,
        "read_nbytes_ahead": found.ahead.read_nbytes,
        "predicted_nbytes": found.ahead.predicted,
        "useful_nbytes": found.ahead.useful,
        "wasted_nbytes": found.ahead.wasted,
    }
