import itertools
import math
import random
from collections import defaultdict

import pytest

from undercroft.errors import BudgetExceeded
from undercroft.training.plan import Plan, make_plan
from undercroft.training.simulation import Rates, live_curve, simulate
from undercroft.training.step import SavedStorage, StepTrace, least_budget

TIE = 1e-4  # stalls that differ by this part of a step are equal to the planner
Pass = tuple[str, list[int], float]  # "save" or "use", storages, seconds of compute


def record(nbytes: list[int], passes: list[Pass]) -> StepTrace:
    """The trace of a step; storages are released by the end of their last use, or of the step."""
    times, packed = [0.0], dict[int, int]()
    uses = defaultdict[int, list[tuple[int, int]]](list)
    for verb, storages, seconds in passes:
        begun = len(times)
        times += [times[-1]] * len(storages) if verb == "use" else []
        times.append(times[-1] + seconds)
        for place, i in enumerate(storages):
            if verb == "use":
                uses[i].append((begun + place, len(times) - 1))
            packed.setdefault(i, len(times) - 1)
    lives = (
        SavedStorage(
            nbytes=n,
            packed=packed[i],
            uses=tuple(uses[i]),
            released=uses[i][-1][1] if uses[i] else len(times) - 1,
        )
        for i, n in enumerate(nbytes)
    )
    return StepTrace(storages=tuple(lives), times=tuple(times))


def layered_step(layers: int, nbytes: int = 10) -> StepTrace:
    """One storage for each layer; a second of forward and two of backward each."""
    forward: list[Pass] = [("save", [i], 1.0) for i in range(layers)]
    backward: list[Pass] = [("use", [i], 2.0) for i in reversed(range(layers))]
    return record([nbytes] * layers, forward + backward)


def random_step(rng: random.Random, n: int) -> StepTrace:
    """Micro-batches in some schedule, storages shared by nodes or never used, sometimes a second backward."""
    count = min(n, rng.choice([1, 1, 1, 2, 3]))
    batches = [list(range(n))[m::count] for m in range(count)]
    forwards, backwards = [], []
    for batch in batches:
        nodes = [[i] if rng.random() < 0.9 else [] for i in batch]
        for place, node in enumerate(nodes[1:], start=1):
            node += rng.sample(batch[:place], 1 if rng.random() < 0.3 else 0)
        forwards.append([("save", [i], rng.uniform(0.2, 1)) for i in batch])
        backward = [("use", node, rng.uniform(0.4, 2)) for node in reversed(nodes)]
        backwards.append(backward * (2 if rng.random() < 0.15 else 1))
    lead = rng.randint(1, count)  # how many forwards come before the first backward
    passes = [*itertools.chain(*forwards[:lead])]
    for m in range(count):
        passes += backwards[m] + (forwards[m + lead] if m + lead < count else [])
    return record([rng.choice([1, 2, 4, 8, 16]) * 100 + rng.randint(0, 50) for _ in range(n)], passes)


def random_rates(rng: random.Random, trace: StepTrace) -> Rates:
    """From a disk that takes five steps to write all that is saved, to one that takes a tenth of a step."""
    total = sum(storage.nbytes for storage in trace.storages)
    read, write = (total / trace.times[-1] * 10 ** rng.uniform(-0.7, 1) for _ in range(2))
    return Rates(
        read_bytes_per_second=read,
        write_bytes_per_second=write,
        latency_seconds=rng.choice([0.0, 0.01 * trace.times[-1]]),
    )


def random_budget(rng: random.Random, trace: StepTrace) -> int:
    least, total = least_budget(trace), sum(storage.nbytes for storage in trace.storages)
    return least + int((total - least) * rng.random() ** 1.5)


def random_case(seed: int, most: int = 9) -> tuple[StepTrace, int, Rates]:
    rng = random.Random(seed)
    trace = random_step(rng, rng.randint(1, most))
    return trace, random_budget(rng, trace), random_rates(rng, trace)


