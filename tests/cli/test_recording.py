"""``undercroft bench moe MODEL --trace``: what it writes can be replayed, and what cannot be meant is said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.moe.conftest import qwen
from transformers import PreTrainedTokenizerFast

from undercroft.models.fresh import Shape, write_fresh_model

UNDERCROFT = Path(sys.executable).with_name("undercroft")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    dense = Shape(layers=1, width=32, heads=2, vocabulary=300, longest=64)
    write_fresh_model(folder / "dense", dense, ["the cat sat on the mat"])
    qwen(0, vocab_size=320, eos_token_id=None).save_pretrained(folder / "experts")
    PreTrainedTokenizerFast.from_pretrained(folder / "dense").save_pretrained(folder / "experts")
    return folder / "experts"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [UNDERCROFT, "bench", "moe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_recorded_trace_can_be_replayed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the cat\nthe mat\n")
    trace = tmp_path / "trace.csv"
    options = ("--prompts", tmp_path / "prompts.txt", "--tokens", "4", "--budget", "1MiB", "--json")
    recorded = run(model, "--trace", trace, *options)
    assert recorded.returncode == 0, recorded.stderr
    found = json.loads(recorded.stdout)
    assert (found["prompts"], found["tokens"], found["layers"]) == (2, 8, 3)
    assert "prompt 2/2" in recorded.stderr
    replayed = run("--simulate", trace, "--budget", "25%", "--policy", "lru", "--json")
    assert replayed.returncode == 0, replayed.stderr
    [answer] = json.loads(replayed.stdout)["answers"]
    assert answer["figures"]["simulations"][0]["budget"] == "25%"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("{model}",), 2, "MODEL --trace OUT.csv"),
        (("--trace", "out.csv"), 2, "MODEL --trace OUT.csv"),
        (("{model}", "--simulate", "in.csv"), 2, "MODEL --trace OUT.csv"),
        (("{model}", "--trace", "out.csv", "--simulate", "in.csv"), 2, "MODEL --trace OUT.csv"),
        (("--simulate", "in.csv", "--prompts", "prompts.txt"), 2, "MODEL --trace OUT.csv"),
        (("{model}", "--trace", "out.csv", "--tokens", "0"), 2, "--tokens is at least 1"),
        (("{model}", "--trace", "out.csv", "--budget", "1MiB", "--budget", "2MiB"), 2, "one --budget"),
        (("{model}", "--trace", "out.csv", "--prompts", "none.txt"), 1, "No such file"),
        (("./none", "--trace", "out.csv"), 1, "there is no folder none"),
        (("{model}", "--trace", "none/out.csv"), 1, "cannot be written"),
    ],
)
def test_what_cannot_be_meant_is_said(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    filled = [argument.format(model=model) for argument in arguments]
    done = subprocess.run(
        [UNDERCROFT, "bench", "moe", *filled], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == code
    assert words in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
