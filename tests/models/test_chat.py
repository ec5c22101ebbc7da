"""Which words of a conversation the assistant wrote."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from undercroft import InvalidInput
from undercroft.models.chat import Message, assistant_spans, marks_generation
from undercroft.models.fresh import Shape, write_fresh_model
from undercroft.models.tokenizer import Tokenizer

CHAT: list[Message] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello there"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "see you"},
]
APPENDS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</>{% endgeneration %}{% else %}{{ m.content }}</>{% endif %}{% endfor %}"
)
COUNTS = (
    "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"  # no prefix of a longer chat
)
REFUSES = "{{ raise_exception('roles must alternate') }}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    shape = Shape(layers=1, width=32, heads=2, vocabulary=300, longest=32)
    write_fresh_model(folder, shape, [message["content"] for message in CHAT])
    return folder


def tokenizer(folder: Path, template: str | None) -> Tokenizer:
    inner = AutoTokenizer.from_pretrained(folder)
    inner.chat_template = template
    return Tokenizer(inner, source="here")


def answers(tokens: Tokenizer, folder: Path) -> str:
    told = tokens.converse(CHAT)
    assert told.answers is not None
    chosen = [token for token, answer in zip(told.ids, told.answers, strict=True) if answer]
    return AutoTokenizer.from_pretrained(folder).decode(chosen)


@pytest.mark.parametrize("template", [APPENDS, MARKS], ids=["appends", "marks"])
def test_only_the_assistants_words_are_answers(template: str, folder: Path) -> None:
    assert answers(tokenizer(folder, template), folder) == "hello there</>see you</>"


def test_a_template_that_does_not_only_append_claims_nothing(folder: Path) -> None:
    told = tokenizer(folder, COUNTS).converse(CHAT)
    assert told.answers is None
    assert AutoTokenizer.from_pretrained(folder).decode(told.ids) == "4hihello therebyesee you"


def test_without_a_template_or_with_one_that_refuses_the_user_is_told(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="no chat template"):
        tokenizer(folder, None).converse(CHAT)
    with pytest.raises(InvalidInput, match="roles must alternate"):
        tokenizer(folder, REFUSES).converse(CHAT)


def test_an_assistant_that_speaks_first_is_found() -> None:
    def render(messages: list[Message], *, answer_next: bool = False) -> str:
        return "".join(f"[{m['content']}]" for m in messages)

    assert assistant_spans(CHAT[1:2], "[hello there]", render) == [(0, 13)]


def test_marks_are_recognised_however_they_trim_blanks() -> None:
    assert marks_generation("{%- generation -%}")
    assert not marks_generation("generation")
    assert not marks_generation(None)
