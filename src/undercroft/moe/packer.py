"""The work of packing a checkpoint: layer by layer, expert by expert, each step kept once it is done.

It knows what lies in a packed folder, in which order it is written, and what a killed call leaves; `packing` knows what
a record holds. Invariants: one expert is in memory at a time; a layer's record file is whole or not there; the
manifest is written when everything else is on the disk; results do not depend on how often the work was interrupted.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import xxhash
from transformers import PreTrainedConfig

from undercroft.errors import CorruptRecord, InvalidInput, SpillMisuse, TierFull, TransferFailed
from undercroft.kernels.format import Format
from undercroft.models.recipe import Array, Stored, assemble
from undercroft.models.tensor_files import TensorFiles
from undercroft.moe.bank import Layer
from undercroft.moe.dense import DenseFile, write_whole
from undercroft.moe.manifest import (
    DENSE,
    FILE,
    Forms,
    Manifest,
    PackedLayer,
    PackedParameter,
    SourceFile,
    read_whole,
    records_file,
)
from undercroft.moe.pack_report import Amount, Meter, OnProgress, PackReport
from undercroft.moe.packing import LOSSLESS, QUANTISED, Part, arrange, blocks, squeezable
from undercroft.moe.survey import survey
from undercroft.store.index import index_path
from undercroft.store.ranges import round_up
from undercroft.store.records import RecordFile
from undercroft.store.writer import RecordWriter
from undercroft.units import MIB, format_size

UNFINISHED = f"{FILE}.unfinished"
"""The manifest's name while packing is under way."""
BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
"""What is copied besides weights: configuration, tokenizer, chat templates, licence."""


@dataclass(frozen=True, eq=False)
class _Work:
    """What is to be done for a layer.

    Attributes:
        layer: which.
        forms: of its experts.
        transposed: their matrices are [inputs, outputs].
        rare: for how many rare exponents lossless copies have room, by parameter.
    """

    layer: Layer
    forms: Forms
    transposed: bool
    rare: Mapping[str, int]

    @cached_property
    def parts(self) -> dict[str, tuple[Part, ...]]:
        """Of the records of its experts, by kind."""
        parameters = list(self.layer.parameters.values())
        group, phases = self.forms.group, {each.name: each.phase_of(0) for each in parameters}
        return {
            kind: arrange(parameters, kind, group, transposed=self.transposed, rare=self.rare, phases=phases)
            for kind in self.forms.kinds
        }

    @property
    def file(self) -> str:
        return records_file(self.layer.number)

    @property
    def nbytes(self) -> int:
        """Bytes of all its records."""
        return sum(self.occupied(kind) for kind in self.parts)

    def occupied(self, kind: str) -> int:
        """Bytes of its records of a kind."""
        last = self.parts[kind][-1]
        return self.layer.experts * round_up(last.offset + last.nbytes)


