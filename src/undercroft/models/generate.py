"""Writes text with a causal model, piece by piece.

It knows transformers' generation; not where weights are, nor who reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from undercroft.models.tokenizer import Tokenizer


@dataclass(slots=True)
class Writing:
    """How far a text is.

    Attributes:
        prompt: tokens of the prompt.
        tokens: written so far.
        prefill_seconds: until the first of them.
        decode_seconds: since then.
    """

    prompt: int
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    _began: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, the first token aside; 0 before the second."""
        return (self.tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    def advance(self) -> None:
        """One more token was written."""
        now = time.perf_counter() - self._began
        if self.tokens == 0:
            self.prefill_seconds = now
        self.tokens += 1
        self.decode_seconds = now - self.prefill_seconds


def generate_text(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    ids: list[int],
    *,
    most_tokens: int = 256,
    temperature: float = 0.0,
    say: Callable[[str, Writing], None],
) -> Writing:
    """Go on from a prompt, until the model ends or `most_tokens` are written.

    Args:
        model: that writes.
        tokenizer: its.
        ids: the prompt.
        most_tokens: to write.
        temperature: of sampling; 0 takes the likeliest token always.
        say: told each piece of text as soon as it can be read, and each token with an empty text.
    """
    writing = Writing(prompt=len(ids))
    writer: Any = model
    prompt = torch.tensor([ids], device=writer.get_input_embeddings().weight.device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    with torch.no_grad():
        writer.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=most_tokens,
            streamer=_Streamer(tokenizer, writing, say),
            pad_token_id=(tokenizer.end or [0])[0],
            **({"do_sample": False} | sampling),
        )
    return writing


class _Streamer(TextStreamer):
    """Passes text on as it becomes readable."""

    def __init__(self, tokenizer: Tokenizer, writing: Writing, say: Callable[[str, Writing], None]) -> None:
        super().__init__(tokenizer.inner, skip_prompt=True, skip_special_tokens=True)
        self._writing, self._say = writing, say
        self._is_prompt = True

    def put(self, value: Any) -> None:
        """A token, or at first the prompt."""
        if not self._is_prompt:
            self._writing.advance()
            self._say("", self._writing)
        self._is_prompt = False
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Text that no later token changes."""
        self._say(text, self._writing)
