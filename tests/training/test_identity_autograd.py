"""Training with spilling is bit-identical however autograd is used: checkpoints, own functions, orders, hooks."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from undercroft import ActivationSpill

Context = AbstractContextManager[object]
Flow = Callable[[nn.Module, list[Tensor], Context], Iterable[object]]


def stack() -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)) for _ in range(3)])


def loss_of(output: Tensor) -> Tensor:
    return output.sin().square().mean()


# -- functions of autograd's user, applied between layers ---------------------------------------------------------


class SavesInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class SavesIntermediate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        middle = x.exp()
        ctx.save_for_backward(middle, None, x)
        return middle.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        middle, nothing, x = ctx.saved_tensors
        assert nothing is None
        return gradient * middle.cos() * x.exp()


class EditsSaved(torch.autograd.Function):
    """Uses what it saved as its scratch space."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        middle = x.tanh()
        ctx.save_for_backward(middle)
        return middle * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (middle,) = ctx.saved_tensors
        return middle.square_().neg_().add_(1).mul_(gradient)


class TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        one, two = x.sin(), x.exp()
        ctx.save_for_backward(x, two)
        return one, two

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> Tensor:
        x, two = ctx.saved_tensors
        assert second is None
        assert first is not None
        return first * x.cos() + 0 * two


