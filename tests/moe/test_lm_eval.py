"""EleutherAI's evaluation harness asks a streamed model as it asks any other."""

from typing import Any

import pytest
import torch
from tests.moe.conftest import stock
from transformers import AutoTokenizer

from undercroft.bundled import model_folder
from undercroft.moe.load import load_moe

FOLDER = model_folder("moe")


def answers(harness: Any, ask: Any, model: Any) -> tuple[Any, Any]:
    tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER)
    asked = harness.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    pairs = [("The", " cat sat on the mat"), ("Once upon a", " time"), ("I was", " there")]
    likely = [ask.Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    options = {"max_gen_toks": 12, "do_sample": False, "until": []}
    text = [ask.Instance("generate_until", {}, ("Once upon", options), 0)]
    return asked.loglikelihood(likely), asked.generate_until(text)


@pytest.mark.filterwarnings("ignore")  # of the harness's own code
def test_it_gets_the_same_answers() -> None:
    harness = pytest.importorskip("lm_eval.models.huggingface")
    ask = pytest.importorskip("lm_eval.api.instance")
    wanted = answers(harness, ask, stock(FOLDER, torch.bfloat16))
    assert answers(harness, ask, load_moe(FOLDER, budget="1MiB")) == wanted
