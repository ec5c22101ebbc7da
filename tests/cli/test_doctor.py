"""``undercroft doctor``: the same facts for people and for programs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from undercroft import machine
from undercroft.cli.doctor import Diagnosis, Fits, describe, diagnose
from undercroft.machine import DepthRates, Device, Disk, DiskRates, Ram
from undercroft.units import GIB

UNDERCROFT = Path(sys.executable).with_name("undercroft")


def diagnosis(*, limit: int | None = None, in_ram: bool = False, direct: bool = True) -> Diagnosis:
    return Diagnosis(
        versions={"undercroft": "0.1.0", "torch": "2.13.0"},
        devices=(
            Device(name="cpu", label="A CPU", nbytes=16 * GIB, threads=2),
            Device(name="cuda:0", label="A GPU", nbytes=8 * GIB, threads=0),
        ),
        ram=Ram(total=16 * GIB, available=12 * GIB, limit=limit, usable=3 * GIB),
        huge_pages="madvise",
        disk=Disk(
            directory=Path("/spill"),
            total=9 * GIB,
            free=2 * GIB,
            file_system="ext4",
            in_ram=in_ram,
            device="d",
        ),
        rates=DiskRates(
            device="d",
            measured="2026-11-22",
            direct=direct,
            depths=(DepthRates(depth=4, read=2e9, write=1e9),),
        ),
        carried=6e8,
        fits=(Fits(where="RAM", full=1_500_000_000, adapter=12_000_000_000),),
    )


def test_people_get_one_fact_a_line() -> None:
    assert describe(diagnosis()).splitlines() == [
        "versions     undercroft 0.1.0, torch 2.13.0",
        "cpu          A CPU, 2 threads",
        "cuda:0       A GPU, 8 GiB",
        "RAM          16 GiB, 3 GiB usable now",
        "huge pages   madvise",
        "disk         /spill (ext4), 2 GiB free",
        "measured     2026-11-22, past the page cache",
        "  4 in flight reads 2.00 GB/s, writes 1.00 GB/s",
        "carries      600.00 MB/s of activations, out and back, while a step computes",
        "fits RAM     training 1.50 billion parameters whole (float32, AdamW), "
        "or an adapter on 12.0 billion (bfloat16), beside the activations",
    ]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (diagnosis(limit=4 * GIB), "16 GiB, limited to 4 GiB by a control group, 3 GiB usable now"),
        (diagnosis(in_ram=True), "lies in RAM, so spilling there saves none"),
        (diagnosis(direct=False), "through the page cache: O_DIRECT is refused"),
    ],
)
def test_what_limits_a_machine_is_said(found: Diagnosis, words: str) -> None:
    assert words in describe(found)
    assert words not in describe(diagnosis())


def test_the_diagnosis_follows_from_what_was_measured(tmp_path: Path) -> None:
    found = diagnose(tmp_path)
    assert found.rates == machine.cached_rates(tmp_path)
    assert found.carried == pytest.approx(
        found.rates.read * found.rates.write / (found.rates.read + found.rates.write)
    )
    assert found.carried < min(found.rates.read, found.rates.write)
    assert found.fits[-1].where == "RAM"
    assert found.fits[-1].full * 16 <= found.ram.usable


def test_json_holds_the_whole_diagnosis_and_progress_stays_on_stderr(tmp_path: Path) -> None:
    finished = subprocess.run(
        [UNDERCROFT, "doctor", "--json", "--disk", str(tmp_path)], capture_output=True, text=True, check=True
    )
    found = json.loads(finished.stdout)
    assert set(found) == set(Diagnosis.__dataclass_fields__)
    assert found["devices"][0]["name"] == "cpu"
    assert found["disk"]["directory"] == str(tmp_path)
    assert [entry["depth"] for entry in found["rates"]["depths"]] == [1, 4, 8]
    assert finished.stderr.startswith("looking at")
