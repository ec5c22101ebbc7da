"""The simulation: facts that any right one must show, on traces made for them."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from undercroft.errors import BudgetExceeded, InvalidInput
from undercroft.moe.policies import ONLINE
from undercroft.moe.quality import Quality
from undercroft.moe.simulate import simulate
from undercroft.moe.simulation import Simulation
from undercroft.moe.synthetic import synthetic_trace
from undercroft.moe.trace import Trace

ORDERLY = synthetic_trace(layers=8, experts=32, used=4, tokens=160, skew=0.8, stickiness=1.5, seed=3)
CHANCE = synthetic_trace(layers=4, experts=32, used=4, prompt=1, tokens=300, skew=0, stickiness=0, seed=4)
DEMAND = 8 * 4 * 3 * 4096  # bytes that a token of ORDERLY uses


def hit_rate(trace: Trace, policy: str, budget: str | int) -> float:
    return simulate(trace, budget=budget, policy=policy, bound=False).hit_rate


@pytest.mark.parametrize("policy", ONLINE)
def test_where_routing_is_chance_every_policy_hits_the_share_that_it_holds(policy: str) -> None:
    assert hit_rate(CHANCE, policy, "50%") == pytest.approx(0.5, abs=0.04)


def test_below_one_tokens_demand_lru_hits_nothing_and_the_default_does() -> None:
    assert hit_rate(ORDERLY, "lru", DEMAND // 2) == 0
    assert hit_rate(ORDERLY, "expected-use", DEMAND // 2) > 0.15


@pytest.mark.parametrize("budget", ["6%", "12.5%", "25%", "50%"])
def test_the_default_is_near_the_best_and_none_beats_the_one_that_knows_the_future(budget: str) -> None:
    rates = {policy: hit_rate(ORDERLY, policy, budget) for policy in ONLINE}
    assert rates["expected-use"] >= max(rates.values()) - 0.01
    assert hit_rate(ORDERLY, "belady", budget) >= max(rates.values())


def test_what_is_hit_and_missed_is_all_that_is_used() -> None:
    found = simulate(ORDERLY, budget="12.5%")
    assert found.decode_tokens == 160
    assert found.decode.hits + found.decode.misses == 160 * 8 * 4
    assert found.decode.read_nbytes == found.decode.misses * 3 * 4096
    assert found.nbytes_per_token == found.decode.read_nbytes / 160
    assert found.prefill.misses > 0
    assert found.belady_hit_rate == hit_rate(ORDERLY, "belady", "12.5%")
    assert (found.low_mass, found.skip_mass, found.decode.skipped) == (0, 0, 0)


def test_with_room_for_all_each_expert_is_read_once() -> None:
    found = simulate(ORDERLY, budget="100%")
    used = {
        (int(layer), int(e)) for layer, row in zip(ORDERLY.layer, ORDERLY.expert, strict=True) for e in row
    }
    assert found.decode.misses + found.prefill.misses == len(used)


def test_one_expert_at_a_time_is_enough() -> None:
    assert simulate(ORDERLY, budget=3 * 4096, bound=False).decode.misses > 0
    with pytest.raises(BudgetExceeded, match='Smallest budget known to work: "12KiB"'):
        simulate(ORDERLY, budget=3 * 4096 - 1)


@pytest.mark.parametrize("low", [0.02, 0.05, 0.2])
def test_lower_quality_reads_less_and_keeps_its_promise(low: float) -> None:
    exact = simulate(ORDERLY, budget="12.5%", bound=False)
    found = simulate(ORDERLY, budget="12.5%", quality=Quality(low=low), bound=False)
    assert 0 < found.low_mass <= low
    assert found.decode.low_misses > 0
    assert found.decode.read_nbytes < exact.decode.read_nbytes


def test_skipping_reads_less_still() -> None:
    low = simulate(ORDERLY, budget="12.5%", quality=Quality(low=0.05), bound=False)
    found = simulate(ORDERLY, budget="12.5%", quality=Quality(low=0.05, skip=0.03), bound=False)
    assert 0 < found.skip_mass <= 0.03
    assert found.decode.skipped > 0
    assert found.decode.read_nbytes < low.decode.read_nbytes
    without_copies = Quality(low_precision=None, skip=0.03)
    assert simulate(ORDERLY, budget="12.5%", quality=without_copies, bound=False).decode.low_misses == 0


def test_a_long_prompt_does_not_flush_what_decoding_uses() -> None:
    """A second prompt, of another text, between two answers that want the same experts."""
    first = synthetic_trace(tokens=100, prompt=1, skew=3, stickiness=0, domain_tokens=10**6, seed=5)
    prompt = synthetic_trace(tokens=0, prompt=40, skew=0, stickiness=0, seed=6)
    both = join(first, prompt, first)
    kept = {
        policy: simulate(both, budget="25%", policy=policy, bound=False).decode
        for policy in ("lru", "expected-use")
    }
    assert kept["expected-use"].misses < 0.9 * kept["lru"].misses


def test_predicted_seconds_are_the_longer_of_reading_and_computing() -> None:
    def seconds(**rates: float) -> float:
        found = simulate(ORDERLY, budget="12.5%", bound=False, read_bytes_per_second=1e6, **rates)
        assert found.decode_seconds is not None
        assert found.tokens_per_second == 160 / found.decode_seconds
        return found.decode_seconds

    reading = simulate(ORDERLY, budget="12.5%", bound=False).decode.read_nbytes / 1e6
    assert seconds() == pytest.approx(reading)
    assert seconds(compute_seconds_per_expert=100.0) == pytest.approx(160 * 8 * 4 * 100)
    assert seconds(seconds_per_token=2.0) == pytest.approx(reading + 320)
    assert simulate(ORDERLY, budget="12.5%", bound=False).tokens_per_second is None


def test_a_path_and_a_trace_and_the_same_budget_in_other_words_are_the_same(tmp_path: Path) -> None:
    ORDERLY.write(tmp_path / "trace.csv")
    whole = 8 * 32 * 3 * 4096
    answers: list[Simulation] = [
        simulate(tmp_path / "trace.csv", budget=whole // 4),
        simulate(str(tmp_path / "trace.csv"), budget="768KiB"),
        simulate(ORDERLY, budget="25 %"),
        simulate(ORDERLY, budget=whole // 4, expert_nbytes=3 * 4096),
    ]
    assert answers[0].budget == whole // 4
    assert answers[1:] == answers[:1] * 3


def test_smaller_copies_are_read_faster_and_more_of_them_fit() -> None:
    whole = simulate(ORDERLY, budget="25%")
    smaller = simulate(ORDERLY, budget="25%", high_share=2 / 3)  # two blocks of three
    assert smaller.budget == whole.budget
    assert smaller.hit_rate > whole.hit_rate
    assert smaller.decode.read_nbytes < 2 / 3 * whole.decode.read_nbytes
    equal = simulate(ORDERLY, budget=2 * whole.budget // 3, high_share=2 / 3)
    assert equal.decode.hits == whole.decode.hits
    assert equal.decode.read_nbytes == 2 * whole.decode.read_nbytes // 3


def test_progress_ends_where_the_trace_does() -> None:
    told: list[tuple[int, int]] = []
    simulate(ORDERLY, budget="25%", bound=False, on_progress=lambda done, steps: told.append((done, steps)))
    assert told[-1] == (ORDERLY.step_count, ORDERLY.step_count)


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": "much"},
        {"budget": "-5%"},
        {"policy": "best"},
        {"quality": "finest"},
        {"low_share": 1.0},
        {"high_share": 0.0},
        {"high_share": 1.1},
        {"high_share": math.nan},
        {"quality": "balanced", "high_share": 0.2},
        {"low_share": math.nan},
        {"expert_nbytes": 0},
        {"read_bytes_per_second": 0.0},
        {"compute_seconds_per_expert": -1.0},
        {"trace": "no-such-trace.csv"},
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        simulate(**{"trace": ORDERLY, "budget": "25%", **wrong})  # type: ignore[arg-type]


def test_a_trace_that_says_no_sizes_needs_one(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("turn,phase,step,layer,slot,expert,weight\n0,1,0,0,0,0,1\n")
    with pytest.raises(InvalidInput, match=r"no expert_bytes of layers \[0\]; give expert_nbytes"):
        simulate(tmp_path / "trace.csv", budget=8192)
    assert simulate(tmp_path / "trace.csv", budget=8192, expert_nbytes=100).decode.misses == 1


def join(*traces: Trace) -> Trace:
    """One conversation after another in one trace."""

    arrays = {
        name: np.concatenate([getattr(trace, name) for trace in traces])
        for name in ("phase", "step", "layer", "expert", "weight")
    }
    turns = [np.full(len(trace.layer), turn, dtype=np.int32) for turn, trace in enumerate(traces)]
    return dataclasses.replace(traces[0], turn=np.concatenate(turns), **arrays)
