"""Recipes against the tensor operations that they stand for."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from undercroft.errors import UnsupportedModel
from undercroft.models.recipe import (
    Array,
    Joined,
    Recipe,
    Stacked,
    Stored,
    Swapped,
    assemble,
    is_plain,
    item,
    leaves,
    shape_of,
)
from undercroft.models.tracing import Traced

Made = tuple[torch.Tensor, Traced]


def stored(name: str, shape: tuple[int, ...], seed: int) -> Made:
    generator = torch.Generator().manual_seed(seed)
    real = torch.randint(2**15, shape, dtype=torch.int16, generator=generator)
    return real, Traced.of(Stored(name, shape, 2), torch.int16)


@st.composite
def conversions(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], torch.Tensor, Traced]:
    """Tensors, and what a few operations make of them, really and as a recipe."""
    shape = (draw(st.integers(1, 3)), 2 * draw(st.integers(1, 2)), 4)
    made = [stored(str(n), shape, n) for n in range(draw(st.integers(1, 3)))]
    sources = {str(n): real for n, (real, _) in enumerate(made)}
    steps: list[Callable[[list[torch.Tensor]], list[torch.Tensor]]] = [
        lambda all_: [torch.stack(all_)] if all_[0].dim() < 5 else all_,
        lambda all_: [torch.cat(all_, dim=0)],
        lambda all_: [torch.cat(all_, dim=1)],
        lambda all_: [torch.cat([each, each], dim=-1) for each in all_],
        lambda all_: [each.transpose(1, 2).contiguous() for each in all_],
        lambda all_: [each.transpose(-2, -1) for each in all_],
        lambda all_: [torch.chunk(each, 2, dim=-1)[1] for each in all_ if each.shape[-1] > 1] or all_,
        lambda all_: [each.split([1, each.shape[1] - 1], dim=1)[0] for each in all_],
        lambda all_: (
            [each.reshape(each.shape[0], -1, 2) for each in all_ if each[0].numel() % 2 == 0] or all_
        ),
    ]
    reals, traced = [real for real, _ in made], [trace for _, trace in made]
    for step in draw(st.lists(st.sampled_from(steps), max_size=4)):
        reals, traced = step(reals), step(traced)  # type: ignore[arg-type,assignment]
    return sources, reals[0], traced[0]


def reader(sources: dict[str, torch.Tensor]) -> Callable[[Stored], Array]:
    def read(leaf: Stored) -> Array:
        raw = sources[leaf.name].contiguous().numpy().tobytes()[leaf.start : leaf.start + leaf.nbytes]
        return np.frombuffer(raw, dtype="u2").reshape(leaf.shape)

    return read


@given(conversions())
def test_a_recipe_makes_what_the_operations_made(
    conversion: tuple[dict[str, torch.Tensor], torch.Tensor, Traced],
) -> None:
    sources, real, traced = conversion
    recipe = traced.recipe
    assert recipe is not None
    assert shape_of(recipe) == tuple(real.shape)
    assert np.array_equal(assemble(recipe, reader(sources)), real.numpy())


@given(conversions())
def test_an_item_is_a_slice_or_refused(
    conversion: tuple[dict[str, torch.Tensor], torch.Tensor, Traced],
) -> None:
    sources, real, traced = conversion
    recipe = traced.recipe
    assert recipe is not None
    for index in range(real.shape[0]):
        try:
            found = item(recipe, index)
        except UnsupportedModel:
            continue
        assert np.array_equal(assemble(found, reader(sources)), real[index].numpy())
        if is_plain(found):
            runs = [reader(sources)(leaf).reshape(-1) for leaf in leaves(found)]
            assert np.array_equal(np.concatenate(runs), real[index].numpy().reshape(-1))


def parts(count: int) -> tuple[Recipe, ...]:
    return tuple(Stored(str(n), (4, 6), 2) for n in range(count))


def test_experts_stored_one_by_one_are_read_one_by_one() -> None:
    gate, up = Stacked(parts(3)), Stacked(parts(3))
    assert item(Joined((gate, up), 1), 2) == Joined((parts(3)[2], parts(3)[2]), 0)


def test_experts_interleaved_in_one_tensor_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="interleaved"):
        item(Swapped(Stored("x", (4, 8), 2), 0, 1), 0)


def test_what_no_recipe_can_say_has_none() -> None:
    assert (Traced.of(Stored("x", (4,), 4), torch.float32) * 2).recipe is None
