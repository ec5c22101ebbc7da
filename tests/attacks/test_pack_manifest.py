"""Hostile packed folders: whatever a manifest or an index says, opening it ends in our errors, and nothing else."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.moe.conftest import qwen

from undercroft.errors import CorruptRecord, UndercroftError
from undercroft.moe.manifest import Manifest
from undercroft.moe.pack import pack
from undercroft.moe.packed import open_packed

pytestmark = pytest.mark.usefixtures("nothing_left")
MANIFEST = "undercroft-pack.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good packed folder, which no test changes."""
    folder = tmp_path_factory.mktemp("good")
    qwen(0).save_pretrained(folder / "model")
    pack(folder / "model", folder / "packed")
    return folder / "packed"


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def sealed(content: Any) -> str:
    """A manifest's text with the checksum that belongs to it."""
    if not isinstance(content, dict):
        return json.dumps(content)
    rest = {name: value for name, value in content.items() if name != "xxh3_64"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return json.dumps({**rest, "xxh3_64": xxhash.xxh3_64_hexdigest(text.encode())})


def changed(folder: Path, act: Callable[[Any], object]) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    act(content)
    (folder / MANIFEST).write_text(sealed(content))


def in_layer(field: str, value: object) -> Callable[[Any], object]:
    return lambda content: content["layers"][0].update({field: value})


def in_parameter(field: str, value: object) -> Callable[[Any], object]:
    return lambda content: content["layers"][0]["parameters"][0].update({field: value})


@pytest.mark.parametrize(
    "act",
    [
        *(in_layer("experts", value) for value in (0, -1, 17, 2**62, 2**63, 1.5, True, "16", None)),
        *(in_layer("module", value) for value in (None, 3, ["x"])),
        *(in_layer("parameters", value) for value in ([], None, {}, [None], [[]])),
        *(
            in_parameter("shape", value)
            for value in ([64], [64, -64], [0, 64], [64.0, 64], [2**40, 2**40], "64")
        ),
        *(in_parameter("stored", value) for value in ("object", None, 4, ["float32"])),
        *(in_parameter("name", value) for value in ("down_proj", "other", None, 7)),
        *(
            lambda content, high=high: content.update(high=high)
            for high in ("int8", "int4", "x", None, ["keep"])
        ),
        *(lambda content, group=group: content.update(group=group) for group in (31, 32.0, "32", True, None)),
        *(lambda content, low=low: content.update(low=low) for low in ("int2", "keep", "../low", {})),
        lambda content: content.update(layers=content["layers"] * 2, indexes=content["indexes"] * 2),
        lambda content: content.update(layers=content["layers"][::-1], indexes=content["indexes"][::-1]),
        lambda content: content.update(layers=[], indexes=[]),
        lambda content: content.update(indexes=[None] * 3),
        lambda content: content.update(tensors={"x": {"dtype": "float32", "shape": [10**30]}}),
        lambda content: content.update(tensors=[]),
        lambda content: content.update(source="x"),
        lambda content: content.update(version="1"),
        lambda content: content.pop("dense"),
        lambda content: content.clear(),
    ],
)
def test_a_manifest_that_cannot_be_is_corrupt(folder: Path, act: Callable[[Any], object]) -> None:
    changed(folder, act)
    with pytest.raises(CorruptRecord):
        open_packed(folder)


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"format": NaN}', b"7" * 5000]
)
def test_a_manifest_that_is_none_is_corrupt(folder: Path, text: bytes) -> None:
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(CorruptRecord):
        open_packed(folder)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"parts": [{"name": "gate_up_proj", "offset": 0, "shape": [64, 64], "dtype": "float32"}]},
        {
            "parts": [
                {"name": "gate_up_proj", "offset": 16384, "shape": [64, 64], "dtype": "float32"},
                {"name": "down_proj", "offset": 0, "shape": [64, 32], "dtype": "float32"},
            ]
        },
    ],
)
def test_a_record_that_holds_something_else_is_corrupt(folder: Path, metadata: dict[str, Any]) -> None:
    """Its index and the manifest were sealed again by somebody who knows how."""
    path = folder / "experts-00001.records.json"
    index = json.loads(path.read_text())
    index["records"][4]["metadata"] = metadata
    path.write_text(json.dumps(index))
    digest = xxhash.xxh3_64_hexdigest(path.read_bytes())
    changed(folder, lambda content: content["indexes"].__setitem__(1, digest))
    with pytest.raises(CorruptRecord, match="a record does not"):
        open_packed(folder)


def test_a_pipe_in_place_of_a_manifest_does_not_make_us_wait(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    with pytest.raises(CorruptRecord, match="no regular file"):
        open_packed(folder)


def test_names_of_files_are_never_taken_from_the_manifest(folder: Path) -> None:
    changed(folder, lambda content: content["source"]["files"][0].update(name="/etc/passwd"))
    with open_packed(folder) as experts:
        assert [file.path.parent for file in experts.files] == [folder] * 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    return [path] * bool(path) + [found for key, each in inner for found in places(each, (*path, key))]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data(), value=json_values)
def test_any_value_in_any_place_is_believed_or_a_typed_error(
    good: Path, data: st.DataObject, value: object
) -> None:
    content = json.loads((good / MANIFEST).read_text())
    content["tensors"] = dict(list(content["tensors"].items())[:2])
    *way, last = data.draw(st.sampled_from(places(content)))
    target = content
    for key in way:
        target = target[key]
    target[last] = value
    try:
        manifest = Manifest.parse(sealed(content), "manifest")
    except UndercroftError:
        return
    assert Manifest.parse(manifest.text(), "again") == manifest
