"""Lets a family's own forward run over experts that are not there: it asks for one expert, and waits until it came.

transformers dispatches every decorated family's experts through one registry; what is registered here runs the very
forward that the family brings, over an object that stands for its module. So whatever a family does to its experts'
outputs, in whatever precision and order, is done. It knows that forward's shape; not files or caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import cache
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from undercroft.errors import UnsupportedModel
from undercroft.kernels import ExpertKernel, bitwise
from undercroft.moe.alike import alike
from undercroft.moe.feed_forward import FeedForward
from undercroft.moe.products import products_of

IMPLEMENTATION = "undercroft"
"""What transformers calls this way to run experts."""
_ATTRIBUTE, _IS_USUAL = "_undercroft_serve", "_undercroft_is_usual"


class Service(Protocol):
    """The experts of one forward of one layer."""

    @property
    def skipped(self) -> Set[int]:
        """Those that are left out."""
        ...

    def __getitem__(self, expert: int) -> Mapping[str, Tensor]:
        """One expert's parameters, in ascending order; those of the one before may be gone."""
        ...

    @property
    def kernel(self) -> ExpertKernel | None:
        """What computes its experts by their addresses, if something does, so that `blocks` may be asked for."""
        ...

    def outputs(self, x: Tensor, feed_forward: FeedForward) -> Iterator[tuple[Sequence[int], Tensor]]:
        """What those that are not left out make of one token, (experts, width), all that are there at a time."""
        ...

    def blocks(self) -> Iterator[Sequence[tuple[int, tuple[int, ...]]]]:
        """Those, all together that are there at a time, as blocks, which stay until the next are asked for."""
        ...

    def close(self) -> None:
        """No more are wanted."""
        ...


class Serve(Protocol):
    """How a module finds its experts."""

    def __call__(self, chosen: Tensor, weights: Tensor) -> Service:
        """Begin to bring what a forward wants, all at once; see `streamed_forward`. What is chosen is on the CPU."""
        ...


@runtime_checkable
class Binds(Protocol):
    """A `Serve` that may do so for one token after another in the same memory."""

    def bind(self, x: Tensor, chosen: Tensor, shares: Tensor, out: Tensor) -> Callable[[], bool] | None:
        """See `bind_token`."""
        ...


class _Stack:
    """Stands for a stacked parameter: indexing gives one expert's part."""

    def __init__(self, name: str, service: Service, like: Tensor, device: torch.device) -> None:
        self._name, self._service = name, service
        self.shape, self.dtype, self.device = like.shape, like.dtype, device

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        return self._service[int(expert)][self._name]


class _Borrowed:
    """Stands for an experts module in its own forward: the same in all but its stacked parameters."""

    def __init__(self, module: torch.nn.Module, stacks: Mapping[str, _Stack]) -> None:
        self.__dict__.update(stacks)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def attach(module: torch.nn.Module, serve: Serve) -> None:
    """Let a module find its experts through `serve`."""
    setattr(module, _ATTRIBUTE, serve)
    setattr(module, _IS_USUAL, is_usual(own_forward(module)))


class Place(NamedTuple):
    """Where an experts module is: an attribute of another module."""

    parent: torch.nn.Module
    attribute: str
    module: torch.nn.Module


def places(model: torch.nn.Module, names: Sequence[str]) -> list[Place]:
    """Those of a model's experts modules, whose dotted names are given."""
    parts = [name.rpartition(".") for name in names]
    return [
        Place(model.get_submodule(parent), attribute, model.get_submodule(name))
        for name, (parent, _, attribute) in zip(names, parts, strict=True)
    ]


def refuse_wrapped(found: Sequence[Place], *_: Any) -> None:
    """Make sure that experts modules are where they were.

    Raises:
        UnsupportedModel: another module took the place of one, as peft's do around the parameters that they adapt.
    """
    for parent, attribute, module in found:
        if (there := getattr(parent, attribute)) is not module:
            raise UnsupportedModel(
                f"{type(there).__name__} was put around streamed experts, whose weights are not here to be adapted: "
                "adapt other modules (attention, routers), or merge the adapter into the checkpoint"
            )


def attached(module: torch.nn.Module) -> Serve:
    """Through what a module finds its experts."""
    return getattr(module, _ATTRIBUTE)


def own_forward(module: torch.nn.Module) -> Callable[..., Tensor] | None:
    """The forward that a decorated experts class brings itself; None if the class is not decorated."""
    return getattr(type(module).forward, "__wrapped__", None) if hasattr(module, "has_gate") else None


def expert_count(module: Any) -> int:
    """How many experts a decorated module has."""
    return module.num_experts


