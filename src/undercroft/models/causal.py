"""A causal language model as training needs it: logits, what is trained, an adapter, recomputation, saving.

It knows transformers and peft; not losses, data or budgets. Invariant: `trainable` names each trained tensor
once, under a name that is the same in every process that opens the model the same way.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from undercroft.errors import MissingExtra, UnsupportedModel


class CausalModel:
    """A transformers model, with or without an adapter.

    Args:
        module: the model.
        source: where it came from, for messages.
    """

    def __init__(self, module: PreTrainedModel, *, source: str) -> None:
        self.source = source
        self._module: Any = module

    @property
    def module(self) -> torch.nn.Module:
        """The model itself, of transformers or peft."""
        return self._module

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows; ids are smaller."""
        return int(self._module.get_input_embeddings().num_embeddings)

    @property
    def longest(self) -> int | None:
        """The most tokens of a sequence, or None where its configuration names no limit."""
        return getattr(self._module.config, "max_position_embeddings", None)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, length, vocabulary] of token ids [batch, length]."""
        return self._module(input_ids=ids, use_cache=False).logits

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def recompute_layers(self) -> None:
        """Checkpoint every layer: its activations are computed again in the backward pass.

        Raises:
            UnsupportedModel: the model does not offer it.
        """
        try:
            self._module.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise UnsupportedModel(f"{self.source} cannot recompute its layers: {error}") from error

    def add_adapter(self, *, rank: int, alpha: int) -> None:
        """Freeze the model and put a LoRA adapter beside every linear layer but the output.

        Raises:
            MissingExtra: peft is not installed.
        """
        require_adapters()
        import peft

        shape = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        with (
            warnings.catch_warnings()
        ):  # peft warns of what it settles itself: Conv1D's layout, names of transformers
            warnings.simplefilter("ignore")
            self._module = cast(Any, peft.get_peft_model(self._module, shape))

    def save(self, directory: Path) -> None:
        """Write the model, or only its adapter, as safetensors that `from_pretrained` opens."""
        extra = {"save_embedding_layers": False} if hasattr(self._module, "peft_config") else {}
        self._module.save_pretrained(directory, **extra)


def require_adapters() -> None:
    """Nothing, if adapters can be made.

    Raises:
        MissingExtra: peft is not installed.
    """
    if find_spec("peft") is None:
        raise MissingExtra("lora", "training an adapter")
