"""Experts that no model has: random weights of a chosen shape, in a folder such as `pack` writes.

It knows shapes and how a packed folder is laid out; not traces or engines. Shapes that no machine here could train can
so be timed, but nothing be said of quality. Invariants: the same shape and seed give the same bytes; one expert's
record is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from undercroft.errors import InvalidInput
from undercroft.kernels.format import BLOCK_ROWS, Format
from undercroft.kernels.packed import Codes, pack
from undercroft.moe.dense import write_whole
from undercroft.moe.manifest import (
    DENSE,
    FILE,
    Forms,
    Manifest,
    PackedLayer,
    PackedParameter,
    read_whole,
    records_file,
)
from undercroft.moe.packed import PackedExperts, is_packed, open_packed
from undercroft.moe.packing import Part, arrange
from undercroft.store.index import index_path
from undercroft.store.ranges import round_up
from undercroft.store.writer import RecordWriter

DIFFERENT = 256
"""How many experts differ before the first comes again: each is the one before, moved by a block of rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """What the experts are like: gated feed-forward blocks, as Mixtral, Qwen and most families have them.

    Attributes:
        layers: how many have experts.
        experts: in each layer.
        hidden: width of what goes in and comes out; a multiple of 32.
        intermediate: width between; a multiple of 32.
        high: the kind of the full copies: "keep", "bfloat16", "int8" or "int4".
        low: that of the low copies: "int4", "int2" or None.
        group: columns of a quantised matrix that share a scale.
        dtype: of the activations, and of weights that are kept.

    Raises:
        InvalidInput: sizes below 1 or of no whole blocks of 32 rows, or a kind that is not offered.
    """

    layers: int
    experts: int
    hidden: int
    intermediate: int
    high: str = "int4"
    low: str | None = None
    group: int = 32
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if min(self.layers, self.experts, self.hidden, self.intermediate) < 1:
            raise InvalidInput("layers, experts, hidden and intermediate must be at least 1")
        if self.hidden % BLOCK_ROWS or self.intermediate % BLOCK_ROWS:
            raise InvalidInput(f"hidden and intermediate must be multiples of {BLOCK_ROWS}")
        _ = self.forms

    @property
    def forms(self) -> Forms:
        """The kinds, as a manifest has them."""
        return Forms(high=self.high, low=self.low, group=self.group)

    @property
    def parameters(self) -> dict[str, PackedParameter]:
        """Of one expert, by name."""
        shapes = {
            "gate_up_proj": (2 * self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }
        return {
            name: PackedParameter(name=name, shape=shape, stored=self.dtype, dtype=self.dtype)
            for name, shape in shapes.items()
        }

    def parts(self, kind: str) -> tuple[Part, ...]:
        """What the record of a kind holds."""
        return arrange(self.parameters.values(), kind, self.group, transposed=False)

    def record_nbytes(self, kind: str) -> int:
        """Bytes of one expert's copy of a kind, on disk and in memory."""
        last = self.parts(kind)[-1]
        return round_up(last.offset + last.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all copies of all experts."""
        return self.layers * self.experts * sum(map(self.record_nbytes, self.forms.kinds))


def random_experts(
    folder: Path, shape: ExpertShape, *, seed: int = 0, on_layer: Callable[[int], None] | None = None
) -> PackedExperts:
    """Open a folder of random experts, written first if it is not there.

    Args:
        folder: a new or empty one, or one that an earlier call wrote.
        shape: of the experts.
        seed: of the weights.
        on_layer: told how many layers are written.

    Raises:
        InvalidInput: the folder holds something else.
        TierFull, TransferFailed: the disk did not take them.
        CorruptRecord: the folder was changed since it was written.
    """
    wanted = _manifest(shape, seed)
    if not is_packed(folder):
        _write(folder, shape, wanted, seed, on_layer)
    found = Manifest.parse(read_whole(folder / FILE), str(folder / FILE))
    if replace(found, indexes=(), dense="") != wanted:
        raise InvalidInput(
            f"{folder} holds {found.source} in another shape; name a folder that is new or empty"
        )
    return open_packed(folder)


def _manifest(shape: ExpertShape, seed: int) -> Manifest:
    layers = (
        PackedLayer(
            number=number,
            module=f"layers.{number}.experts",
            experts=shape.experts,
            parameters=shape.parameters,
        )
        for number in range(shape.layers)
    )
    source = f"random weights of seed {seed}"
    return Manifest(source=source, files=(), forms=shape.forms, layers=tuple(layers), tensors={})


def _write(
    folder: Path, shape: ExpertShape, manifest: Manifest, seed: int, on_layer: Callable[[int], None] | None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if strange := next(folder.iterdir(), None):
        raise InvalidInput(f"{folder} holds {strange.name}; name a folder that is new or empty")
    random = torch.Generator().manual_seed(seed)
    content = {kind: _Content(shape.parts(kind), random) for kind in shape.forms.kinds}
    indexes: list[str] = []
    for layer in manifest.layers:
        path = folder / records_file(layer.number)
        _write_layer(path, layer, content)
        indexes.append(xxhash.xxh3_64_hexdigest(read_whole(index_path(path))))
        if on_layer is not None:
            on_layer(layer.number + 1)
    dense = write_whole(folder / DENSE, [])
    complete = replace(manifest, indexes=tuple(indexes), dense=dense)
    write_whole(folder / FILE, [memoryview(complete.text().encode())])


def _write_layer(path: Path, layer: PackedLayer, content: Mapping[str, _Content]) -> None:
    with RecordWriter(path) as writer:
        for expert in range(layer.experts):
            for kind, each in content.items():
                number = layer.number * layer.experts + expert
                writer.add(*layer.key(expert, kind), *each.of(number), metadata=each.said)


class _Content:
    """The content of the records of a kind: each expert's matrices are a run of blocks of rows of a longer one.

    Args:
        parts: of a record.
        random: what draws the weights.
    """

    def __init__(self, parts: Sequence[Part], random: torch.Generator) -> None:
        self.said = {"parts": [part.entry() for part in parts]}
        self._blocks = [part.matrix[0] // BLOCK_ROWS for part in parts]
        self._longer = [
            _rows(part, blocks + DIFFERENT, random) for part, blocks in zip(parts, self._blocks, strict=True)
        ]
        ends = [*(part.offset for part in parts[1:]), parts[-1].offset + parts[-1].nbytes]
        self._zeros = [  # levels of columns that are on one level, and what lies between parts
            torch.zeros(end - part.offset - blocks * longer.shape[1], dtype=torch.uint8)
            for part, end, blocks, longer in zip(parts, ends, self._blocks, self._longer, strict=True)
        ]

    def of(self, number: int) -> Iterator[Tensor]:
        """The parts of an expert."""
        first = number % DIFFERENT
        for blocks, longer, zeros in zip(self._blocks, self._longer, self._zeros, strict=True):
            yield longer[first : first + blocks]
            yield zeros


def _rows(part: Part, blocks: int, random: torch.Generator) -> Tensor:
    """Random blocks of rows as such a part stores them: uint8 [blocks, bytes of one].

    The weights' variance is 1 / columns, so that products keep the size of what they multiply; quantised ones are
    uniform, since a search for good scales would find nothing in noise.
    """
    rows, columns = blocks * BLOCK_ROWS, part.matrix[1]
    if not isinstance(part.content, Format):
        weights = torch.randn(rows, columns, generator=random) / columns**0.5
        return weights.to(part.content).view(torch.uint8).view(blocks, -1)
    groups, levels = part.content.groups(columns), part.content.levels
    least = -levels if part.content.symmetric else 0
    variance = ((levels - least + 1) ** 2 - 1) / 12
    codes = torch.randint(least, levels + 1, (rows, groups, part.content.group), generator=random)
    scale = torch.full((rows, groups), (columns * variance) ** -0.5, dtype=torch.bfloat16)
    if part.content.symmetric:
        return pack(Codes(codes.to(torch.int8), scale, None), part.content).view(blocks, -1)
    return pack(Codes(codes.to(torch.uint8), scale, scale * (-levels / 2)), part.content).view(blocks, -1)
