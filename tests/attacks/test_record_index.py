"""Hostile record files: whatever an index says, opening it ends in our errors and no read leaves the data."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from undercroft.errors import CorruptRecord, TransferFailed, UndercroftError, WrongVersion
from undercroft.store.index import RecordIndex
from undercroft.store.records import RecordFile
from undercroft.store.writer import RecordWriter

BLOCK = 4096
Index = dict[str, Any]

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good record file of two records of one block each."""
    path = tmp_path / "file"
    with RecordWriter(path) as writer:
        writer.add("first", "x", bytes(100))
        writer.add("second", "x", bytes(BLOCK))
    return path


@pytest.fixture
def index(path: Path) -> Index:
    return json.loads(index_of(path).read_text())


def index_of(path: Path) -> Path:
    return Path(f"{path}.json")


def set_field(index: Index, field: str, value: object) -> None:
    """Change a field of the whole, or as "0.offset" one of a record."""
    where, _, name = field.rpartition(".")
    target = index["records"][int(where)] if where else index
    target[name] = value


HUGE = 2**63
NO_COUNTS = [-1, -(2**70), HUGE, 2**200, True, 1.0, 1e3, "1", None, [1], {}]


@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
@pytest.mark.parametrize("field", ["data_nbytes", "0.offset", "1.offset", "0.nbytes"])
def test_a_number_that_is_no_count_of_bytes(path: Path, index: Index, field: str, value: object) -> None:
    set_field(index, field, value)
    index_of(path).write_text(json.dumps(index))
    with pytest.raises(CorruptRecord, match=field.rpartition(".")[2]):
        RecordFile.open(path)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("1.offset", 0, "overlaps"),
        ("0.offset", BLOCK, "overlaps"),
        ("1.offset", 1, "no multiple of 4096"),
        ("1.offset", BLOCK + 512, "no multiple of 4096"),
        ("1.offset", 2 * BLOCK, "past the data's"),
        ("1.offset", 2**63 - BLOCK, "past the data's"),
        ("0.nbytes", 0, "0 bytes cannot be"),
        ("0.nbytes", 99, "99 bytes cannot be"),
        ("0.nbytes", 2**62, "cannot be"),
        ("0.shape", [], "cannot be"),
        ("0.shape", [100, 0], "cannot be"),
        ("0.shape", [-10, -10], "shape"),
        ("0.shape", [10.0, 10], "shape"),
        ("0.shape", [True] * 100, "shape"),
        ("0.shape", [1] * 33, "shape"),
        ("0.shape", [2**62] * 32, "cannot be"),
        ("0.shape", "100", "shape"),
        ("0.shape", {"0": 100}, "shape"),
        ("0.dtype", "float32", "cannot be"),
        ("0.dtype", "nn", "no dtype"),
        ("0.dtype", "__class__", "no dtype"),
        ("0.dtype", "torch.uint8", "no dtype"),
        ("0.dtype", 7, "dtype is no text"),
        ("0.name", "", "name is no text"),
        ("0.name", None, "name is no text"),
        ("0.name", ["first"], "name is no text"),
        ("0.name", "second", "names a record twice"),
        ("0.kind", "", "kind is no text"),
        ("0.xxh3_64", "0" * 15, "xxh3_64"),
        ("0.xxh3_64", "0" * 17, "xxh3_64"),
        ("0.xxh3_64", "0x00000000000000", "xxh3_64"),
        ("0.xxh3_64", "ABCDEFABCDEFABCD", "xxh3_64"),
        ("0.xxh3_64", "+000000000000001", "xxh3_64"),
        ("0.xxh3_64", "\u0660" * 16, "xxh3_64"),
        ("0.xxh3_64", 5, "xxh3_64"),
        ("0.metadata", [1], "metadata"),
        ("metadata", "text", "metadata"),
        ("records", {}, "records is no list"),
        ("records", None, "records is no list"),
        ("records", [None], "record 0 is no JSON object"),
        ("records", [[]], "record 0 is no JSON object"),
        ("data_nbytes", 0, "past the data's"),
        ("data_nbytes", 3 * BLOCK, "its index says"),
        ("format", "safetensors", "no index of a record file"),
        ("format", None, "no index of a record file"),
    ],
)
def test_an_index_that_describes_what_cannot_be(
    path: Path, index: Index, field: str, value: object, complaint: str
) -> None:
    set_field(index, field, value)
    index_of(path).write_text(json.dumps(index))
    with pytest.raises(CorruptRecord, match=complaint):
        RecordFile.open(path)


@pytest.mark.parametrize("field", ["name", "kind", "offset", "nbytes", "dtype", "shape", "xxh3_64"])
def test_a_field_that_is_missing(path: Path, index: Index, field: str) -> None:
    del index["records"][1][field]
    index_of(path).write_text(json.dumps(index))
    with pytest.raises(CorruptRecord, match=f"record 1.*{field}"):
        RecordFile.open(path)


