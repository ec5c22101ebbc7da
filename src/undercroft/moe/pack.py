"""Packs a Mixture-of-Experts checkpoint: each expert becomes one record in each precision, the rest is copied.

It knows where checkpoints come from and how precisions are spelled; `packer` does the work.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedConfig

from undercroft.errors import UnsupportedModel
from undercroft.models.checkpoint import Checkpoint
from undercroft.models.gguf_checkpoint import GgufCheckpoint
from undercroft.models.gguf_files import write_files
from undercroft.models.place import download, is_gguf, locate_weights
from undercroft.models.source import read_config
from undercroft.models.tensor_files import TensorFiles
from undercroft.moe.manifest import Forms
from undercroft.moe.pack_report import OnProgress, PackProgress, PackReport
from undercroft.moe.packer import Packer

_SPELLINGS = {"bf16": "bfloat16", "none": None}


def pack(
    source: str | Path,
    destination: str | Path,
    *,
    high: str = "keep",
    low: str | None = "int4",
    group: int = 32,
    on_progress: OnProgress | None = None,
) -> PackReport:
    """Pack a Mixture-of-Experts checkpoint, so that each expert is read with one call, and in less precision.

    What a killed call left is taken up by the next one with the same arguments.

    Args:
        source: a folder that holds config.json and *.safetensors, a GGUF file, or a name on the Hugging Face hub.
        destination: a folder, which must not hold anything else.
        high: the precision of the full copies: "keep" (the checkpoint's, bit for bit; of a GGUF file's quantised
            weights, bfloat16), "lossless" (the same bits in 0.7 of the bytes where they are bfloat16), "bf16", "int8"
            or "int4".
        low: that of the low copies: "int4", "int2", or "none" for no such copies.
        group: columns of a quantised matrix that share a scale: 32, 64 or 128. A matrix that it does not divide
            gets the largest smaller one that does, or is left in the checkpoint's precision.
        on_progress: told before the first expert, after each, and of those that were packed before.

    Raises:
        InvalidInput: a precision that is not offered; no such source; a destination that holds something else, or
            was packed otherwise; weights that are not finite.
        UnsupportedModel: a model without experts, or with experts that cannot be read one by one; a GGUF file of a
            family that is not read.
        MissingExtra: the source is a GGUF file, and the package gguf is not installed.
        CorruptRecord: a file contradicts itself, or was changed meanwhile.
        TierFull: the disk is full; layers that are complete stay, and are taken up by the next call.
        SpillMisuse: another process is packing into the destination.
        TransferFailed: a disk, or the hub, failed.
    """
    forms = Forms(high=_SPELLINGS.get(high) or high, low=_SPELLINGS.get(low or "none", low), group=group)
    place = locate_weights(source)
    with _open_gguf(Path(place)) if is_gguf(place) else _open_folder(place) as opened:
        return Packer(*opened, forms).run(Path(destination).expanduser(), on_progress or _ignore)


_Opened = tuple[Path, str, TensorFiles, PreTrainedConfig]
"""The folder of configuration and tokenizer, what the source is called, its weights, and the configuration."""


@contextmanager
def _open_folder(place: str) -> Generator[_Opened]:
    folder = download(place)
    name = folder.resolve().name if place == str(folder) else place
    config = read_config(str(folder))
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"{place} is quantised already; pack the checkpoint that it was made from")
    with Checkpoint(folder) as checkpoint:
        yield folder, name, checkpoint, config


@contextmanager
def _open_gguf(path: Path) -> Generator[_Opened]:
    with GgufCheckpoint(path) as checkpoint, TemporaryDirectory() as folder:
        write_files(checkpoint, Path(folder))
        yield Path(folder), path.name, checkpoint, read_config(folder)


def _ignore(_: PackProgress) -> None:
    """Nobody asked."""
