"""Gives a module that exists a class before its own, so that it stays what it was and does some things differently."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from torch import nn


def put_before(mixin: type, module: nn.Module) -> None:
    """Let a module look into `mixin` first; it keeps its own class's name and bases."""
    module.__class__ = _mixed(mixin, type(module))


def give_ways(
    modules: Iterable[nn.Module], mixin: type, attribute: str, way_of: Callable[[nn.Module], object | None]
) -> int:
    """Put `mixin` before those modules that have a way, which each keeps as an attribute; how many there are."""
    number = 0
    for module in modules:
        way = way_of(module)
        if way is not None:
            put_before(mixin, module)
            setattr(module, attribute, way)
            number += 1
    return number


@cache
def _mixed(mixin: type, own: type[nn.Module]) -> type[nn.Module]:
    return type(own.__name__, (mixin, own), {"__module__": own.__module__})
