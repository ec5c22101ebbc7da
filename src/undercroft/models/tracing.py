"""Finds the recipe of every parameter by loading a model whose weights are only names.

transformers converts checkpoints with a few tensor operations. Here they run on meta tensors that note what was done
to them, so that any family is understood by what its conversion does, not by a list of families. It knows
transformers' loading and torch's functions; not what an expert is. Invariant: no byte of a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from undercroft.errors import UnsupportedModel
from undercroft.models.checkpoint import DTYPES
from undercroft.models.recipe import Cut, Joined, Recipe, Reshaped, Stacked, Stored, Swapped, shape_of
from undercroft.models.tensor_files import StoredTensor

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NOT_CONVERTED = (
    "automatic conversion of the weights"  # what transformers says of experts that lack some part
)
Given = Callable[[StoredTensor, torch.dtype | None], torch.Tensor]
"""What stands for a stored tensor while a model is loaded, in the dtype that the model wants."""


class Lazy:
    """A stored tensor as transformers' loader takes it: a slice that is only read when it is moved to its place.

    Args:
        stored: which.
        give: what to put there.
    """

    def __init__(self, stored: StoredTensor, give: Given) -> None:
        self._stored, self._give = stored, give

    def __getitem__(self, _: object) -> Lazy:
        return self

    def get_shape(self) -> list[int]:
        """See safetensors."""
        return list(self._stored.shape)

    def get_dtype(self) -> str:
        """See safetensors."""
        return _NAMES[self._stored.dtype]

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Called once, on one of the loader's threads."""
        return self._give(self._stored, dtype)


class Traced(torch.Tensor):
    """A meta tensor with a recipe; None once something was done to it that no recipe can say."""

    recipe: Recipe | None

    @staticmethod
    def of(recipe: Recipe, dtype: torch.dtype) -> Traced:
        """One that stands for what a recipe makes."""
        empty = torch.empty(shape_of(recipe), dtype=dtype, device="meta")
        made = cast("Traced", torch.Tensor._make_subclass(Traced, empty))  # pyright: ignore
        made.recipe = recipe
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do it, and note it down."""
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "to":  # there is nothing to move
            args = tuple(each for each in args if not isinstance(each, str | torch.device))
            kwargs = {"dtype": args[0].dtype, **kwargs, "device": None}
        result: Any = cast("Any", super()).__torch_function__(func, types, args, kwargs)
        made = [one for one in _flat(result) if isinstance(one, Traced) and "recipe" not in vars(one)]
        rule = _RULES.get(getattr(func, "__name__", ""), _forget)
        for one, recipe in zip(made, rule(made, args, kwargs), strict=True):
            one.recipe = recipe
        return result


def load(
    config: PreTrainedConfig, weights: Mapping[str, Lazy], *, dtype: torch.dtype, experts: str
) -> PreTrainedModel:
    """A causal language model of a configuration, with what `weights` give as its weights.

    Args:
        config: of which family and shape.
        weights: the checkpoint's tensors by name.
        dtype: of the model's floating-point parameters, but for those that its family keeps otherwise.
        experts: the experts implementation.

    Raises:
        UnsupportedModel: weights are missing, left over or of another shape.
    """
    mapping: Any = AutoModelForCausalLM._model_mapping  # pyright: ignore[reportPrivateUsage]
    family: Any = mapping[type(config)]
    try:
        model, found = family.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            dtype=dtype,
            experts_implementation=experts,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except RuntimeError as error:
        if _NOT_CONVERTED not in str(error):
            raise
        raise UnsupportedModel(
            f"the checkpoint's weights cannot be put together to those of a {family.__name__}; some are missing"
        ) from error
    wrong = sorted({*found["missing_keys"], *(str(entry[0]) for entry in found["mismatched_keys"])})
    if wrong:
        raise UnsupportedModel(
            f"the checkpoint lacks {len(wrong)} weights of a {family.__name__}, or has them in another shape: "
            f"{wrong[0]} first"
        )
    return model


def trace(
    config: PreTrainedConfig, stored: Mapping[str, StoredTensor], *, dtype: torch.dtype, experts: str
) -> tuple[PreTrainedModel, dict[str, Recipe]]:
    """The model without weights, and how its parameters and buffers are made of the checkpoint, by name.

    One that is made in a way that no recipe can say is left out, and so is one that the checkpoint does not have.
    """

    def give(tensor: StoredTensor, wanted: torch.dtype | None) -> torch.Tensor:
        recipe = Stored(tensor.name, tensor.shape, tensor.dtype.itemsize)
        return Traced.of(recipe, wanted or tensor.dtype)

    weights = {name: Lazy(tensor, give) for name, tensor in stored.items()}
    model = load(config, weights, dtype=dtype, experts=experts)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    traced = {name: tensor.recipe for name, tensor in named.items() if isinstance(tensor, Traced)}
    return model, {name: recipe for name, recipe in traced.items() if recipe is not None}


def _flat(result: Any) -> list[Any]:
    return list(cast("Any", result)) if isinstance(result, tuple | list) else [result]


_Recipes = Sequence[Recipe | None]
_Rule = Callable[[list[Traced], tuple[Any, ...], dict[str, Any]], _Recipes]


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str, default: Any) -> Any:
    return kwargs.get(name, args[place] if len(args) > place else default)


def _recipes(tensors: Iterable[torch.Tensor]) -> tuple[Recipe, ...] | None:
    found = tuple(getattr(tensor, "recipe", None) for tensor in tensors)
    return None if None in found else cast("tuple[Recipe, ...]", found)


def _forget(made: list[Traced], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recipes:
    return [None] * len(made)


def _same(made: list[Traced], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recipes:
    return [args[0].recipe] * len(made)


def _reshape(made: list[Traced], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recipes:
    whole = args[0].recipe
    return [whole and Reshaped(whole, tuple(one.shape)) for one in made]


def _stack(made: list[Traced], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recipes:
    parts, dim = _recipes(args[0]), _argument(args, kwargs, 1, "dim", 0)
    return [Stacked(parts) if parts and dim == 0 else None]


def _join(made: list[Traced], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recipes:
    parts, dim = _recipes(args[0]), _argument(args, kwargs, 1, "dim", 0)
    return [Joined(parts, dim % made[0].dim()) if parts else None]


def _divide(made: list[Traced], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recipes:
    whole, dim = args[0].recipe, _argument(args, kwargs, 2, "dim", 0) % args[0].dim()
    recipes: list[Recipe | None] = []
    first = 0
    for one in made:
        last = first + cast("int", one.size(dim))
        recipes.append(whole and Cut(whole, dim, first, last))
        first = last
    return recipes


def _swap(made: list[Traced], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recipes:
    whole, ndim = args[0].recipe, args[0].dim()
    one, two = _argument(args, kwargs, 1, "dim0", 0), _argument(args, kwargs, 2, "dim1", 1)
    return [whole and Swapped(whole, one % ndim, two % ndim)]


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("to", "contiguous", "clone", "detach", "requires_grad_", "cpu"), _same),
    **dict.fromkeys(("reshape", "view", "flatten", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("cat", "concat"), _join),
    **dict.fromkeys(("chunk", "split"), _divide),
    **dict.fromkeys(("transpose", "swapaxes"), _swap),
    "stack": _stack,
}
