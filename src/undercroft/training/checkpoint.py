"""The checkpoint of a training run: everything that decides how it goes on, in one folder.

    output/checkpoint-00000120/
        weights.safetensors      what is trained, by name
        optimizer.safetensors    AdamW's moments: "exp_avg.NAME", "exp_avg_sq.NAME", "step.NAME"
        state.json               the step, the state of the random generators, settings and data

It knows files and tensors, not how they are trained. Invariant: a folder of that name is complete (see
`durable`). The newest is kept; older ones are removed once it is safe.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from undercroft.errors import CorruptRecord, InvalidInput, WrongVersion
from undercroft.training.durable import whole_folder

_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d{8})")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a run is besides its tensors.

    Attributes:
        step: optimizer steps done. The position in the data follows from it.
        losses: of those steps.
        random: state of torch's generators, hexadecimal, by device.
        settings: those that decide the numbers.
        data: the fingerprint of the corpus.
    """

    step: int
    losses: list[float]
    random: dict[str, str]
    settings: dict[str, Any]
    data: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A run after some step.

    Attributes:
        state: the small part.
        weights, moments: the tensors, by name.
    """

    state: State
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]


def save_checkpoint(output: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and remove the one before it; returns its folder.

    Raises:
        TierFull, TransferFailed: it could not be written; the one before it is still there.
    """
    target = output / f"checkpoint-{checkpoint.state.step:08d}"
    before = [folder for folder in _folders(output) if folder != target]
    with whole_folder(target) as folder:
        save_file(checkpoint.weights, folder / "weights.safetensors")
        save_file(checkpoint.moments, folder / "optimizer.safetensors")
        text = json.dumps({"format": _FORMAT, **asdict(checkpoint.state)}, indent=1)
        (folder / "state.json").write_text(text, encoding="utf-8")
    for folder in before:
        shutil.rmtree(folder)
    return target


def newest_checkpoint(output: Path) -> Path | None:
    """The folder of the newest checkpoint, or None."""
    return max(_folders(output), default=None)


def load_state(folder: Path) -> State:
    """The small part of a checkpoint.

    Raises:
        CorruptRecord: it is not what `save_checkpoint` writes.
        WrongVersion: another version of Undercroft wrote it.
    """
    try:
        text: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        found = text.pop("format")
        if found != _FORMAT:
            raise WrongVersion(
                f"{folder} has format {found}, this is version {_FORMAT}; resume it with what wrote it"
            )
        return State(**text)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptRecord(
            f"{folder} cannot be resumed: state.json is damaged ({error}); start anew"
        ) from error


def load_checkpoint(folder: Path) -> Checkpoint:
    """A whole checkpoint.

    Raises:
        CorruptRecord, WrongVersion: see `load_state`; or a file of tensors is damaged.
    """
    state = load_state(folder)
    try:
        weights, moments = (load_file(folder / f"{name}.safetensors") for name in ("weights", "optimizer"))
    except (OSError, SafetensorError) as error:
        raise CorruptRecord(f"{folder} cannot be resumed: {error}; start anew") from error
    return Checkpoint(state=state, weights=weights, moments=moments)


def check_resumable(state: State, settings: dict[str, Any], data: str, folder: Path) -> None:
    """Refuse to go on from a checkpoint under other settings or on other data.

    Raises:
        InvalidInput: they differ; the text says in what.
    """
    for name, value in settings.items():
        if state.settings.get(name) != value:
            raise InvalidInput(
                f"{folder} was trained with {name} = {state.settings.get(name)!r}, not {value!r}; "
                "resume it with the same settings, or start anew in another folder"
            )
    if state.data != data:
        raise InvalidInput(
            f"the data changed since {folder} was written; resume it with the same, or start anew"
        )


def remove_checkpoints(output: Path) -> None:
    """Remove all checkpoints of a finished run."""
    for folder in _folders(output):
        shutil.rmtree(folder)


def _folders(output: Path) -> list[Path]:
    return [folder for folder in output.glob("checkpoint-*") if _NAME.fullmatch(folder.name)]
