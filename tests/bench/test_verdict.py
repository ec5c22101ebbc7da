"""Lines of acceptance, and answers made of them."""

import json
from pathlib import Path

import pytest

from undercroft.bench.answer import Answer, table
from undercroft.bench.report import write_report
from undercroft.bench.verdict import Line
from undercroft.errors import UnsafeDirectory


@pytest.mark.parametrize(
    ("found", "relation", "verdict"),
    [
        (1.0, "<=", "PASS"),
        (1.1, "<=", "FAIL"),
        (0.9, "<=", "PASS"),
        (1.0, ">=", "PASS"),
        (1.1, ">=", "PASS"),
        (0.9, ">=", "FAIL"),
        (float("nan"), "<=", "FAIL"),
        (float("nan"), ">=", "FAIL"),
    ],
)
def test_the_figure_decides(found: float, relation: str, verdict: str) -> None:
    assert Line(claim="speed", found=found, bound=1.0, relation=relation).verdict == verdict
    void = Line(claim="speed", found=found, bound=1.0, relation=relation, void="raw varied")
    assert void.verdict == "VOID"


def test_a_line_reads_as_a_sentence() -> None:
    line = Line(claim="own CPU", found=0.0712, bound=0.06, unit=" s/GB", note="raw 0.030")
    assert str(line) == "FAIL  own CPU: 0.071 s/GB <= 0.060 s/GB  (raw 0.030)"
    assert str(Line(claim="losses", found=0, bound=0)) == "PASS  losses: 0 <= 0"
    assert "raw varied" in str(Line(claim="own CPU", found=1, bound=2, void="raw varied", note="hidden"))


def answer(*lines: Line, plot: str = "") -> Answer:
    return Answer(
        theme="store",
        question="Is it fast?",
        falsified_by="something faster.",
        head=("", "rate"),
        rows=(("raw", "1 GB/s"), ("the store", "999 MB/s")),
        lines=lines,
        plot=plot,
    )


def test_an_answer_passes_only_if_every_line_does() -> None:
    good, bad = Line(claim="a", found=0, bound=1), Line(claim="b", found=2, bound=1)
    void = Line(claim="c", found=0, bound=1, void="unsteady")
    assert answer(good, good).passed
    assert not answer(good, bad).passed
    assert not answer(good, void).passed


def test_an_answer_states_what_would_falsify_it_and_its_json_is_json() -> None:
    text = str(answer(Line(claim="a", found=float("inf"), bound=1)))
    assert text.startswith("Is it fast?\nFalsified by: something faster.")
    assert "FAIL  a: inf <= 1" in text
    facts = json.loads(
        json.dumps(answer(Line(claim="a", found=float("nan"), bound=1)).as_dict(), allow_nan=False)
    )
    assert facts["lines"][0] == {
        "claim": "a",
        "found": None,
        "bound": 1,
        "relation": "<=",
        "unit": "",
        "note": "",
        "void": "",
        "verdict": "FAIL",
    }


def test_columns_line_up() -> None:
    assert table(("", "rate"), [("raw", "1 GB/s"), ("the store", "9 MB/s")]).splitlines() == [
        "             rate",
        "raw        1 GB/s",
        "the store  9 MB/s",
    ]


def test_a_report_has_theme_hardware_and_date(tmp_path: Path) -> None:
    report = write_report(answer(Line(claim="a", found=0, bound=1), plot="<svg/>"), tmp_path / "results")
    text = report.read_text()
    assert [line.partition(":")[0] for line in text.splitlines()[2:5]] == ["- theme", "- hardware", "- date"]
    assert "PASS  a" in text
    assert "](store.svg)" in text
    assert report.with_suffix(".svg").read_text() == "<svg/>"
    assert json.loads(report.with_suffix(".json").read_text())["passed"]


def test_a_report_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnsafeDirectory, match="cannot write the report"):
        write_report(answer(), tmp_path / "file")
