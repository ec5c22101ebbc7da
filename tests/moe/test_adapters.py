"""An adapter beside streamed experts: of what is resident it works, bit for bit; training it is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model  # pyright: ignore
from tests.moe.conftest import prompt, stock

from undercroft.errors import UnsupportedModel
from undercroft.moe.load import load_moe

PEFT_IS_OLDER = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
pytestmark = pytest.mark.filterwarnings(PEFT_IS_OLDER)


def adapted(model: Any, **targets: list[str]) -> Any:
    torch.manual_seed(0)
    wanted = LoraConfig(r=4, init_lora_weights=False, **targets or {"target_modules": ["q_proj", "v_proj"]})
    return get_peft_model(model, wanted)


def test_an_adapter_of_the_attention_changes_what_it_would_change(checkpoint: Callable[..., Path]) -> None:
    folder, ids = checkpoint(), prompt(rows=2)
    with torch.no_grad():
        plain, wanted = stock(folder)(ids).logits, adapted(stock(folder))(ids).logits
        found = adapted(load_moe(folder, budget="300KiB"))(ids).logits
    assert torch.equal(found, wanted)
    assert not torch.equal(found, plain)


def test_its_training_is_refused_with_what_to_do(checkpoint: Callable[..., Path]) -> None:
    model, ids = adapted(load_moe(checkpoint(), budget="300KiB")), prompt()
    with pytest.raises(UnsupportedModel, match="undercroft train"):
        model(ids, labels=ids)


def test_an_adapter_of_the_experts_is_refused_with_what_to_do(checkpoint: Callable[..., Path]) -> None:
    model = adapted(load_moe(checkpoint(), budget="300KiB"), target_parameters=["experts.down_proj"])
    with torch.no_grad(), pytest.raises(UnsupportedModel, match="merge the adapter"):
        model(prompt())
