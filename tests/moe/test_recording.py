"""Recording: the trace is of what the model did, and of nothing else."""

from pathlib import Path

import pytest
import torch
from tests.moe.conftest import qwen, stock
from transformers import PreTrainedTokenizerFast

from undercroft.errors import InvalidInput
from undercroft.models.fresh import Shape, write_fresh_model
from undercroft.moe.recording import read_prompts, record_trace
from undercroft.moe.simulate import simulate
from undercroft.moe.trace import Trace

PROMPTS = ("the cat", "the mat sat on")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixture of Experts with a tokenizer."""
    folder = tmp_path_factory.mktemp("given")
    dense = Shape(layers=1, width=32, heads=2, vocabulary=300, longest=64)
    write_fresh_model(folder / "dense", dense, ["the cat sat on the mat"])
    qwen(0, vocab_size=320, eos_token_id=None).save_pretrained(folder / "experts")
    PreTrainedTokenizerFast.from_pretrained(folder / "dense").save_pretrained(folder / "experts")
    return folder / "experts"


def test_the_trace_is_what_stock_routers_choose_along_the_same_text(model: Path, tmp_path: Path) -> None:
    told: list[int] = []
    path = tmp_path / "trace.csv"
    found = record_trace(model, path, prompts=PROMPTS, tokens=5, budget="128KiB", on_prompt=told.append)
    trace = Trace.read(path)
    assert (
        (found.layers, found.experts, found.used) == (trace.layers, trace.experts, trace.used) == (3, 16, 4)
    )
    assert (found.prompts, found.tokens, told) == (2, 10, [1, 2])
    tokenizer, whole = PreTrainedTokenizerFast.from_pretrained(model), stock(model)
    for turn, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        text = whole.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            routers = whole(text[:, :-1], output_router_logits=True).router_logits
        for layer, logits in enumerate(routers):
            mine = torch.from_numpy(trace.expert[(trace.turn == turn) & (trace.layer == layer)].copy())
            assert torch.equal(mine.long().sort().values, logits.topk(4).indices.sort().values)
    assert found.prompt_tokens + found.tokens - len(PROMPTS) == len(trace.layer) / 3
    assert simulate(trace, budget="25%").decode_tokens == 8


@pytest.mark.parametrize(
    ("prompts", "tokens", "name", "words"),
    [
        ((), 5, "trace.csv", "a prompt and a token"),
        (PROMPTS, 0, "trace.csv", "a prompt and a token"),
        (PROMPTS, 5, ".", "cannot be written"),
        (PROMPTS, 5, "none/trace.csv", "cannot be written"),
        (("",), 5, "trace.csv", "a prompt is empty"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_the_model_is_read(
    model: Path, tmp_path: Path, prompts: tuple[str, ...], tokens: int, name: str, words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        record_trace(model, tmp_path / name, prompts=prompts, tokens=tokens)
    assert not list(tmp_path.iterdir())


def test_prompts_are_the_lines_of_a_file_that_are_not_empty(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two\n")
    assert read_prompts(path) == ["one", "  two"]
    for content, words in ((b"\n \n", "no prompts"), (b"\xff\xfe", "no UTF-8")):
        path.write_bytes(content)
        with pytest.raises(InvalidInput, match=words):
            read_prompts(path)
    with pytest.raises(InvalidInput, match="No such file"):
        read_prompts(tmp_path / "none.txt")