def subsets(trace: StepTrace) -> list[set[int]]:
    everything = range(len(trace.storages))
    return [
        set(some) for size in range(len(everything) + 1) for some in itertools.combinations(everything, size)
    ]


def least_stall(trace: StepTrace, budget: int, rates: Rates) -> float:
    outcomes = (simulate(trace, spill, budget=budget, rates=rates) for spill in subsets(trace))
    return min((outcome.stall_seconds for outcome in outcomes if outcome.feasible), default=math.inf)


@pytest.mark.parametrize("seed", [*range(120), 402, 434, 480, 883, 1130])  # the last need the restarts
def test_the_plan_is_as_good_as_the_best_of_all_choices(seed):
    trace, budget, rates = random_case(seed)
    plan = make_plan(trace, budget=budget, rates=rates)
    step_seconds = trace.times[-1]
    assert plan.stall_seconds <= 1.05 * least_stall(trace, budget, rates) + 5 * TIE * step_seconds


@pytest.mark.parametrize("seed", range(60))
def test_the_plan_predicts_what_its_simulation_says(seed):
    trace, budget, rates = random_case(seed, most=30)
    plan = make_plan(trace, budget=budget, rates=rates)
    outcome = simulate(trace, plan.spill, budget=budget, rates=rates)
    assert outcome.feasible
    assert (plan.peak, plan.written, plan.read) == (outcome.peak, outcome.written, outcome.read)
    assert plan.stall_seconds == outcome.stall_seconds
    assert plan.peak == max(live_curve(trace, plan.spill, budget=budget, rates=rates)) <= budget


@pytest.mark.parametrize("seed", range(60))
def test_a_choice_is_feasible_only_within_its_budget_and_everything_spilled_always_is(seed):
    trace, budget, rates = random_case(seed, most=7)
    everything, least = range(len(trace.storages)), least_budget(trace)
    assert simulate(trace, everything, budget=least, rates=rates).feasible
    for spill in subsets(trace):
        assert not simulate(trace, spill, budget=least - 1, rates=rates).feasible
        assert simulate(trace, spill, budget=budget, rates=rates).peak <= budget


@pytest.mark.parametrize("seed", range(30))
def test_a_plan_exists_exactly_from_the_least_budget_on(seed):
    trace, _, rates = random_case(seed)
    least = least_budget(trace)
    assert make_plan(trace, budget=least, rates=rates).least_budget == least
    with pytest.raises(BudgetExceeded) as refusal:
        make_plan(trace, budget=least - 1, rates=rates)
    assert refusal.value.least == least
    assert refusal.value.budget == least - 1
    assert refusal.value.asked + sum(refusal.value.held.values()) == least


@pytest.mark.parametrize("seed", range(20))
def test_what_fits_is_not_spilled(seed):
    trace, _, rates = random_case(seed, most=40)
    peak = simulate(trace, (), budget=10**9, rates=rates).peak
    plan = make_plan(trace, budget=peak, rates=rates)
    assert plan == Plan(
        spill=frozenset(),
        budget=peak,
        peak=peak,
        stall_seconds=0.0,
        written=0,
        read=0,
        least_budget=least_budget(trace),
    )


@pytest.mark.parametrize("seed", range(10))
def test_the_same_record_gives_the_same_plan(seed):
    trace, budget, rates = random_case(seed, most=40)
    assert make_plan(trace, budget=budget, rates=rates) == make_plan(trace, budget=budget, rates=rates)


SPEEDS = (1, 2, 4, 6, 10, 20, 100)  # bytes per second; a layer saves 10 in one second


@pytest.mark.parametrize("speed", SPEEDS)
def test_more_budget_is_never_slower(speed):
    trace = layered_step(12)
    disk = Rates(read_bytes_per_second=speed, write_bytes_per_second=speed)
    stalls = [make_plan(trace, budget=budget, rates=disk).stall_seconds for budget in range(20, 121, 20)]
    assert all(more <= less + TIE * trace.times[-1] for less, more in itertools.pairwise(stalls)), stalls
    assert stalls[-1] == 0


