"""What a model whose experts are elsewhere does not do as others: move, change its dtype, be saved.

It knows transformers' models; not how experts are served.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from transformers import PreTrainedModel

from undercroft.errors import InvalidInput, UnsupportedModel
from undercroft.moe.mixed import put_before


class StreamedModel:
    """Mixed into the class of a model by `adopt`."""

    undercroft_files: Sequence[Path]
    """The checkpoint's files of weights, its index included."""
    undercroft_device: torch.device
    """Where it computes."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `torch.nn.Module.to`, where there is nothing to do.

        Raises:
            UnsupportedModel: for another device or dtype.
        """
        parse: Any = torch._C._nn._parse_to  # pyright: ignore
        parsed = cast("tuple[Any, ...]", parse(*args, **kwargs))
        device, dtype = parsed[0], parsed[1]
        model, own = cast("Any", self), self.undercroft_device
        is_there = device is None or (device.type == own.type and own.index in (None, device.index or 0))
        if is_there and dtype in (None, model.dtype):
            return self
        raise UnsupportedModel(
            f"a streamed model stays on {own} in {model.dtype}: its experts are not here to be moved; "
            "open it again with load_moe(..., device=..., dtype=...)"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What `half`, `cuda` and their like come to."""
        raise UnsupportedModel(
            "a streamed model cannot be converted, for its experts are not here; "
            "open it again with load_moe(..., device=..., dtype=...)"
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Copy the checkpoint, and write the configuration.

        Raises:
            InvalidInput: that is where it came from, or an option that would change what is written.
        """
        directory, model = Path(save_directory), cast("Any", self)
        if options:
            raise InvalidInput(
                f"a streamed model is saved by copying its checkpoint; leave out {', '.join(options)}"
            )
        if directory.resolve() == self.undercroft_files[0].parent.resolve():
            raise InvalidInput(f"{directory} is where the model's experts are read from; save it elsewhere")
        directory.mkdir(parents=True, exist_ok=True)
        for file in self.undercroft_files:
            shutil.copyfile(file, directory / file.name)
        model.config.save_pretrained(directory)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(directory)


def adopt(model: PreTrainedModel, files: Sequence[Path], device: torch.device) -> None:
    """Make a model a `StreamedModel` too; it stays an instance of its own class.

    Args:
        model: whose experts are meta tensors.
        files: its checkpoint's files of weights.
        device: where it computes.
    """
    put_before(StreamedModel, model)
    cast("Any", model).undercroft_files = files
    cast("Any", model).undercroft_device = device
    # So that pipelines leave it where it is, and `generate` does not compile it.
    cast("Any", model).hf_device_map = {"": str(device), "experts": "disk"}
