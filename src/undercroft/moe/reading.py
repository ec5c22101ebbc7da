"""Reads a text through a model token by token, and says how far two readings of it are apart.

Every token is a forward of its own with the KV cache of those before it, as in decoding: that is where experts come and
go, and where low copies are served. It knows transformers' models as things to call, streamed or resident; not texts,
experts or budgets. Invariant: a reading depends on the model and the tokens alone, in this order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undercroft.errors import InvalidInput


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What a model expected of a text.

    Attributes:
        expected: float32 [tokens, vocabulary], log-probabilities of what comes next, wherever something came.
        came: int64 [tokens], what did.
        forwards: tokens read; the last of a window tells nothing of what comes next.
        seconds: that it took.
    """

    expected: Tensor
    came: Tensor
    forwards: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        return math.exp(-self.expected.gather(1, self.came[:, None]).double().mean().item())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How far a reading is from a reference.

    Attributes:
        perplexity_change: its perplexity over the reference's, less 1.
        top_agreement: share of tokens for which both think the same most likely, 0 to 1.
        divergence: mean Kullback-Leibler divergence of the reading from the reference, in nats.
        same: whether all probabilities have the same bits.
    """

    perplexity_change: float
    top_agreement: float
    divergence: float
    same: bool


def read(
    model: Any, windows: Sequence[Sequence[int]], on_token: Callable[[int, int], None] | None = None
) -> Reading:
    """Read windows of text, each from an empty KV cache.

    Args:
        model: a causal language model of transformers.
        windows: token ids, at least two in each.
        on_token: told after each token how many were read, and how many there are.

    Raises:
        InvalidInput: a window with nothing to foresee.
    """
    if not windows or min(map(len, windows)) < 2:
        raise InvalidInput("a window of text has two tokens at least: one to read and one to foresee")
    total, done = sum(map(len, windows)), 0
    expected: list[Tensor] = []
    began = time.perf_counter()
    for window in windows:
        past = None
        for token in window:
            logits, past = _step(model, token, past)
            expected.append(logits)
            done += 1
            if on_token is not None:
                on_token(done, total)
        expected.pop()
    seconds = time.perf_counter() - began
    came = torch.tensor([token for window in windows for token in window[1:]])
    return Reading(expected=torch.stack(expected), came=came, forwards=total, seconds=seconds)


@torch.inference_mode()
def _step(model: Any, token: int, past: Any) -> tuple[Tensor, Any]:
    out = model(input_ids=torch.tensor([[token]]), past_key_values=past, use_cache=True)
    return out.logits[0, -1].float().log_softmax(-1), out.past_key_values


def compare(reading: Reading, reference: Reading) -> Fidelity:
    """How far a reading is from another one of the same text.

    Raises:
        InvalidInput: they are not of the same text.
    """
    if not torch.equal(reading.came, reference.came):
        raise InvalidInput("two readings are compared token by token, so they must be of the same text")
    mine, theirs = reading.expected, reference.expected
    apart = (theirs.exp() * (theirs - mine)).sum(-1).double().mean().item()
    return Fidelity(
        perplexity_change=reading.perplexity / reference.perplexity - 1,
        top_agreement=(mine.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
        divergence=apart,
        same=torch.equal(mine, theirs),
    )


def windows_of(
    documents: Sequence[Sequence[int]], end: Sequence[int], *, length: int, count: int
) -> list[list[int]]:
    """The first windows of documents that are written one after another.

    Args:
        documents: token ids of each.
        end: what separates documents; it comes before each.
        length: tokens of a window.
        count: how many windows.

    Raises:
        InvalidInput: there is less text than that.
    """
    text = [token for document in documents for token in (*end, *document)]
    if len(text) < length * count:
        raise InvalidInput(f"{count} windows of {length} tokens were asked of a text of {len(text)}")
    return [text[start : start + length] for start in range(0, length * count, length)]


@contextmanager
def one_thread() -> Generator[None]:
    """For models so small that a second thread costs more than it does: the first waits for it at every layer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
