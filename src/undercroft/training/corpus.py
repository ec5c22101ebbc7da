"""A file of text or conversations as blocks of tokens, all of one length.

Two kinds of file: plain text, which is one document; and JSON lines (``.jsonl``), where each line is a
document: an object with "text", or with "messages" (a list of objects with "role" and "content"). Documents
follow one another, separated by the tokenizer's end token, and are cut into blocks; tokens that fill no
block are left out and counted.

It knows files and tokens, no models. A file is read piece by piece, so that memory holds its tokens (4 bytes
each) and never its text. Invariant: the same file and tokenizer give the same blocks, and `fingerprint`
names them.
"""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from undercroft.errors import InvalidInput
from undercroft.models.tokenizer import Tokenizer
from undercroft.training.fingerprint import fingerprint

_PIECE = 1 << 18
_JSON_LINES = (".jsonl", ".ndjson", ".json")
IGNORED = -100
"""The label that a loss passes over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Blocks of tokens.

    Attributes:
        blocks: token ids [number of blocks, length], int32.
        counted: which of them the loss counts, of the same shape; None for all.
        documents: how many documents the file holds.
        left_out: tokens after the last whole block.
        unmarked: conversations whose chat template does not tell what the assistant wrote; all of theirs
            counts.
    """

    blocks: torch.Tensor
    counted: torch.Tensor | None
    documents: int
    left_out: int
    unmarked: int

    def batch(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels [len(indices), length], int64: a label is the next token, or `IGNORED`."""
        ids = self.blocks[indices].long()
        labels = torch.full_like(ids, IGNORED)
        labels[:, :-1] = ids[:, 1:]
        if self.counted is not None:
            labels[:, :-1][~self.counted[indices][:, 1:]] = IGNORED
        return ids, labels

    @property
    def fingerprint(self) -> str:
        """A hash of the blocks and of what counts."""
        return fingerprint([self.blocks] if self.counted is None else [self.blocks, self.counted])

    @property
    def loss_counts(self) -> str:
        """In words, which tokens the loss counts."""
        said = "every token" if self.counted is None else "what the assistant wrote"
        if self.unmarked:
            said += (
                f"; all of {self.unmarked} conversations, whose chat template does not tell who wrote what"
            )
        return said


def read_corpus(path: Path, tokenizer: Tokenizer, *, length: int) -> Corpus:
    """Read a file into blocks of `length` tokens.

    Raises:
        InvalidInput: the file is missing, empty, not text, malformed (the text names the line), or too short.
    """
    pile = _Pile()
    add = _add_json_lines if path.suffix.lower() in _JSON_LINES else _add_text
    try:
        add(path, tokenizer, pile)
    except IsADirectoryError as error:
        raise InvalidInput(f"{path} is a folder; name one file of text or JSON lines") from error
    except OSError as error:
        raise InvalidInput(
            f"cannot read {path}: {error.strerror}; name a file of text or JSON lines"
        ) from error
    if not pile.documents:
        raise InvalidInput(f"{path} is empty; there is nothing to learn from it")
    return pile.cut(path, length)


class _Pile:
    """Tokens of all documents so far."""

    def __init__(self) -> None:
        self.documents = 0
        self.unmarked = 0
        self._ids = array("i")
        self._counted = bytearray()
        self._has_answers = False

    def add(self, ids: list[int], answers: list[bool] | None = None) -> None:
        self._ids.extend(ids)
        self._counted.extend(b"\1" * len(ids) if answers is None else bytes(answers))
        self._has_answers |= answers is not None

    def cut(self, path: Path, length: int) -> Corpus:
        number, left_out = divmod(len(self._ids), length)
        if number == 0:
            raise InvalidInput(
                f"{path} has {len(self._ids)} tokens, less than one block of {length}; "
                f"use a sequence length of {len(self._ids)} at most, or more text"
            )
        shape, whole = (number, length), number * length
        counted = torch.frombuffer(self._counted, dtype=torch.bool)[:whole].view(shape)
        if not counted[:, 1:].any():
            raise InvalidInput(f"{path} holds no answer of an assistant to learn from")
        return Corpus(
            blocks=torch.frombuffer(self._ids, dtype=torch.int32)[:whole].view(shape),
            counted=counted if self._has_answers else None,
            documents=self.documents,
            left_out=left_out,
            unmarked=self.unmarked,
        )


def _add_text(path: Path, tokenizer: Tokenizer, pile: _Pile) -> None:
    for piece in _pieces(path):
        if not pile.documents:
            pile.add(tokenizer.beginning)
            pile.documents = 1
        pile.add(tokenizer.encode(piece))
    if pile.documents:
        pile.add(tokenizer.end)


def _pieces(path: Path) -> Iterator[str]:
    """The text in pieces of about `_PIECE` characters, cut at ends of lines; no piece if all is blank."""
    held: list[str] = []
    size, seen = 0, False
    for line in _lines(path, _PIECE):
        held.append(line)
        size += len(line)
        seen = seen or not line.isspace()
        if size >= _PIECE and seen:
            yield "".join(held)
            held, size = [], 0
    if held and seen:
        yield "".join(held)


def _lines(path: Path, longest: int) -> Iterator[str]:
    """The lines of a text file, those longer than `longest` bytes in parts.

    Raises:
        InvalidInput: it is not UTF-8 text; the number of the line is given.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number = 1
    with path.open("rb") as file:
        while raw := file.readline(longest):
            if b"\0" in raw:
                raise InvalidInput(f"{path}, line {number}: a zero byte; this is no text file")
            yield _decode(decoder.decode, raw, f"{path}, line {number}")
            number += raw.endswith(b"\n")
        _decode(lambda rest: decoder.decode(rest, True), b"", f"{path}, line {number}")


def _decode(decode: Callable[[bytes], str], raw: bytes, where: str) -> str:
    try:
        return decode(raw)
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{where}: not UTF-8 text ({error.reason}); convert it, for example with iconv -t UTF-8"
        ) from error


