"""What a budget, a policy and a quality would do for a model, computed from a trace of its routing.

It knows how the parts fit: trace, serving order, policy, and a cache on paper; not weights. Invariant: hits, misses and
bytes are those of an engine that runs the same steps without hints, for it has the same parts in the same order.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from undercroft.errors import BudgetExceeded, InvalidInput
from undercroft.moe.importance import Importance, weigh
from undercroft.moe.paper import PaperCache
from undercroft.moe.policies import make_policy
from undercroft.moe.quality import Quality
from undercroft.moe.serving_order import Choice, ServingOrder, waves
from undercroft.moe.simulation import Counts, Simulation
from undercroft.moe.stock import Stock
from undercroft.moe.trace import Step, Trace
from undercroft.units import parse_size

LOW_SHARE = 0.28
"""Bytes of a low copy for each that the trace says of an expert: int4 with scales against bfloat16 (4.5 bits of 16)."""
_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%", re.ASCII)
_PROGRESS_STEPS = 512


def simulate(
    trace: Trace | str | os.PathLike[str],
    *,
    budget: int | str,
    policy: str = "expected-use",
    quality: Quality | str = "exact",
    expert_nbytes: int | None = None,
    high_share: float = 1.0,
    low_share: float = LOW_SHARE,
    read_bytes_per_second: float | None = None,
    compute_seconds_per_expert: float = 0.0,
    seconds_per_token: float = 0.0,
    bound: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Replay a trace through the parts that serve experts.

    Args:
        trace: or the path of a CSV file, see `Trace.read`.
        budget: the most bytes of experts in memory; or a share of all of them as the trace has them, such as "12.5%".
        policy: one of `policies.ONLINE`, or "belady".
        quality: or the name of a preset.
        expert_nbytes: bytes of an expert; None for what the trace says.
        high_share: bytes of a high copy for each of these, up to 1: 0.7 where packed lossless, 0.53 in int8.
        low_share: bytes of a low copy for each of these, below `high_share`.
        read_bytes_per_second: predicts seconds: in each step of a layer the longer of reading and computing counts, for
            without hints a layer's reads overlap nothing but its own experts.
        compute_seconds_per_expert: for that; one expert for one token.
        seconds_per_token: for that; everything that is not experts.
        bound: replay it once more by the policy that knows the future.
        on_progress: told now and then of steps done and steps in all.

    Raises:
        InvalidInput: an argument that cannot be meant, or a file that is no trace.
        BudgetExceeded: the budget does not hold one expert.
    """
    trace = trace if isinstance(trace, Trace) else Trace.read(trace)
    quality = Quality.preset(quality) if isinstance(quality, str) else quality
    stock = stock_of(trace, quality, expert_nbytes, high_share, low_share)
    rates = Rates(read_bytes_per_second, compute_seconds_per_expert, seconds_per_token)
    exact = Quality.preset("exact")
    nbytes = _parse_budget(budget, stock_of(trace, exact, expert_nbytes).nbytes)
    if nbytes < max(stock.high_nbytes):
        raise BudgetExceeded(max(stock.high_nbytes), nbytes, least=max(stock.high_nbytes))
    replay = _Replay(trace, stock, quality, policy, nbytes, rates)
    replay.run(on_progress)
    if not bound:
        return replay.result(None)
    whole = stock_of(trace, exact, expert_nbytes, high_share)
    best = _Replay(trace, whole, exact, "belady", nbytes, rates)
    best.run(on_progress)
    return replay.result(best.counts[False].hit_rate)


def stock_of(
    trace: Trace,
    quality: Quality,
    expert_nbytes: int | None = None,
    high_share: float = 1.0,
    low_share: float = LOW_SHARE,
) -> Stock:
    """The experts that a trace speaks of; for the arguments see `simulate`.

    Raises:
        InvalidInput: nothing says what an expert weighs, or an argument cannot be meant.
    """
    if not 0 < high_share <= 1:
        raise InvalidInput(f"a high copy takes between 0 and 1 of an expert, not {high_share!r}")
    has_low = quality.low_precision is not None and quality.low > 0
    if not 0 < low_share < (high_share if has_low else 1):
        raise InvalidInput(f"a low copy takes between 0 and {high_share} of an expert, not {low_share!r}")
    sizes: Mapping[int, int] = trace.expert_nbytes
    if expert_nbytes is not None:
        sizes = dict.fromkeys(range(trace.layers), expert_nbytes)
    if missing := [layer for layer in range(trace.layers) if layer not in sizes]:
        raise InvalidInput(f"the trace says no expert_bytes of layers {missing[:5]}; give expert_nbytes")
    whole = [sizes[layer] for layer in range(trace.layers)]
    return Stock.of(
        [math.ceil(nbytes * high_share) for nbytes in whole],
        experts=trace.experts,
        used=trace.used,
        high=quality.high,
        low=quality.low_precision if has_low else None,
        low_nbytes=[math.ceil(nbytes * low_share) for nbytes in whole] if has_low else (),
    )


