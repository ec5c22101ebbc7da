"""Traces: what is written is read back, forwards are told apart, and no file is believed blindly."""

from pathlib import Path

import numpy as np
import pytest

from undercroft.errors import InvalidInput
from undercroft.moe.synthetic import synthetic_trace
from undercroft.moe.trace import Trace

HEAD = "# n_layer=2 n_expert=4 n_expert_used=2\nturn,phase,step,layer,slot,expert,weight\n"
ROWS = "0,0,0,0,0,1,.6\n0,0,0,0,1,2,.4\n"


def read(folder: Path, text: str) -> Trace:
    path = folder / "trace.csv"
    path.write_text(text)
    return Trace.read(path)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    trace = synthetic_trace(layers=3, experts=8, used=2, prompt=4, tokens=5)
    trace.write(tmp_path / "trace.csv")
    back = Trace.read(tmp_path / "trace.csv")
    assert (back.layers, back.experts, back.used) == (3, 8, 2)
    assert back.expert_nbytes == trace.expert_nbytes
    for name in ("turn", "phase", "step", "layer", "expert", "weight"):
        assert np.array_equal(getattr(back, name), getattr(trace, name)), name


def test_a_prefill_is_one_forward_and_each_decoded_token_another() -> None:
    trace = synthetic_trace(layers=3, experts=8, used=2, prompt=4, tokens=2)
    steps = list(trace.steps())
    assert len(steps) == trace.step_count == 9
    assert [step.layer for step in steps] == [0, 1, 2] * 3
    assert [step.is_first for step in steps] == [True, False, False] * 3
    assert [step.is_prefill for step in steps] == [True] * 3 + [False] * 6
    assert [len(step.experts) for step in steps] == [4] * 3 + [1] * 6


def test_chunks_of_a_prefill_are_forwards(tmp_path: Path) -> None:
    rows = [(layer, token) for chunk in ((0, 1), (2, 3)) for layer in (0, 1) for token in chunk]
    body = "".join(f"0,0,{token},{layer},{slot},{slot},.5\n" for layer, token in rows for slot in (0, 1))
    steps = list(read(tmp_path, HEAD + body).steps())
    assert [(step.layer, step.is_first, len(step.experts)) for step in steps] == [
        (0, True, 2),
        (1, False, 2),
        (0, True, 2),
        (1, False, 2),
    ]


def test_columns_may_come_in_any_order_among_others(tmp_path: Path) -> None:
    text = "expert,bytes,weight,slot,layer,step,phase,turn\n3,77,.25,0,1,9,1,2\n"
    trace = read(tmp_path, text)
    (step,) = trace.steps()
    assert (step.turn, step.is_prefill, step.layer) == (2, False, 1)
    assert (trace.layers, trace.experts, trace.used) == (2, 4, 1)
    assert step.experts.tolist() == [[3]]
    assert step.weights.tolist() == [[0.25]]


def test_metadata_is_kept(tmp_path: Path) -> None:
    trace = read(
        tmp_path, "# layer=1 expert_bytes=5000 dense_bytes=7\n# layer=9 expert_bytes=3\n" + HEAD + ROWS
    )
    assert trace.expert_nbytes == {1: 5000}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# only comments\n", "is empty"),
        (HEAD, "has no rows"),
        ("turn,phase,step,layer,slot,expert\n0,0,0,0,0,1\n", "line 1 names no column weight"),
        (HEAD + "0,0,0,0,0,1\n", "line 3 is no row of numbers"),
        (HEAD + "0,0,0,0,0,x,.5\n", "line 3 is no row of numbers"),
        (HEAD + f"0,0,0,0,0,{'9' * 5000},.5\n", "line 3 is no row of numbers"),
        (HEAD + ROWS + "0,0,0,0,0,1,nan\n", "line 5 has nan for a gate weight"),
        (HEAD + "0,0,0,0,0,1,inf\n", "line 3 has inf for a gate weight"),
        (HEAD + "0,0,0,0,0,1,-1\n", "line 3 has -1.0 for a gate weight"),
        (HEAD + "0,2,0,0,0,1,.5\n", "line 3 has a number out of range"),
        (HEAD + "0,0,-1,0,0,1,.5\n", "line 3 has a number out of range"),
        (HEAD + "0,0,4294967296,0,0,1,.5\n", "line 3 has a number out of range"),
        (HEAD + "0,0,0,0,2,1,.5\n", "line 3 has a number out of range"),
        (HEAD + "0,0,0,0,0,4,.5\n0,0,0,0,1,1,.5\n", "has n_expert=4, but rows for 5"),
        (HEAD + "0,0,0,7,0,1,.5\n0,0,0,7,1,2,.5\n", "has n_layer=2, but rows for 8"),
        (HEAD + ROWS + "0,0,1,0,0,1,.5\n", "row 3 after the header: each token has slots 0 to 1"),
        (HEAD + "0,0,0,0,1,1,.5\n0,0,0,0,0,2,.5\n", "row 1 after the header"),
        (HEAD + ROWS + "0,0,1,0,0,1,.5\n0,0,1,0,1,1,.5\n", "row 3 after the header"),
        (HEAD + "0,0,0,0,0,1,.5\n0,0,1,0,1,2,.5\n", "row 1 after the header"),
        ("# n_layer=99999999999 n_expert=9\n" + HEAD[HEAD.index("turn") :] + ROWS, "is no model"),
        ("# n_layer=0\n", "line 1 has n_layer=0, which is out of range"),
        ("# n_layer=two\n", "line 1 has n_layer=two"),
        ("# n_expert=" + "9" * 300 + "\n", "out of range"),
        (HEAD + "0," * 70000, "line 3 is too long"),
        ("turn,phase,step,layer,slot,expert,weight\n0,0,0,2147483647,0,2147483647,1\n", "is no model"),
        ("\x00\xff\xfe", "names no column"),
    ],
)
def test_what_is_no_trace_is_a_typed_error_that_says_where(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        read(tmp_path, text)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_bytes(bytes(range(256)))
    with pytest.raises(InvalidInput, match="names no column"):
        Trace.read(tmp_path / "trace.csv")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="No such file"):
        Trace.read(tmp_path / "none.csv")
