"""Which storages of a recorded step to spill, so that the budget holds and compute waits least.

Answers for the choice; `simulation` answers for what a choice costs. It knows no torch, files, clocks or
threads. Invariant: a plan that exists is feasible and was simulated; the same record, budget and rates give
the same plan.

The search keeps greedily, in two orders, up to several fractions of the budget: what is not kept leaves room
for writes on their way out and reads on their way in. It improves the best of these choices by moving blocks
of storages across, large blocks first; then it tries the same from disturbed copies. Simulation judges each
choice, and the work of the whole search is bounded.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from undercroft.errors import BudgetExceeded
from undercroft.training.simulation import Outcome, Rates, Script, Simulation
from undercroft.training.step import Demand, StepTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to spill, and what the simulation predicts of it.

    Attributes:
        spill: indices into the storages of the recorded step.
        budget: bytes that may be held.
        peak: the most bytes held at once.
        stall_seconds: how long compute waits for room and for reads.
        written: bytes written.
        read: bytes read.
        least_budget: the smallest budget that this step could be planned for.
    """

    spill: frozenset[int]
    budget: int
    peak: int
    stall_seconds: float
    written: int
    read: int
    least_budget: int


def make_plan(trace: StepTrace, *, budget: int, rates: Rates) -> Plan:
    """Choose what to spill: least stall, and among equals the fewest bytes written.

    Stalls that differ by less than a ten-thousandth of the step are equal. The search is bounded: a large
    step gets a good plan, not always the best. Nothing is spilled where everything fits.

    Raises:
        BudgetExceeded: no choice can keep to `budget`; the error names the smallest budget that some can.
    """
    demand = Demand(trace)
    least = _check(demand, budget)
    best = _Search(trace, demand, budget, rates).run()
    return Plan(
        spill=best.spilled,
        budget=budget,
        peak=best.outcome.peak,
        stall_seconds=best.outcome.stall_seconds,
        written=best.outcome.written,
        read=best.outcome.read,
        least_budget=least,
    )


def _check(demand: Demand, budget: int) -> int:
    moments = zip(demand.used, demand.asked, strict=True)
    used, asked = max(moments, key=sum, default=(0, 0))
    if used + asked > budget:
        raise BudgetExceeded(asked, budget, {"activations in use": used}, used + asked)
    return used + asked


class _Room:
    """A choice that can be changed storage by storage, and the bytes it needs in memory at each moment.

    A choice is feasible exactly if no moment needs more than the budget: all else can be waited out.
    """

    def __init__(self, trace: StepTrace, demand: Demand) -> None:
        self.spilled = {i for i, storage in enumerate(trace.storages) if storage.nbytes}
        self._changes = 0
        self._nbytes = [storage.nbytes for storage in trace.storages]
        self._idle = demand.idle
        self._needs = np.array(demand.used, dtype=np.int64) + np.array(demand.asked, dtype=np.int64)

    def need(self) -> int:
        return int(self._needs.max(initial=0))

    def count_changes(self) -> int:
        """Return how many storages were looked at since it was last asked."""
        changes, self._changes = self._changes, 0
        return changes

    def can_keep(self, i: int, limit: int) -> bool:
        self._changes += 1
        return all(self._needs[a:b].max() + self._nbytes[i] <= limit for a, b in self._idle[i])

    def flip(self, i: int) -> None:
        """Keep `i` if it is spilled, spill it if it is kept."""
        self._changes += 1
        change = self._nbytes[i] if i in self.spilled else -self._nbytes[i]
        for a, b in self._idle[i]:
            self._needs[a:b] += change
        self.spilled ^= {i}

    def become(self, spilled: Collection[int]) -> None:
        for i in self.spilled.symmetric_difference(spilled):
            self.flip(i)

    def fill(self, order: Iterable[int], limit: int) -> None:
        """Keep what fits, in order."""
        for i in order:
            if i in self.spilled and self.can_keep(i, limit):
                self.flip(i)

    def clear(self, order: Iterable[int], limit: int) -> None:
        """Spill in order, until the rest fits."""
        for i in order:
            if i not in self.spilled:
                if self.need() <= limit:
                    return
                self.flip(i)


_STEPS = 8  # limits in a scan, blocks in the coarsest sweep
_RESTARTS = 12
_DISTURBED = 3  # storages that each restart flips


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    score: tuple[int, int]  # stall in quanta, bytes written: smaller is better
    spilled: frozenset[int]
    outcome: Outcome


