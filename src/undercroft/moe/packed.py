"""The experts of a packed folder, as records for a cache.

It knows record files and what their records hold; not caches, engines or transformers. Invariants: nothing in the
folder is believed before it is checked; what `parameters` gives lies inside the lease that it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import xxhash
from torch import Tensor

from undercroft.errors import BudgetExceeded, CorruptRecord
from undercroft.kernels import bitwise_lossless
from undercroft.kernels.bitwise_lossless import Squeezed
from undercroft.kernels.block import Block, Gated, available
from undercroft.kernels.format import Format, packed_nbytes
from undercroft.kernels.lossless import Lossless, restore
from undercroft.kernels.quantise import dequantise
from undercroft.models.tensor_files import StoredTensor
from undercroft.moe.bank import strides_of, view_of
from undercroft.moe.dense import digest_of
from undercroft.moe.levels import factors
from undercroft.moe.manifest import DENSE, FILE, Manifest, PackedLayer, read_whole, records_file
from undercroft.moe.packing import ALIGNMENT, Part, parse_parts
from undercroft.moe.stock import Stock
from undercroft.store.disk import Syscalls
from undercroft.store.index import index_path
from undercroft.store.ranges import round_up
from undercroft.store.record import Key, Record
from undercroft.store.records import RecordFile, Verify
from undercroft.store.slab import Lease, Lender, Slab

GATED = ("gate_up_proj", "down_proj")
"""What most families call the two matrices of an expert."""
WORKED_ON = 2
"""Experts whose weights may be in use at once: one, and of the one before what a forward has not let go of yet."""
NOWHERE = -1
"""The file of a tensor that is not in the folder as such."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A quantised matrix, over the lease that holds its bytes.

    Attributes:
        packed: uint8 [packed_nbytes(format, rows, columns)], for `kernels.linear`.
        format: of it.
        rows: outputs.
        columns: inputs.
        transposed: the parameter of the model is [columns, rows].
        inputs: float32 [columns], what inputs are multiplied by first; None for nothing.
    """

    packed: Tensor
    format: Format
    rows: int
    columns: int
    transposed: bool
    inputs: Tensor | None = None

    def tensor(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The parameter that the bytes stand for, in the model's shape."""
        matrix = dequantise(self.packed, self.format, self.rows, self.columns)
        matrix = (matrix if self.inputs is None else matrix * self.inputs).to(dtype)
        return matrix.t() if self.transposed else matrix


@dataclass(frozen=True, slots=True)
class _Slot:
    """A part, and what of it is wanted at every read: of a quantised matrix its end and shape, else the strides.

    Of what is lossless also: the bytes that it takes restored.
    """

    part: Part
    dtype: torch.dtype = torch.uint8
    strides: tuple[int, ...] = ()
    format: Format | None = None
    end: int = 0
    rows: int = 0
    columns: int = 0
    restored: int = 0

    @staticmethod
    def of(part: Part) -> _Slot:
        """Of a part."""
        if isinstance(part.content, Lossless):
            room = round_up(2 * part.content.count, ALIGNMENT)
            return _Slot(part, torch.bfloat16, strides_of(part.shape), restored=room)
        if not isinstance(part.content, Format):
            return _Slot(part, part.content, strides_of(part.shape))
        end = part.offset + packed_nbytes(part.content, *part.matrix)
        return _Slot(part, format=part.content, end=end, rows=part.matrix[0], columns=part.matrix[1])


