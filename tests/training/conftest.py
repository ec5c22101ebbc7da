"""One runner for every claim of identity: a program is trained plainly and with spilling, and nothing may differ.

A program is a `build` function that makes a module, and a `flow` that takes one step with it. The runner finds the
smallest budget by asking, as a user would: it begins far too small and goes where the error says.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from undercroft import ActivationSpill, BudgetExceeded, arithmetic
from undercroft.training.report import SpillReport

Build = Callable[[], nn.Module]
Inputs = list[torch.Tensor]
Flow = Callable[[nn.Module, Inputs, AbstractContextManager[object]], Iterable[object]]
"""Takes one step: a module, several independent inputs, the context to compute in; returns what must be equal too."""

arithmetic.settle()

_STEPS = 3
_COPIES = 3  # independent inputs of a step, so that what one of them demands is a fraction of what all save
_PATIENCE = 12
_FIRST_BUDGET = 16 * 1024


def scalar(output: torch.Tensor) -> torch.Tensor:
    """A loss to which every element contributes differently."""
    real = torch.view_as_real(output) if output.is_complex() else output
    return real.float().square().mean()


def one_backward(
    module: nn.Module, inputs: Inputs, context: AbstractContextManager[object]
) -> Iterable[object]:
    """The usual step: one loss of all inputs, one backward."""
    with context:
        loss = torch.stack([scalar(module(x)) for x in inputs]).sum()
        loss.backward()
    return [loss]


def same_bits(one: object, other: object) -> bool:
    """Whether two results are the same in type, layout, strides and every bit."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and one == other
    if (one.layout, one.dtype, one.shape) != (other.layout, other.dtype, other.shape):
        return False
    if one.layout is torch.sparse_coo:
        pairs = [(one._indices(), other._indices()), (one._values(), other._values())]
        return all(same_bits(a, b) for a, b in pairs)
    return one.stride() == other.stride() and torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes of a tensor, so that NaN equals itself and -0 differs from 0."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)


def take_steps(
    build: Build, flow: Flow, context_for: Callable[[nn.Module], AbstractContextManager[object]]
) -> list[object]:
    """Train from a fixed seed; returns everything that may be observed, in order."""
    torch.manual_seed(0)
    module = build()
    context = context_for(module)
    seen: list[object] = []
    for _ in range(_STEPS):
        inputs = [torch.randn(64, 64).requires_grad_() for _ in range(_COPIES)]
        seen += [_copy(result) for result in flow(module, inputs, context)]
        seen += [_copy(leaf.grad) for leaf in (*inputs, *module.parameters())]
        seen += [_copy(buffer) for buffer in module.buffers()]
        _descend(module)
    return [*seen, torch.get_rng_state()]


def _copy(result: object) -> object:
    return result.detach().clone() if isinstance(result, torch.Tensor) else result


@torch.no_grad()
def _descend(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.add_(parameter.grad, alpha=-0.1)
            parameter.grad = None


@dataclass(frozen=True, kw_only=True)
class Spilling:
    """How to spill: given the model or not, and from which size on."""

    model: bool
    min_bytes: int


@dataclass(frozen=True)
class Run:
    """What was seen of a program that ran with spilling, and what the spill reported at its end."""

    seen: list[object]
    report: SpillReport

    def check_against(self, plain: list[object]) -> None:
        different = [i for i, pair in enumerate(zip(plain, self.seen, strict=True)) if not same_bits(*pair)]
        assert not different, f"results {different} of {len(plain)} differ: {self.report}"
        assert self.report.peak_nbytes <= self.report.budget
        assert self.report.live_nbytes == 0

    def check_spilled(self) -> None:
        assert self.report.spilled_nbytes > 0, self.report
        assert self.report.read_nbytes > 0, self.report


TIGHT = Spilling(model=True, min_bytes=64)
ROOMY = Spilling(model=False, min_bytes=4096)


class Bench:
    """Runs programs plainly and with spilling, in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def least(self, build: Build, flow: Flow, how: Spilling, budget: int = _FIRST_BUDGET) -> Run:
        """The run with the smallest budget that the errors lead to, beginning at one.

        Here the errors only have to lead somewhere; `test_budget_holds` takes them at their word.
        """
        for _ in range(_PATIENCE):
            try:
                return self.spilled(build, flow, how, budget)
            except BudgetExceeded as error:
                budget = max(error.least or 0, budget * 9 // 8)
        raise AssertionError(f"the errors lead on and on, to {budget} bytes after {_PATIENCE} tries")

    def spilled(self, build: Build, flow: Flow, how: Spilling, budget: int) -> Run:
        """What is seen with a budget."""
        spills: list[ActivationSpill] = []

        def make(module: nn.Module) -> ActivationSpill:
            model = module if how.model else None
            spills.append(ActivationSpill(model, budget, self._directory, how.min_bytes))
            return spills[-1]

        try:
            seen = take_steps(build, flow, make)
            spills[0].close()  # waits for what is under way
            return Run(seen, spills[0].report)
        finally:
            for spill in spills:
                spill.close()

    def check(self, build: Build, flow: Flow = one_backward, *, spills: bool = True) -> None:
        """Nothing that can be observed differs, however it is spilled; where it is meant to spill, it does."""
        plain = take_steps(build, flow, lambda module: nullcontext())
        tight = self.least(build, flow, TIGHT)
        tight.check_against(plain)
        if spills:
            tight.check_spilled()
        self.least(build, flow, ROOMY, int(1.5 * tight.report.budget)).check_against(plain)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)
