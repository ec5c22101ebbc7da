"""Spilling where nothing can be compiled: read buffers come from a slab, and the heap is trimmed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from undercroft import ActivationSpill
from undercroft.store import pool

def step(seed):
    torch.manual_seed(seed)
    start = torch.randn(elements, requires_grad=True)
    x = start
    for _ in range(8):
        x = x.sin()
    x.sum().backward()
    return start.grad

assert pool.install() is None
elements, budget = {elements}, {budget!r}
plain = [step(seed) for seed in range(3)]
with ActivationSpill(budget=budget, min_bytes=0) as spill:
    spilled = [step(seed) for seed in range(3)]
assert all(torch.equal(a, b) for a, b in zip(plain, spilled, strict=True))
report = spill.report
assert report.read_nbytes > 0 and report.peak_nbytes <= report.budget, report
spill.close()
"""


@pytest.mark.parametrize(
    ("elements", "budget"), [(2**22, "80MiB"), (2**20, "20MiB"), (2**14, "320KiB")], ids=str
)
def test_a_step_is_the_same_and_the_budget_holds(elements: int, budget: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": "/nonexistent", "UNDERCROFT_HOME": str(tmp_path)}
    program = PROGRAM.format(elements=elements, budget=budget)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
