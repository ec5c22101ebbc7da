"""``undercroft bench``: each question, at a size at which nothing is proven but that it can be asked."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

UNDERCROFT = Path(sys.executable).with_name("undercroft")
TINY = (
    *("--layers", "1", "--width", "64", "--vocabulary", "64", "--sequence-length", "64", "--batch-size", "1"),
    *("--budget", "256KiB", "--min-bytes", "4KiB", "--rounds", "2", "--attempts", "1"),
)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([UNDERCROFT, "bench", *arguments], capture_output=True, text=True, check=False)


def claims(*arguments: str | Path) -> dict[str, dict[str, Any]]:
    """The lines of the only answer, by claim."""
    finished = run(*arguments, "--json")
    assert finished.returncode == 0, finished.stderr
    [answer] = json.loads(finished.stdout)["answers"]
    assert answer["question"]
    assert answer["falsified_by"]
    return {line["claim"]: line for line in answer["lines"]}


def test_store_answers_every_line_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    sizes = ("--size", "16MiB", "--queued", "16MiB", "--rounds", "2", "--attempts", "1")
    lines = claims("store", *sizes, "--disk", disk)
    cases = {claim.removesuffix(": rate over raw") for claim in lines if claim.endswith("rate over raw")}
    assert cases == {
        "sequential reads, 8 MiB",
        "sequential writes, 8 MiB",
        *(f"records, {size} MiB" for size in (16, 8, 4, 1)),
    }
    assert len(lines) == 3 * len(cases) + 1
    assert all(line["found"] is not None for line in lines.values())
    assert not list(disk.iterdir())


def test_train_answers_every_line(tmp_path: Path) -> None:
    finished = run("train", *TINY, "--disk", tmp_path / "spill", "--results", tmp_path / "results")
    assert finished.returncode == 0, finished.stderr
    assert "Falsified by:" in finished.stdout
    assert len(re.findall(r"^(?:PASS|FAIL|VOID)  ", finished.stdout, re.MULTILINE)) == 11
    same = "PASS  losses that differ from plain in any bit, all modes and steps: 0 <= 0"
    assert same in finished.stdout, finished.stdout  # whole, for the table names the mode that differs
    assert "PASS  most bytes counted at any instant" in finished.stdout
    assert "round 2/2" in finished.stderr
    assert (tmp_path / "results" / "training.md").exists()


@pytest.mark.slow
def test_the_sweep_plots_every_budget(tmp_path: Path) -> None:
    results = tmp_path / "results"
    lines = claims("train", *TINY, "--sweep", "2", "--disk", tmp_path / "spill", "--results", results)
    assert lines["losses that differ from plain in any bit, all budgets"]["verdict"] == "PASS"
    assert lines["most bytes counted beyond the budget"]["verdict"] == "PASS"
    assert (results / "budget-sweep.svg").read_text().count("<circle") == 4


@pytest.mark.slow
@pytest.mark.root
def test_limits_kill_plain_training(tmp_path: Path) -> None:
    finished = run("train", *TINY, "--limits", "2", "--disk", tmp_path / "spill", "--json")
    if "cannot make a control group" in finished.stderr:
        pytest.skip(finished.stderr)
    [answer] = json.loads(finished.stdout)["answers"]
    killed = answer["lines"][0]
    assert (killed["found"], killed["verdict"]) == (2, "PASS")


def test_flatness_is_found_in_few_steps(tmp_path: Path) -> None:
    lines = claims("train", *TINY, "--flat", "5", "--disk", tmp_path / "spill")
    assert {"growth of open files per step", "growth of threads per step"} <= set(lines)
    assert lines["growth of threads per step"]["found"] == 0


def test_strict_fails_where_a_line_does_and_otherwise_not(tmp_path: Path) -> None:
    # With one read ahead of it, none can come ten times sooner.
    sizes = ("--size", "1MiB", "--queued", "4MiB", "--rounds", "1", "--attempts", "1")
    assert run("store", *sizes, "--disk", tmp_path).returncode == 0
    assert run("store", *sizes, "--disk", tmp_path, "--strict").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("store", "--rounds", "0"), 1, "must be at least 1"),
        (("store", "--disk", "/nowhere"), 1, "cannot look at /nowhere"),
        (("store", "--size", "many"), 1, "is not a size"),
        (("train", "--width", "100"), 2, "multiple of 64"),
        (("train", "--flat", "4"), 1, "take 5 at least"),
        (("train", "--sweep", "1"), 1, "two points at least"),
    ],
)
def test_what_cannot_be_meant_is_a_typed_message(arguments: tuple[str, ...], code: int, words: str) -> None:
    finished = run(*arguments)
    assert finished.returncode == code
    assert words in finished.stderr
    assert "Traceback" not in finished.stderr