class Packer:
    """One call of `pack`.

    Args:
        folder: of the checkpoint.
        name: what the manifest calls it.
        checkpoint: its tensors.
        config: of the model.
        forms: in which its experts are packed.

    Raises:
        UnsupportedModel: a model without experts, or with experts that cannot be read one by one.
    """

    def __init__(
        self, folder: Path, name: str, checkpoint: TensorFiles, config: PreTrainedConfig, forms: Forms
    ) -> None:
        found = survey(config, checkpoint, getattr(config, "dtype", None) or torch.float32)
        experts_own = found.tensors()
        self._folder, self._checkpoint = folder, checkpoint
        self._work = [self._plan(layer, forms, layer.module in found.transposed) for layer in found.layers]
        self._dense = DenseFile(checkpoint, experts_own)
        self._manifest = Manifest(
            source=name,
            files=tuple(_describe(checkpoint)),
            forms=forms,
            layers=tuple(_packed_layer(layer) for layer in found.layers),
            tensors={each: (checkpoint[each].dtype, checkpoint[each].shape) for each in sorted(experts_own)},
        )

    def _plan(self, layer: Layer, forms: Forms, transposed: bool) -> _Work:
        """What is to be done, as far as one expert can tell: in lossless copies, others may take a little more."""
        layer.recipes(0)  # refuses experts that cannot be told apart before a byte is written
        rare = self._rare(layer, 1) if forms.high == LOSSLESS else {}
        return _Work(layer, forms, transposed, rare)

    def _rare(self, layer: Layer, experts: int) -> dict[str, int]:
        """The most rare exponents that one of the first experts has, by parameter: all get room for as many."""
        found = [squeezable(_read_expert(self._checkpoint, layer, number)) for number in range(experts)]
        return {name: max(each[name] for each in found) for name in found[0]}

    def run(self, destination: Path, on_progress: OnProgress) -> PackReport:
        """Do what is left to do in a folder, and say what is there then."""
        started = time.monotonic()
        with _alone_in(destination):
            is_complete = self._begin(destination)
            kept = [work for work in self._work if is_complete or _is_packed(destination, work)]
            if not is_complete:
                self._pack_all(destination, kept, on_progress)
                self._finish(destination)
        return self._report(destination, len(kept), time.monotonic() - started)

    def _begin(self, destination: Path) -> bool:
        """Whether all is done already; if not, this call or an earlier one has begun."""
        finished, unfinished = destination / FILE, destination / UNFINISHED
        if finished.exists():
            self._check_same(finished)
            unfinished.unlink(missing_ok=True)
            return True
        if unfinished.exists():
            self._check_same(unfinished)
        else:
            strange = [path.name for path in destination.iterdir() if path.suffix != ".partial"]
            if strange:
                raise InvalidInput(f"{destination} holds {strange[0]}; name a folder that is new or empty")
            _check_room(
                destination, self._needed(self._work)
            )  # before anything binds the folder to these forms
            write_whole(unfinished, [memoryview(self._manifest.text().encode())])
        self._clear(destination)
        return False

    def _check_same(self, path: Path) -> None:
        """Refuse to go on with what was packed otherwise."""
        found, mine = Manifest.parse(read_whole(path), str(path)), self._manifest
        instead = f"name another folder, or remove {path.parent}"
        if found.forms != mine.forms:
            raise InvalidInput(f"{path.parent} has high {found.forms}, not {mine.forms}; {instead}")
        if found.source == mine.source and found.files != mine.files:
            raise CorruptRecord(f"{mine.source} was changed since {path} was written; {instead}")
        if replace(found, indexes=(), dense="") != mine:
            raise InvalidInput(f"{path.parent} holds {found.source}, or was begun otherwise; {instead}")

    def _clear(self, destination: Path) -> None:
        """Remove what a killed call left half-done."""
        for path in destination.glob("*.partial"):
            path.unlink()
        for work in self._work:
            if not _is_packed(destination, work):
                (destination / work.file).unlink(missing_ok=True)

    def _pack_all(self, destination: Path, kept: list[_Work], on_progress: OnProgress) -> None:
        missing = [work for work in self._work if work not in kept]
        _check_room(destination, self._needed(missing))
        meter = Meter(_amount(self._work), _amount(kept), self._dense.nbytes, on_progress)
        for work in missing:
            self._pack(destination, work, meter)

    def _needed(self, missing: list[_Work]) -> int:
        return self._dense.nbytes + _amount(missing).nbytes

    def _pack(self, destination: Path, work: _Work, meter: Meter) -> None:
        if work.rare:
            work = replace(work, rare=self._rare(work.layer, work.layer.experts))
        said = {kind: {"parts": [part.entry() for part in parts]} for kind, parts in work.parts.items()}
        with RecordWriter(destination / work.file) as writer:
            for expert in range(work.layer.experts):
                parameters = _read_expert(self._checkpoint, work.layer, expert)
                for kind, parts in work.parts.items():
                    key = work.layer.key(expert, kind)
                    writer.add(*key, *blocks(parts, parameters), metadata=said[kind])
                meter.advance(work.nbytes // work.layer.experts)
            self._checkpoint.check_unchanged()

    def _finish(self, destination: Path) -> None:
        for path in _files_beside(self._folder):
            write_whole(destination / path.name, [memoryview(read_whole(path))])
        dense = write_whole(destination / DENSE, self._dense.blocks())
        self._checkpoint.check_unchanged()
        indexes = [
            xxhash.xxh3_64_hexdigest(read_whole(index_path(destination / work.file))) for work in self._work
        ]
        text = replace(self._manifest, indexes=tuple(indexes), dense=dense).text()
        write_whole(destination / FILE, [memoryview(text.encode())])
        (destination / UNFINISHED).unlink()

    def _report(self, destination: Path, kept_layers: int, seconds: float) -> PackReport:
        forms = self._manifest.forms
        by_kind = _occupied(destination / work.file for work in self._work)
        layers = [work.layer for work in self._work]
        return PackReport(
            destination=str(destination),
            **asdict(forms),
            layers=len(layers),
            experts=sum(layer.experts for layer in layers),
            kept_layers=kept_layers,
            stored_nbytes=sum(
                layer.experts * each.nbytes for layer in layers for each in layer.parameters.values()
            ),
            high_nbytes=by_kind[forms.high],
            low_nbytes=by_kind[forms.low] if forms.low else 0,
            dense_nbytes=self._dense.nbytes,
            not_quantised=tuple(_not_quantised(self._work)),
            seconds=seconds,
        )


def _amount(works: list[_Work]) -> Amount:
    return Amount(sum(work.layer.experts for work in works), sum(work.nbytes for work in works))


def _occupied(files: Iterable[Path]) -> Counter[str]:
    """Bytes that the records of each kind take."""
    found: Counter[str] = Counter()
    for path in files:
        with RecordFile.open(path, verify="never") as file:
            for key in file:
                found[key[1]] += file[key].occupied
    return found


def _not_quantised(works: list[_Work]) -> Iterator[str]:
    for work in works:
        for kind in QUANTISED.keys() & work.parts.keys():
            for part in work.parts[kind]:
                if len(part.shape) == 2 and not isinstance(part.content, Format):
                    yield f"{work.layer.module}.{part.name} in {kind}"


def _packed_layer(layer: Layer) -> PackedLayer:
    parameters = {
        name: PackedParameter(name=name, shape=each.shape, stored=each.stored, dtype=each.dtype)
        for name, each in layer.parameters.items()
    }
    return PackedLayer(number=layer.number, module=layer.module, experts=layer.experts, parameters=parameters)


def _read_expert(checkpoint: TensorFiles, layer: Layer, expert: int) -> dict[str, torch.Tensor]:
    """An expert's parameters, as stored."""

    def read(leaf: Stored) -> Array:
        content = bytearray(leaf.nbytes)
        checkpoint.read_run(checkpoint[leaf.name], leaf.start, memoryview(content))
        return np.frombuffer(content, dtype=f"u{leaf.itemsize}").reshape(leaf.shape)

    found: dict[str, torch.Tensor] = {}
    for name, recipe in layer.recipes(expert).items():
        each = layer.parameters[name]
        flat = np.ascontiguousarray(assemble(recipe, read)).reshape(-1).view(np.uint8)
        found[name] = torch.from_numpy(flat).view(each.stored).view(each.shape)
    return found


def _describe(checkpoint: TensorFiles) -> Iterator[SourceFile]:
    for number, (path, version) in enumerate(zip(checkpoint.paths, checkpoint.versions, strict=True)):
        start = bytearray(min(checkpoint.header_nbytes[number] + MIB, version.nbytes))
        checkpoint.read_into(number, 0, memoryview(start))
        yield SourceFile(
            name=path.name,
            nbytes=version.nbytes,
            changed_ns=max(version.changed_ns, 0),
            xxh3_64=xxhash.xxh3_64_hexdigest(start),
        )


def _files_beside(folder: Path) -> list[Path]:
    """The files that a packed model needs too: configuration, tokenizer, templates, licence."""
    found = {path for pattern in BESIDE for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.name.endswith(".index.json") and path.name != FILE)


def _is_packed(destination: Path, work: _Work) -> bool:
    return index_path(destination / work.file).exists()


def _check_room(destination: Path, nbytes: int) -> None:
    free = shutil.disk_usage(destination).free
    if nbytes > free:
        raise TierFull(
            f"packing into {destination} takes {format_size(nbytes)} more, and {format_size(free)} are free there; "
            "name a folder on another disk, or pack without low copies"
        )


@contextmanager
def _alone_in(destination: Path) -> Generator[None]:
    """Make a folder if there is none, and keep other processes' packing out of it."""
    try:
        destination.mkdir(parents=True, exist_ok=True)
        fd = os.open(destination, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise TransferFailed(f"{destination} cannot be used: {error.strerror}", errno=error.errno) from error
    try:
        _lock(fd, destination)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, destination: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SpillMisuse(
            f"another process is packing into {destination}; wait until it has ended"
        ) from error