def streamed_forward(module: torch.nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The experts' weighted sum.

    Args:
        module: the experts module, `attach`ed.
        hidden: (tokens, width).
        chosen: (tokens, k) int64, experts by number; a number beyond the last means none.
        weights: (tokens, k), of the chosen.

    Raises:
        UnsupportedModel: a gradient is wanted, which would need the experts a second time.
    """
    if torch.is_grad_enabled() and hidden.requires_grad:
        raise UnsupportedModel(
            "streamed experts are for inference: a backward would need them again. Call the model under "
            "torch.no_grad(), or train with resident experts and `undercroft train`"
        )
    serve = attached(module)
    forward = own_forward(module)
    assert forward is not None
    routed = chosen.cpu()  # where a device computes, the one time in a layer that the CPU waits for it
    service = serve(routed, weights)
    if len(chosen) == 1 and is_usual(forward):
        return _one_token(module, service, hidden, routed, weights)
    if service.skipped:
        chosen, weights = _without(chosen, weights, list(service.skipped))
    parameters = module.named_parameters(recurse=False)
    stacks = {name: _Stack(name, service, each, hidden.device) for name, each in parameters}
    try:
        with products_of(hidden):
            return forward(_Borrowed(module, stacks), hidden, chosen, weights)
    finally:
        service.close()


def of_a_token(
    module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, out: Tensor | None = None
) -> Tensor:
    """What an unhooked experts module makes of one token where nobody differentiates; most are not asked themselves.

    Args:
        module: streamed or not.
        hidden: (1, width).
        chosen: (1, k) int64, on the CPU.
        weights: (1, k).
        out: (1, width), for the result if that is one of a kernel's; it may come in memory of its own.
    """
    own = module.__dict__
    if not own.get(_IS_USUAL) or module.config._experts_implementation != IMPLEMENTATION:
        return module(hidden, chosen, weights)
    return _one_token(module, own[_ATTRIBUTE](chosen, weights), hidden, chosen, weights, out)


def bind_token(
    module: Any, x: Tensor, chosen: Tensor, shares: Tensor, out: Tensor
) -> Callable[[], bool] | None:
    """`of_a_token` in memory that stays, if that can be.

    Returns:
        What does it, or says that it has done nothing, so that `of_a_token` has to.
    """
    own = module.__dict__
    serve = own.get(_ATTRIBUTE)
    if not own.get(_IS_USUAL) or not FeedForward(module.act_fn).is_silu or not isinstance(serve, Binds):
        return None
    return serve.bind(x, chosen, shares, out)


def _without(chosen: Tensor, weights: Tensor, skipped: list[int]) -> tuple[Tensor, Tensor]:
    """The same choice without some experts: another of the token's takes their place, with no weight."""
    gone = torch.isin(chosen, torch.tensor(skipped, device=chosen.device))
    other = chosen.gather(1, (~gone).int().argmax(dim=1, keepdim=True))
    return torch.where(gone, other, chosen), weights.masked_fill(gone, 0)


@cache
def is_usual(forward: Any) -> bool:
    """Whether a family's own forward is, instruction by instruction, Mixtral's, as most families' is."""
    return alike(forward, _USUAL)


def _one_token(
    module: Any,
    service: Service,
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """What the usual forward does to one token: experts compute as they arrive, and are summed in its own order."""
    feed_forward = FeedForward(module.act_fn)
    (routed,) = cast("list[list[int]]", chosen.tolist())
    if service.kernel is not None and feed_forward.is_silu:
        x = service.kernel.taken(hidden)
        if x is not None:
            return _in_one_call(service, service.kernel, x, routed, weights, out).to(hidden.dtype)
    places: dict[int, int] = {}
    products: list[Tensor] = []
    for experts, rows in service.outputs(hidden, feed_forward):
        places |= {expert: place for place, expert in enumerate(experts, start=len(places))}
        products.append(rows)
    service.close()
    order = sorted((expert, slot) for slot, expert in enumerate(routed) if expert in places)
    return _summed(products, [(places[expert], slot) for expert, slot in order], hidden, weights)


def _summed(
    products: Sequence[Tensor], terms: Sequence[tuple[int, int]], hidden: Tensor, weights: Tensor
) -> Tensor:
    """The sum of some products' rows, each by its number and the place of its weight, as the usual forward adds up."""
    if not products:
        return torch.zeros_like(hidden)
    rows = products[0] if len(products) == 1 else torch.cat(list(products))
    if bitwise.adds(rows, weights):
        shares: list[float] = weights[0].tolist()  # pyright: ignore
        return bitwise.add_up(rows, [row for row, _ in terms], [shares[slot] for _, slot in terms])
    out = torch.zeros_like(hidden)
    for row, slot in terms:
        out.add_((rows[row : row + 1] * weights[:, slot : slot + 1]).to(out.dtype))
    return out


def _in_one_call(
    service: Service,
    kernel: ExpertKernel,
    x: Tensor,
    chosen: Sequence[int],
    weights: Tensor,
    out: Tensor | None,
) -> Tensor:
    """The same by a kernel: one call for all where all are there, else one for each group that comes."""
    (shares,) = cast("list[list[float]]", weights.tolist())
    routed = sorted(zip(chosen, shares, strict=True))
    places: dict[int, int] = {}
    products: list[Tensor] = []

    def terms() -> list[tuple[int, float]]:
        """By number of the expert: a sum does not depend on the order of arrival."""
        return [(places[expert], weight) for expert, weight in routed if expert in places]

    count = len(routed) - len(service.skipped)
    for group in service.blocks():
        places |= {expert: place for place, (expert, _) in enumerate(group, start=len(places))}
        blocks = [block for _, block in group]
        if len(group) == count:
            mixed = kernel.mix(x, blocks, terms(), out)
            service.close()
            return mixed
        products.append(kernel.feed_forwards(x, blocks))
    service.close()
    return kernel.add_up(products, terms(), x.dtype) if products else torch.zeros_like(x)


_USUAL: Any = MixtralExperts.forward.__wrapped__  # pyright: ignore
ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = streamed_forward
