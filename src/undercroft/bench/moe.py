"""Question: how often are the experts that a token needs in memory already, and what is read for the rest?

It replays a trace for each budget and policy and judges; `undercroft.moe.simulate` finds the figures. Nothing here
depends on the machine or the time of day.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from undercroft.bench.answer import Answer
from undercroft.bench.verdict import Line
from undercroft.errors import InvalidInput
from undercroft.moe.policies import ONLINE
from undercroft.moe.simulate import LOW_SHARE, simulate
from undercroft.moe.simulation import Simulation
from undercroft.moe.trace import Trace
from undercroft.units import format_rate, format_size

BUDGETS = ("6%", "12.5%", "25%", "50%")
BOUND = "belady"
_MOST_POINTS_BEHIND = 1.0
_LEAST_FEWER_BYTES = 1.1

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSettings:
    """What to simulate.

    Attributes:
        trace: path of a CSV file, see `undercroft.moe.trace`.
        budgets: bytes, or shares of all experts.
        policies: names; the bound is always beside them.
        quality: name of a preset.
        expert_nbytes: of an expert; None for what the trace says.
        high_share: bytes of a high copy for each of these.
        low_share: bytes of a low copy for each of these.
        read_bytes_per_second: to predict tokens per second; None for no prediction.
        compute_seconds_per_expert: for that.
        seconds_per_token: for that; everything that is not experts.
    """

    trace: str | os.PathLike[str]
    budgets: tuple[str, ...] = BUDGETS
    policies: tuple[str, ...] = ONLINE
    quality: str = "exact"
    expert_nbytes: int | None = None
    high_share: float = 1.0
    low_share: float = LOW_SHARE
    read_bytes_per_second: float | None = None
    compute_seconds_per_expert: float = 0.0
    seconds_per_token: float = 0.0

    def __post_init__(self) -> None:
        if not (self.budgets and self.policies):
            raise InvalidInput("a simulation needs a budget and a policy at least")


Found = Mapping[tuple[str, str], Simulation]


def measure_moe(settings: MoeSettings, progress: Progress) -> Answer:
    """Simulate every policy at every budget.

    Raises:
        InvalidInput, BudgetExceeded: see `simulate`.
    """
    trace = Trace.read(settings.trace)
    policies = (*dict.fromkeys(settings.policies), *(() if BOUND in settings.policies else (BOUND,)))
    found = {
        (budget, policy): _simulate(trace, settings, budget, policy, progress)
        for budget in settings.budgets
        for policy in policies
    }
    return Answer(
        theme="moe",
        question="How often are the experts that a token needs in memory already?",
        falsified_by="a trace and a budget at which another online policy hits clearly more often than expected-use, "
        "or at which it reads as much as LRU.",
        head=("budget", "policy", "hits", "MB/token", "tokens/s", "low mass", "skipped mass"),
        rows=tuple(_row(budget, each) for (budget, _), each in found.items()),
        lines=tuple(_lines(found, settings.budgets, policies)),
        notes=(_note(trace, found), *_assumed(settings)),
        figures={"simulations": [_figures(budget, each) for (budget, _), each in found.items()]},
    )


def _simulate(
    trace: Trace, settings: MoeSettings, budget: str, policy: str, progress: Progress
) -> Simulation:
    return simulate(
        trace,
        budget=budget,
        policy=policy,
        quality="exact" if policy == BOUND else settings.quality,
        expert_nbytes=settings.expert_nbytes,
        high_share=settings.high_share,
        low_share=settings.low_share,
        read_bytes_per_second=settings.read_bytes_per_second,
        compute_seconds_per_expert=settings.compute_seconds_per_expert,
        seconds_per_token=settings.seconds_per_token,
        bound=False,
        on_progress=partial(_tell, progress, f"{policy} at {budget}"),
    )


def _tell(progress: Progress, name: str, done: int, steps: int) -> None:
    if done == steps:
        progress(f"{name}: {steps} steps")


def _lines(found: Found, budgets: Sequence[str], policies: Sequence[str]) -> Iterator[Line]:
    """What is claimed of the default policy, where it was asked for beside others."""
    online = [policy for policy in policies if policy not in ("expected-use", BOUND)]
    if "expected-use" not in policies or not online:
        return
    for budget in budgets:
        ours = found[budget, "expected-use"]
        best = max(online, key=lambda policy: found[budget, policy].hit_rate)
        yield Line(
            claim=f"{budget}: points of hit rate behind the best other online policy",
            found=100 * (found[budget, best].hit_rate - ours.hit_rate),
            bound=_MOST_POINTS_BEHIND,
            note=best,
        )
    budget = "12.5%"
    if budget in budgets and "lru" in online:
        nbytes = found[budget, "expected-use"].decode.read_nbytes
        yield Line(
            claim=f"{budget}: bytes that LRU reads over ours",
            found=found[budget, "lru"].decode.read_nbytes / nbytes if nbytes else float("inf"),
            bound=_LEAST_FEWER_BYTES,
            relation=">=",
        )


def _row(budget: str, found: Simulation) -> tuple[str, ...]:
    rate = found.tokens_per_second
    return (
        budget,
        f"{found.policy} (bound)" if found.policy == BOUND else found.policy,
        f"{found.hit_rate:.1%}",
        f"{found.nbytes_per_token / 1e6:.1f}",
        "" if rate is None else f"{rate:.2f}",
        f"{found.low_mass:.1%}",
        f"{found.skip_mass:.1%}",
    )


def _note(trace: Trace, found: Found) -> str:
    any_found = next(iter(found.values()))
    return (
        f"{trace.layers} layers of {trace.experts} experts, {trace.used} used by a token, "
        f"{format_size(any_found.stock_nbytes)} in all; {any_found.decode_tokens} decoded tokens. "
        f"Hits and bytes are of decoding; {BOUND} knows the future and serves in full precision."
    )


def _assumed(settings: MoeSettings) -> Iterator[str]:
    if (rate := settings.read_bytes_per_second) is not None:
        yield (
            f"tokens/s at {format_rate(rate)}, {1e3 * settings.seconds_per_token:g} ms a token besides, and "
            f"{1e6 * settings.compute_seconds_per_expert:g} us an expert while others are read."
        )


def _figures(budget: str, found: Simulation) -> dict[str, Any]:
    return {
        "budget": budget,
        "budget_nbytes": found.budget,
        "policy": found.policy,
        "hit_rate": found.hit_rate,
        "prefill_hit_rate": found.prefill.hit_rate,
        "nbytes_per_token": found.nbytes_per_token,
        "tokens_per_second": found.tokens_per_second,
        "low_mass": found.low_mass,
        "skip_mass": found.skip_mass,
        "high_hits": found.decode.high_hits,
        "low_hits": found.decode.low_hits,
        "high_misses": found.decode.high_misses,
        "low_misses": found.decode.low_misses,
        "skipped": found.decode.skipped,
        "read_nbytes": found.decode.read_nbytes,
        "prefill_read_nbytes": found.prefill.read_nbytes,
    }
