"""Copies the weights that are no experts: one safetensors file, written from its beginning to its end.

It knows the safetensors header and pieces of files; not what the weights are. Invariants: at most one piece is in
memory; the file has its name only when it is whole.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from undercroft.errors import TransferFailed
from undercroft.models.checkpoint import DTYPES, PHASES
from undercroft.models.tensor_files import StoredTensor, TensorFiles
from undercroft.store.partial import PartialFile
from undercroft.store.ranges import round_up
from undercroft.units import MIB

PIECE = 4 * MIB
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class DenseFile:
    """The weights of a checkpoint that are no experts, as one safetensors file in the making.

    Args:
        checkpoint: where they lie.
        left_out: names of those that are not copied.

    Attributes:
        nbytes: of the file.
    """

    def __init__(self, checkpoint: TensorFiles, left_out: set[str]) -> None:
        kept = [tensor for name, tensor in checkpoint.items() if name not in left_out]
        # The format's own order: widest elements first, so that all are aligned without gaps.
        self._tensors = sorted(kept, key=lambda each: (-each.dtype.itemsize, each.name))
        self._checkpoint = checkpoint
        self._header = _header(self._tensors)
        self.nbytes = len(self._header) + sum(tensor.nbytes for tensor in self._tensors)

    def blocks(self) -> Iterator[memoryview]:
        """The content; each block is void once the next is asked for.

        Raises:
            CorruptRecord, TransferFailed: see `TensorFiles.read`.
        """
        yield memoryview(self._header)
        piece = memoryview(bytearray(PIECE))
        for tensor in self._tensors:
            for start in range(0, tensor.nbytes, PIECE):
                block = piece[: min(PIECE, tensor.nbytes - start)]
                self._checkpoint.read_run(tensor, start, block)
                yield block


def write_whole(path: Path, blocks: Iterable[memoryview]) -> str:
    """Write a file that has its name only when all its bytes are on the disk; its xxh3_64, hexadecimal.

    Raises:
        SpillMisuse: somebody else is writing it.
        TierFull, TransferFailed: the disk took it not; nothing is left.
    """
    digest = xxhash.xxh3_64()
    with mmap.mmap(-1, PIECE) as buffer:
        file = PartialFile(path, buffer)
        try:
            for block in blocks:
                digest.update(block)
                file.append(block)
            file.finish()
            file.publish()
            file.close()
        finally:
            file.discard()
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """The xxh3_64 of a file, hexadecimal, as `write_whole` gave it.

    Raises:
        TransferFailed: it cannot be read.
    """
    digest, piece = xxhash.xxh3_64(), memoryview(bytearray(PIECE))
    try:
        with open(
            path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            while nbytes := file.readinto(piece):
                digest.update(piece[:nbytes])
    except OSError as error:
        raise TransferFailed(f"{path}: {error.strerror}", errno=error.errno) from error
    return digest.hexdigest()


def _header(tensors: Sequence[StoredTensor]) -> bytes:
    phases = {tensor.name: tensor.phase for tensor in tensors}
    entries: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt", PHASES: json.dumps(phases)}}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.nbytes]
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        end = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    return round_up(len(text), 8).to_bytes(8, "little") + text.ljust(round_up(len(text), 8))
