"""What of the one budget is not the experts': the KV cache, and what a forward computes with experts.

It knows bytes, and where transformers keeps keys and values; not how experts are chosen. Invariant: what is set aside
and what experts take are never more than the budget together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast
from weakref import ref

import torch
from transformers import PreTrainedConfig

from undercroft.errors import BudgetExceeded
from undercroft.moe.growing import GrowingLayer, grows, spare
from undercroft.store.budget import Budget, Reservation
from undercroft.store.cache import RecordCache
from undercroft.store.ranges import round_up
from undercroft.units import format_size

_HOLDER = "KV cache and prefill"


class Headroom:
    """Takes room from the experts as a KV cache grows, and gives it back when the next sequence begins.

    It moves in steps of an eighth of an expert, so that most tokens change nothing.

    Args:
        budget: what all share; the cache's slab reserves its memory there.
        cache: of experts.
        least: bytes that the cache must keep: the largest expert.
        token_nbytes: what the KV cache is expected to take for a token, until it can be measured.
        row_nbytes: what the experts' forward computes with for a token.
        context: tokens whose KV cache is set aside from the beginning; a prefill computes there too.
        grows: whether the KV cache of a single row has room behind it, see `growing.spare`.

    Raises:
        BudgetExceeded: an expert and that many tokens do not fit.
    """

    def __init__(
        self,
        budget: Budget,
        cache: RecordCache,
        *,
        least: int,
        token_nbytes: int,
        row_nbytes: int,
        context: int = 0,
        grows: bool = False,
    ) -> None:
        self.total = cache.budget
        self._budget, self._cache, self._least, self._grows = budget, cache, least, grows
        self._token_nbytes, self._row_nbytes = token_nbytes, row_nbytes
        self._always = context * token_nbytes
        self._step = round_up(least // 8)
        self._claim: Reservation | None = None
        self._known = _Known(lambda: None, 0.0)
        self._set_aside(self._always)

    @property
    def nbytes(self) -> int:
        """What is set aside now."""
        return self._claim.nbytes if self._claim else 0

    def make_room(self, past: object, past_tokens: int, rows: int, tokens: int) -> None:
        """Before a forward: for the KV cache as it will be after it, and for what it computes.

        Args:
            past: the KV cache, or None.
            past_tokens: that it holds in each row.
            rows: sequences of the batch.
            tokens: that each row adds.

        Raises:
            BudgetExceeded: what is left does not hold an expert.
        """
        kept = self._kept(past, past_tokens, rows, tokens)
        self._set_aside(max(self._always, kept + rows * tokens * self._row_nbytes))

    def _kept(self, past: object, past_tokens: int, rows: int, tokens: int) -> int:
        """Bytes of a KV cache with so many more tokens, and of the room behind it."""
        most = past_tokens + tokens
        room = spare(most) if self._grows and rows == 1 else 0
        if past is not None and self._known.past() is past:
            return int(self._known.each * rows * (most + room))
        held = kv_nbytes(past)
        each = held / (rows * past_tokens) if held and past_tokens else self._token_nbytes
        kept = held + int(each * rows * tokens)
        if not self._grows or not (past is None or grows(past)):
            return kept
        if held and past_tokens:
            self._known = _Known(ref(past), each)  # asked once, for a cache has many parts
        return kept + int(each * room)

    def _set_aside(self, nbytes: int) -> None:
        claim = round_up(nbytes, self._step)
        if claim == self.nbytes:
            return
        if self.total - claim < self._least:
            raise BudgetExceeded(
                claim,
                self.total,
                {"the largest expert": self._least},
                least=claim + self._least,
                hint="Begin with a shorter text, or fewer at once.",
            )
        if self._claim is not None:
            self._claim.release()
        self._cache.resize(self.total - claim)
        self._claim = self._budget.reserve("host", claim, _HOLDER) if claim else None


class _Known(NamedTuple):
    """A KV cache that may grow where it lies, and its bytes for each token of a row."""

    past: Callable[[], object]
    each: float


def kv_nbytes(past: object) -> int:
    """Bytes of the tensors of one of transformers' caches, whatever its kind, without room behind them."""
    layers: Iterable[object] = getattr(past, "layers", None) or ()
    return sum(_layer_nbytes(each) for each in layers)


def _layer_nbytes(layer: object) -> int:
    return layer.nbytes if isinstance(layer, GrowingLayer) else _tensor_nbytes(vars(layer).values())


def _tensor_nbytes(values: Iterable[object]) -> int:
    found = 0
    for value in values:
        if isinstance(value, torch.Tensor):
            found += value.nbytes
        elif isinstance(value, dict):
            found += _tensor_nbytes(cast("dict[Any, object]", value).values())
        elif isinstance(value, (list, tuple)):
            found += _tensor_nbytes(cast("Sequence[object]", value))
    return found


def token_nbytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """What the KV cache of a configuration is expected to take for a token: full attention in every layer."""
    text: Any = config.get_text_config()
    heads = _number(text, "num_attention_heads", 1)
    width = _number(text, "head_dim", _number(text, "hidden_size", 0) // heads)
    return (
        2
        * _number(text, "num_hidden_layers", 0)
        * _number(text, "num_key_value_heads", heads)
        * width
        * dtype.itemsize
    )


def row_nbytes(shapes: Sequence[Mapping[str, tuple[int, ...]]], dtype: torch.dtype) -> int:
    """What one token's way through one expert takes: each matrix's input and output.

    Args:
        shapes: of an expert's parameters, by layer.
        dtype: of the activations.
    """
    sums = [sum(sum(shape) for shape in layer.values() if len(shape) > 1) for layer in shapes]
    return max(sums, default=0) * dtype.itemsize


def advice(budget: int, demand: int) -> str | None:
    """What to say of a budget that is less than one token uses, in all layers together; None if it is not."""
    if budget >= demand:
        return None
    return (
        f"a budget of {format_size(budget)} is less than one token uses in all layers: {format_size(demand)}, with "
        "which some experts would still be in memory when the next token comes; now nearly all are read for every token"
    )


def _number(text: object, name: str, otherwise: int) -> int:
    try:
        found = cast("object", getattr(text, name, None))
    except RuntimeError:  # it differs from layer to layer, says the configuration
        found = None
    return found if isinstance(found, int) and found > 0 else otherwise