class SetsUpContext(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sigmoid()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return gradient * output * (1 - output)


def between(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Tensor:
    for block in module:
        x = function(block(x))
    return x


def keyword_input(module: nn.Module, x: Tensor) -> Tensor:
    scale = x.exp()
    return checkpoint(lambda y, *, factor: module(y) * factor.sin(), x, factor=scale, use_reentrant=False)


def nested(module: nn.Module, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return checkpoint(module[1], F.dropout(module[0](y), 0.1), use_reentrant=False).sin()

    return module[2](checkpoint(inner, x.exp(), use_reentrant=False))


def mixed(module: nn.Module, x: Tensor) -> Tensor:
    first = checkpoint(module[0], x.sin(), use_reentrant=True)
    return checkpoint(module[2], module[1](F.dropout(first, 0.2)), use_reentrant=False)


def selective(module: nn.Module, x: Tensor) -> Tensor:
    def policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        kept = op is torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(module, x.exp(), use_reentrant=False, context_fn=contexts)


def mapped(module: nn.Module, x: Tensor) -> Tensor:
    rows = torch.func.vmap(lambda row: module[0](row).square().sum())(x)
    return module(x) * rows.unsqueeze(1).tanh()


def forward_mode(module: nn.Module, x: Tensor) -> Tensor:
    _, directional = torch.func.jvp(module[1], (x,), (x.detach().exp(),))
    return module[2](x * directional)


APPLIED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "saves input": partial(between, SavesInput.apply),
    "saves intermediate": partial(between, SavesIntermediate.apply),
    "edits saved": partial(between, EditsSaved.apply),
    "two outputs": partial(between, lambda x: TwoOutputs.apply(x)[0]),
    "sets up context": partial(between, SetsUpContext.apply),
    "checkpoint reentrant": lambda m, x: between(
        lambda y: checkpoint(m[0], y, use_reentrant=True).sin(), m, x
    ),
    "checkpoint": lambda m, x: between(lambda y: checkpoint(m[0], y, use_reentrant=False).sin(), m, x),
    "checkpoint sequential": lambda m, x: checkpoint_sequential(m, 2, x.exp(), use_reentrant=False),
    "checkpoint keyword": keyword_input,
    "checkpoint nested": nested,
    "checkpoint mixed": mixed,
    "checkpoint selective": selective,
    "vmap": mapped,
    "jvp": forward_mode,
}


# torch compiles its forward-mode rules when they are first used
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", APPLIED)
def test_functions_and_checkpoints(bench: Any, name: str) -> None:
    def flow(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
        with context:
            loss = torch.stack([loss_of(APPLIED[name](module, x)) for x in inputs]).sum()
            loss.backward()
        return [loss]

    bench.check(stack, flow)


# -- ways to ask for gradients ------------------------------------------------------------------------------------


def total_loss(module: nn.Module, inputs: list[Tensor]) -> Tensor:
    return torch.stack([loss_of(module(x)) for x in inputs]).sum()


def retained_thrice(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with context:
        loss = total_loss(module, inputs)
        for _ in range(3):
            loss.backward(retain_graph=True)
        loss.backward()
    yield loss


def second_order(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with context:
        loss = total_loss(module, inputs)
        slopes = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
        torch.stack([slope.square().sum() for slope in slopes]).sum().backward()
    yield from (loss, *slopes)


def gradient_penalty(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with context:
        loss = total_loss(module, inputs)
        (slope,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
        penalised = loss + (slope.norm() - 1).square()
        penalised.backward()
    yield penalised


def backward_with_graph(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    x = inputs[0]
    with context:
        loss = loss_of(module(x.tanh()))
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.sum(), x)
    yield from (first, second, third)


def some_inputs_only(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with context:
        loss = total_loss(module, inputs)
        yield from torch.autograd.grad(loss, inputs[1:], retain_graph=True)
        yield from torch.autograd.grad(loss, [module[1][0].weight, inputs[0]])


def backward_into_some(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with context:
        loss = total_loss(module, inputs)
        loss.backward(inputs=[*module[0].parameters()])
    yield loss


def two_losses_of_a_trunk(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with context:
        trunk = module[:2](torch.cat(inputs))
        one, two = loss_of(module[2](trunk)), loss_of(trunk.exp())
        one.backward(retain_graph=True)
        two.backward()
    yield from (one, two)


def halve(weight: Tensor) -> None:
    weight.grad.mul_(0.5)


def hooks(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    seen: list[object] = []
    handles = [
        module[1].register_full_backward_hook(lambda _, into, out: seen.append(out[0].clone())),
        module[0][0].weight.register_post_accumulate_grad_hook(halve),
    ]
    with context:
        hidden = module[0](torch.cat(inputs))
        hidden.register_hook(lambda gradient: gradient * 2)
        hidden.retain_grad()
        loss_of(module[1:](hidden)).backward()
    for handle in handles:
        handle.remove()
    return [*seen, hidden.grad]


def other_hooks_inside(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    """Hooks entered later win; ours see the rest."""
    with context:
        first = module[0](torch.cat(inputs))
        with torch.autograd.graph.save_on_cpu():
            second = module[1](first)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            third = module[2](second.sin())
        loss_of(third.exp()).backward()
    return [third]


def saved_on_the_node(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    """Reads saved tensors from the graph, as visualisers do."""
    with context:
        hidden = module(torch.cat(inputs)).exp()
        result = hidden.grad_fn._saved_result.clone()
        again = hidden.grad_fn._saved_result.clone()
        loss_of(hidden).backward()
    return [result, again]


def anomaly_detection(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with context, torch.autograd.set_detect_anomaly(True, check_nan=True):
        loss = total_loss(module, inputs)
        loss.backward()
    return [loss]


def multithreading_off(module: nn.Module, inputs: list[Tensor], context: Context) -> Iterable[object]:
    with context, torch.autograd.set_multithreading_enabled(False):
        loss = total_loss(module, inputs)
        loss.backward()
    return [loss]


FLOWS: list[Flow] = [
    retained_thrice,
    second_order,
    gradient_penalty,
    backward_with_graph,
    some_inputs_only,
    backward_into_some,
    two_losses_of_a_trunk,
    hooks,
    other_hooks_inside,
    saved_on_the_node,
    multithreading_off,
]


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.__name__)
def test_ways_to_ask_for_gradients(bench: Any, flow: Flow) -> None:
    bench.check(stack, flow)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_detection(bench: Any) -> None:
    bench.check(stack, anomaly_detection)


def test_torch_refuses_hooks_under_its_own_gradient_transform(tmp_path: Path) -> None:
    """`torch.func.grad` inside the context is refused by torch: an error, never a wrong number."""
    with (
        ActivationSpill(directory=tmp_path) as spill,
        pytest.raises(RuntimeError, match="saved tensor hooks"),
    ):
        torch.func.grad(lambda x: x.sin().sum())(torch.randn(4))
    spill.close()
