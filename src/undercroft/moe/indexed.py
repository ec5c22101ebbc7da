"""Experts read where they lie, in the safetensors files of a checkpoint: no second copy.

It knows byte ranges and how they become an expert's parameters; not caches or models. Source offsets are multiples
of 8 at best, so whole blocks are read around them. Where the runs of a parameter lie side by side in the file, as they
mostly do, and at its phase where that counts, it is a view of what was read; other experts are put in order, on the
thread that read them.
Invariant: a file that changed since it was opened is never believed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from undercroft.errors import CorruptRecord, TransferFailed
from undercroft.kernels import ExpertKernel
from undercroft.kernels.bitwise_experts import PlainBlock, exact_kernel
from undercroft.models.checkpoint import Checkpoint
from undercroft.models.recipe import Array, Recipe, Stored, assemble, is_plain, leaves
from undercroft.models.tensor_files import LINE, Version
from undercroft.moe.bank import GATED, Layer, Parameter, view_of
from undercroft.moe.stock import Stock
from undercroft.store.disk import DiskFile, Syscalls, open_file
from undercroft.store.ranges import BLOCK, round_up
from undercroft.store.record import Key, Record
from undercroft.store.records import RecordSource
from undercroft.store.slab import Lease
from undercroft.store.transfer import Chunk, cut

KIND = "stored"
"""The kind of these records: each expert as the checkpoint has it."""


@dataclass(frozen=True, slots=True)
class Window:
    """Whole blocks of a file that hold some of an expert.

    Attributes:
        file: number of the file.
        offset: in it, of the first block.
        need: bytes until the last that is wanted; the file may end before the block does.
        place: bytes into the record.
    """

    file: int
    offset: int
    need: int
    place: int

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return round_up(self.need)


@dataclass(frozen=True, slots=True)
class Expert:
    """Where one expert lies, and where its parameters will be.

    Attributes:
        record: the room it takes.
        windows: what is read, in the order of the files.
        layer: that it belongs to.
        recipes: of its parameters.
        places: bytes into the record at which each parameter starts, once it is settled.
        in_order: the parameters are views of what was read.
    """

    record: Record
    windows: tuple[Window, ...]
    layer: Layer
    recipes: dict[str, Recipe]
    places: dict[str, int]
    in_order: bool


class IndexedExperts:
    """The experts of a checkpoint as records, one each; a `RecordSource`.

    Args:
        checkpoint: whose files they lie in; they are opened again, past the page cache.
        layers: what they are made of.
        syscalls: the seam for doubles.

    Attributes:
        files: itself, for a cache.
        layers: as given.

    Raises:
        TransferFailed: a file cannot be opened.
        UnsupportedModel: experts cannot be told apart, see `recipe.item`.
    """

    def __init__(
        self, checkpoint: Checkpoint, layers: Sequence[Layer], *, syscalls: Syscalls | None = None
    ) -> None:
        self.path = checkpoint.paths[0].parent
        self.files: list[RecordSource] = [self]
        self.layers = layers
        self._checkpoint = checkpoint
        self._files: list[DiskFile] = []
        try:
            for path in checkpoint.paths:
                self._files.append(_open(path, syscalls))
            self._check_unchanged()
            self._experts = {
                expert.record.key: expert for layer in layers for expert in self._locate_all(layer)
            }
        except BaseException:
            self.close()
            raise

    def parameters(self, key: Key, lease: Lease) -> dict[str, torch.Tensor]:
        """An expert's parameters, as stored, over a lease that holds it, which they keep alive."""
        storage, expert = lease.storage(0, lease.nbytes), self._experts[key]
        return {
            name: view_of(storage, expert.places[name], each.stored, each.shape, each.strides)
            for name, each in expert.layer.parameters.items()
        }

    def kernel(self, layer: int, *, low: bool) -> ExpertKernel | None:
        """What computes a layer's experts where they lie, if something here does; there are no low copies."""
        found = next(each for each in self.layers if each.number == layer).parameters
        if set(found) != set(GATED) or any(each.stored is not torch.bfloat16 for each in found.values()):
            return None
        return exact_kernel(*(found[name].shape for name in GATED), squeezed=False)

    def block(self, key: Key, lease: Lease) -> PlainBlock:
        """An expert of a layer that has a `kernel`, for as long as a lease holds it."""
        places = self._experts[key].places
        return PlainBlock(*(lease.address + places[name] for name in GATED))

    def stock(self, used: int) -> Stock:
        """What a policy needs to know of them.

        Args:
            used: how many experts a token uses in each layer.
        """
        rooms = [self._experts[layer.key(0, KIND)].record.occupied for layer in self.layers]
        most = max(layer.experts for layer in self.layers)
        return Stock.of(rooms, experts=most, used=used, high=KIND)

    def chunks(self, pieces: Sequence[tuple[Record, int]]) -> list[Chunk]:
        """See `RecordSource`."""
        return [chunk for record, address in pieces for chunk in self._chunks(record, address)]

    def settle(self, record: Record, address: int, *, moved: bool) -> None:
        """Put an expert in order that was read to `address`; read it again first if it was not `moved`.

        Raises:
            CorruptRecord: a file was changed or became shorter.
            TransferFailed: the disk failed again.
        """
        if not moved:
            for chunk in self._chunks(record, address):
                chunk.file.read(chunk.offset, chunk.iovecs, chunk.need)
        self._check_unchanged()
        expert = self._experts[record.key]
        if not expert.in_order:
            self._put_in_order(expert, address)

    def close(self) -> None:
        """Close the files, which nobody may be reading; again is allowed."""
        for file in self._files:
            file.close()

    def __getitem__(self, key: tuple[str, str]) -> Record:
        return self._experts[Key(*key)].record

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._experts)

    def _locate_all(self, layer: Layer) -> Iterator[Expert]:
        """The experts of a layer; all take the same room, whatever blocks they touch."""
        recipes = [layer.recipes(number) for number in range(layer.experts)]
        windows = [_windows(self._spans(each)) for each in recipes]
        read = max(sum(window.nbytes for window in each) for each in windows)
        nbytes = max(read, *(round_up(_places(layer, number)[1]) for number in range(layer.experts)))
        for number in range(layer.experts):
            yield self._locate(layer, number, recipes[number], windows[number], nbytes)

    def _locate(
        self, layer: Layer, number: int, recipes: dict[str, Recipe], windows: tuple[Window, ...], nbytes: int
    ) -> Expert:
        key = layer.key(number, KIND)
        record = Record(
            name=key.name,
            kind=key.kind,
            offset=windows[0].offset,
            nbytes=nbytes,
            dtype="uint8",
            shape=(nbytes,),
            checksum=0,
            metadata={},
        )
        places = {
            name: self._in_place(recipe, windows, layer.parameters[name], number)
            for name, recipe in recipes.items()
        }
        direct = {name: place for name, place in places.items() if place is not None}
        if len(direct) == len(places):
            return Expert(record, windows, layer, recipes, direct, in_order=True)
        return Expert(record, windows, layer, recipes, _places(layer, number)[0], in_order=False)

    def _spans(self, recipes: dict[str, Recipe]) -> list[tuple[int, int, int]]:
        return [self._span(leaf) for recipe in recipes.values() for leaf in leaves(recipe)]

    def _span(self, leaf: Stored) -> tuple[int, int, int]:
        stored = self._checkpoint[leaf.name]
        start = stored.offset + leaf.start
        return stored.file, start, start + leaf.nbytes

    def _place(self, leaf: Stored, windows: Sequence[Window]) -> int:
        file, start, end = self._span(leaf)
        return next(
            window.place + start - window.offset
            for window in windows
            if window.file == file and window.offset <= start and end <= window.offset + window.need
        )

    def _in_place(
        self, recipe: Recipe, windows: Sequence[Window], parameter: Parameter, expert: int
    ) -> int | None:
        """Where a parameter lies in what was read; None if its runs are not side by side there, or out of phase."""
        runs = [(self._place(leaf, windows), leaf.nbytes) for leaf in leaves(recipe)]
        beside = all(place + nbytes == after for (place, nbytes), (after, _) in pairwise(runs))
        aligned = runs[0][0] % next(leaves(recipe)).itemsize == 0
        in_phase = not parameter.is_phased or runs[0][0] % LINE == parameter.phase_of(expert)
        return runs[0][0] if beside and aligned and in_phase and is_plain(recipe) else None

    def _chunks(self, record: Record, address: int) -> Iterator[Chunk]:
        for window in self._experts[record.key].windows:
            for start, nbytes in cut(window.nbytes):
                memory = (address + window.place + start, nbytes)
                need = min(nbytes, window.need - start)
                yield Chunk(self._files[window.file], window.offset + start, (memory,), need, memory)

    def _put_in_order(self, expert: Expert, address: int) -> None:
        room: Any = (ctypes.c_char * expert.record.nbytes).from_address(address)
        memory: np.ndarray[tuple[int], np.dtype[np.uint8]] = np.frombuffer(room, dtype=np.uint8)

        def read(leaf: Stored) -> Array:
            start = self._place(leaf, expert.windows)
            return memory[start : start + leaf.nbytes].copy().view(f"u{leaf.itemsize}").reshape(leaf.shape)

        made = {name: assemble(recipe, read) for name, recipe in expert.recipes.items()}
        for name, array in made.items():
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            memory[expert.places[name] : expert.places[name] + flat.size] = flat

    def _check_unchanged(self) -> None:
        for path, file, version in zip(
            self._checkpoint.paths, self._files, self._checkpoint.versions, strict=True
        ):
            if Version.of(file.fd) != version:
                raise CorruptRecord(f"{path} was changed since it was opened; load the model again")


def _windows(spans: Sequence[tuple[int, int, int]]) -> tuple[Window, ...]:
    windows: list[Window] = []
    for file, start, end in sorted(set(spans)):
        last = windows[-1] if windows else None
        if last is not None and last.file == file and start <= last.offset + last.nbytes:
            need = max(last.need, end - last.offset)
            windows[-1] = Window(file, last.offset, need, last.place)
            continue
        offset = start // BLOCK * BLOCK
        windows.append(Window(file, offset, end - offset, last.place + last.nbytes if last else 0))
    return tuple(windows)


def _places(layer: Layer, expert: int) -> tuple[dict[str, int], int]:
    """Where an expert's parameters are when they are put in order, one after another, and where the last ends."""
    places: dict[str, int] = {}
    end = 0
    for name, each in layer.parameters.items():
        places[name] = round_up(end, LINE) + each.phase_of(expert)
        end = places[name] + each.nbytes
    return places, end


def _open(path: Path, syscalls: Syscalls | None) -> DiskFile:
    try:
        return open_file(str(path), os.O_RDONLY, name=str(path), syscalls=syscalls)
    except OSError as error:
        raise TransferFailed(f"{path} cannot be read: {error.strerror}", errno=error.errno) from error
