"""The nodes of an autograd graph: what each will ask for at once, and which gradients it must not lend out.

It knows autograd's graph and how to reach what our hooks left in it; it does not know budgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.autograd.function import BackwardCFunction

from undercroft.training.identity import storage_key, why_kept

_LENT = "undercroft.lent"
Node = Any
"""A node of the autograd graph; torch gives them no common public type."""


def packed_by_node(root: Node) -> Iterator[list[object]]:
    """For each node reachable from `root`, what pack hooks returned for the tensors it saved and has not freed."""
    waiting, seen = [root], {root}
    while waiting:
        node = waiting.pop()
        yield list(_packed(node))
        following = {edge[0] for edge in node.next_functions if edge[0] is not None}
        waiting.extend(following - seen)
        seen |= following


def running_node() -> Node | None:
    """The node whose backward runs on this thread, if any."""
    return torch._C._current_autograd_node()  # pyright: ignore


def own_gradients(lent: torch.Tensor) -> None:
    """See that a gradient which is the unpacked tensor itself is copied before anyone takes it.

    A custom Function may return what it saved. Plain autograd then finds that others hold the tensor, and copies it
    into `.grad`. A tensor unpacked through hooks has no other holder, so `.grad` would share its memory: with a
    parameter, or with what a second backward unpacks. The running node's own hooks were read before it ran, so the
    nodes that follow it are asked.
    """
    node = running_node()
    if not isinstance(node, BackwardCFunction):
        return
    keys = cast(set[int] | None, node.metadata.get(_LENT))
    if keys is None:
        keys = set[int]()
        node.metadata[_LENT] = keys
        for following, _ in node.next_functions:
            if following is not None:
                _copy_once(following, node, keys)
    keys.add(storage_key(lent))


def _copy_once(following: Node, node: BackwardCFunction, lent: set[int]) -> None:
    def copy(gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        hook.remove()
        node.metadata.pop(_LENT, None)  # another backward through the same node asks again
        return tuple(_own(gradient, lent) for gradient in gradients)

    hook = following.register_prehook(copy)


def _own(gradient: torch.Tensor | None, lent: set[int]) -> torch.Tensor | None:
    if gradient is None or why_kept(gradient) is not None or storage_key(gradient) not in lent:
        return gradient
    return gradient.clone()


def _packed(node: Node) -> Iterator[object]:
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            saved: Any = getattr(node, name)
            each: list[Any] = list(saved) if isinstance(saved, list | tuple) else [saved]  # pyright: ignore
            for one in each:
                if (packed := getattr(one, "data", None)) is not None:
                    yield packed
