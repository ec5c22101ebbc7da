"""Held-out texts: there is enough of each, and exercises are from the held-out side."""

from itertools import islice
from random import Random

from transformers import AutoTokenizer

from undercroft.bundled import model_folder
from undercroft.bundled.skills import exercises
from undercroft.bundled.texts import held_out


def test_there_is_text_for_some_windows_of_each_domain() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder("moe"), local_files_only=True)
    for documents in held_out().values():
        assert (
            sum(len(tokenizer(text, truncation=False, verbose=False)["input_ids"]) for text in documents)
            > 8 * 512
        )


def test_no_exercise_is_one_of_training() -> None:
    trained = {each.question for each in islice(exercises("train", Random(3)), 20_000)}
    asked = {text.partition("\n")[0].removeprefix("Question: ") for text in held_out()["exercises"]}
    assert len(asked) > 100
    assert not trained & asked
    assert held_out() == held_out()
