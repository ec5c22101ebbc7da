"""Whether modules are still what they were when a way around them was found.

Who goes around a module's call passes over its hooks, and over whatever was put in its place since. It knows modules;
not what goes around them. Invariant: while `holds`, calling each part is calling its class's forward with the weights
and numbers that it had, and nothing else. What makes asking slow is memory that no cache has, so little is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook  # pyright: ignore
from torch.utils.hooks import RemovableHandle

_FORWARD = "forward"


class Kept:
    """Some modules, their places, and their weights.

    Args:
        places: each a parent and the name of a child.
        hooked: of the children, those whose hooks on what they are given are called all the same.
        numbers: plain attributes, each a module and a name.
    """

    def __init__(
        self,
        places: Sequence[tuple[nn.Module, str]],
        hooked: Iterable[nn.Module] = (),
        numbers: Iterable[tuple[nn.Module, str]] = (),
    ) -> None:
        # Dictionaries and not attributes: each attribute of a module takes as long as a small product.
        found: list[Any] = [parent.get_submodule(name) for parent, name in places]
        parents: list[Any] = [parent for parent, _ in places]
        names = [name for _, name in places]
        self._there: list[tuple[Mapping[str, Any], str, object]] = [
            *(
                (parent._modules, name, child)
                for parent, name, child in zip(parents, names, found, strict=True)
            ),
            *(
                (each._parameters, name, weight)
                for each in found
                for name, weight in each._parameters.items()
            ),
            *((module.__dict__, name, module.__dict__[name]) for module, name in numbers),
        ]
        passed = set(hooked)
        self._hooks: list[Mapping[int, Any]] = [
            *(each._forward_pre_hooks for each in found if each not in passed),
            *(each._forward_hooks for each in found),
        ]
        self._own: list[Mapping[str, Any]] = [each.__dict__ for each in found]
        self._handles = -1

    @property
    def holds(self) -> bool:
        """Whether all are there still, unhooked, and nobody listens to all modules."""
        return (
            not _has_any_global_hook()
            and self._has_no_hook
            and not any(_FORWARD in own for own in self._own)
            and all(there.get(name) is each for there, name, each in self._there)
        )

    @property
    def _has_no_hook(self) -> bool:
        handles = RemovableHandle.next_id
        if handles != self._handles:  # since then, somebody hooked something somewhere
            if any(self._hooks):
                return False
            self._handles = handles
        return True
