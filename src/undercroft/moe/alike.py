"""Whether a family's function does what one that is known does, whatever the two are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def alike(function: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions do the same, instruction by instruction; their words may differ."""
    codes = [each.__code__ for each in (function, other)]
    one, two = ((code.co_code, code.co_names, _numbers(code.co_consts)) for code in codes)
    return one == two


def alike_throughout(function: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """The same of two decorated functions, of each decorator's and of what is decorated."""
    one, two = _layers(function), _layers(other)
    return len(one) == len(two) and all(map(alike, one, two))


def _layers(function: Callable[..., Any] | None) -> list[Callable[..., Any]]:
    found: list[Callable[..., Any]] = []
    while function is not None:
        found.append(function)
        function = getattr(function, "__wrapped__", None)
    return found


def _numbers(constants: tuple[Any, ...]) -> list[Any]:
    return [each for each in constants if not isinstance(each, str)]
