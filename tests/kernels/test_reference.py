"""Products in plain torch: against float64, and in a process that has no compiler."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from undercroft.kernels import quantise, reference
from undercroft.kernels.format import Format

Weights = Callable[[int, int], tuple[Tensor, Tensor]]


@pytest.mark.parametrize("piece", [1, 1 << 24])
def test_it_is_the_product_with_the_dequantised_weight(
    format: Format, weights: Weights, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_PIECE", piece)
    for rows in (1, 31, 33, 100):
        packed, weight = weights(rows, 3 * format.group)
        x = torch.randn(5, 3 * format.group)
        found = reference.linear(x, packed, format, rows)
        torch.testing.assert_close(found, (x.double() @ weight.T).float(), rtol=1e-4, atol=1e-4)
        half = reference.linear(x.bfloat16(), packed, format, rows)
        exact = (x.bfloat16().double() @ weight.T).bfloat16()
        torch.testing.assert_close(half, exact, rtol=2**-7, atol=1e-3)


def test_without_a_compiler_it_computes_and_says_so(tmp_path: Path) -> None:
    program = """
import torch
from undercroft import kernels
torch.manual_seed(0)
format = kernels.Format.parse("int8")
weight, x = torch.randn(64, 64) / 8, torch.randn(3, 64)
packed = kernels.quantise(weight, format)
print(kernels.backend())
exact = x @ kernels.dequantise(packed, format, 64, 64).T
torch.testing.assert_close(kernels.linear(x, packed, format, 64), exact)
gate, up = exact.chunk(2, dim=1)
down = kernels.quantise(torch.randn(64, 32), format)
found = kernels.expert(x, packed, down, format, format, 32)
wanted = (torch.nn.functional.silu(gate) * up) @ kernels.dequantise(down, format, 64, 32).T
torch.testing.assert_close(found, wanted)
"""
    environment = {**os.environ, "PATH": str(tmp_path), "UNDERCROFT_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch"
    assert "no C++ compiler" in done.stderr


def test_an_expert_in_plain_torch_is_near_the_native_one() -> None:
    from undercroft.kernels import expert

    torch.manual_seed(0)
    format = Format(8)
    gate_up, down = quantise(torch.randn(128, 64) / 8, format), quantise(torch.randn(64, 64) / 8, format)
    x = torch.randn(4, 64)
    found = reference.expert(x, (gate_up, format), (down, format), 64)
    wanted = expert(x, gate_up, down, format, format, 64)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
