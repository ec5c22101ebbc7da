"""``undercroft demo``, tiny: the same facts for people and programs, and nothing left behind."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from undercroft.cli.demo import streaming_text, training_text
from undercroft.cli.table import comparison_table, streaming_table
from undercroft.moe.demonstration import StreamedRow, StreamingShown
from undercroft.training.compare import Row
from undercroft.training.demonstration import Scale, TrainingShown
from undercroft.units import MIB

UNDERCROFT = Path(sys.executable).with_name("undercroft")
TINY = ["--layers", "2", "--width", "64", "--sequence-length", "64", "--batch-size", "2", "--steps", "3"]
TINY += ["--budget", "4MiB", "--min-bytes", "4KiB", "--tokens", "4"]
ROWS = (
    Row(name="plain", failure=None, peak_nbytes=8 * MIB, fraction=1.0, equal=True),
    Row(name="spilled", failure=None, peak_nbytes=2 * MIB, fraction=0.25, equal=True, spilled_nbytes=MIB),
)


def demo(temporary: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    return subprocess.run(
        [UNDERCROFT, "demo", *arguments], capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    temporary = tmp_path_factory.mktemp("temporary")
    finished = demo(temporary, *TINY, "--json")
    assert list(temporary.iterdir()) == []
    return finished


def test_act_one_shows_three_runs_with_the_same_bits(shown: subprocess.CompletedProcess[str]) -> None:
    assert shown.returncode == 0, shown.stderr
    act, _ = json.loads(shown.stdout)["acts"]
    assert act["act"] == "training"
    assert [row["name"] for row in act["rows"]] == ["plain", "checkpointed", "spilled"]
    assert all(row["equal"] for row in act["rows"])
    assert act["rows"][2]["spilled_nbytes"] > 0
    assert act["parameters"] > 0


def test_act_two_shows_the_same_model_streamed(shown: subprocess.CompletedProcess[str]) -> None:
    _, act = json.loads(shown.stdout)["acts"]
    assert act["act"] == "streaming"
    assert [row["name"] for row in act["rows"]] == ["in memory", "LRU", "exact", "balanced", "fast"]
    assert [row["same"] for row in act["rows"]][:3] == [True, True, True]
    assert act["budget"] == act["experts_nbytes"] // 4
    assert act["tokens"] == 8


def test_progress_names_the_run_and_stays_on_stderr(shown: subprocess.CompletedProcess[str]) -> None:
    for name in ("plain", "checkpointed", "spilled"):
        assert f"{name} step 3/3 loss " in shown.stderr
    for name in ("in memory", "LRU", "exact", "balanced", "fast"):
        assert f"{name} step 8/8 tokens read" in shown.stderr


def test_an_impossible_shape_is_told(tmp_path: Path) -> None:
    finished = demo(tmp_path, "--width", "100")
    assert finished.returncode == 1
    assert "the width must be a multiple of 64" in finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_people_get_a_table_and_a_conclusion() -> None:
    shown = TrainingShown(parameters=7_300_000, scale=Scale(), rows=ROWS)
    text = training_text(shown)
    assert text.startswith("A model of 7.3 million parameters learns")
    assert text.endswith("between steps: 2 MiB in the place of 8 MiB.")
    assert comparison_table(ROWS) in text


def test_different_bits_or_a_failed_run_are_no_success() -> None:
    for bad in (replace(ROWS[1], equal=False), Row(name="spilled", failure="killed")):
        text = training_text(TrainingShown(parameters=1, scale=Scale(), rows=(ROWS[0], bad)))
        assert "This should not be" in text


STREAMED = (
    StreamedRow(name="in memory", tokens_per_second=50.0),
    StreamedRow(name="exact", tokens_per_second=25.0, nbytes_per_token=MIB, hit_rate=0.5, low_mass=0.0),
    StreamedRow(
        name="fast",
        tokens_per_second=40.0,
        nbytes_per_token=MIB / 4,
        hit_rate=0.75,
        low_mass=0.1,
        perplexity_change=0.012,
        same=False,
    ),
)


def streamed(rows: tuple[StreamedRow, ...]) -> StreamingShown:
    return StreamingShown(
        experts_nbytes=16 * MIB,
        budget=4 * MIB,
        tokens=8,
        question="What is 1 plus 1?",
        answer="#### 2",
        rows=rows,
    )


def test_people_get_the_second_table_and_the_answer() -> None:
    text = streaming_text(streamed(STREAMED))
    assert "16 MiB" in text
    assert "4 MiB" in text
    assert text.endswith("  What is 1 plus 1?\nthey answer\n  #### 2")
    table = streaming_table(STREAMED)
    assert table in text
    assert table.splitlines()[3].split() == ["fast", "40.0", "256", "KiB", "75%", "10.0%", "+1.20%", "no"]


def test_streaming_that_is_not_exact_is_no_success() -> None:
    shown = streamed((STREAMED[0], replace(STREAMED[1], same=False)))
    assert not shown.held
    assert "This should not be" in streaming_text(shown)