class PackedExperts:
    """The experts of a packed folder; made by `open_packed`, and a context manager.

    Attributes:
        folder: where it is. Its other weights are `Checkpoint(folder)`.
        files: the record files of the layers, for a cache.
        layers: what they are made of.
        high: the kind of the full copies.
        low: that of the low copies; None where there are none.
        tensors: the tensors of the original checkpoint that experts were made of, for a loader that must hear of
            every name; their file is `NOWHERE`.
        workshop: lends the memory in which lossless parts are restored.
    """

    def __init__(self, folder: Path, manifest: Manifest, files: list[RecordFile]) -> None:
        self.folder, self.files = folder, files
        self.layers, forms = manifest.layers, manifest.forms
        self.high, self.low = forms.high, forms.low
        self.tensors = {
            name: StoredTensor(name, NOWHERE, dtype, shape, 0)
            for name, (dtype, shape) in manifest.tensors.items()
        }
        self.workshop: Lender | None = None
        self._slots: dict[Key, tuple[_Slot, ...]] = {}
        self._level: set[tuple[Key, str]] = set()
        self._offsets: dict[Key, Block] = {}
        for layer, file in zip(self.layers, files, strict=True):
            for kind in forms.kinds:
                self._slots.update(_all_slots(layer, file, kind))

    def parameters(self, key: Key, lease: Lease) -> dict[str, Tensor | PackedMatrix]:
        """An expert's parameters by name, over a lease that holds its record, which they keep alive.

        Args:
            key: from `PackedLayer.key`.
            lease: of the record's bytes. Do not write to what is returned.
        """
        storage, slots = lease.storage(0, lease.nbytes), self._slots[key]
        found = {slot.part.name: self._usable(key, slot, storage) for slot in slots if not slot.restored}
        return found if len(found) == len(slots) else found | self._restored(slots, storage)

    @property
    def restored_nbytes(self) -> int:
        """What a workshop lends while an expert is used, for what is lossless in it; 0 where nothing is."""
        return max(sum(slot.restored for slot in slots) for slots in self._slots.values())

    def squeezes(self, layer: int) -> bool:
        """Whether kernels here multiply a token with each full copy of a layer as it lies, as `squeezed` gives it."""
        found = next(each for each in self.layers if each.number == layer)
        layouts = {self._slots[found.key(expert, self.high)] for expert in range(found.experts)}
        return all(
            _are_squeezed(slots) and all(bitwise_lossless.reproduces(slot.part.shape[1]) for slot in slots)
            for slots in layouts
        )

    def squeezed(self, key: Key, lease: Lease) -> dict[str, Squeezed] | None:
        """An expert's matrices by name, squeezed as they lie; None for one that is not lossless.

        Args:
            key: from `PackedLayer.key`, of a layer that `squeezes`.
            lease: of the record's bytes, which they keep alive.
        """
        slots = self._slots[key]
        if not _are_squeezed(slots):
            return None
        storage = lease.storage(0, lease.nbytes)
        return {slot.part.name: _squeezed(slot.part, storage) for slot in slots}

    def gated(self, layer: int) -> Gated | None:
        """The sizes of a layer's experts, where each copy is a `Block` that the kernels here can compute."""
        found = next(each for each in self.layers if each.number == layer)
        kinds = (self.high,) if self.low is None else (self.high, self.low)
        layouts = [self._slots[found.key(expert, kind)] for expert in range(found.experts) for kind in kinds]
        sizes = set(map(_gated, layouts))
        return sizes.pop() if len(sizes) == 1 and available() else None

    def block(self, key: Key, lease: Lease) -> Block:
        """An expert of a layer that is `gated`, for as long as a lease holds its record.

        Args:
            key: from `PackedLayer.key`.
            lease: of the record's bytes.
        """
        if key not in self._offsets:
            self._offsets[key] = self._locate(key, lease)
        at, offset = lease.address, self._offsets[key]
        return Block(
            at + offset.gate_up,
            offset.gate_up_levels and at + offset.gate_up_levels,
            offset.bits,
            offset.group,
            at + offset.down,
            offset.down_levels and at + offset.down_levels,
            offset.down_bits,
            offset.down_group,
        )

    def stock(self, used: int) -> Stock:
        """What a policy needs to know of them.

        Args:
            used: how many experts a token uses in each layer.
        """
        return Stock.of(
            self._sizes(self.high),
            experts=max(layer.experts for layer in self.layers),
            used=used,
            high=self.high,
            low=self.low,
            low_nbytes=self._sizes(self.low) if self.low else (),
        )

    def close(self) -> None:
        """Close the files, which nobody may be reading; again is allowed."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _locate(self, key: Key, lease: Lease) -> Block:
        """An expert as a `Block` of offsets into its record; columns that are all on one level need none."""
        found = self.parameters(key, lease)
        slots = {slot.part.name: slot for slot in self._slots[key]}
        fields: list[int] = []
        for name in GATED:
            matrix, slot = found[name], slots[name]
            assert isinstance(matrix, PackedMatrix)
            levels = 0 if matrix.inputs is None else slot.end
            fields += [slot.part.offset, levels, matrix.format.bits, matrix.format.group]
        return Block._make(fields)

    def _usable(self, key: Key, slot: _Slot, storage: torch.UntypedStorage) -> Tensor | PackedMatrix:
        part = slot.part
        if slot.format is None:
            return view_of(storage, part.offset, slot.dtype, part.shape, slot.strides)
        inputs = None
        if part.levelled and (key, part.name) not in self._level:
            levels = view_of(storage, slot.end, torch.int8, (slot.columns,), (1,))
            if levels.any():
                inputs = factors(levels)
            else:
                self._level.add((key, part.name))
        packed = view_of(storage, part.offset, torch.uint8, (slot.end - part.offset,), (1,))
        return PackedMatrix(packed, slot.format, slot.rows, slot.columns, part.transposed, inputs)

    def _restored(self, slots: Sequence[_Slot], storage: torch.UntypedStorage) -> dict[str, Tensor]:
        """The lossless ones of an expert's parts, in memory of the workshop, which they keep."""
        room, at = self._lend(sum(slot.restored for slot in slots)), 0
        found: dict[str, Tensor] = {}
        for slot in slots:
            part, form = slot.part, slot.part.content
            if isinstance(form, Lossless):
                squeezed = view_of(storage, part.offset, torch.uint8, (form.nbytes,), (1,))
                found[part.name] = view_of(room, at, slot.dtype, part.shape, slot.strides)
                restore(squeezed, form, found[part.name])
                at += slot.restored
        return found

    def _lend(self, nbytes: int) -> torch.UntypedStorage:
        if self.workshop is None:
            self.workshop = Slab(WORKED_ON * round_up(self.restored_nbytes))
        if (lease := self.workshop.lease(nbytes)) is None:
            raise BudgetExceeded(
                nbytes,
                WORKED_ON * self.restored_nbytes,
                hint="Let go of one expert's weights before the next.",
            )
        return lease.storage(0, nbytes)

    def _sizes(self, kind: str) -> list[int]:
        return [file[layer.key(0, kind)].nbytes for layer, file in zip(self.layers, self.files, strict=True)]


