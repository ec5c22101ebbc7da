"""Reading token by token: what a whole forward would expect, and how far two readings are apart."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from undercroft.errors import InvalidInput
from undercroft.moe.reading import Reading, compare, read, windows_of

WINDOWS = [[1, 5, 2, 9], [3, 3, 7]]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).eval()


def test_it_expects_what_a_whole_forward_expects(model: Any) -> None:
    told: list[tuple[int, int]] = []
    reading = read(model, WINDOWS, lambda done, total: told.append((done, total)))
    with torch.no_grad():
        whole = [model(input_ids=torch.tensor([window])).logits[0, :-1].log_softmax(-1) for window in WINDOWS]
    torch.testing.assert_close(reading.expected, torch.cat(whole))
    assert reading.came.tolist() == [5, 2, 9, 3, 7]
    assert told == [(n, 7) for n in range(1, 8)]
    assert reading.forwards == 7
    loss = torch.nn.functional.nll_loss(torch.cat(whole), reading.came)
    assert reading.perplexity == pytest.approx(float(loss.exp()), rel=1e-5)


def test_a_reading_is_the_same_as_itself(model: Any) -> None:
    found = compare(read(model, WINDOWS), read(model, WINDOWS))
    assert found.same
    assert (found.perplexity_change, found.top_agreement, found.divergence) == (0, 1, 0)


def of(*probabilities: list[float]) -> Reading:
    came = torch.zeros(len(probabilities), dtype=torch.int64)
    return Reading(
        expected=torch.tensor(probabilities).log(), came=came, forwards=len(probabilities), seconds=1.0
    )


def test_distances_are_those_of_the_textbook() -> None:
    found = compare(of([0.25, 0.75], [0.5, 0.5]), of([0.5, 0.5], [0.5, 0.5]))
    assert found.perplexity_change == pytest.approx(2**0.5 - 1)
    assert found.divergence == pytest.approx(torch.tensor(4 / 3).log().item() / 4)
    assert found.top_agreement == 0.5
    assert not found.same


def test_other_texts_are_not_compared() -> None:
    with pytest.raises(InvalidInput, match="the same text"):
        compare(of([0.5, 0.5]), of([0.5, 0.5], [0.5, 0.5]))


def test_nothing_to_foresee_is_refused(model: Any) -> None:
    for windows in ([], [[1]], [[1, 2], [3]]):
        with pytest.raises(InvalidInput, match="two tokens"):
            read(model, windows)


def test_windows_are_cut_from_documents_with_their_ends() -> None:
    assert windows_of([[1, 2], [3, 4, 5]], [0], length=3, count=2) == [[0, 1, 2], [0, 3, 4]]
    with pytest.raises(InvalidInput, match="a text of 7"):
        windows_of([[1, 2], [3, 4, 5]], [0], length=3, count=3)
