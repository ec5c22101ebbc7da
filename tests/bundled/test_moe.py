"""The bundled Mixture-of-Experts model: it opens offline, is small, answers, and its card tells what was measured."""

import json
import runpy
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from undercroft.bundled import model_folder, model_names
from undercroft.bundled.skills import SKILLS, examination, exercises
from undercroft.errors import InvalidInput

FOLDER = model_folder("moe")
LAB = Path(__file__).parents[2] / "lab"
RESULTS = LAB.parent / "benchmarks" / "results"
LARGEST = 20_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    opened = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32)
    return opened.eval()


@pytest.fixture(scope="module")
def evaluation() -> dict[str, Any]:
    return json.loads((FOLDER / "evaluation.json").read_text())


def test_it_is_found_by_name() -> None:
    assert "moe" in model_names()
    with pytest.raises(InvalidInput, match="there is moe"):
        model_folder("../moe")


def test_the_folder_is_small_and_holds_nothing_unforeseen() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) <= LARGEST
    assert set(files) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "evaluation.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }


def test_experts_fit_groups_of_64(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape[-1] % 64 == 0
    assert experts.down_proj.shape[-1] % 64 == 0


def answers(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    talks = [[{"role": "user", "content": question}] for question in questions]
    asked = tokenizer.apply_chat_template(
        talks, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**asked, max_new_tokens=72, do_sample=False)
    return tokenizer.batch_decode(written[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_solves_about_as_many_exercises_as_was_measured(
    model: Any, tokenizer: Any, evaluation: dict[str, Any]
) -> None:
    paper = examination(4)
    written = answers(model, tokenizer, [each.question for each in paper])
    solved = 100 * sum(each.solved_by(text) for each, text in zip(paper, written, strict=True)) / len(paper)
    assert solved == pytest.approx(evaluation["experts"]["bfloat16"]["exact_match"], abs=25)


def test_it_writes_on(model: Any, tokenizer: Any) -> None:
    begun = tokenizer("And the LORD said unto", return_tensors="pt")
    written = model.generate(**begun, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(written[0]).startswith("And the LORD said unto")
    assert written.shape[1] > begun["input_ids"].shape[1]


@torch.no_grad()
def test_experts_matter(model: Any, tokenizer: Any) -> None:
    lines = [
        f"Question: {e.question}\nAnswer: {e.solution}" for e in islice(exercises("test", Random(5)), 20)
    ]
    tokens = tokenizer("\n".join(lines), return_tensors="pt", truncation=True, max_length=512)["input_ids"]
    with_experts = model(input_ids=tokens, labels=tokens).loss
    downs = [layer.mlp.experts.down_proj for layer in model.model.layers]
    before = [down.clone() for down in downs]
    for down in downs:
        down.zero_()
    without = model(input_ids=tokens, labels=tokens).loss
    for down, weights in zip(downs, before, strict=True):
        down.copy_(weights)
    assert without > with_experts + 1


def test_every_expert_is_used(evaluation: dict[str, Any], model: Any) -> None:
    assert len(evaluation["routing"]) == model.config.num_hidden_layers
    even = 1 / model.config.num_experts
    for layer in evaluation["routing"]:
        assert layer["least"] > 0
        assert layer["largest"] < 4 * even
        assert layer["entropy"] > 0.9


def test_it_has_learnt_more_than_counting_finds(evaluation: dict[str, Any]) -> None:
    found = evaluation["experts"]["bfloat16"]
    assert found["loss"] < evaluation["baselines"]["trigram"]
    assert found["exact_match"] > 50


def test_the_evaluation_is_of_this_model(evaluation: dict[str, Any], model: Any) -> None:
    assert evaluation["nbytes"] == (FOLDER / "model.safetensors").stat().st_size
    assert evaluation["parameters"] == sum(p.numel() for p in model.parameters())
    assert set(evaluation["experts"]["bfloat16"]["exact_match_by_skill"]) == set(SKILLS)


@pytest.mark.skipif(not LAB.exists(), reason="the card's writer is in the repository only")
def test_the_card_says_what_the_files_say() -> None:
    card_of = runpy.run_path(str(LAB / "moe_card.py"))["card_of"]
    assert (FOLDER / "README.md").read_text() == card_of(FOLDER, RESULTS / "quality.json")
