"""The files that the sides of `peers` read, written once and kept: the same model in each side's own form.

Invariant: a file or folder that is there is whole.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from undercroft.bench import gguf_twin, llama_worker
from undercroft.bench.peers_model import PeerShape, is_written, write_checkpoint, write_stacked
from undercroft.bench.peers_worker import ACCELERATE
from undercroft.errors import InvalidInput, TransferFailed
from undercroft.moe.pack import pack
from undercroft.moe.packed import is_packed

Progress = Callable[[str], None]
_PACKED = {"lossless": ("lossless", "none"), "balanced": ("int8", "int4"), "int8": ("int8", "none")}
"""The sides that read a packed folder, and its precisions."""

INSTALL = {
    "llama.cpp": "CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf",
    "ik_llama.cpp": "pip install ik-llama-cpp-python gguf",
    ACCELERATE: "pip install accelerate",
}
"""How each peer is got; llama.cpp and its kin into the Python that `--python` names."""


@dataclass(frozen=True, slots=True)
class PeersPlace:
    """A folder for one model.

    Attributes:
        folder: which.
        shape: of the model.
        python: one that has llama.cpp or its kin; None where none has.
    """

    folder: Path
    shape: PeerShape
    python: Path | None

    def model(self, side: str, bits: str) -> Path:
        """What a side reads: files of its own, for pages that one side maps would serve another outside its limit."""
        if side in llama_worker.MODULES:
            return self.folder / side / f"{gguf_twin.KINDS[bits]}.gguf"
        own = {"exact": "checkpoint", ACCELERATE: "stacked", **{side: side for side in _PACKED}}
        return self.folder / own[side]

    def peers(self) -> list[str]:
        """Those that are installed.

        Raises:
            InvalidInput: there is no such Python.
        """
        found = [name for name in llama_worker.MODULES if self.python and _has(self.python, name)]
        return [ACCELERATE, *found] if find_spec("accelerate") else found

    def prepare(self, side: str, bits: str, progress: Progress) -> None:
        """Write what a side reads, unless it is there.

        Raises:
            TransferFailed: gguf is missing, or failed.
        """
        target, source = self.model(side, bits), self.folder / "checkpoint"

        def told(layer: int) -> None:
            progress(f"peers: {layer} of {self.shape.layers + 1} shards written")

        if not is_written(self.shape, source):
            write_checkpoint(self.shape, source, told)
        if side == ACCELERATE and not is_written(self.shape, target):
            write_stacked(self.shape, source, target, told)
        if side in _PACKED and not is_packed(target):
            high, low = _PACKED[side]
            progress(f"peers: packing {target.name}")
            pack(source, target, high=high, low=low)
        if target.suffix == ".gguf" and not target.exists():
            self._write_twin(source, target, progress)

    def _write_twin(self, source: Path, target: Path, progress: Progress) -> None:
        progress(f"peers: writing {target.name} for {target.parent.name}")
        target.parent.mkdir(exist_ok=True)
        command = [str(self.python), gguf_twin.__file__, str(source), str(target), target.stem]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            words = finished.stderr.strip().splitlines()
            raise TransferFailed(f"{target} was not written: {words[-1] if words else finished.returncode}")


def forget_pages(model: Path) -> None:
    """Have the page cache let go of a file, or of a folder's files, so that everyone begins without it."""
    for file in sorted(model.rglob("*")) if model.is_dir() else [model]:
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            try:
                os.fsync(fd)  # what is not written yet would stay
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _has(python: Path, peer: str) -> bool:
    command = [str(python), "-c", f"import {llama_worker.MODULES[peer]}"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise InvalidInput(f"--python {python} cannot be run: {error.strerror}") from error
