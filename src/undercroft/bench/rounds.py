"""Ways of doing one thing, measured in turns: what a neighbour on the machine does, it does to all of them.

Pure: it calls what it is given and knows no clock. Invariants: all ways have as many samples, and sample `n`
of each was taken in round `n`; ratios are taken within a round, before any median.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Generic, TypeVar

from undercroft.errors import InvalidInput

UNSTEADY = 1.3
"""Where the 90th percentile of a reference exceeds its 10th by more than this factor, the rounds are void."""

T = TypeVar("T")
Figure = Callable[[T], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The middle of some values, and where their lowest and highest tenth begin."""

    p10: float
    median: float
    p90: float

    @property
    def width(self) -> float:
        """The 90th percentile over the 10th; infinite where that is 0."""
        return self.p90 / self.p10 if self.p10 else float("inf")

    def is_steady(self) -> bool:
        """Whether the values are close enough together to compare anything with them."""
        return self.width <= UNSTEADY

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.p10:.3f}, {self.p90:.3f}]"


def spread(values: Sequence[float]) -> Spread:
    """Median and percentiles, linear between values.

    Raises:
        InvalidInput: there are no values.
    """
    if not values:
        raise InvalidInput("no values have no median; measure at least one round")
    tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return Spread(p10=tenths[0], median=median(values), p90=tenths[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns(Generic[T]):
    """What every way gave, round by round.

    Attributes:
        samples: way → one sample per round.
        attempts: how often the rounds were taken until the reference was steady, or patience ended.
    """

    samples: Mapping[str, tuple[T, ...]]
    attempts: int = 1

    def spread(self, way: str, figure: Figure[T]) -> Spread:
        """One figure of a way over all rounds."""
        return spread([figure(sample) for sample in self.samples[way]])

    def ratio(self, way: str, reference: str, figure: Figure[T]) -> Spread:
        """A way's figure over the reference's of the same round."""
        pairs = zip(self.samples[way], self.samples[reference], strict=True)
        return spread([figure(ours) / figure(theirs) for ours, theirs in pairs])

    def why_void(self, reference: str, figure: Figure[T]) -> str:
        """Why nothing can be said against this reference; empty where something can."""
        found = self.spread(reference, figure)
        if found.is_steady():
            return ""
        times = "once" if self.attempts == 1 else f"{self.attempts} times"
        return f"{reference} alone varied by {found.width:.2f}x (measured {times}; allowed {UNSTEADY}x)"


def take_turns(
    ways: Mapping[str, Callable[[], T]], *, rounds: int, on_round: Callable[[int], None] | None = None
) -> Turns[T]:
    """Measure every way once per round; each round begins with another one.

    Args:
        ways: name → what takes one sample.
        rounds: how many samples of each.
        on_round: told the number of each round, from 1, when it has ended.
    """
    names = list(ways)
    samples: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(ways[name]())
        if on_round is not None:
            on_round(number + 1)
    return Turns(samples={name: tuple(taken) for name, taken in samples.items()})


def until_steady(
    take: Callable[[], Turns[T]], reference: str, figure: Figure[T], *, attempts: int
) -> Turns[T]:
    """Take turns until the reference is steady in a figure, at most `attempts` times; the last turns count."""
    for attempt in range(1, attempts + 1):
        turns = Turns(samples=take().samples, attempts=attempt)
        if attempt == attempts or not turns.why_void(reference, figure):
            return turns
    raise InvalidInput(f"{attempts} attempts measure nothing")
