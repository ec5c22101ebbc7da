"""The record of one training step: which storages autograd saved, when, and how long compute took between.

Answers for what the record alone implies, whatever is spilled: the order of actions at each event and the
bytes that must be in memory at once. It knows no disk, no plan and no clock. Invariant: a record that exists
is consistent; each storage lives from its pack to its last event, and its uses lie in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from undercroft.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedStorage:
    """One storage that autograd saved, as indices into the events of its `StepTrace`.

    Attributes:
        nbytes: its size.
        packed: the event at which it was first saved.
        uses: (unpack, end) events of each use, by unpack; its bytes are in memory between them. They may
            overlap, and there may be none.
        released: the event at which its last token died. A use that ends later keeps the bytes until then.
    """

    nbytes: int
    packed: int
    uses: tuple[tuple[int, int], ...]
    released: int

    def __post_init__(self) -> None:
        in_order = all(earlier <= later for earlier, later in pairwise(self.uses))
        begun = all(self.packed <= unpack <= end for unpack, end in self.uses)
        if self.nbytes < 0 or not 0 <= self.packed <= self.released or not in_order or not begun:
            raise InvalidInput(f"not the life of a storage: {self}")

    @property
    def last(self) -> int:
        """The event after which nobody can ask for the bytes."""
        return max([self.released, *(end for _, end in self.uses)])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """A recorded step.

    Attributes:
        storages: what was saved, in any order.
        times: seconds of compute elapsed at each event, never falling; our own stalls are not in it.
    """

    storages: tuple[SavedStorage, ...]
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        if any(later < earlier for earlier, later in pairwise(self.times)):
            raise InvalidInput("the times of a step must never fall")
        if any(storage.last >= len(self.times) for storage in self.storages):
            raise InvalidInput(f"a storage outlives the {len(self.times)} events of its step")


END, RELEASE, PACK, UNPACK = range(4)  # in the order in which one event does them
Action = tuple[int, int]  # one of the above, and the index of a storage


def actions_by_event(trace: StepTrace) -> list[list[Action]]:
    """Return what happens at each event: what ends, what begins, then what began there and ends there."""
    ends: list[list[Action]] = [[] for _ in trace.times]
    begins: list[list[Action]] = [[] for _ in trace.times]
    momentary: list[list[Action]] = [[] for _ in trace.times]
    for i, storage in enumerate(trace.storages):
        begins[storage.packed].append((PACK, i))
        for unpack, end in storage.uses:
            begins[unpack].append((UNPACK, i))
            (momentary if unpack == end else ends)[end].append((END, i))
        begun = max([storage.packed, *(unpack for unpack, _ in storage.uses)])
        (momentary if begun == storage.last else ends)[storage.last].append((RELEASE, i))
    return [sorted(a) + sorted(b) + sorted(c) for a, b, c in zip(ends, begins, momentary, strict=True)]


class Demand:
    """The bytes that must be in memory at once, moment by moment, when all that is idle is elsewhere.

    A moment is a pack, or an unpack of a storage that is not in use already: the only times at which the
    need for memory grows.

    Attributes:
        asked: bytes that each moment asks for.
        used: bytes in use by others at each moment.
        idle: by storage, the spans [from, to) of moments at which it lives and nobody needs it in memory.
    """

    def __init__(self, trace: StepTrace) -> None:
        self.asked: list[int] = []
        self.used: list[int] = []
        self.idle: list[list[tuple[int, int]]] = [[] for _ in trace.storages]
        users, idle_from, used = [0] * len(trace.storages), [0] * len(trace.storages), 0
        for action, i in (each for actions in actions_by_event(trace) for each in actions):
            nbytes, was_used = trace.storages[i].nbytes, users[i] > 0
            users[i] += (action == UNPACK) - (action == END)
            if (action == UNPACK and not was_used) or (action == RELEASE):
                self._idled(i, idle_from[i])
            if action in (PACK, UNPACK) and not was_used:
                self.asked.append(nbytes)
                self.used.append(used)
            used += nbytes * ((users[i] > 0) - was_used)
            idle_from[i] = len(self.asked) if action in (PACK, END) else idle_from[i]

    def _idled(self, i: int, since: int) -> None:
        if since < len(self.asked):
            self.idle[i].append((since, len(self.asked)))


def least_budget(trace: StepTrace) -> int:
    """Return the smallest budget in bytes that any choice of spilled storages can meet."""
    demand = Demand(trace)
    return max((used + asked for used, asked in zip(demand.used, demand.asked, strict=True)), default=0)