def _add_json_lines(path: Path, tokenizer: Tokenizer, pile: _Pile) -> None:
    for number, line in enumerate(_lines(path, -1), start=1):
        if line.strip():
            _add_document(_parse(line, f"{path}, line {number}"), tokenizer, pile, f"{path}, line {number}")


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise InvalidInput(f"{where}: not JSON ({error}); write one object a line") from error
    if not isinstance(document, dict):
        raise InvalidInput(f'{where}: not an object; write {{"text": …}} or {{"messages": …}} on each line')
    return cast(dict[str, Any], document)


def _add_document(document: dict[str, Any], tokenizer: Tokenizer, pile: _Pile, where: str) -> None:
    if isinstance(document.get("text"), str):
        pile.add([*tokenizer.beginning, *tokenizer.encode(document["text"]), *tokenizer.end])
    elif "messages" in document:
        try:
            told = tokenizer.converse(_messages(document["messages"], where))
        except InvalidInput as error:
            raise error if str(error).startswith(where) else InvalidInput(f"{where}: {error}") from error
        pile.add(told.ids, told.answers)
        pile.unmarked += told.answers is None
    else:
        raise InvalidInput(f'{where}: an object needs "text" (a string) or "messages" (a list)')
    pile.documents += 1


def _messages(given: object, where: str) -> list[dict[str, str]]:
    turns = cast(list[object], given) if isinstance(given, list) else []
    if not turns or not all(_is_message(turn) for turn in turns):
        raise InvalidInput(
            f'{where}: "messages" must be a list of objects with "role" and "content", both strings'
        )
    return cast(list[dict[str, str]], turns)


def _is_message(turn: object) -> bool:
    if not isinstance(turn, dict):
        return False
    fields = cast(dict[object, object], turn)
    return isinstance(fields.get("role"), str) and isinstance(fields.get("content"), str)
