"""Measuring quality, at a size at which nothing is proven but that the right things are compared."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from undercroft.bench.answer import Answer
from undercroft.bench.quality import class_shares, measure_quality
from undercroft.bench.quality_runs import OUTLIERS, PLAIN, QualitySettings
from undercroft.errors import InvalidInput
from undercroft.moe.importance import Importance
from undercroft.moe.trace import Trace


@pytest.fixture(scope="module")
def answer(small_moe: Path) -> Answer:
    settings = QualitySettings(model=small_moe, windows=1, length=8, exercises=1, share=0.5)
    return measure_quality(settings, lambda text: None)


def test_every_quality_is_measured_on_both_models(answer: Answer) -> None:
    runs = [(run["model"], run["quality"]) for run in answer.figures["runs"]]
    assert runs[0] == (PLAIN, "exact")
    assert set(runs[1:]) == {
        (PLAIN, "hobbit"),
        *((m, q) for m in (PLAIN, OUTLIERS) for q in ("balanced", "fast")),
    }
    assert [row[:2] for row in answer.rows] == runs
    for run in answer.figures["runs"]:
        assert run["fidelity"]["same"] == (run["quality"] == "exact") or run["quality"] == "hobbit"
        assert run["exact_match"] == (0 if run["quality"] in ("exact", "balanced") else None)
    json.dumps(answer.as_dict())


def test_exact_is_bit_for_bit_what_is_in_memory(answer: Answer) -> None:
    line = answer.lines[0]
    assert (line.found, line.bound, line.verdict) == (0, 0, "PASS")


def test_claims_have_lines_and_outliers_are_called_synthetic(answer: Answer) -> None:
    claims = [line.claim for line in answer.lines]
    assert len(claims) == len(set(claims)) == 2 + 6
    assert [line.bound for line in answer.lines[2:]] == [0.5, 1, 2, 0.5, 1, 2]
    assert all("synthetic" in claim for claim in claims[5:])
    assert "67/30/3" in answer.notes[1]


def test_classes_are_counted_use_by_use() -> None:
    numbers = np.zeros(4, dtype=np.int32)
    weights = np.array([[0.5, 0.3, 0.2], [0.7, 0.25, 0.05], [0.95, 0.03, 0.02], [0.65, 0.3, 0.05]])
    trace = Trace(
        layers=1,
        experts=3,
        used=3,
        turn=numbers,
        phase=numbers,
        step=np.arange(4, dtype=np.int32),
        layer=numbers,
        expert=np.tile(np.arange(3, dtype=np.int32), (4, 1)),
        weight=weights,
    )
    shares = class_shares(trace)
    assert list(shares) == [Importance.HIGH, Importance.LOW, Importance.SKIP]
    assert list(shares.values()) == pytest.approx([100 * 5 / 12, 100 * 3 / 12, 100 * 4 / 12])


@pytest.mark.parametrize("wrong", [{"windows": 0}, {"length": 1}, {"exercises": -1}, {"share": 0.0}])
def test_settings_that_measure_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match="measure nothing"):
        QualitySettings(**wrong)  # type: ignore[arg-type]


def test_the_verb_refuses_what_measures_nothing() -> None:
    command = [str(Path(sys.executable).with_name("undercroft")), "bench", "quality", "--windows", "0"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "measure nothing" in finished.stderr
    assert "Traceback" not in finished.stderr
