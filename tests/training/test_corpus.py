"""Files as blocks of tokens: what becomes of text and conversations, and what a bad file is told."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from undercroft import InvalidInput
from undercroft.models.fresh import Shape, write_fresh_model
from undercroft.models.tokenizer import Tokenizer
from undercroft.training.corpus import IGNORED, read_corpus

CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}.{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte."""
    folder = tmp_path_factory.mktemp("model")
    write_fresh_model(folder, Shape(layers=1, width=32, heads=2, vocabulary=257, longest=32), [""])
    inner = AutoTokenizer.from_pretrained(folder)
    inner.chat_template = TEMPLATE
    return Tokenizer(inner, source="here")


def decode(tokenizer: Tokenizer, ids: torch.Tensor) -> str:
    return tokenizer._inner.decode(ids.flatten().tolist())


def lines(*objects: object) -> str:
    return "\n".join(json.dumps(each) for each in objects)


def test_text_is_one_document_with_an_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abcdef\nghi")
    corpus = read_corpus(file, tokenizer, length=4)
    assert decode(tokenizer, corpus.blocks) == "abcdef\ng"
    assert (corpus.documents, corpus.left_out, corpus.loss_counts) == (1, 3, "every token")


def test_each_json_line_is_a_document_and_blank_lines_are_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines({"text": "ab"}, {"text": "cdé"}).replace("\n", "\n\n") + "\n")
    corpus = read_corpus(file, tokenizer, length=8)
    assert decode(tokenizer, corpus.blocks) == "ab<end>cdé<end>"
    assert corpus.documents == 2


def test_labels_are_the_tokens_that_come_next(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abcdefg")
    ids, labels = read_corpus(file, tokenizer, length=4).batch([1, 0])
    assert decode(tokenizer, ids) == "efg<end>abcd"
    assert torch.equal(labels[:, :-1], ids[:, 1:])
    assert (labels[:, -1] == IGNORED).all()


def test_of_a_conversation_only_answers_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines({"messages": CHAT}))
    corpus = read_corpus(file, tokenizer, length=8)
    ids, labels = corpus.batch([0])
    assert decode(tokenizer, ids) == "uab.acd."
    assert decode(tokenizer, labels[labels != IGNORED]) == "cd."
    assert corpus.loss_counts == "what the assistant wrote"


def test_text_beside_conversations_is_counted_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines({"messages": CHAT}, {"text": "efghijk"}))
    _, labels = read_corpus(file, tokenizer, length=8).batch([1])
    assert decode(tokenizer, labels[labels != IGNORED]) == "fghijk<end>"


def test_what_cannot_be_told_apart_is_counted_and_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines({"messages": CHAT}))
    tokenizer._inner.chat_template = "{{ messages | length }}" + TEMPLATE
    try:
        corpus = read_corpus(file, tokenizer, length=4)
    finally:
        tokenizer._inner.chat_template = TEMPLATE
    assert corpus.counted is None
    assert corpus.loss_counts.startswith("every token; all of 1 conversations")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n ", "is empty"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.txt", b"ab", "has 3 tokens, less than one block of 8; use a sequence length of 3 at most"),
        ("a.txt", b"one\ntwo\0three", "line 2: a zero byte"),
        ("a.txt", b"one\ntwo\nthr\xe9e and more\n", "line 3: not UTF-8"),
        ("a.txt", b"one\ntw\xc3", "line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b"[1, 2]", "line 1: not an object"),
        ("a.json", b'[\n{"text": "a"}\n]', "line 1: not JSON"),
        ("a.jsonl", b'{"texts": "a"}', 'line 1: an object needs "text"'),
        ("a.jsonl", b'{"text": 3}', 'line 1: an object needs "text"'),
        ("a.jsonl", b'\n{"messages": []}', 'line 2: "messages" must be a list'),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', 'line 1: "messages" must be a list'),
        ("a.jsonl", b'{"messages": ["hi"]}', 'line 1: "messages" must be a list'),
        ("a.jsonl", lines({"messages": CHAT[:1] * 4}).encode(), "no answer of an assistant"),
    ],
)
def test_a_bad_file_is_told_what_is_wrong_and_where(
    name: str, content: bytes, told: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput) as caught:
        read_corpus(tmp_path / name, tokenizer, length=8)
    assert told in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_file_and_a_folder_are_told_apart(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="No such file"):
        read_corpus(tmp_path / "missing", tokenizer, length=8)
    with pytest.raises(InvalidInput, match="is a folder"):
        read_corpus(tmp_path, tokenizer, length=8)


def test_a_byte_order_mark_is_no_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert decode(tokenizer, read_corpus(tmp_path / "a.txt", tokenizer, length=4).blocks) == "abc<end>"


def test_a_file_in_many_pieces_is_read_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "é" * 600_000 + "\n" + "line\n" * 100_000  # one line longer than a piece, and many shorter ones
    (tmp_path / "a.txt").write_text(text)
    corpus = read_corpus(tmp_path / "a.txt", tokenizer, length=len(text.encode()) + 1)
    assert decode(tokenizer, corpus.blocks) == text + "<end>"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1),
    length=st.integers(2, 9),
)
def test_blocks_hold_every_token_but_those_left_out(
    texts: list[str], length: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines(*({"text": text} for text in texts)))
    expected = [token for text in texts for token in [*tokenizer.encode(text), *tokenizer.end]]
    if len(expected) < length:
        return
    corpus = read_corpus(file, tokenizer, length=length)
    whole = len(expected) // length * length
    assert corpus.blocks.flatten().tolist() == expected[:whole]
    assert corpus.left_out == len(expected) - whole


def test_the_fingerprint_knows_tokens_shape_and_what_counts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("uab.acd.")
    (tmp_path / "b.txt").write_text("uab.acd,")
    (tmp_path / "c.jsonl").write_text(lines({"messages": CHAT}))
    seen = {
        read_corpus(tmp_path / name, tokenizer, length=length).fingerprint
        for name, length in (("a.txt", 8), ("a.txt", 4), ("b.txt", 8), ("c.jsonl", 8))
    }
    assert len(seen) == 4
    again = read_corpus(tmp_path / "a.txt", tokenizer, length=8).fingerprint
    assert again in seen
