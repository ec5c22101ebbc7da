"""``undercroft pack`` as users meet it: a process, its two streams, its exit code, and what it leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.moe.conftest import qwen
from tests.moe.gguf_files import write_gguf

from undercroft.moe.packed import open_packed
from undercroft.units import format_size

UNDERCROFT = Path(sys.executable).with_name("undercroft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a small model."""
    folder = tmp_path_factory.mktemp("given")
    qwen(0).save_pretrained(folder / "model")
    whole = write_gguf(qwen(0), folder / "whole.gguf", "Q8_0", tokenizer=True).read_bytes()
    (folder / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    return folder


def pack(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder`."""
    command = [UNDERCROFT, "pack", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_it_packs_and_says_what_it_did(folder: Path, tmp_path: Path) -> None:
    finished = pack(folder, "model", tmp_path / "out", "--high", "bf16", "--low", "int2", "--group", "64")
    assert finished.returncode == 0, finished.stderr
    dense = (tmp_path / "out" / "dense.safetensors").stat().st_size
    first, *rest = finished.stdout.splitlines()
    assert first.startswith(f"{tmp_path / 'out'}: 48 experts of 3 layers in ")
    assert rest == [
        "experts: bfloat16 576 KiB, int2 192 KiB; in the checkpoint 1.12 MiB",
        f"all other weights: {format_size(dense)}",
    ]
    told = finished.stderr.splitlines()
    assert told[0] == f"packing 48 experts into {tmp_path / 'out'}: {format_size(dense + 768 * 1024)} in all"
    assert told[1].startswith("pack step 1/48 16 KiB written  about ")
    assert told[-1] == "pack step 48/48 768 KiB written"
    with open_packed(tmp_path / "out") as experts:
        assert (experts.high, experts.low) == ("bfloat16", "int2")


def test_a_gguf_file_is_packed_and_then_run(folder: Path, tmp_path: Path) -> None:
    finished = pack(folder, "whole.gguf", tmp_path / "out", "--high", "int8")
    assert finished.returncode == 0, finished.stderr
    assert "experts: int8 384 KiB, int4 192 KiB; in the checkpoint 576 KiB\n" in finished.stdout
    command = [UNDERCROFT, "run", tmp_path / "out", "hello", "--quality", "balanced", "--tokens", "4"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_again_it_has_nothing_to_do_and_says_so_as_json(folder: Path, tmp_path: Path) -> None:
    reports = [pack(folder, "model", tmp_path / "out", "--low", "none", "--json") for _ in range(2)]
    first, second = (json.loads(finished.stdout) for finished in reports)
    assert (first["kept_layers"], second["kept_layers"]) == (0, 3)
    assert first["low"] is None
    assert {**first, "kept_layers": 3, "seconds": second["seconds"]} == second


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["missing/", "out"], "there is no folder missing"),
        (["missing.gguf", "out"], "there is no file missing.gguf"),
        (["cut.gguf", "out"], "does not lie inside the file as its shape says; fetch it again"),
        (["model", "model"], "; name a folder that is new or empty"),
        (["model", "out", "--high", "int4"], "low copies in int4, like the high ones, would save nothing"),
        (["model", "out", "--group", "48"], "group is one of (32, 64, 128), not 48"),
    ],
)
def test_failures_are_typed_messages(folder: Path, arguments: list[str], told: str) -> None:
    finished = pack(folder, *arguments)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert told in finished.stderr
    assert "Traceback" not in finished.stderr


def test_wrong_usage_is_2(folder: Path) -> None:
    finished = pack(folder, "model", "out", "--low", "int3")
    assert finished.returncode == 2
    assert "'int4', 'int2', 'none'" in finished.stderr
