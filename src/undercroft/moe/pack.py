"""Packs a Mixture-of-Experts checkpoint: each expert becomes one record in each precision, the rest is copied.

It knows where checkpoints come from and how precisions are spelled; `packer` does the work.
"""

from __future__ import annotations

from pathlib import Path

from undercroft.errors import UnsupportedModel
from undercroft.models.checkpoint import Checkpoint
from undercroft.models.place import download, locate
from undercroft.models.source import read_config
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
        source: a folder that holds config.json and *.safetensors, or a name on the Hugging Face hub.
        destination: a folder, which must not hold anything else.
        high: the precision of the full copies: "keep" (the checkpoint's, bit for bit), "lossless" (the same bits in
            0.7 of the bytes where they are bfloat16), "bf16", "int8" or "int4".
        low: that of the low copies: "int4", "int2", or "none" for no such copies.
        group: columns of a quantised matrix that share a scale: 32, 64 or 128. A matrix that it does not divide
            gets the largest smaller one that does, or is left in the checkpoint's precision.
        on_progress: told before the first expert, after each, and of those that were packed before.

    Raises:
        InvalidInput: a precision that is not offered; no such source; a destination that holds something else, or
            was packed otherwise; weights that are not finite.
        UnsupportedModel: a model without experts, or with experts that cannot be read one by one.
        CorruptRecord: a file contradicts itself, or was changed meanwhile.
        TierFull: the disk is full; layers that are complete stay, and are taken up by the next call.
        SpillMisuse: another process is packing into the destination.
        TransferFailed: a disk, or the hub, failed.
    """
    forms = Forms(high=_SPELLINGS.get(high) or high, low=_SPELLINGS.get(low or "none", low), group=group)
    place = locate(source)
    folder = download(place)
    name = folder.resolve().name if place == str(folder) else place
    config = read_config(str(folder))
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"{source} is quantised already; pack the checkpoint that it was made from")
    with Checkpoint(folder) as checkpoint:
        packer = Packer(folder, name, checkpoint, config, forms)
        return packer.run(Path(destination).expanduser(), on_progress or _ignore)


def _ignore(_: PackProgress) -> None:
    """Nobody asked."""
