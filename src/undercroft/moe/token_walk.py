"""A token's way through a whole model in few calls, without asking each of its modules.

Between the products of a large model no cache is warm, so that asking each layer, and making each call's arguments,
takes as long as a fifth of all its products. Here both are done once: a model whose code is, instruction by
instruction, Qwen3-MoE's or Mixtral's (`usual_model`, `usual_layer`) takes a single token of a single row through calls
that are bound to one token's memory, and does all else as ever. It knows this forward and its experts' way; not what
computes the other parts. Invariant: what comes out, and what becomes of the cache, is what the model itself would do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from undercroft.kernels.linear import is_plain
from undercroft.moe.growing import Growing, GrowingLayer, grown
from undercroft.moe.kept import Kept
from undercroft.moe.mixed import put_before
from undercroft.moe.streamed import bind_token, of_a_token
from undercroft.moe.token_memory import Sizes, TokenMemory
from undercroft.moe.turns import Turns
from undercroft.moe.usual_model import UsualModel, usual_model

_WALK = "_undercroft_walk"
_ANY = torch.empty(0)
_LOOKED_AT = ("input_ids", "past_key_values", "attention_mask", "position_ids", "logits_to_keep")
_NO_MATTER = (
    "use_cache",
    "return_dict",
)  # in a forward that is given a cache; what is asked for is a dictionary
_forward: Any = Qwen3MoeForCausalLM.forward


class Bound(NamedTuple):
    """What a layer does to a token, bound to a `TokenMemory`, whose attributes these name.

    Attributes:
        begin: from `hidden` to `heads`, turned by `turns`.
        attend: given the memory of all keys and values, see `GrowingLayer`, a function that puts `states` there behind
            so many others, and what `query` sees of all into `seen`.
        end: from there to `residual`.
        normalise: that into `x`.
        route: to `shares` and `chosen`.
        add: `residual` and `product`, into `hidden`.
    """

    begin: Sequence[Callable[[], object]]
    attend: Callable[[Tensor], Callable[[int], object]]
    end: Sequence[Callable[[], object]]
    normalise: Callable[[], object]
    route: Callable[[], object]
    add: Callable[[], object]


class Way(Protocol):
    """How the parts of one layer are computed.

    Attributes:
        sizes: of its parts.
        places: of its modules, each a parent and a name.
        hooked: of these, the norm before the experts, to which others may listen who want to know the residual.
        experts: the module.
        weights: all that it computes with, but for its experts.
        numbers: attributes that it computes with, each a module and a name.
    """

    sizes: Sizes
    places: Sequence[tuple[nn.Module, str]]
    hooked: nn.Module
    experts: nn.Module
    weights: Sequence[Tensor]
    numbers: Sequence[tuple[nn.Module, str]]

    @property
    def config(self) -> object:
        """Of the layer."""
        ...

    @property
    def attends(self) -> bool:
        """Whether layers with that configuration would now attend in this way."""
        ...

    def bind(self, memory: TokenMemory) -> Bound:
        """Its calls, with as many threads as PyTorch has now."""
        ...


class Walk:
    """A token's way through a model.

    Args:
        model: its parts.
        ways: of its layers, all of the same sizes.
    """

    def __init__(self, model: UsualModel, ways: Sequence[Way]) -> None:
        sizes = ways[0].sizes
        self._model, self._ways = model, ways
        places = [*model.places, *(place for way in ways for place in way.places)]
        numbers = [*model.numbers, *(number for way in ways for number in way.numbers)]
        self._kept = Kept(places, hooked=[way.hooked for way in ways], numbers=numbers)
        self._config: dict[str, Any] = {}
        self._embedding: Tensor = model.embedding.weight
        weights = [self._embedding, *(weight for way in ways for weight in way.weights)]
        self._weights = [(each, each.data_ptr(), each.dtype, each.shape) for each in weights]
        self._memory = TokenMemory(sizes)
        self._turns = Turns(model.rotary)
        self._states = Growing(len(ways), sizes.keys, sizes.head, sizes.dtype)
        self._bound: list[Bound] = []
        self._serve: list[Callable[[], bool] | None] = []
        self._threads = 0
        self._lock = Lock()

    def go(self, args: Sequence[Any], options: Mapping[str, Any]) -> Tensor | None:
        """What the last layer makes of a token, (1, 1, width), given a forward's arguments.

        Returns:
            None where the model itself has to: nothing was done.
        """
        past = options.get("past_key_values")
        before = None if args else self._states.tokens(past)
        token = None if before is None else self._token(options, before)
        if before is None or token is None or not self._is_same or not self._lock.acquire(blocking=False):
            return None
        try:
            self._bind()
            return self._through(token, before, grown(past))
        finally:
            self._lock.release()

    def _token(self, options: Mapping[str, Any], before: int) -> int | None:
        """The one that is asked for, behind so many others and with nothing else."""
        ids = options.get("input_ids")
        if type(ids) is not Tensor or ids.shape != (1, 1) or ids.dtype is not torch.int64 or not ids.is_cpu:
            return None
        token = int(ids.item())
        others = (value for name, value in options.items() if name not in _LOOKED_AT + _NO_MATTER)
        is_usual = (
            0 <= token < len(self._embedding)
            and all(value is None or value is False for value in others)
            and options.get("return_dict") is not False
            and _is_number(options.get("logits_to_keep", 0))
            and _hides_nothing(options.get("attention_mask"), before + 1)
            and _is_next(options.get("position_ids"), before)
        )
        return token if is_usual else None

    @property
    def _is_same(self) -> bool:
        """Whether the model is what it was, and nobody watches what it does."""
        return (
            not torch.is_autocast_enabled("cpu")
            and is_plain(_ANY)
            and self._is_usual
            and self._ways[0].attends
            and self._kept.holds
            and all(
                weight.data_ptr() == address
                and weight.dtype is dtype
                and weight.shape == shape
                and weight.is_contiguous()
                for weight, address, dtype, shape in self._weights
            )
        )

    @property
    def _is_usual(self) -> bool:
        config = self._model.config
        if config != self._config:
            if not self._model.is_usual:
                return False
            self._config = config.copy()
        return True

    def _bind(self) -> None:
        if (threads := torch.get_num_threads()) != self._threads:
            m = self._memory
            self._bound = [way.bind(m) for way in self._ways]
            self._serve = [
                bind_token(way.experts, m.x, m.chosen, m.shares, m.product[0]) for way in self._ways
            ]
            self._threads = threads

    def _through(self, token: int, before: int, states: Sequence[GrowingLayer]) -> Tensor:
        memory = self._memory
        memory.hidden.copy_(self._embedding[token])
        memory.turns.copy_(self._turns.at(before, memory.hidden))
        for number, (way, bound) in enumerate(zip(self._ways, self._bound, strict=True)):
            for call in bound.begin:
                call()
            states[number].add(bound.attend)
            for call in bound.end:
                call()
            if way.hooked._forward_pre_hooks:  # pyright: ignore[reportPrivateUsage]
                residual = memory.residual.clone()  # for who listens may keep or change it
                memory.x.copy_(way.hooked(residual)[0])
                memory.residual.copy_(residual)
            else:
                bound.normalise()
            bound.route()
            self._mix(number)
            bound.add()
        return memory.hidden.clone()

    def _mix(self, number: int) -> None:
        serve, memory = self._serve[number], self._memory
        if serve is None or not serve():
            experts, out = self._ways[number].experts, memory.product[0]
            made = of_a_token(experts, memory.x, memory.chosen, memory.shares, out)
            if made is not out:
                out.copy_(made)


def shorten_model(model: nn.Module, way_of: Callable[[nn.Module], Way | None]) -> bool:
    """Let a model take a token this way if all its layers have one; whether it does."""
    found = usual_model(model)
    ways = [] if found is None else [way for layer in found.layers if (way := way_of(layer)) is not None]
    if found is None or not ways or len(ways) < len(found.layers) or len({way.sizes for way in ways}) > 1:
        return False
    weight = found.embedding.weight
    if any(way.config is not found.inner.config for way in ways):
        return False
    if weight.dtype is not ways[0].sizes.dtype or weight.shape[1] != ways[0].sizes.width or not weight.is_cpu:
        return False
    put_before(_Short, model)
    setattr(model, _WALK, Walk(found, ways))
    return True


def is_short(model: nn.Module) -> bool:
    """Whether a model takes a token this way."""
    return hasattr(model, _WALK)


class _Short:
    """A token's way through a model, before the model's own class, which does what this does not."""

    @wraps(_forward)  # generation asks for its signature
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        model: Any = self
        hidden = getattr(model, _WALK).go(args, kwargs)
        if hidden is None:
            stock: Any = super()
            return stock.forward(*args, **kwargs)
        logits = model.lm_head(model.model.norm(hidden))
        return MoeCausalLMOutputWithPast(logits=logits, past_key_values=kwargs["past_key_values"])


def _is_number(value: object) -> bool:
    return type(value) is int and value >= 0


def _hides_nothing(mask: Any, tokens: int) -> bool:
    return mask is None or (type(mask) is Tensor and mask.shape == (1, tokens) and bool(mask.all()))


def _is_next(places: Any, before: int) -> bool:
    return places is None or (type(places) is Tensor and places.shape == (1, 1) and places.item() == before)
