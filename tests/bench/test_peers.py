"""The comparison with peers, on a model small enough for a test: real processes, and what is installed here."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from undercroft.bench.cgroup import MemoryGroup, NoControlGroup
from undercroft.bench.peers import PeersSettings, measure_peers
from undercroft.bench.peers_bout import Bout, claims
from undercroft.bench.peers_model import PeerShape, is_written, write_checkpoint, write_stacked
from undercroft.bench.peers_place import INSTALL
from undercroft.bench.peers_worker import Stretch
from undercroft.bench.rounds import Turns
from undercroft.bench.side import Side, SideEnded
from undercroft.errors import InvalidInput
from undercroft.models.checkpoint import Checkpoint
from undercroft.units import MIB

SHAPE = PeerShape(
    layers=2, experts=16, used=4, hidden=128, intermediate=64, heads=2, key_heads=1, vocabulary=64
)
UNDERCROFT = Path(sys.executable).with_name("undercroft")


def ignore(_: object) -> None:
    """Nobody asked."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


def test_the_model_is_the_same_again_and_stacked(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert not is_written(SHAPE, tmp_path / name)
        write_checkpoint(SHAPE, tmp_path / name, ignore)
        assert is_written(SHAPE, tmp_path / name)
    assert not is_written(replace(SHAPE, seed=1), tmp_path / "one")
    write_stacked(SHAPE, tmp_path / "one", tmp_path / "stacked", ignore)
    for shard in (tmp_path / "one").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()
    ids = torch.arange(8)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("one", "stacked")
    ]
    assert torch.equal(*logits)
    with Checkpoint(tmp_path / "one") as checkpoint:
        found = [each for each in checkpoint.values() if ".experts." in each.name]
    assert sum(math.prod(each.shape) for each in found) == SHAPE.elements


def test_sides_that_nothing_can_quantise_are_refused() -> None:
    with pytest.raises(InvalidInput, match="multiples of 32"):
        PeerShape(hidden=100)


def test_sides_compute_the_same_and_missing_peers_are_named(place: Path) -> None:
    told: list[str] = []
    answer = measure_peers(_settings(place, "bf16"), told.append)
    [bout] = answer.figures["bouts"]
    assert list(bout["samples"]) == ["exact", "accelerate"]
    assert not bout["lost"]
    assert sum(INSTALL[name] in note for name in ("llama.cpp", "ik_llama.cpp") for note in answer.notes) == 2
    [alike] = answer.lines
    assert alike.found == pytest.approx(1.0)
    assert "peers: none, bf16, exact loads" in told


@pytest.mark.slow
def test_without_a_peer_our_side_is_measured_alone(place: Path) -> None:
    answer = measure_peers(_settings(place, "int8"), ignore)
    [bout] = answer.figures["bouts"]
    assert list(bout["samples"]) == ["int8"]
    assert not bout["lost"]
    assert not answer.lines


def _settings(place: Path, bits: str) -> PeersSettings:
    return PeersSettings(
        directory=place, shape=SHAPE, limits=("none",), bits=(bits,), rounds=1, tokens=2, prompt=8, threads=1
    )


def bout(limit: str = "50%", *, lost: str = "", **rates: float) -> Bout:
    def stretch(rate: float) -> Stretch:
        return Stretch(tokens=4, seconds=4 / rate, cpu=1.0, read=110, missed=100)

    samples = {name: (stretch(rate), stretch(rate)) for name, rate in rates.items() if name != lost}
    return Bout(
        limit=limit,
        bits="bf16",
        turns=Turns(samples=samples),
        peaks=dict.fromkeys(rates),
        logits={name: (1.0, float(name == "balanced")) for name in rates},
        lost={lost: "it was killed"} if lost else {},
    )


def test_a_bout_is_held_against_the_better_llama() -> None:
    rates = {"exact": 20.0, "balanced": 24.0, "accelerate": 2.0, "llama.cpp": 4.0, "ik_llama.cpp": 5.0}
    exact, balanced, llama, frugal, *alike = claims(bout(**rates))
    assert (exact.found, exact.bound) == (10.0, 8.0)
    assert (balanced.found, balanced.bound) == (12.0, 12.0)
    assert (llama.found, llama.bound) == (4.0, 4.0)
    assert "ik_llama.cpp" in llama.claim
    assert frugal.found == pytest.approx(1.1)
    assert {line.verdict for line in (exact, balanced, llama, frugal)} == {"PASS"}
    found = {line.claim.split("'")[0].split()[-1]: line.found for line in alike}
    assert found["balanced"] == pytest.approx(math.sqrt(0.5))
    assert found["llama.cpp"] == pytest.approx(1.0)
    unlimited, *_ = claims(bout("none", exact=4.0, accelerate=1.0, **{"llama.cpp": 5.0}))
    assert (unlimited.found, unlimited.bound) == (pytest.approx(0.8), 0.8)


def test_our_side_lost_fails_and_a_lost_peer_says_nothing() -> None:
    rates = {"exact": 20.0, "accelerate": 2.0}
    first, *_ = claims(bout(lost="exact", **rates))
    assert (first.verdict, first.note) == ("FAIL", "it was killed")
    assert not any("over accelerate" in line.claim for line in claims(bout(lost="accelerate", **rates)))


@pytest.mark.root
def test_sides_that_the_kernel_kills_are_told_of(place: Path) -> None:
    try:
        with MemoryGroup(MIB):
            pass
    except NoControlGroup as error:
        pytest.skip(str(error))
    settings = PeersSettings(
        directory=place, shape=SHAPE, limits=("50%",), bits=("int8",), rounds=1, threads=1
    )
    answer = measure_peers(settings, ignore)
    assert not answer.rows
    assert any("50%, int8: int8 ended with code 137" in note for note in answer.notes)


@pytest.mark.parametrize("limit", ["0%", "101%", "half", "1GiB"])
def test_a_limit_is_a_share(tmp_path: Path, limit: str) -> None:
    with pytest.raises(InvalidInput, match="a share of the experts"):
        PeersSettings(directory=tmp_path, limits=(limit,))
    with pytest.raises(InvalidInput, match="is not compared"):
        PeersSettings(directory=tmp_path, bits=("int3",))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("raise SystemExit('no model')", "code 1: no model"),
        ("import os; os.kill(os.getpid(), 9)", "code 137"),
    ],
)
def test_a_side_that_ends_says_why(script: str, words: str) -> None:
    with Side("it", [sys.executable, "-c", script], limit=None, threads=1) as side:
        with pytest.raises(SideEnded, match=words):
            side.ask("1")
        assert side.peak is None


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "--model"),
        (("--model", "{place}", "--python", "no/python"), 1, "cannot be run"),
    ],
)
def test_the_verb_refuses_what_cannot_be_meant(
    tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    given = [argument.format(place=tmp_path) for argument in arguments]
    finished = subprocess.run(
        [UNDERCROFT, "bench", "peers", *given], capture_output=True, text=True, check=False
    )
    assert finished.returncode == code
    assert words in finished.stderr
    assert "Traceback" not in finished.stderr
