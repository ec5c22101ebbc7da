"""Texts and conversations as token ids, with what a loss may count.

It knows tokenizers and chat templates; not files or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from undercroft.errors import InvalidInput
from undercroft.models.chat import Message, assistant_spans, marks_generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A conversation as the model sees it.

    Attributes:
        ids: its tokens.
        answers: for each token whether the assistant wrote it, or None where the chat template does not tell.
    """

    ids: list[int]
    answers: list[bool] | None


class Tokenizer:
    """A transformers tokenizer.

    Args:
        inner: the tokenizer.
        source: where it came from, for messages.
    """

    def __init__(self, inner: PreTrainedTokenizerBase, *, source: str) -> None:
        self.source = source
        self._inner: Any = inner

    @property
    def inner(self) -> PreTrainedTokenizerBase:
        """The tokenizer of transformers."""
        return self._inner

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self._inner)

    @property
    def beginning(self) -> list[int]:
        """What it puts before a text: the token for a beginning, or nothing."""
        start = self._inner.bos_token_id
        return [start] if start is not None and self._inner("")["input_ids"][:1] == [start] else []

    @property
    def end(self) -> list[int]:
        """What separates texts: the token for an end, or nothing where there is none."""
        stop = self._inner.eos_token_id
        return [] if stop is None else [stop]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without any that mark beginning or end."""
        return self._inner(text, add_special_tokens=False, verbose=False)["input_ids"]

    def converse(self, messages: list[Message]) -> Conversation:
        """The tokens of a conversation, through the model's chat template.

        Raises:
            InvalidInput: there is no template, or it refuses these messages.
        """
        if not self._inner.chat_template:
            raise InvalidInput(
                f'the tokenizer of {self.source} has no chat template, so "messages" cannot be written out; '
                'use a chat model, or lines with "text"'
            )
        if marks_generation(self._inner.chat_template):
            return self._marked(messages)
        text = self._render(messages)
        spans = assistant_spans(messages, text, self._render)
        if spans is None or not self._inner.is_fast:
            return Conversation(ids=self.encode(text), answers=None)
        found = self._inner(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        answers = [any(a < end and b > start for start, end in spans) for a, b in found["offset_mapping"]]
        return Conversation(ids=found["input_ids"], answers=answers)

    def ask(self, messages: list[Message]) -> list[int]:
        """The tokens of a conversation up to where the assistant's next words begin.

        Raises:
            InvalidInput: see `converse`.
        """
        if not self._inner.chat_template:
            raise InvalidInput(
                f"the tokenizer of {self.source} has no chat template; leave --chat out to go on from a text"
            )
        return self.encode(self._render(messages, answer_next=True))

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files."""
        self._inner.save_pretrained(directory)

    def _render(self, messages: list[Message], *, answer_next: bool = False) -> str:
        try:
            return self._inner.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer_next
            )
        except jinja2.TemplateError as error:
            raise InvalidInput(
                f"the chat template of {self.source} refuses these messages: {error}"
            ) from error

    def _marked(self, messages: list[Message]) -> Conversation:
        try:
            found = self._inner.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except jinja2.TemplateError as error:
            raise InvalidInput(
                f"the chat template of {self.source} refuses these messages: {error}"
            ) from error
        return Conversation(ids=found["input_ids"], answers=[bool(mark) for mark in found["assistant_masks"]])
