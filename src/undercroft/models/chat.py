"""Which part of a written-out conversation the assistant wrote: pure text, no tokens.

A chat template does not say so, unless its author marked it. But most templates only append: what is written
for the first messages is the beginning of what is written for all. Then an answer lies between "all before
it, and ask for an answer" and "all up to it". Where that does not hold, nothing is claimed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

Message = dict[str, str]
"""A turn: "role" and "content"."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Render(Protocol):
    """Writes messages out; with `answer_next`, up to where the assistant's next words begin."""

    def __call__(self, messages: list[Message], *, answer_next: bool = False) -> str: ...  # noqa: D102


def marks_generation(template: object) -> bool:
    """Whether a template itself marks what the assistant wrote, with ``{% generation %}``."""
    return isinstance(template, str) and _GENERATION.search(template) is not None


def assistant_spans(messages: Sequence[Message], text: str, render: Render) -> list[tuple[int, int]] | None:
    """Where the assistant's words lie in `text`, which is all `messages` written out; with the ends of turns.

    Returns:
        Start and end of each answer, or None where the template does not only append.
    """
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(list(messages[:index]), answer_next=True) if index else ""
        through = render(list(messages[: index + 1]))
        if not (through.startswith(before) and text.startswith(through)):
            return None
        spans.append((len(before), len(through)))
    return spans
