"""Where a model computes: whether there is such a device, what of a model goes there, and how much room it has.

It knows devices; not experts' bytes or who serves them. Invariant: what is returned as a device can be computed on.
"""

from __future__ import annotations

import errno
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from undercroft.errors import InvalidInput, TierFull
from undercroft.moe.carriage import Carrier, CudaCarrier, HostCarrier
from undercroft.units import parse_size

_SHARE = 0.8
"""Of what is free on a device, how much experts take unasked; the rest is for activations, keys and values."""


def find_device(asked: str | torch.device) -> torch.device:
    """A device by name, with its number if it is a GPU.

    Raises:
        InvalidInput: there is no such device here, or nothing of ours computes there.
    """
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise InvalidInput(f"{asked!r} is no device; there are cpu, cuda, cuda:0, cuda:1, …") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise InvalidInput(f"experts are served to cpu and cuda, not to {device.type}; leave the device out")
    if not torch.cuda.is_available():
        why = "this PyTorch was built without CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"
        raise InvalidInput(
            f"{asked} was asked for, and {why}: install a CUDA build of torch and the GPU's driver, or leave the "
            "device out to compute on the CPU (`undercroft doctor` lists what is here)"
        )
    number: Any = device.index
    index = torch.cuda.current_device() if number is None else number
    if index >= torch.cuda.device_count():
        raise InvalidInput(f"there is no cuda:{index}; this machine has {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


@contextmanager
def room_for(what: str, device: torch.device, hint: str) -> Generator[None]:
    """Around what takes memory of a device.

    Raises:
        TierFull: it has not that much.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).partition(" If reserved")[0]
        raise TierFull(f"{device} has no room for {what}; {hint}: {said}", errno=errno.ENOMEM) from error


def put_trunk(model: nn.Module, device: torch.device) -> None:
    """Move all of a model that is not meta, its buffers included; weights that are shared stay shared.

    Raises:
        TierFull: the device has no room for them.
    """

    def moved(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_meta else tensor.to(device)

    unbound: Any = nn.Module
    with room_for("the weights that are no experts", device, "they must all be there"):
        unbound._apply(model, moved)


def slots_nbytes(asked: int | str | None, device: torch.device, *, most: int, aside: int) -> int | None:
    """Bytes of experts on a device; None for none.

    Args:
        asked: so many; None for what there is room for on a GPU, and for none on the CPU.
        device: where.
        most: what all experts take.
        aside: bytes that are needed for something else.
    """
    if asked is not None:
        return parse_size(asked)
    if device.type == "cpu":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return min(most, max(0, int(_SHARE * free) - aside))


def carrier_to(device: torch.device) -> Carrier:
    """What copies to a device."""
    return HostCarrier() if device.type == "cpu" else CudaCarrier(device)
