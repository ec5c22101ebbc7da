"""Measuring the kernels, at a size at which nothing is proven but that the right things are compared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from undercroft.bench.kernels import KernelSettings, measure_kernels
from undercroft.bench.products import OURS, READ, products, sample
from undercroft.errors import InvalidInput
from undercroft.units import KIB

ROWS, COLUMNS = 64, 128


def test_every_way_multiplies_and_walks_through_the_working_set() -> None:
    ways = products(ROWS, COLUMNS, 100 * KIB)
    assert {READ, "torch int8", "torch int4-g32", "torch int4-g128", *OURS} == set(ways)
    for product in ways.values():
        assert 100 * KIB <= product.nbytes * len(product.weights) < 100 * KIB + product.nbytes
        addresses = {weight[0].data_ptr() for weight in product.weights}
        assert len(addresses) == len(product.weights)
        x = torch.randn(3, COLUMNS).to(product.dtype)
        with torch.inference_mode():
            found = product.multiply(x, product.weights[0])
        assert found.shape == (3, ROWS)
        taken = sample(product, 3, COLUMNS)
        assert taken.seconds > 0
        assert taken.nbytes == product.nbytes


def test_ways_that_are_compared_hold_the_same_weights_in_nearly_the_same_bytes() -> None:
    ways = products(ROWS, COLUMNS, 1)
    for group in (32, 128):
        name = "int4" if group == 32 else "int4-g128"
        assert ways[name].nbytes == ways[f"torch int4-g{group}"].nbytes
    assert ways["int8"].nbytes > ways["torch int8"].nbytes
    block, dense = ways["int8"].weights[0], ways[READ].weights[0][0]
    x = torch.randn(1, COLUMNS)
    found = ways["int8"].multiply(x, block)[:, :32]
    torch.testing.assert_close(found, x @ dense[:32].T, rtol=0.05, atol=0.05)


def test_the_answer_has_a_line_for_every_claim_and_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    settings = KernelSettings(
        shapes=((ROWS, COLUMNS),), batches=(1, 3), threads=threads + 1, working_set=KIB, rounds=2, attempts=1
    )
    answer = measure_kernels(settings, lambda text: None)
    assert torch.get_num_threads() == threads
    claims = [line.claim for line in answer.lines]
    assert len(claims) == len(set(claims)) == 3 + 3 + 3
    assert len(answer.rows) == 2 * 9
    json.dumps(answer.as_dict())


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"threads": 0},
        {"batches": (1, 0)},
        {"shapes": ((64, 64),)},
        {"shapes": ((63, 128),)},
        {"shapes": ((0, 128),)},
    ],
)
def test_settings_that_measure_nothing_are_refused(wrong: dict) -> None:
    with pytest.raises(InvalidInput):
        KernelSettings(**wrong)


def test_the_command_answers_and_writes_a_report(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("undercroft")), "bench", "kernels", "--rounds", "2"]
    tiny = ["--attempts", "1", "--threads", "1", "--shape", "64x128", "--batch", "2", "--working-set", "1KiB"]
    done = subprocess.run([*command, *tiny, "--results", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "times faster than torch int4-g128" in done.stdout
    assert (tmp_path / "kernels.md").exists()
    wrong = subprocess.run([*command, "--shape", "64 by 128"], capture_output=True, text=True)
    assert wrong.returncode == 2
