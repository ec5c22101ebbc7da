"""Every family that transformers' registry of experts serves gives the same bits streamed as stock eager gives."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.moe.families import Family, decorated, fill, tiny_config
from transformers import PreTrainedModel

from undercroft.errors import BudgetExceeded
from undercroft.moe.load import load_moe

FAMILIES = [pytest.param(each, id=each[0].model_type) for each in decorated()]
# Of these the text part is a family of its own here; the causal class of three cannot be built of the whole
# configuration at all, which lacks attributes of a text model, and that of gemma4 brings its vision tower.
COMPOSITE = {"dots3_note", "gemma4", "qwen3_5_moe", "qwen4_exp"}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the families' own code


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def stock(family: Family, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    model: Any = family[1]
    return model.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


def outputs(model: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        logits = model(input_ids=prompt).logits
    tokens = model.generate(prompt[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
    return logits, tokens


def streamed(folder: Path, dtype: torch.dtype, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """With a budget of few experts, and what the error says where keys and values need more."""
    try:
        return outputs(load_moe(folder, "256KiB", dtype=dtype), prompt)
    except BudgetExceeded as error:
        return outputs(load_moe(folder, (error.least or 0) + 512 * 1024, dtype=dtype), prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_streams_bit_for_bit(family: Family, tmp_path: Path) -> None:
    if family[0].model_type in COMPOSITE:
        pytest.skip(f"{family[0].__name__} wraps a text model, whose own configuration is tested")
    model = family[1](tiny_config(family[0]))
    fill(model, seed=0)
    model.save_pretrained(tmp_path)
    prompt = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = outputs(stock(family, tmp_path, dtype), prompt)
            found = streamed(tmp_path, dtype, prompt)
        for one, other in zip(wanted, found, strict=True):
            assert torch.equal(one, other)


def test_at_least_fifty_families_are_tried() -> None:
    assert len(FAMILIES) - len(COMPOSITE) >= 50
