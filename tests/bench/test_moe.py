"""The simulation as a benchmark: every policy and budget is answered, in words and in numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from undercroft.bench.moe import MoeSettings, measure_moe
from undercroft.errors import InvalidInput
from undercroft.moe.policies import ONLINE
from undercroft.moe.synthetic import synthetic_trace

UNDERCROFT = Path(sys.executable).with_name("undercroft")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "trace.csv"
    synthetic_trace(layers=6, experts=16, used=2, tokens=60, skew=0.8, stickiness=1.5).write(path)
    return path


def test_every_policy_is_answered_at_every_budget(trace: Path) -> None:
    told: list[str] = []
    answer = measure_moe(MoeSettings(trace=trace, budgets=("12.5%", "50%")), told.append)
    expected = [(budget, policy) for budget in ("12.5%", "50%") for policy in (*ONLINE, "belady")]
    found = answer.figures["simulations"]
    assert [(each["budget"], each["policy"]) for each in found] == expected
    assert [row[0] for row in answer.rows] == [budget for budget, _ in expected]
    assert len(told) == len(expected)
    best = {each["budget"]: each["hit_rate"] for each in found if each["policy"] == "belady"}
    assert all(each["hit_rate"] <= best[each["budget"]] for each in found)
    assert [line.bound for line in answer.lines] == [1.0, 1.0, 1.1]
    assert answer.lines[2].found == pytest.approx(found[1]["read_nbytes"] / found[0]["read_nbytes"])


def test_one_policy_is_not_judged(trace: Path) -> None:
    answer = measure_moe(MoeSettings(trace=trace, budgets=("25%",), policies=("lfu",)), lambda _: None)
    assert [row[1] for row in answer.rows] == ["lfu", "belady (bound)"]
    assert not answer.lines


def test_nothing_to_do_is_refused(trace: Path) -> None:
    with pytest.raises(InvalidInput, match="a budget and a policy"):
        MoeSettings(trace=trace, budgets=())


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [UNDERCROFT, "bench", "moe", *arguments], capture_output=True, text=True, check=False
    )


def test_the_verb_prints_numbers_or_a_table(trace: Path) -> None:
    options = ("--simulate", trace, "--budget", "25%", "--policy", "expected-use", "--quality", "balanced")
    finished = run(*options, "--read-rate", "1GB", "--json")
    assert finished.returncode == 0, finished.stderr
    [answer] = json.loads(finished.stdout)["answers"]
    ours, bound = answer["figures"]["simulations"]
    assert 0 < ours["low_mass"] <= 0.05
    assert ours["tokens_per_second"] > 0
    assert bound["policy"] == "belady"
    assert "expected-use at 25%" in finished.stderr
    table = run(*options)
    assert table.returncode == 0
    assert f"{ours['hit_rate']:.1%}" in table.stdout
    assert "tokens/s at" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "--simulate"),
        (("--simulate", "none.csv"), 1, "No such file"),
        (("--simulate", "{trace}", "--policy", "best"), 1, "is no policy"),
        (("--simulate", "{trace}", "--quality", "best"), 1, "is no quality"),
        (("--simulate", "{trace}", "--budget", "lots"), 1, "is not a size"),
        (("--simulate", "{trace}", "--budget", "1B"), 1, "Smallest budget known to work"),
    ],
)
def test_what_cannot_be_meant_is_a_typed_message(
    trace: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    finished = run(*(argument.format(trace=trace) for argument in arguments))
    assert finished.returncode == code
    assert words in finished.stderr
    assert "Traceback" not in finished.stderr
