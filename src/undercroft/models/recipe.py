"""How a parameter of a model is made of the tensors of its checkpoint.

Checkpoints hold experts one by one, or stacked, or transposed; models hold them stacked in their own way, and
transformers converts. A recipe is that conversion written down: what is stacked, joined, cut or transposed. It only
moves elements about, never computes, so it can be followed for one expert alone. Pure but for `assemble`, which moves
bytes that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from undercroft.errors import UnsupportedModel

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


@dataclass(frozen=True, slots=True)
class Stored:
    """A contiguous run of elements of a checkpoint's tensor.

    Attributes:
        name: the tensor's.
        shape: of the run.
        itemsize: bytes of an element.
        start: bytes of the tensor before it.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the run."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class Stacked:
    """Several of one shape, along a new first dimension."""

    parts: tuple[Recipe, ...]


@dataclass(frozen=True, slots=True)
class Joined:
    """Several, one after another along a dimension that they have."""

    parts: tuple[Recipe, ...]
    dim: int


@dataclass(frozen=True, slots=True)
class Cut:
    """The elements [first, last) along a dimension."""

    whole: Recipe
    dim: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Swapped:
    """Two dimensions in each other's place."""

    whole: Recipe
    one: int
    two: int


@dataclass(frozen=True, slots=True)
class Reshaped:
    """The same elements in the same order in another shape."""

    whole: Recipe
    shape: tuple[int, ...]


Recipe = Stored | Stacked | Joined | Cut | Swapped | Reshaped


def shape_of(recipe: Recipe) -> tuple[int, ...]:
    """The shape of what a recipe makes."""
    match recipe:
        case Stored() | Reshaped():
            return recipe.shape
        case Stacked():
            return (len(recipe.parts), *shape_of(recipe.parts[0]))
        case Joined():
            total = sum(shape_of(part)[recipe.dim] for part in recipe.parts)
            return _with(shape_of(recipe.parts[0]), recipe.dim, total)
        case Cut():
            return _with(shape_of(recipe.whole), recipe.dim, recipe.last - recipe.first)
        case Swapped():
            shape = shape_of(recipe.whole)
            return _with(_with(shape, recipe.one, shape[recipe.two]), recipe.two, shape[recipe.one])


def leaves(recipe: Recipe) -> Iterator[Stored]:
    """The runs that a recipe is made of, in its order."""
    match recipe:
        case Stored():
            yield recipe
        case Stacked() | Joined():
            for part in recipe.parts:
                yield from leaves(part)
        case Cut() | Swapped() | Reshaped():
            yield from leaves(recipe.whole)


def item(recipe: Recipe, index: int) -> Recipe:
    """The recipe of one item along the first dimension.

    Raises:
        UnsupportedModel: the item's bytes are not contiguous in the checkpoint, or not apart from the other items'.
    """
    match recipe:
        case Stored():
            nbytes = recipe.nbytes // recipe.shape[0]
            return replace(recipe, shape=recipe.shape[1:], start=recipe.start + index * nbytes)
        case Stacked():
            return recipe.parts[index]
        case Joined() if recipe.dim > 0:
            return Joined(tuple(item(part, index) for part in recipe.parts), recipe.dim - 1)
        case Joined():
            for part in recipe.parts:
                if index < shape_of(part)[0]:
                    return item(part, index)
                index -= shape_of(part)[0]
        case Cut() if recipe.dim > 0:
            return replace(recipe, whole=item(recipe.whole, index), dim=recipe.dim - 1)
        case Cut():
            return item(recipe.whole, recipe.first + index)
        case Swapped() if min(recipe.one, recipe.two) > 0:
            return Swapped(item(recipe.whole, index), recipe.one - 1, recipe.two - 1)
        case Reshaped() if recipe.shape[0] == shape_of(recipe.whole)[0]:
            return Reshaped(item(recipe.whole, index), recipe.shape[1:])
        case _:
            pass
    raise UnsupportedModel(
        "the experts of this checkpoint are interleaved with one another, so none can be read alone"
    )


def is_plain(recipe: Recipe) -> bool:
    """Whether the result is just the runs, one after another."""
    match recipe:
        case Stored():
            return True
        case Stacked() | Joined():
            rest = isinstance(recipe, Stacked) or math.prod(shape_of(recipe)[: recipe.dim]) == 1
            return rest and all(is_plain(part) for part in recipe.parts)
        case Reshaped():
            return is_plain(recipe.whole)
        case Cut() | Swapped():
            return False


def assemble(recipe: Recipe, read: Callable[[Stored], Array]) -> Array:
    """Make the parameter.

    Args:
        recipe: of what.
        read: gives a run as an array of its shape, of any dtype of its itemsize.
    """
    match recipe:
        case Stored():
            return read(recipe)
        case Stacked():
            return np.stack([assemble(part, read) for part in recipe.parts])
        case Joined():
            return np.concatenate([assemble(part, read) for part in recipe.parts], axis=recipe.dim)
        case Cut():
            where = (slice(None),) * recipe.dim + (slice(recipe.first, recipe.last),)
            return assemble(recipe.whole, read)[where]
        case Swapped():
            return np.swapaxes(assemble(recipe.whole, read), recipe.one, recipe.two)
        case Reshaped():
            return assemble(recipe.whole, read).reshape(recipe.shape)


def _with(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])