def _gated(slots: Sequence[_Slot]) -> Gated | None:
    """The sizes of a gated feed-forward block, if that is what a record holds, quantised."""
    found = {slot.part.name: slot for slot in slots}
    if found.keys() != set(GATED) or any(slot.format is None or slot.part.transposed for slot in slots):
        return None
    gate_up, down = (found[name] for name in GATED)
    fits = gate_up.rows == 2 * down.columns and down.rows == gate_up.columns
    return Gated(down.rows, down.columns) if fits else None


def _are_squeezed(slots: Sequence[_Slot]) -> bool:
    """Whether a record holds a gated feed-forward block, lossless."""
    shapes = {slot.part.name: slot.part.shape for slot in slots if slot.restored}
    if len(slots) != len(GATED) or shapes.keys() != set(GATED):
        return False
    gate_up, down = (shapes[name] for name in GATED)
    return len(gate_up) == len(down) == 2 and gate_up == (2 * down[1], down[0])


def _squeezed(part: Part, storage: torch.UntypedStorage) -> Squeezed:
    assert isinstance(part.content, Lossless)
    packed = view_of(storage, part.offset, torch.uint8, (part.content.nbytes,), (1,))
    return Squeezed(packed, part.content, *part.matrix)


def is_packed(folder: str | Path) -> bool:
    """Whether a folder says that it holds a packed model, complete."""
    return (Path(folder) / FILE).is_file()


def open_packed(
    folder: str | Path, *, verify: Verify = "once", syscalls: Syscalls | None = None
) -> PackedExperts:
    """Open the experts of a folder that `pack` wrote.

    Args:
        folder: the folder.
        verify: compare the checksums of experts at their first read, at every one, or never. Unless never, that of
            all other weights is compared now, which reads them.
        syscalls: the seam for doubles.

    Raises:
        InvalidInput: there is no packed model, or no such `verify`.
        WrongVersion: it is of another version.
        CorruptRecord: something in it was changed, is missing, or describes what cannot be.
        TransferFailed: it cannot be read.
    """
    place = Path(folder)
    manifest = Manifest.parse(read_whole(place / FILE), str(place / FILE))
    if len(manifest.indexes) != len(manifest.layers) or not manifest.layers:
        raise CorruptRecord(f"{place} was not packed to its end; pack it again")
    if verify != "never" and digest_of(place / DENSE) != manifest.dense:
        raise CorruptRecord(f"{place / DENSE} was changed after it was written; pack the model again")
    files: list[RecordFile] = []
    try:
        for number, digest in enumerate(manifest.indexes):
            files.append(_open_records(place / records_file(number), digest, verify, syscalls))
        return PackedExperts(place, manifest, files)
    except BaseException:
        for file in files:
            file.close()
        raise


def _open_records(path: Path, digest: str, verify: Verify, syscalls: Syscalls | None) -> RecordFile:
    if not index_path(path).exists():
        raise CorruptRecord(f"{index_path(path)} is missing; pack the model again")
    if xxhash.xxh3_64_hexdigest(read_whole(index_path(path))) != digest:
        raise CorruptRecord(f"{index_path(path)} was changed after it was written; pack the model again")
    return RecordFile.open(path, verify=verify, syscalls=syscalls)


def _all_slots(layer: PackedLayer, file: RecordFile, kind: str) -> dict[Key, tuple[_Slot, ...]]:
    """What the records of a layer hold; all of a kind are of one size, which caches count on."""
    shapes = {name: each.shape for name, each in layer.parameters.items()}
    found: dict[Key, tuple[_Slot, ...]] = {}
    before: Record | None = None
    for expert in range(layer.experts):
        record = file.get(layer.key(expert, kind))
        if record is None or record.nbytes != (before or record).nbytes:
            raise CorruptRecord(f"{file.path} has no {kind} copy of expert {expert}, or one of another size")
        if before is not None and record.metadata == before.metadata:
            found[record.key] = found[before.key]
        else:
            parts = parse_parts(record.metadata, shapes, record.nbytes)
            found[record.key] = tuple(map(_Slot.of, parts))
        before = record
    return found
