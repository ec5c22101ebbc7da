"""Whether a family's function does what one that is known does, whatever the two are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def alike(function: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions do the same, instruction by instruction; their words may differ."""
    codes = [each.__code__ for each in (function, other)]
    one, two = ((code.co_code, code.co_names, _numbers(code.co_consts)) for code in codes)
    return one == two


def _numbers(constants: tuple[Any, ...]) -> list[Any]:
    return [each for each in constants if not isinstance(each, str)]
