"""Opens a Mixture-of-Experts model whose experts are never resident.

It knows how the parts fit: checkpoint, recipes, cache, engine, model. Invariant: what it returns computes what
transformers' eager forward computes, with every weight from the checkpoint.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from undercroft.errors import UnsupportedModel
from undercroft.models.checkpoint import Checkpoint, StoredTensor
from undercroft.models.recipe import Recipe, leaves, shape_of
from undercroft.models.source import locate, read_config
from undercroft.models.tracing import Lazy, load, trace
from undercroft.moe.bank import Layer, Parameter
from undercroft.moe.engine import Engine
from undercroft.moe.indexed import IndexedExperts
from undercroft.moe.streamed import IMPLEMENTATION, attach, expert_count, own_forward
from undercroft.store.cache import RecordCache
from undercroft.store.ranges import BLOCK
from undercroft.store.slab import HUGE_PAGE, Slab
from undercroft.store.transfer import TransferQueue
from undercroft.units import parse_size


def load_moe(
    source: str | Path,
    budget: int | str = "2GiB",
    *,
    dtype: torch.dtype | None = None,
    readers: int = 4,
) -> PreTrainedModel:
    """A causal language model of transformers whose experts stay on disk but for `budget` bytes of them.

    Args:
        source: a folder that holds config.json and *.safetensors, or a name on the Hugging Face hub.
        budget: the most bytes of experts to hold in memory.
        dtype: of the model; what the checkpoint's configuration says if None.
        readers: threads that read.

    Raises:
        InvalidInput, UnsupportedModel, TransferFailed: see `locate` and `read_config`.
        UnsupportedModel: the model has no experts, or its family's code does not let them be streamed.
        CorruptRecord: a file contradicts itself.
        BudgetExceeded: the budget does not hold one expert.
    """
    folder = Path(locate(source))
    config = read_config(str(folder))
    kind = dtype or getattr(config, "dtype", None) or torch.float32
    checkpoint = Checkpoint(folder)
    layers = _layers(config, checkpoint, kind)
    model = _dense(config, checkpoint, layers, kind)
    engine, close = _engine(checkpoint, layers, parse_size(budget), readers)
    for layer in layers:
        attach(model.get_submodule(layer.module), engine.layer(layer))
    weakref.finalize(model, close)
    return model.requires_grad_(False).eval()


def _layers(config: PreTrainedConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> list[Layer]:
    model, recipes = trace(config, checkpoint, dtype=dtype, experts=IMPLEMENTATION)
    modules = _expert_modules(model)
    if not modules:
        raise UnsupportedModel(f"a {type(model).__name__} has no experts that could be streamed")
    return [
        Layer(
            number=number,
            module=name,
            experts=expert_count(module),
            parameters=dict(_parameters(name, module, checkpoint, recipes)),
        )
        for number, (name, module) in enumerate(modules.items())
    ]


def _expert_modules(model: Any) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if own_forward(module) is not None}


def _parameters(
    name: str, module: torch.nn.Module, checkpoint: Checkpoint, recipes: Mapping[str, Recipe]
) -> Iterator[tuple[str, Parameter]]:
    for attribute, tensor in module.named_parameters(recurse=False):
        recipe = recipes.get(f"{name}.{attribute}")
        if recipe is None:
            raise UnsupportedModel(
                f"{name}.{attribute} is made of this checkpoint in a way that no expert can be read alone"
            )
        (stored,) = {checkpoint[leaf.name].dtype for leaf in leaves(recipe)}
        yield (
            attribute,
            Parameter(
                name=attribute, shape=shape_of(recipe)[1:], stored=stored, dtype=tensor.dtype, recipe=recipe
            ),
        )


def _dense(
    config: PreTrainedConfig, checkpoint: Checkpoint, layers: list[Layer], dtype: torch.dtype
) -> PreTrainedModel:
    """The model with all weights but its experts', which are meta tensors."""
    streamed = {
        leaf.name for layer in layers for each in layer.parameters.values() for leaf in leaves(each.recipe)
    }

    def give(stored: StoredTensor, wanted: torch.dtype | None) -> torch.Tensor:
        if stored.name in streamed:
            return torch.empty(stored.shape, dtype=wanted or stored.dtype, device="meta")
        return checkpoint.read(stored).to(wanted or stored.dtype)

    weights = {name: Lazy(stored, give) for name, stored in checkpoint.items()}
    return load(config, weights, dtype=dtype, experts=IMPLEMENTATION)


def _engine(checkpoint: Checkpoint, layers: list[Layer], budget: int, readers: int) -> tuple[Engine, Any]:
    source = IndexedExperts(checkpoint, layers)
    page = HUGE_PAGE if budget >= 64 * HUGE_PAGE else BLOCK
    slab = Slab(budget, page=page)
    queue = TransferQueue(workers=readers + 1)
    cache = RecordCache([source], budget, slab, queue)

    def close() -> None:
        cache.close()
        queue.close()
        slab.close()
        source.close()
        checkpoint.close()

    return Engine(layers, source, cache), close
