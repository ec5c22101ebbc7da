"""The overlap of reads and products: every line is answered, from a budget that really hits every other expert."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from undercroft.bench.driving import DOCTOR, IN_MEMORY, READS, RESIDENT, STREAMED
from undercroft.bench.overlap import OverlapSettings, measure_overlap
from undercroft.bench.workload import plan_workload
from undercroft.errors import InvalidInput
from undercroft.moe.random_experts import ExpertShape
from undercroft.moe.synthetic import synthetic_trace
from undercroft.units import MIB

UNDERCROFT = Path(sys.executable).with_name("undercroft")
TINY: dict[str, Any] = {
    **{"kinds": ("int8",), "hidden": 64, "intermediate": 64, "layers": 2, "experts": 24, "used": 3},
    **{"tokens": 24, "nbytes": MIB, "rounds": 2, "attempts": 1},
}


def test_every_line_is_answered_and_nothing_is_left(tmp_path: Path) -> None:
    told: list[str] = []
    answer = measure_overlap(OverlapSettings(directory=tmp_path, **TINY), told.append)
    assert not list(tmp_path.iterdir())
    assert told[-1] == "round 2/2"
    low, high, seconds, rate, cpu = answer.lines
    assert (low.verdict, high.verdict) == ("PASS", "PASS")
    assert (seconds.bound, rate.bound, cpu.bound) == (1.15, 0.85, 1.1)
    assert "below 1 MiB" in seconds.void
    assert "below 1 MiB" in rate.void
    passes = answer.figures["kinds"]["int8"]["passes"]
    assert set(passes) == {STREAMED, READS, IN_MEMORY, RESIDENT, DOCTOR}
    uses = 2 * 24 * 3
    for number in range(2):
        for way in (STREAMED, READS):
            each = passes[way][number]
            assert each["hits"] + each["misses"] == uses
            assert each["nbytes"] == each["misses"] * answer.figures["kinds"]["int8"]["record_nbytes"]
            assert 0 < each["reading"] <= each["wall"]
        assert (passes[IN_MEMORY][number]["hits"], passes[IN_MEMORY][number]["nbytes"]) == (uses, 0)
        assert passes[RESIDENT][number]["cpu"] > 0
    longer = [
        max(reads["wall"], products["wall"])
        for reads, products in zip(passes[READS], passes[RESIDENT], strict=True)
    ]
    ratios = [each["wall"] / most for each, most in zip(passes[STREAMED], longer, strict=True)]
    assert seconds.found == pytest.approx(sum(ratios) / 2)


def test_a_given_trace_decides_layers_and_experts() -> None:
    like = ExpertShape(layers=8, experts=64, hidden=64, intermediate=64)
    given = synthetic_trace(layers=5, experts=10, used=2, prompt=7, tokens=30, stickiness=0.5)
    work = plan_workload(like, given, used=8, tokens=20, nbytes=MIB, policy="lru")
    assert (work.shape.layers, work.shape.experts, work.trace.used) == (5, 10, 2)
    assert (work.tokens, set(work.trace.phase.tolist())) == (20, {1})
    few = plan_workload(like, given, used=8, tokens=20, nbytes=like.record_nbytes("int4") * 30, policy="lru")
    assert (few.shape.layers, few.trace.layers) == (3, 3)


@pytest.mark.parametrize("changes", [{"rounds": 0}, {"layers": 1}, {"tokens": 0}, {"used": 0}])
def test_settings_that_measure_nothing_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="at least"):
        OverlapSettings(directory=tmp_path, **{**TINY, **changes})


def test_the_verb_follows_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    synthetic_trace(layers=3, experts=24, used=3, tokens=30).write(trace)
    sizes = (
        "--hidden",
        "64",
        "--intermediate",
        "64",
        "--high",
        "bfloat16",
        "--size",
        "1MiB",
        "--tokens",
        "16",
    )
    options = ("--trace", trace, "--rounds", "1", "--attempts", "1", "--disk", tmp_path, "--json")
    done = subprocess.run(
        [UNDERCROFT, "bench", "overlap", *sizes, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    [answer] = json.loads(done.stdout)["answers"]
    assert len(answer["lines"]) == 5
    assert f"the trace {trace.name}," in " ".join(answer["notes"])
    assert [path.name for path in tmp_path.iterdir()] == ["trace.csv"]
