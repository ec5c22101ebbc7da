"""The loss of a language model without its logits.

Logits, their gradient and what the softmax saved are alive together when the backward begins, whatever is spilled:
three times (tokens, vocabulary). Taken a few rows at a time, and computed again in the backward, they need room for
those rows only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from undercroft.errors import InvalidInput

_Part = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    rows: int = 256,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Mean cross-entropy of the logits `hidden @ weight.T`, of which no more than `rows` rows exist at a time.

    The same sum in another order: it differs from `torch.nn.functional.cross_entropy` by rounding, and costs one more
    product with `weight`.

    Args:
        hidden: (..., hidden) floating point, what the output layer is given.
        weight: (vocabulary, hidden), the output layer's.
        labels: (...) int64; the caller has shifted them.
        rows: how many tokens at a time.
        ignore_index: tokens with this label do not count.

    Returns:
        A scalar in nats; nan where no token counts, as in PyTorch.

    Raises:
        InvalidInput: less than one row, or not one label for each token.
    """
    if rows < 1 or labels.shape != hidden.shape[:-1]:
        raise InvalidInput(
            f"{rows} rows at a time, {tuple(hidden.shape)} hidden states and {tuple(labels.shape)} labels: there "
            "must be one row at least, and one label for each token"
        )

    def part(some: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(some, weight)
        if logits.dtype.itemsize < torch.float32.itemsize:
            logits = logits.float()
        return functional.cross_entropy(logits, theirs, ignore_index=ignore_index, reduction="sum")

    total = torch.zeros((), device=hidden.device)
    pieces = torch.split(hidden.flatten(0, -2), rows), torch.split(labels.flatten(), rows)
    for some, theirs in zip(*pieces, strict=True):
        total = total + _recomputed(part, some, theirs)
    return total / (labels != ignore_index).sum()


def _recomputed(part: _Part, some: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return checkpoint(part, some, theirs, use_reentrant=False)  # pyright: ignore
