"""Finds the experts of a model, and how each of their parameters is made of the checkpoint.

It knows which of transformers' modules hold experts, and recipes; not bytes, caches or records. Invariant: no byte of
a weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from undercroft.errors import UnsupportedModel
from undercroft.models.recipe import Recipe, Reshaped, Stored, leaves, shape_of
from undercroft.models.tensor_files import LINE, StoredTensor
from undercroft.models.tracing import trace
from undercroft.moe.bank import Layer, Parameter
from undercroft.moe.streamed import IMPLEMENTATION, expert_count, own_forward


class Survey(NamedTuple):
    """What was found.

    Attributes:
        layers: those that have experts, in the model's order.
        transposed: names of the experts modules whose matrices are [inputs, outputs].
    """

    layers: list[Layer]
    transposed: frozenset[str]

    def tensors(self) -> set[str]:
        """Names of the checkpoint's tensors that experts are made of."""
        return {
            leaf.name
            for layer in self.layers
            for each in layer.parameters.values()
            for leaf in leaves(each.recipe)
        }


def survey(config: PreTrainedConfig, stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> Survey:
    """The experts of a causal language model.

    Args:
        config: of which family and shape.
        stored: the checkpoint's tensors by name.
        dtype: of the model.

    Raises:
        UnsupportedModel: it has none, or they are made in a way that no recipe can say; see also `load`.
    """
    model, recipes = trace(config, stored, dtype=dtype, experts=IMPLEMENTATION)
    modules = _expert_modules(model)
    if not modules:
        raise UnsupportedModel(f"a {type(model).__name__} has no experts that could be streamed")
    layers = [
        Layer(
            number=number,
            module=name,
            experts=expert_count(module),
            parameters={each.name: each for each in _parameters(name, module, stored, recipes)},
        )
        for number, (name, module) in enumerate(modules.items())
    ]
    return Survey(layers, frozenset(name for name, module in modules.items() if module.is_transposed))


def _expert_modules(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if own_forward(module) is not None}


def _parameters(
    name: str, module: torch.nn.Module, stored: Mapping[str, StoredTensor], recipes: Mapping[str, Recipe]
) -> Iterator[Parameter]:
    for attribute, tensor in module.named_parameters(recurse=False):
        recipe = recipes.get(f"{name}.{attribute}")
        dtypes = {stored[leaf.name].dtype for leaf in leaves(recipe)} if recipe else set[torch.dtype]()
        if recipe is None or len(dtypes) != 1:
            raise UnsupportedModel(
                f"{name}.{attribute} is made of this checkpoint in a way that no expert can be read alone"
            )
        yield Parameter(
            name=attribute,
            shape=shape_of(recipe)[1:],
            stored=dtypes.pop(),
            dtype=tensor.dtype,
            recipe=recipe,
            phase=_phase(recipe, tensor.dtype, stored),
        )


def _phase(recipe: Recipe, dtype: torch.dtype, stored: Mapping[str, StoredTensor]) -> int:
    """Of a parameter that is one tensor of the file, which transformers maps; what it makes begins at a multiple."""
    while isinstance(recipe, Reshaped):
        recipe = recipe.whole
    if not isinstance(recipe, Stored) or stored[recipe.name].dtype is not dtype:
        return 0
    return (stored[recipe.name].phase + recipe.start) % LINE
