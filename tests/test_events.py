"""Events: bounded, thread-safe, cheap when disabled, and a trace that a viewer can read."""

import json
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.errors import InvalidInput
from undercroft.events import Event, Recorder
from undercroft.testing import ManualClock


def test_a_span_records_when_it_began_and_how_long_it_took() -> None:
    clock = ManualClock(10.0)
    recorder = Recorder(clock=clock)
    with recorder.span("write", "disk", nbytes=4096, detail="block 3"):
        clock.advance(2.5)
    assert recorder.events == (
        Event(name="write", lane="disk", start=10.0, seconds=2.5, nbytes=4096, detail="block 3"),
    )


def test_a_span_is_recorded_also_when_its_block_raises() -> None:
    recorder = Recorder()
    with pytest.raises(KeyError), recorder.span("read", "disk"):
        raise KeyError
    assert [event.name for event in recorder.events] == ["read"]


def test_the_oldest_events_give_way_and_are_counted() -> None:
    recorder = Recorder(capacity=3)
    for index in range(5):
        recorder.record(str(index), "lane")
    assert [event.name for event in recorder.events] == ["2", "3", "4"]
    assert recorder.forgotten == 2


def test_a_disabled_recorder_keeps_no_events_and_reads_no_clock_but_counts() -> None:
    def clock() -> float:
        raise AssertionError("a disabled recorder asked for the time")

    recorder = Recorder(enabled=False, clock=clock)
    recorder.record("a", "lane")
    with recorder.span("b", "lane"):
        recorder.count("bytes", 7)
    assert recorder.events == ()
    assert recorder.counters == {"bytes": 7}


def test_counters_add_up_from_many_threads() -> None:
    recorder = Recorder(capacity=10)

    def work() -> None:
        for _ in range(2000):
            recorder.count("calls")
            recorder.record("call", "lane")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recorder.counters == {"calls": 8000}
    assert len(recorder.events) + recorder.forgotten == 8000


def test_a_counter_never_falls() -> None:
    with pytest.raises(InvalidInput, match="cannot fall"):
        Recorder().count("bytes", -1)


def test_a_recorder_of_no_events_is_refused() -> None:
    with pytest.raises(InvalidInput, match="enabled=False"):
        Recorder(capacity=0)


def test_events_cannot_be_changed() -> None:
    event = Event(name="a", lane="b", start=0.0)
    with pytest.raises(AttributeError):
        event.name = "c"  # type: ignore[misc]


def _trace(recorder: Recorder, path: Path) -> list[dict]:
    recorder.write_chrome_trace(path)
    return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def test_the_trace_names_lanes_and_counts_microseconds_from_the_first_event(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.record("step", "compute", start=100.0, seconds=2.0)
    recorder.record("write", "disk", start=101.0, seconds=0.5, nbytes=8)
    recorder.record("mark", "compute", start=103.0)
    trace = _trace(recorder, tmp_path / "trace.json")
    names = {event["tid"]: event["args"]["name"] for event in trace if event["ph"] == "M"}
    shown = [(e["name"], names[e["tid"]], e["ph"], e["ts"], e.get("dur")) for e in trace if e["ph"] != "M"]
    assert shown == [
        ("step", "compute", "X", 0.0, 2e6),
        ("write", "disk", "X", 1e6, 5e5),
        ("mark", "compute", "i", 3e6, None),
    ]


def test_a_trace_of_nothing_is_valid(tmp_path: Path) -> None:
    assert _trace(Recorder(), tmp_path / "trace.json") == []


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 20), st.integers(1, 5)), max_size=20))
def test_no_two_events_of_one_row_overlap(spans: list[tuple[str, int, int]]) -> None:
    recorder = Recorder()
    for lane, start, seconds in spans:
        recorder.record("x", lane, start=start, seconds=seconds)
    with tempfile.TemporaryDirectory() as directory:
        trace = [event for event in _trace(recorder, Path(directory) / "trace.json") if event["ph"] == "X"]
    assert len(trace) == len(spans)
    for one in trace:
        for other in trace:
            if one is not other and one["tid"] == other["tid"]:
                assert one["ts"] + one["dur"] <= other["ts"] or other["ts"] + other["dur"] <= one["ts"]
