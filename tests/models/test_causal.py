"""A causal model as training needs it: what is trained, adapters, recomputation, saving."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from undercroft.models.causal import CausalModel
from undercroft.models.fresh import Shape, write_fresh_model
from undercroft.models.load import open_causal_model

IDS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture
def model(tmp_path: Path) -> CausalModel:
    write_fresh_model(
        tmp_path, Shape(layers=2, width=32, heads=2, vocabulary=300, longest=32), ["a b c d e f"]
    )
    return open_causal_model(tmp_path)


def test_an_adapter_starts_as_nothing_and_is_all_that_is_trained(model: CausalModel) -> None:
    pytest.importorskip("peft")
    before, whole = model.logits(IDS), sum(weight.numel() for weight in model.trainable().values())
    model.add_adapter(rank=2, alpha=4)
    assert torch.equal(model.logits(IDS), before)
    assert all("lora" in name for name in model.trainable())
    assert 0 < sum(weight.numel() for weight in model.trainable().values()) < whole


def test_gpt2_takes_an_adapter_without_a_warning() -> None:
    pytest.importorskip("peft")
    config = GPT2Config(
        vocab_size=30, n_embd=16, n_layer=1, n_head=1, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = CausalModel(GPT2LMHeadModel(config), source="here")
    model.add_adapter(rank=2, alpha=4)
    assert model.trainable()


def test_an_adapter_is_saved_without_its_model(model: CausalModel, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model.add_adapter(rank=2, alpha=4)
    model.save(tmp_path / "adapter")
    names = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names


def test_a_saved_model_is_opened_by_transformers(model: CausalModel, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(input_ids=IDS).logits, model.logits(IDS))


def test_recomputation_saves_less_and_gives_the_same_gradients(model: CausalModel) -> None:
    def step() -> tuple[int, list[torch.Tensor]]:
        saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model.logits(IDS).sum()
        return saved, list(torch.autograd.grad(loss, list(model.trainable().values())))

    model.module.train()
    plain, gradients = step()
    model.recompute_layers()
    fewer, again = step()
    assert fewer < plain
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
