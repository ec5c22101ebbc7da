"""Compiling a source of ours: once, into Undercroft's home, and never loading what another user could have written."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from undercroft import native

SOURCE = 'extern "C" int answer() { return ANSWER; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that needs `-DANSWER=...`, and a home of its own."""
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler here")
    monkeypatch.setenv("UNDERCROFT_HOME", str(tmp_path / "home"))
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def test_what_was_compiled_runs_and_is_compiled_once(source: Path) -> None:
    path = native.library(source, flags=["-DANSWER=42"])
    assert ctypes.CDLL(str(path)).answer() == 42
    assert path.name.startswith("answer-")
    before = path.stat().st_mtime_ns
    assert native.library(source, flags=["-DANSWER=42"]) == path
    assert path.stat().st_mtime_ns == before
    assert list(path.parent.iterdir()) == [path]


def test_another_recipe_is_another_library_and_another_place_is_not(source: Path, tmp_path: Path) -> None:
    include = tmp_path / "more.inc"
    include.write_text("")
    first = native.library(source, flags=["-DANSWER=1"])
    others = {
        native.library(source, flags=["-DANSWER=2"]),
        native.library(source, flags=["-DANSWER=1"], made_for="something else"),
        native.library(source, flags=["-DANSWER=1"], includes=[include]),
    }
    assert len(others) == 3
    assert first not in others
    assert native.library(source, flags=["-DANSWER=1"], places=[f"-I{tmp_path}"]) == first
    include.write_text("// changed")
    assert native.library(source, flags=["-DANSWER=1"], includes=[include]) not in others


def test_a_source_that_does_not_compile_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="ANSWER"):
        native.library(source)
    assert list((tmp_path / "home" / "native").iterdir()) == []


def test_without_a_compiler_it_says_so(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="no C\\+\\+ compiler"):
        native.library(source)


@pytest.mark.parametrize("what", ["library", "directory"])
def test_what_others_can_write_is_refused(source: Path, what: str) -> None:
    path = native.library(source, flags=["-DANSWER=42"])
    (path if what == "library" else path.parent).chmod(0o722)
    with pytest.raises(OSError, match="another user"):
        native.library(source, flags=["-DANSWER=42"])


@pytest.mark.root
def test_what_a_stranger_put_there_is_refused(source: Path) -> None:
    path = native.library(source, flags=["-DANSWER=42"])
    shutil.chown(path, user=54321)
    with pytest.raises(OSError, match="another user"):
        native.library(source, flags=["-DANSWER=42"])


def test_it_costs_no_torch() -> None:
    program = "import sys, undercroft.native; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
