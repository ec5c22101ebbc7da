"""The command line as users meet it: a process, its two streams and its exit code."""

import importlib.metadata
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

UNDERCROFT = Path(sys.executable).with_name("undercroft")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([UNDERCROFT, *arguments], capture_output=True, text=True, check=False)


def test_help_names_the_verbs() -> None:
    finished = run("--help")
    assert finished.returncode == 0
    assert "doctor" in finished.stdout
    assert finished.stderr == ""


@pytest.mark.parametrize("verb", ["pack", "run", "train"])
def test_help_shows_an_example_on_a_line_of_its_own(verb: str) -> None:
    lines = run(verb, "--help").stdout.splitlines()
    assert lines[lines.index("  Example:") + 1].startswith(f"    undercroft {verb} ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["doctor", "--help"],
        ["run", "./no", "x"],
        ["pack", "./no", "o"],
        ["train", "./no", "x", "--output", "o"],
    ],
    ids=" ".join,
)
def test_help_and_a_wrong_name_import_nothing_that_takes_long(arguments: list[str]) -> None:
    script = (
        "import sys; from undercroft.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "print('imported:', sorted(heavy))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    assert "imported: []" in finished.stdout
    assert "Usage" in finished.stdout or "there is no folder no" in finished.stderr


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout == importlib.metadata.version("undercroft") + "\n"


def test_it_runs_as_a_module() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "undercroft", "--version"], capture_output=True, text=True, check=True
    )
    assert finished.stdout == run("--version").stdout


@pytest.mark.parametrize("arguments", [[], ["docter"], ["doctor", "--jsn"], ["doctor", "here"]], ids=" ".join)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    finished = run(*arguments)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert "Usage" in finished.stderr


def test_a_typed_error_is_1_and_one_line_on_stderr(tmp_path: Path) -> None:
    finished = run("doctor", "--disk", str(tmp_path / "missing"))
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr.splitlines()[-1] == (
        f"undercroft: cannot look at {tmp_path / 'missing'}: No such file or directory"
    )


def test_an_interrupt_is_130_and_one_line(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [UNDERCROFT, "doctor", "--remeasure", "--disk", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    time.sleep(0.5)  # until it measures: in the middle of an import, Python can lose an interrupt
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert first.startswith("looking at")
    assert (process.returncode, out, err) == (130, "", "undercroft: interrupted\n")
    assert list(tmp_path.iterdir()) == []