@pytest.mark.parametrize("version", [0, 2, -1, 1.0, True, "1", None, [1], 10**30])
def test_another_version(path: Path, index: Index, version: object) -> None:
    index["version"] = version
    index_of(path).write_text(json.dumps(index))
    with pytest.raises(WrongVersion, match="reads version 1"):
        RecordFile.open(path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe\x00",
        b"\x80abc",
        b'{"format": NaN}',
        b'{"format": Infinity}',
        b'{"format": "undercroft-records", "format": "undercroft-records"}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"data_nbytes": ' + b"9" * 100_000 + b"}",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_text_that_is_no_index(path: Path, text: bytes) -> None:
    index_of(path).write_bytes(text)
    with pytest.raises(CorruptRecord):
        RecordFile.open(path)


def test_a_member_named_twice_inside_a_record(path: Path, index: Index) -> None:
    text = json.dumps(index).replace('"name": "first"', '"name": "first", "name": "third"')
    index_of(path).write_text(text)
    with pytest.raises(CorruptRecord, match="twice"):
        RecordFile.open(path)


def test_names_cannot_write_to_a_terminal(path: Path, index: Index) -> None:
    index["records"][0]["name"] = "\x1b[2Jname\n\ud800"
    index["records"][0]["offset"] = 1
    index_of(path).write_text(json.dumps(index))
    with pytest.raises(CorruptRecord) as caught:
        RecordFile.open(path)
    assert str(caught.value).isprintable()


def test_members_that_are_not_known_are_passed_over(path: Path, index: Index) -> None:
    index["comment"] = "more"
    index["records"][0]["author"] = {"name": "a stranger"}
    index_of(path).write_text(json.dumps(index))
    with RecordFile.open(path) as file:
        assert len(file) == 2


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_directory(path: Path) -> None:
    path.mkdir()


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [make_fifo, make_directory, make_endless, make_loop])
@pytest.mark.parametrize("suffix", ["", ".json"], ids=["data", "index"])
def test_what_is_no_file_neither_blocks_nor_fills_memory(
    path: Path, suffix: str, make: Callable[[Path], None]
) -> None:
    victim = Path(f"{path}{suffix}")
    victim.unlink()
    make(victim)
    with pytest.raises((CorruptRecord, TransferFailed)):
        RecordFile.open(path)


def test_an_index_of_absurd_size_is_not_read(path: Path) -> None:
    os.truncate(index_of(path), 2**40)
    with pytest.raises(CorruptRecord, match="at most 256 MiB"):
        RecordFile.open(path)


def test_an_index_of_other_data_is_found_out_by_its_checksums(path: Path, index: Index) -> None:
    from undercroft.store.slab import Slab

    path.write_bytes(b"\x01" * (2 * BLOCK))
    lease = Slab(BLOCK).lease(BLOCK)
    assert lease is not None
    with RecordFile.open(path) as file, pytest.raises(CorruptRecord, match="checksum"):
        file.read(("first", "x"), lease)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
records = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["a", "b"]) | json_values,
        "kind": st.just("x"),
        "offset": st.integers(0, 8).map(lambda n: n * BLOCK) | json_values,
        "nbytes": st.integers(0, 3 * BLOCK) | json_values,
        "dtype": st.sampled_from(["uint8", "int16"]) | json_values,
        "shape": st.lists(st.integers(0, 200), max_size=3) | json_values,
        "xxh3_64": st.just("0" * 16),
    }
)
fitting = st.builds(
    lambda name, block, nbytes: {
        "name": name,
        "kind": "x",
        "offset": block * BLOCK,
        "nbytes": nbytes,
        "dtype": "uint8",
        "shape": [nbytes],
        "xxh3_64": "0" * 16,
    },
    st.sampled_from("abcdef"),
    st.integers(0, 8),
    st.integers(1, 3 * BLOCK),
)
indexes = st.fixed_dictionaries(
    {
        "format": st.just("undercroft-records"),
        "version": st.just(1),
        "data_nbytes": st.integers(0, 10).map(lambda n: n * BLOCK) | json_values,
        "records": st.lists(fitting, max_size=4) | st.lists(records, max_size=3) | json_values,
    }
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(indexes | json_values)
def test_an_index_that_is_believed_describes_what_can_be(index: object) -> None:
    try:
        parsed = RecordIndex.parse(json.dumps(index), "index")
    except UndercroftError:
        return
    end = 0
    for record in parsed.records:
        assert record.offset >= end
        assert record.offset % BLOCK == 0
        end = record.offset + record.nbytes
        assert end <= parsed.data_nbytes
    assert len({record.key for record in parsed.records}) == len(parsed.records)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(text: bytes) -> None:
    with pytest.raises(UndercroftError):
        RecordIndex.parse(text, "index")