@pytest.mark.parametrize("budget", [20, 50, 80, 100])
def test_a_faster_disk_is_never_slower(budget):
    trace = layered_step(12)
    disks = [Rates(read_bytes_per_second=speed, write_bytes_per_second=speed) for speed in SPEEDS]
    stalls = [make_plan(trace, budget=budget, rates=disk).stall_seconds for disk in disks]
    assert all(faster <= slower + TIE * trace.times[-1] for slower, faster in itertools.pairwise(stalls)), (
        stalls
    )
    assert stalls[0] > stalls[-1]


def test_on_a_slow_disk_the_tail_is_kept():
    slow = Rates(read_bytes_per_second=2, write_bytes_per_second=2)
    plan = make_plan(layered_step(8), budget=50, rates=slow)
    assert plan.spill == {0, 1, 2}


def test_a_plan_by_hand():
    # Five layers of 10 bytes and room for 3. Two must go; the disk moves 10 bytes in 1 second. Layers 0 and
    # 1 are saved at 1 and 2, and written at 2 and 3, while layers 2 and 3 are saved at 3 and 4. The
    # backward begins at 5: layers 4, 3 and 2 end at 7, 9 and 11. Layer 1 is read from 7 to 8, and layer 0
    # from 9 to 10.
    disk = Rates(read_bytes_per_second=10, write_bytes_per_second=10)
    plan = make_plan(layered_step(5), budget=30, rates=disk)
    assert plan == Plan(
        spill=frozenset({0, 1}), budget=30, peak=30, stall_seconds=0.0, written=20, read=20, least_budget=10
    )


def test_among_equal_stalls_the_fewest_bytes_are_written():
    nbytes = [30, 20, 10, 20]
    passes: list[Pass] = [("save", [i], 10.0) for i in range(4)] + [("use", [i], 10.0) for i in (3, 2, 1, 0)]
    fast = Rates(read_bytes_per_second=1e6, write_bytes_per_second=1e6)
    plan = make_plan(record(nbytes, passes), budget=70, rates=fast)
    assert (plan.spill, plan.written) == ({2}, 10)


def test_two_small_storages_go_rather_than_a_large_one():
    # The large one alone would do, at twice the price.
    nbytes = [160, 40, 40, 60]
    passes: list[Pass] = [("save", [i], 1.0) for i in range(4)] + [("use", [i], 1.0) for i in (3, 2, 1, 0)]
    slow = Rates(read_bytes_per_second=1, write_bytes_per_second=1)
    assert make_plan(record(nbytes, passes), budget=220, rates=slow).spill == {1, 2}


def test_a_step_that_saves_nothing():
    nothing = StepTrace(storages=(), times=())
    disk = Rates(read_bytes_per_second=1, write_bytes_per_second=1)
    plan = make_plan(nothing, budget=0, rates=disk)
    assert (plan.spill, plan.peak, plan.least_budget) == (frozenset(), 0, 0)


def test_storages_without_bytes_are_never_spilled():
    trace = record([0, 10, 10, 0], [("save", [0, 1, 2, 3], 1.0), ("use", [2], 1.0), ("use", [1, 0, 3], 1.0)])
    plan = make_plan(trace, budget=10, rates=Rates(read_bytes_per_second=1, write_bytes_per_second=1))
    assert plan.spill <= {1, 2}


def test_a_large_step_is_planned_close_to_the_bound():
    # All that must be spilled is written once and read once on a disk that is busy from the first pack to
    # the last unpack; no plan can take less time than that.
    trace = layered_step(1000)
    slow = Rates(read_bytes_per_second=4, write_bytes_per_second=4)
    plan = make_plan(trace, budget=2000, rates=slow)
    disk_seconds = 2 * (10_000 - 2000) / 4
    assert plan.stall_seconds + trace.times[-1] <= 1.01 * disk_seconds
