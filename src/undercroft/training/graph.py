"""What each node of an autograd graph will ask for at once: the demand that no plan can lower.

It knows autograd's graph and how to reach what our hooks left in it; it does not know budgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

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


def _packed(node: Node) -> Iterator[object]:
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            saved: Any = getattr(node, name)
            each: list[Any] = list(saved) if isinstance(saved, list | tuple) else [saved]  # pyright: ignore
            for one in each:
                if (packed := getattr(one, "data", None)) is not None:
                    yield packed