class _Search:
    """The best choice found so far, and how much work is left to find a better one."""

    def __init__(self, trace: StepTrace, demand: Demand, budget: int, rates: Rates) -> None:
        self._script = Script(trace, rates)
        self._budget = budget
        self._room = _Room(trace, demand)
        seconds = max(trace.times, default=0.0)
        self._quantum = seconds * 1e-4 or 1e-9
        # Events to simulate and storages to move: about 0.4 s of search, but never much more than a few steps take.
        self._work = int(min(50_000 + 120 * len(trace.storages), 2_000 + 400_000 * seconds))
        self._seen: set[frozenset[int]] = set()
        self._order = sorted(self._room.spilled, key=lambda i: (_worth(trace, self._script, i), i))
        self._best = self._simulate(patience=math.inf)

    def run(self) -> _Candidate:
        """Search until nothing helps or the work is done."""
        self._room.fill(self._order, self._budget)
        self._consider()
        if not self._best.spilled:
            return self._best
        self._scan(self._order)
        self._scan(sorted(self._order, key=lambda i: -self._script.nbytes[i]))
        self._climb()
        best, randomness = self._best, random.Random(0)
        for _ in range(_RESTARTS):
            if self._work > 0:
                self._restart(best, randomness)
                best = min(best, self._best, key=lambda candidate: candidate.score)
        return best

    # Moves: each brings the room to a choice and considers it.

    def _scan(self, order: Sequence[int]) -> None:
        """Keep in `order`, up to each of several limits."""
        self._room.become(self._order)
        least = self._room.need()
        for step in range(_STEPS, -1, -1):
            self._room.become(self._order)
            self._room.fill(order, least + (self._budget - least) * step // _STEPS)
            self._consider()

    def _climb(self) -> None:
        size = max(1, len(self._order) // _STEPS)
        while self._sweep(size) or size > 1:
            size = max(1, size // 2)

    def _sweep(self, size: int) -> bool:
        improved = False
        for at in range(0, len(self._order), size):
            block = frozenset(self._order[at : at + size])
            improved |= self._work > 0 and (self._keep(block) or self._spill(block))
        return improved

    def _keep(self, block: frozenset[int]) -> bool:
        """Keep a block, and spill what is most worth it instead."""
        self._room.become(self._best.spilled - block)
        self._room.clear((i for i in reversed(self._order) if i not in block), self._budget)
        return self._consider()

    def _spill(self, block: frozenset[int]) -> bool:
        """Spill a block, and keep what then fits only if that is better than leaving the room free."""
        self._room.become(self._best.spilled | block)
        if self._consider():
            return True
        self._room.fill((i for i in self._order if i not in block), self._budget)
        return self._consider()

    def _restart(self, best: _Candidate, randomness: random.Random) -> None:
        shuffled = randomness.sample(self._order, len(self._order))
        self._room.become(best.spilled.symmetric_difference(shuffled[:_DISTURBED]))
        self._room.clear(shuffled, self._budget)
        self._best = self._simulate(patience=math.inf)
        self._climb()

    # Judgement.

    def _consider(self) -> bool:
        """Whether the choice in the room is the best so far."""
        spilled = frozenset(self._room.spilled)
        self._work -= self._room.count_changes()
        if self._work <= 0 or spilled in self._seen or self._room.need() > self._budget:
            return False
        candidate = self._simulate(patience=(self._best.score[0] + 1) * self._quantum)
        if not candidate.outcome.feasible or candidate.score >= self._best.score:
            return False
        self._best = candidate
        return True

    def _simulate(self, *, patience: float) -> _Candidate:
        spilled = frozenset(self._room.spilled)
        self._seen.add(spilled)
        simulation = Simulation(self._script, spilled, budget=self._budget, patience=patience)
        outcome = simulation.outcome()
        self._work -= len(simulation.curve)
        score = (round(outcome.stall_seconds / self._quantum), outcome.written)
        return _Candidate(score=score, spilled=spilled, outcome=outcome)


def _worth(trace: StepTrace, script: Script, i: int) -> float:
    """Byte-seconds of memory that spilling storage `i` frees for each second of the disk that it takes."""
    storage, times = trace.storages[i], trace.times
    begins = [unpack for unpack, _ in storage.uses] + [storage.last]
    ends = [storage.packed] + [end for _, end in storage.uses]
    idle_seconds = sum(max(0.0, times[begin] - times[end]) for begin, end in zip(begins, ends, strict=True))
    disk_seconds = script.write_seconds[i] + len(storage.uses) * script.read_seconds[i]
    return storage.nbytes * idle_seconds / disk_seconds
