"""A small Mixture of Experts on disk, and what stock transformers computes with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.moe.families import fill
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from undercroft import arithmetic
from undercroft.moe.governor import Limits

arithmetic.settle()

SMALL = {
    **{"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 256, "num_experts_per_tok": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
}
ALWAYS = Limits(
    **{"window": 1, "least_precise": 0.0, "least_useful": 0.0, "least_gain": -1e9},
    **{"least_waiting": 0.0, "most_waiting": 1.0},
)
"""Predict as soon as anything was read, however the machine is feeling."""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def qwen(seed: int, **changes: Any) -> Any:
    sizes = {**SMALL, "head_dim": 16, "num_experts": 16, "moe_intermediate_size": 32, **changes}
    config = Qwen3MoeConfig(**sizes, mlp_only_layers=[])
    model = Qwen3MoeForCausalLM(config)
    fill(model, seed)
    return model


def mixtral(seed: int) -> Any:
    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=16, intermediate_size=32))
    fill(model, seed)
    return model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """``checkpoint(seed=0, make=qwen)``: a folder that holds a model."""

    def write(seed: int = 0, make: Callable[[int], Any] = qwen, **options: Any) -> Path:
        folder = tmp_path / f"{make.__name__}-{seed}"
        make(seed).save_pretrained(folder, **options)
        return folder

    return write


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    opener: Any = transformers.AutoModelForCausalLM
    return opener.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


def prompt(rows: int = 1, length: int = 12, seed: int = 5) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))
