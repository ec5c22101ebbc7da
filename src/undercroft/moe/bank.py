"""What the experts of a model are made of: per MoE layer, how many, which parameters, and the recipe of each.

Pure; it knows names, shapes and recipes, not files or budgets. Layers are numbered in the order in which a forward
pass comes to them, only those with experts counted. Invariant: all experts of a layer have the same parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from undercroft.models.recipe import Recipe, item
from undercroft.models.tensor_files import LINE
from undercroft.store.record import Key

GATED = ("gate_up_proj", "down_proj")
"""What most families call the two matrices of an expert."""
PHASED = (torch.float32, torch.float64)
"""The dtypes in which PyTorch's products heed where a matrix begins; see `checkpoint`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of the experts of a layer.

    Attributes:
        name: the attribute of the experts module.
        shape: of one expert's part.
        stored: the dtype in the checkpoint.
        dtype: the dtype in the model.
        recipe: how the stacked parameter is made of the checkpoint's tensors.
        phase: where the stacked parameter begins modulo `LINE` where the whole model is in memory.
        strides: of a contiguous tensor of that shape, in elements.
    """

    name: str
    shape: tuple[int, ...]
    stored: torch.dtype
    dtype: torch.dtype
    recipe: Recipe
    phase: int = 0
    strides: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "strides", strides_of(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's part, as stored."""
        return math.prod(self.shape) * self.stored.itemsize

    @property
    def is_phased(self) -> bool:
        """Whether products heed where it begins: not in other dtypes, nor where a converted copy is computed with."""
        return self.stored is self.dtype and self.stored in PHASED

    def phase_of(self, expert: int) -> int:
        """Where an expert's part begins modulo `LINE` there: PyTorch's products may heed it, see `checkpoint`."""
        return (self.phase + expert * self.nbytes) % LINE


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The experts of one layer.

    Attributes:
        number: among the layers that have experts.
        module: the experts module's name in the model.
        experts: how many there are.
        parameters: by name.
    """

    number: int
    module: str
    experts: int
    parameters: Mapping[str, Parameter]

    def key(self, expert: int, kind: str) -> Key:
        """What one expert is asked for by."""
        return Key(f"layers.{self.number}.experts.{expert}", kind)

    def recipes(self, expert: int) -> dict[str, Recipe]:
        """How one expert's parameters are made.

        Raises:
            UnsupportedModel: see `recipe.item`.
        """
        return {name: item(each.recipe, expert) for name, each in self.parameters.items()}


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def view_of(
    storage: torch.UntypedStorage,
    place: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> torch.Tensor:
    """A tensor over a storage's bytes from `place` on: one call, where slices and views would be four."""
    return torch.empty(0, dtype=dtype).set_(storage, place // dtype.itemsize, shape, strides)  # pyright: ignore
