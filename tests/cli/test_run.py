"""``undercroft run`` as users meet it: a process, its two streams and its exit code."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from tests.moe.conftest import qwen, stock
from transformers import PreTrainedTokenizerFast

from undercroft.models.fresh import Shape, write_fresh_model

UNDERCROFT = Path(sys.executable).with_name("undercroft")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    dense = Shape(layers=1, width=32, heads=2, vocabulary=300, longest=64)
    write_fresh_model(folder / "dense", dense, ["the cat sat on the mat"])
    experts = qwen(0, vocab_size=320, eos_token_id=None)
    experts.save_pretrained(folder / "experts")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "dense", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder / "experts")
    return folder


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([UNDERCROFT, "run", *arguments], capture_output=True, text=True, check=False)


def test_it_writes_what_the_resident_model_writes(model: Path) -> None:
    done = run(model / "experts", "the cat", "--budget", "128KiB", "--tokens", "12")
    assert done.returncode == 0, done.stderr
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model / "experts")
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    wanted = stock(model / "experts").generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
    assert done.stdout == text + "\n"
    assert "experts: " in done.stderr
    assert "waiting for the disk" in done.stderr


def test_chat_goes_through_the_template_and_sampling_is_seeded(model: Path) -> None:
    options = ("--chat", "--temperature", "0.8", "--tokens", "8", "--budget", "1MiB")
    one, two = (run(model / "experts", "the mat", *options, "--seed", "3") for _ in range(2))
    assert one.returncode == 0, one.stderr
    assert one.stdout == two.stdout


def test_on_a_terminal_the_text_and_a_live_line_are_shown(model: Path) -> None:
    main, side = pty.openpty()
    command = [UNDERCROFT, "run", model / "experts", "the cat", "--tokens", "6", "--budget", "1MiB"]
    done = subprocess.run(command, stdout=side, stderr=side, check=False)
    os.close(side)
    shown = os.read(main, 65536).decode(errors="replace")
    os.close(main)
    assert done.returncode == 0, shown
    assert "tokens/s  hits" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("./missing", "x"), 1, "there is no folder missing"),
        (("dense", "x"), 1, "no experts that could be streamed"),
        (("experts", ""), 1, "the prompt is empty"),
        (("experts", "x", "--budget", "1KiB"), 1, 'Smallest budget known to work: "28KiB"'),
        (("experts", "x", "--budget", "much"), 1, "much"),
        (("experts", "x", "--policy", "best"), 1, "'best' is no policy"),
        (("experts", "x", "--quality", "good"), 1, "'good' is no quality"),
        (("experts", "x", "--quality", "balanced"), 1, "undercroft pack"),
        (("experts", "x", "--tokens", "0"), 2, "--tokens is at least 1"),
        (("experts", "x", "--device", "cuda:99"), 1, "cuda:99"),
        (("experts", "x", "--device", "gpu"), 1, "'gpu' is no device"),
        (("experts", "x", "--device-budget", "1GiB"), 2, "name it with --device cuda"),
    ],
)
def test_what_cannot_be_meant_is_said(model: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    source, *rest = arguments
    done = run(model / source if (model / source).exists() else source, *rest)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
