"""``undercroft train`` as users meet it: a process, its two streams, its exit code, and what it leaves behind."""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from undercroft.models.fresh import Shape, write_fresh_model
from undercroft.units import parse_size

Mount = Callable[..., Path]
UNDERCROFT = Path(sys.executable).with_name("undercroft")
FEW = [
    "--steps",
    "3",
    "--batch-size",
    "2",
    "--sequence-length",
    "32",
    "--min-bytes",
    "1KiB",
    "--budget",
    "96KiB",
]
TEXT = "the cat sat on the mat and thought about the dog next door. " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a text, and what only looks like them."""
    folder = tmp_path_factory.mktemp("given")
    write_fresh_model(folder / "model", Shape(layers=2, width=32, heads=2, vocabulary=257, longest=32), [""])
    config = BertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    BertForMaskedLM(config).save_pretrained(folder / "bert")
    (folder / "text.txt").write_text(TEXT)
    (folder / "empty.txt").write_text("")
    return folder


def train(folder: Path, model: str, data: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder`."""
    command = [UNDERCROFT, "train", model, data, *FEW, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def said(finished: subprocess.CompletedProcess[str]) -> str:
    """The typed message, which is the last line of stderr."""
    assert finished.returncode == 1, finished.stderr
    assert finished.stdout == ""
    assert "Traceback" not in finished.stderr
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("undercroft: ")
    return last


def test_it_trains_and_prints_what_it_did(folder: Path, tmp_path: Path) -> None:
    finished = train(folder, "model", "text.txt", "--output", tmp_path / "out")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"{tmp_path / 'out' / 'model'} after 3 steps, loss ")
    assert re.search(r"activations: \S+ \w+ spilled, at most \S+ KiB of 96 KiB held", finished.stdout)
    assert [line for line in finished.stderr.splitlines() if line.startswith("train step ")]
    assert "spilled" in finished.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").config.hidden_size == 32


def test_compare_shows_three_ways_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    disks = ["--disk", tmp_path / "one", "--disk", tmp_path / "two"]
    finished = train(
        folder,
        "model",
        "text.txt",
        "--output",
        tmp_path / "out",
        "--lora",
        *disks,
        "--compare",
        "--json",
        "--checksums",
    )
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    rows = {row["name"]: row for row in report["comparison"]}
    assert set(rows) == {"plain", "checkpointed", "spilled"}
    assert all(row["equal"] for row in rows.values())
    assert all(row["peak_nbytes"] is not None and row["cpu_seconds_per_step"] > 0 for row in rows.values())
    assert rows["spilled"]["spilled_nbytes"] == report["spill"]["spilled_nbytes"] > 0
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert all(list(disk.iterdir()) == [] for disk in (tmp_path / "one", tmp_path / "two"))


@pytest.mark.parametrize(
    ("model", "data", "told"),
    [
        ("./missing", "text.txt", r"there is no folder missing; name one that holds config\.json"),
        ("nobody/nothing", "text.txt", r"hf download nobody/nothing --local-dir DIR"),
        ("bert", "text.txt", r"bert is a BertForMaskedLM, not a causal language model"),
        ("model", "empty.txt", r"empty\.txt is empty; there is nothing to learn from it"),
        ("model", "missing.txt", r"cannot read missing\.txt: No such file or directory; name a file"),
    ],
)
def test_what_is_missing_is_named(model: str, data: str, told: str, folder: Path, tmp_path: Path) -> None:
    assert re.search(told, said(train(folder, model, data, "--output", tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


def test_a_budget_too_small_names_one_that_works(folder: Path, tmp_path: Path) -> None:
    told = said(train(folder, "model", "text.txt", "--output", tmp_path / "out", "--budget", "1KiB"))
    named = re.search(r'Smallest budget known to work: "(\w+)"', told)
    assert named is not None
    assert list(tmp_path.iterdir()) == []
    again = train(folder, "model", "text.txt", "--output", tmp_path / "out", "--budget", named[1])
    assert again.returncode == 0, again.stderr
    assert parse_size(named[1]) < 96 * 1024


@pytest.mark.root
def test_a_read_only_disk_is_named(folder: Path, tmp_path: Path, mount: Mount) -> None:
    disk = mount("tmpfs", "ro,mode=700")
    told = said(train(folder, "model", "text.txt", "--output", tmp_path / "out", "--disk", disk))
    assert f"{disk} cannot be used: Read-only file system; name a directory that you can write" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.root
def test_a_disk_too_small_is_said_before_the_error(folder: Path, tmp_path: Path, mount: Mount) -> None:
    disk = mount("tmpfs", "size=64k,mode=700")
    finished = train(folder, "model", "text.txt", "--output", tmp_path / "out", "--disk", disk)
    assert "name a directory with more room (--disk)" in said(finished)
    assert "undercroft: spilling stopped" in finished.stderr
    assert not (tmp_path / "out").exists()
    assert list(disk.iterdir()) == []


def test_ctrl_c_saves_and_tells_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    command = [
        UNDERCROFT,
        "train",
        "model",
        "text.txt",
        "--output",
        str(tmp_path / "out"),
        *FEW,
        "--steps",
        "12",
    ]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while not process.stderr.readline().startswith("train step 1/12"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    told = next(line for line in err.splitlines() if line.startswith("go on with: "))
    (checkpoint,) = (tmp_path / "out").iterdir()
    done = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 1 <= done < 12
    again = shlex.split(told.removeprefix("go on with: "))
    assert again[0] == "undercroft"
    resumed = subprocess.run(
        [UNDERCROFT, *again[1:], "--json"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert len(json.loads(resumed.stdout)["losses"]) == 12


def test_someone_who_watches_sees_a_bar(folder: Path, tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    command = [UNDERCROFT, "train", "model", "text.txt", "--output", str(tmp_path / "out"), *FEW]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=end) as process:
        os.close(end)
        shown = b""
        try:
            while piece := os.read(terminal, 65536):
                shown += piece
        except OSError:  # the other end was closed
            pass
        os.close(terminal)
    assert process.returncode == 0
    assert "━".encode() in shown
    assert b"3/3" in shown


def test_wrong_usage_is_2(folder: Path, tmp_path: Path) -> None:
    finished = train(folder, "model", "text.txt", "--output", tmp_path / "out", "--compare", "--resume")
    assert finished.returncode == 2
    assert "leave --resume out" in finished.stderr
    without = subprocess.run(
        [UNDERCROFT, "train", "model", "text.txt"], capture_output=True, text=True, check=False
    )
    assert without.returncode == 2
    assert "--output" in without.stderr