@dataclass(frozen=True, slots=True)
class Rates:
    """What turns counts into seconds; see `simulate`.

    Raises:
        InvalidInput: a rate that is none.
    """

    read_bytes_per_second: float | None
    compute_seconds_per_expert: float
    seconds_per_token: float

    def __post_init__(self) -> None:
        if self.read_bytes_per_second is not None and not self.read_bytes_per_second > 0:
            raise InvalidInput(f"nothing is read at {self.read_bytes_per_second!r} bytes per second")
        if not (self.compute_seconds_per_expert >= 0 and self.seconds_per_token >= 0):
            raise InvalidInput("seconds are not negative")

    def step_seconds(self, read_nbytes: int, uses: int) -> float:
        """Of one step of one layer."""
        reading = read_nbytes / self.read_bytes_per_second if self.read_bytes_per_second else 0.0
        return max(reading, uses * self.compute_seconds_per_expert)


@dataclass
class _Tally:
    """Counts while they grow."""

    hits: dict[Importance, int] = field(default_factory=lambda: dict.fromkeys(Importance, 0))
    misses: dict[Importance, int] = field(default_factory=lambda: dict.fromkeys(Importance, 0))
    read_nbytes: int = 0

    @property
    def counts(self) -> Counts:
        high, low = Importance.HIGH, Importance.LOW
        skipped = self.hits[Importance.SKIP]
        served = (self.hits[high], self.hits[low], self.misses[high], self.misses[low])
        return Counts(*served, skipped, self.read_nbytes)


class _Replay:
    """One run of a trace."""

    def __init__(
        self, trace: Trace, stock: Stock, quality: Quality, policy: str, budget: int, rates: Rates
    ) -> None:
        self._trace, self._stock, self._quality = trace, stock, quality
        self._name, self._budget, self._rates = policy, budget, rates
        future = ((step.layer, sorted(set(step.experts.ravel().tolist()))) for step in trace.steps())
        self._policy = make_policy(policy, stock, future=future if policy == "belady" else None)
        self._order = ServingOrder(stock, quality, self._policy)
        self._cache = PaperCache(stock, budget, self._policy)
        self._tallies = {True: _Tally(), False: _Tally()}
        self._decode_tokens, self._decode_seconds = 0, 0.0

    @property
    def counts(self) -> dict[bool, Counts]:
        """By whether they are of prefill."""
        return {is_prefill: tally.counts for is_prefill, tally in self._tallies.items()}

    def run(self, on_progress: Callable[[int, int], None] | None) -> None:
        steps = self._trace.step_count
        turn = None
        for number, step in enumerate(self._trace.steps(), start=1):
            if step.turn != turn:
                self._policy.begin()
                turn = step.turn
            self._serve(step)
            if on_progress and (number % _PROGRESS_STEPS == 0 or number == steps):
                on_progress(number, steps)

    def result(self, belady_hit_rate: float | None) -> Simulation:
        account = self._order.account
        return Simulation(
            policy=self._name,
            quality=self._quality,
            budget=self._budget,
            stock_nbytes=self._stock.nbytes,
            decode=self.counts[False],
            prefill=self.counts[True],
            decode_tokens=self._decode_tokens,
            low_mass=account.low_mass / account.mass,
            skip_mass=account.skip_mass / account.mass,
            decode_seconds=self._decode_seconds if self._rates.read_bytes_per_second else None,
            belady_hit_rate=belady_hit_rate,
        )

    def _serve(self, step: Step) -> None:
        tokens = len(step.experts)
        choices = self._order.step(
            step.layer, weigh(step.experts, step.weights), tokens, self._cache.__contains__
        )
        read = self._fetch(choices, self._tallies[step.is_prefill])
        if not step.is_prefill:
            self._decode_tokens += step.is_first
            served = sum(choice.key is not None for choice in choices)
            self._decode_seconds += self._rates.step_seconds(read, served)
            self._decode_seconds += self._rates.seconds_per_token * step.is_first

    def _fetch(self, choices: list[Choice], tally: _Tally) -> int:
        """Serve the choices; the bytes that were read."""
        served = {choice.key: choice.served for choice in choices if choice.key is not None}
        read = 0
        tally.hits[Importance.SKIP] += len(choices) - len(served)
        for wave in waves(served, self._stock, self._budget):
            missing = set(self._cache.fetch(wave))
            for key in wave:
                kept = tally.misses if key in missing else tally.hits
                kept[served[key]] += 1
            read += sum(map(self._stock.occupied, missing))
        tally.read_nbytes += read
        return read


def _parse_budget(budget: int | str, stock_nbytes: int) -> int:
    if isinstance(budget, str) and (share := _SHARE.fullmatch(budget.strip())):
        return math.floor(float(share[1]) / 100 * stock_nbytes)
    return parse_size(budget)
