"""Training with spilling is bit-identical whatever the loop: accumulation, pipelines, threads, errors, evaluation."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from undercroft import ActivationSpill, SpillMisuse

Context = AbstractContextManager[object]
Flow = Callable[[nn.Module, list[Tensor], Context], Iterable[object]]


def stack() -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)) for _ in range(3)])


def loss_of(output: Tensor) -> Tensor:
    return output.sin().square().mean()


def total_loss(module: nn.Module, inputs: list[Tensor]) -> Tensor:
    return torch.stack([loss_of(module(x)) for x in inputs]).sum()


def accumulated(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with context:
        for x in inputs:
            loss = loss_of(module(torch.cat([x, x.exp()])))
            loss.backward()
            yield loss


def interleaved(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    """One forward, one backward: as the stages of a pipeline do, with two micro-batches under way."""
    with context:
        waiting: list[Tensor] = []
        for x in inputs:
            waiting.append(loss_of(module(x)))
            if len(waiting) == 2:
                waiting.pop(0).backward()
        waiting.pop().backward()
    return []


def forwards_first(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with context:
        losses = [loss_of(module(x)) for x in inputs]
        for loss in losses:
            loss.backward()
    return losses


def loop_inside(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    """One `with` around several steps."""
    with context:
        for _ in range(3):
            loss = total_loss(module, inputs)
            loss.backward()
            yield loss


def backward_outside(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with context:
        loss = total_loss(module, inputs)
    loss.backward()
    return [loss]


def only_a_part_inside(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    hidden = module[0](torch.cat(inputs))
    with context:
        hidden = module[1](hidden.exp())
    loss = loss_of(module[2](hidden))
    with context:
        loss.backward()
    return [loss]


def backward_in_another_thread(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with context:
        loss = total_loss(module, inputs)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()
    return [loss]


def forward_in_another_thread(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    def forward() -> Tensor:
        with context:
            return total_loss(module, inputs)

    with ThreadPoolExecutor(1) as pool:
        loss = pool.submit(forward).result()
    loss.backward()
    return [loss]


def unused_branches(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with context:
        hidden = module[0](torch.cat(inputs))
        unused = [hidden.exp() * hidden, module[1](hidden).sin()]
        loss = loss_of(module[2](hidden))
        loss.backward()
    return [loss, len(unused)]


def losses_kept_alive(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    """The loss and a branch that is never differentiated live on while the next step is computed."""
    with context:
        hidden = module[0](torch.cat(inputs))
        loss = loss_of(module(hidden))
        loss.backward()
        module.step = getattr(module, "step", 0) + 1
        module.kept = (
            (loss, hidden.exp().sin()) if module.step < 3 else None
        )  # frees those of the step before
    return [loss]


def late_backward(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    """What was saved in one step is differentiated in the next."""
    with context:
        loss = total_loss(module, inputs)
        module.step = getattr(module, "step", 0) + 1
        late = getattr(module, "late", None)
        module.late = inputs[0].exp().sin().square().mean() if module.step < 3 else None
        loss.backward()
        if late is not None:
            late.backward()
    return [loss]


def interrupted_forward(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with suppress(ZeroDivisionError), context:
        hidden = module(torch.cat(inputs))
        hidden.exp().sin().mul(1 // 0)
    with context:
        loss = total_loss(module, inputs)
        loss.backward()
    return [loss]


def interrupted_backward(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    def interrupt(_: Tensor) -> None:
        raise ZeroDivisionError

    with suppress(ZeroDivisionError), context:
        hidden = module[0](torch.cat(inputs))
        hidden.register_hook(interrupt)
        loss_of(module(hidden)).backward()
    with context:
        loss = total_loss(module, inputs)
        loss.backward()
    return [loss]


def changing_shapes(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    step = module.step = getattr(module, "step", 0) + 1
    with context:
        loss = loss_of(module(torch.cat(inputs)[: 160 - 40 * step]))
        loss.backward()
    return [loss]


def changing_structure(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    step = module.step = getattr(module, "step", 0) + 1
    with context:
        loss = loss_of(module[step % 3 :](module[: 1 + step % 2](torch.cat(inputs))))
        loss.backward()
    return [loss]


def evaluation_inside(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with context:
        with torch.no_grad():
            before = module(inputs[0])
        loss = total_loss(module, inputs)
        with torch.inference_mode():
            between = module(inputs[1]).clone()
        loss.backward()
        forgotten = module(inputs[2])
    return [before, between, loss, forgotten]


def optimised_inside(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Flow:
    def flow(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
        if not hasattr(module, "optimizer"):
            module.optimizer = kind(module.parameters(), lr=1e-2, **options)
        with context:
            for x in inputs:
                module.optimizer.zero_grad(set_to_none=False)
                loss = loss_of(module(torch.cat([x, x.exp()])))
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), 0.5)
                module.optimizer.step()
        return [loss, *(weight.clone() for weight in module.parameters())]

    flow.__name__ = f"{kind.__name__} {options}"
    return flow


def second_evaluation_optimizer(
    module: nn.Module, inputs: list[Tensor], context: Context
) -> Iterable[object]:
    """An optimizer that computes forward and backward itself, several times a step."""
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = total_loss(module, inputs)
        loss.backward()
        return loss

    with context:
        loss = optimizer.step(closure)
    return [loss, *(weight.clone() for weight in module.parameters())]


class Rows(Dataset[Tensor]):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((64,), float(index)).sin().cos()


def forked_workers(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with context:
        for batch in DataLoader(Rows(), batch_size=48, num_workers=1, multiprocessing_context="fork"):
            loss = loss_of(module(batch) + module(inputs[0][:48]))
            loss.backward()
            yield loss


FLOWS: list[Flow] = [
    accumulated,
    interleaved,
    forwards_first,
    loop_inside,
    backward_outside,
    only_a_part_inside,
    backward_in_another_thread,
    forward_in_another_thread,
    unused_branches,
    losses_kept_alive,
    late_backward,
    interrupted_forward,
    interrupted_backward,
    changing_shapes,
    changing_structure,
    evaluation_inside,
    optimised_inside(torch.optim.SGD, momentum=0.9),
    optimised_inside(torch.optim.AdamW, foreach=True),
    optimised_inside(torch.optim.Adam, fused=True),
    second_evaluation_optimizer,
]


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.__name__)
def test_nothing_differs(bench: Any, flow: Flow) -> None:
    bench.check(stack, flow)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_workers_inside(bench: Any) -> None:
    bench.check(stack, forked_workers)


def train_alone(module: nn.Module, context: Context, inputs: Tensor) -> list[Tensor]:
    for _ in range(4):
        with context:
            loss_of(module(inputs)).backward()
    return [parameter.grad for parameter in module.parameters()]


@pytest.mark.usefixtures("nothing_left")
def test_two_spills_on_two_threads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    modules = [stack() for _ in range(4)]
    inputs = torch.randn(192, 64)
    for one, two in (modules[:2], modules[2:]):
        two.load_state_dict(one.state_dict())
    results: dict[int, list[Tensor]] = {}

    def train(place: int, context: Context) -> None:
        results[place] = train_alone(modules[place], context, inputs)

    spills = [ActivationSpill(modules[place], "280KiB", tmp_path, 64) for place in (0, 2)]
    contexts: list[Context] = [spills[0], nullcontext(), spills[1], nullcontext()]
    threads = [threading.Thread(target=train, args=each) for each in enumerate(contexts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for spill in spills:
        assert spill.report.read_nbytes > 0
        spill.close()
    for place in (0, 2):
        assert all(map(torch.equal, results[place], results[place + 1]))


def test_one_spill_on_two_threads_at_once(tmp_path: Path) -> None:
    """Two loops may share a spill; the steps it sees are then those of both."""
    torch.manual_seed(0)
    modules = [stack() for _ in range(4)]
    inputs = torch.randn(192, 64)
    for one, two in (modules[:2], modules[2:]):
        two.load_state_dict(one.state_dict())
    results: dict[int, list[Tensor]] = {}
    spill = ActivationSpill(budget="700KiB", directory=tmp_path, min_bytes=64)

    def train(place: int, context: Context) -> None:
        results[place] = train_alone(modules[place], context, inputs)

    threads = [threading.Thread(target=train, args=(place, spill)) for place in (0, 2)]
    for thread in threads:
        thread.start()
    for place in (1, 3):
        train(place, nullcontext())
    for thread in threads:
        thread.join()
    spill.close()
    for place in (0, 2):
        assert all(map(torch.equal, results[place], results[place + 1]))


def test_nesting_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    module, x = stack(), torch.randn(8, 64)
    with ActivationSpill(module, directory=tmp_path) as spill:
        other = ActivationSpill(module, directory=tmp_path)
        with pytest.raises(SpillMisuse), other:
            pass
        with pytest.raises(SpillMisuse), spill:
            pass
        loss_of(module(x)).backward()
    with other:
        loss_of(module(x)).backward()
    assert other.report.saved_nbytes == spill.report.saved_nbytes > 0
    spill.close()
    other.close()


def test_a_closed_spill_is_refused(tmp_path: Path) -> None:
    spill = ActivationSpill(directory=tmp_path)
    spill.close()
    with pytest.raises(SpillMisuse), spill:
        pass
