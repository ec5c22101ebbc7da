"""The budget is a promise: never exceeded at any instant, met down to the least one, and an error below says which."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undercroft import ActivationSpill, BudgetExceeded

Build = Callable[[], nn.Module]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.view(2, -1, 4, x.shape[-1] // 4).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(x)))


def deep() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)) for _ in range(6)])


def wide() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.SiLU(), nn.Linear(1024, 64)
    )


def transformer() -> nn.Module:
    return nn.Sequential(*[Block(64) for _ in range(3)])


def convolutional() -> nn.Module:
    layers = [nn.Sequential(nn.Conv1d(64, 64, 5, padding=2), nn.BatchNorm1d(64), nn.ReLU()) for _ in range(5)]
    return nn.Sequential(nn.Unflatten(0, (2, -1)), *layers, nn.Flatten(0, 1))


def uneven() -> nn.Module:
    """Sizes from a few bytes to most of what is saved."""
    return nn.Sequential(
        nn.Linear(64, 2),
        nn.Tanh(),
        nn.Linear(2, 2048),
        nn.GELU(),
        nn.Linear(2048, 7),
        nn.Tanh(),
        nn.Linear(7, 300),
        nn.ReLU(),
    )


BUILDS: list[Build] = [deep, wide, transformer, convolutional, uneven]
AMPLE = 48 << 20  # small enough for small pages
MODELS = pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)


def step(model: nn.Module, spill: ActivationSpill) -> None:
    with spill:
        model(torch.randn(128, 64, requires_grad=True)).sin().square().mean().backward()
    model.zero_grad()


def watch(model: nn.Module, spill: ActivationSpill) -> list[int]:
    """Read what is held before and after each module, forward and backward."""
    held: list[int] = []

    def look(*_: object) -> None:
        held.append(spill.report.live_nbytes)

    for module in model.modules():
        module.register_forward_pre_hook(look)
        module.register_forward_hook(look)
        module.register_full_backward_pre_hook(look)
        module.register_full_backward_hook(look)
    return held


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., ActivationSpill]]:
    """Three steps of a model with a budget; raises what they raise."""
    spills: list[ActivationSpill] = []

    def train(build: Build, budget: int, steps: int = 3, **options: Any) -> ActivationSpill:
        torch.manual_seed(0)
        model = build()
        spill = ActivationSpill(model, budget, tmp_path, options.pop("min_bytes", 64), **options)
        spills.append(spill)
        held = watch(model, spill)
        for _ in range(steps):
            step(model, spill)
        assert held
        assert max(held) <= spill.report.peak_nbytes <= budget
        return spill

    yield train
    for spill in spills:
        spill.close()


@MODELS
def test_budgets_from_all_to_the_least(build: Build, train: Callable[..., ActivationSpill]) -> None:
    everything = train(build, AMPLE).report
    assert everything.spilled_nbytes == 0
    assert everything.least_budget is not None
    least, peak = everything.least_budget, everything.peak_nbytes
    assert least < peak
    for part in (1.0, 0.4, 0.0):
        report = train(build, int(least + part * (peak - least))).report
        assert part > 0.9 or report.read_nbytes > 0


@MODELS
def test_the_least_budget_of_the_report_is_the_least(
    build: Build, train: Callable[..., ActivationSpill]
) -> None:
    least = train(build, AMPLE).report.least_budget
    assert least is not None
    train(build, least)
    with pytest.raises(BudgetExceeded):
        train(build, int(least * 0.75))


@MODELS
@pytest.mark.parametrize("begin", [4096, 24 * 1024])
def test_an_error_names_a_budget_that_works(
    build: Build, begin: int, train: Callable[..., ActivationSpill]
) -> None:
    with pytest.raises(BudgetExceeded) as raised:
        train(build, begin)
    assert raised.value.least is not None
    assert raised.value.least > begin
    train(build, raised.value.least)


def test_small_tensors_count(train: Callable[..., ActivationSpill]) -> None:
    """What is too small to be written is held all the same, and an error says so."""
    with pytest.raises(BudgetExceeded) as raised:
        train(deep, 64 * 1024, min_bytes="1MiB")
    assert raised.value.least is not None
    assert train(deep, raised.value.least, min_bytes="1MiB").report.spilled_nbytes == 0


def test_each_budget_gives_the_same_numbers(train: Callable[..., ActivationSpill]) -> None:
    """And a run after an error is as good as any."""
    with pytest.raises(BudgetExceeded):
        train(deep, 8192)
    assert train(deep, AMPLE).report.saved_nbytes == train(deep, 256 * 1024).report.saved_nbytes


def test_the_error_says_what_to_try() -> None:
    error = BudgetExceeded(4096, 8192, {"activations": 8000}, 16384)
    assert '"16KiB"' in str(error)
    assert "activations" in str(error)


def test_gradients_of_a_failed_step_are_not_half_done_twice(tmp_path: Path) -> None:
    """The spill that failed can be closed and another one used with the same model."""
    torch.manual_seed(0)
    model, x = deep(), torch.randn(128, 64)
    with ActivationSpill(model, 8192, tmp_path, 64) as small:
        loss = model(x).square().mean()
        with pytest.raises(BudgetExceeded) as raised:
            loss.backward()
    small.close()
    del loss
    model.zero_grad()
    with ActivationSpill(model, raised.value.least or 0, tmp_path, 64) as enough:
        model(x).square().mean().backward()
    enough.close()
    spilled = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(x).square().mean().backward()
    assert all(
        torch.equal(one, parameter.grad) for one, parameter in zip(spilled, model.parameters(), strict=True)
    )
