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
from undercroft.kernels.bitwise_experts import PlainBlock, SqueezedBlock, exact_kernel
from undercroft.kernels.block import Block, ExpertKernel, Gated, available
from undercroft.kernels.format import Format, packed_nbytes
from undercroft.kernels.lossless import Lossless, restore
from undercroft.kernels.quantise import dequantise
from undercroft.models.tensor_files import StoredTensor
from undercroft.moe.bank import GATED, strides_of, view_of
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

WORKED_ON = 2
"""Experts whose weights may be in use at once: one, and of the one before what a forward has not let go of yet."""
Matrices = Block | PlainBlock | SqueezedBlock
"""Where an expert has its matrices."""
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
        self._offsets: dict[Key, Matrices] = {}
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

    def kernel(self, layer: int, *, low: bool) -> ExpertKernel | None:
        """What computes a layer's experts where they lie; None where copies are of several forms, or nothing does.

        Args:
            layer: its number.
            low: whether low copies may serve, too.
        """
        found = next(each for each in self.layers if each.number == layer)
        kinds = (self.high, self.low) if low and self.low is not None else (self.high,)
        layouts = {self._slots[found.key(expert, kind)] for expert in range(found.experts) for kind in kinds}
        kernels = set(map(_kernel, layouts))
        return kernels.pop() if len(kernels) == 1 else None

    def block(self, key: Key, lease: Lease) -> Matrices:
        """An expert of a layer that has a `kernel`, for as long as a lease holds its record.

        Args:
            key: from `PackedLayer.key`.
            lease: of the record's bytes.
        """
        if key not in self._offsets:
            self._offsets[key] = self._locate(key, lease)
        return self._offsets[key].at(lease.address)

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

    def _locate(self, key: Key, lease: Lease) -> Matrices:
        """An expert as offsets into its record; columns that are all on one level need none."""
        slots = {slot.part.name: slot for slot in self._slots[key]}
        gate_up, down = (slots[name] for name in GATED)
        if gate_up.format is None:
            return _exact_block(gate_up.part, down.part)
        found = self.parameters(key, lease)
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


def _kernel(slots: Sequence[_Slot]) -> ExpertKernel | None:
    """What computes a gated feed-forward block here, if that is what a record holds in one form."""
    found = {slot.part.name: slot for slot in slots}
    if found.keys() != set(GATED) or any(slot.part.transposed for slot in slots):
        return None
    gate_up, down = (found[name] for name in GATED)
    forms = {type(slot.part.content) for slot in slots}
    if forms == {Format}:
        fits = gate_up.rows == 2 * down.columns and down.rows == gate_up.columns
        return Gated(down.rows, down.columns) if fits and available() else None
    is_exact = all(slot.dtype is torch.bfloat16 for slot in slots) and len(forms) == 1
    return (
        exact_kernel(gate_up.part.shape, down.part.shape, squeezed=forms == {Lossless}) if is_exact else None
    )


def _exact_block(gate_up: Part, down: Part) -> PlainBlock | SqueezedBlock:
    one, other = gate_up.content, down.content
    if isinstance(one, Lossless) and isinstance(other, Lossless):
        return SqueezedBlock(gate_up.offset, one.rare, down.offset, other.rare)
    return PlainBlock(gate_up.offset, down.offset)


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
