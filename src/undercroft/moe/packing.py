"""How one expert becomes the content of a record, and which bytes of it are which parameter.

It knows shapes, precisions and the packed layout of `kernels`; not files, nor where experts come from. Invariant:
what a record holds is said by its parts alone, and each begins at a multiple of 64 bytes, or at its phase behind one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from undercroft.errors import CorruptRecord, InvalidInput, UnsupportedModel
from undercroft.kernels.format import GROUPS, Format, packed_nbytes
from undercroft.kernels.lossless import Lossless, rare_in, squeeze
from undercroft.kernels.quantise import quantise
from undercroft.moe.bank import PHASED
from undercroft.moe.levels import factors, levels_of
from undercroft.store.ranges import round_up
from undercroft.store.record import DTYPES

ALIGNMENT = 64
"""Bytes of which every part's offset is a multiple, but for its phase: a line of the cache."""
QUANTISED = {"int8": 8, "int4": 4, "int2": 2}
"""Bits of a weight in the kinds of records that hold quantised matrices."""
LOSSLESS = "lossless"
"""The kind of records whose bfloat16 numbers take fewer bytes, every bit kept."""
KINDS = ("keep", LOSSLESS, "bfloat16", *QUANTISED)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Described(Protocol):
    """A parameter of an expert."""

    @property
    def name(self) -> str:
        """Its name in the experts module."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one expert's part, in the model."""
        ...

    @property
    def stored(self) -> torch.dtype:
        """Its dtype in the checkpoint."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One parameter of an expert, as a record holds it.

    Attributes:
        name: the parameter's.
        offset: bytes into the record.
        shape: of the parameter in the model.
        content: the dtype of its elements, or the form in which they are quantised or squeezed.
        transposed: the quantised matrix is the parameter's transpose, so that its columns are the inputs.
        levelled: after the quantised matrix come its columns' `levels`, int8 [columns].
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    content: torch.dtype | Format | Lossless
    transposed: bool = False
    levelled: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of a quantised matrix."""
        rows, columns = self.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        if isinstance(self.content, Lossless):
            return self.content.nbytes
        if isinstance(self.content, Format):
            return packed_nbytes(self.content, *self.matrix) + self.levelled * self.matrix[1]
        return math.prod(self.shape) * self.content.itemsize

    def entry(self) -> dict[str, Any]:
        """What the record's metadata says of it."""
        where = {"name": self.name, "offset": self.offset, "shape": list(self.shape)}
        if isinstance(self.content, Lossless):
            return {**where, "rare": self.content.rare}
        if isinstance(self.content, Format):
            return {
                **where,
                "bits": self.content.bits,
                "group": self.content.group,
                "transposed": self.transposed,
                "levelled": self.levelled,
            }
        return {**where, "dtype": _NAMES[self.content]}


def arrange(
    parameters: Iterable[Described],
    kind: str,
    group: int,
    *,
    transposed: bool,
    rare: Mapping[str, int] | None = None,
    phases: Mapping[str, int] | None = None,
) -> tuple[Part, ...]:
    """The parts of an expert's record.

    Args:
        parameters: the expert's.
        kind: one of `KINDS`.
        group: columns that share a scale; fewer where only fewer divide a matrix.
        transposed: the parameters' matrices are [inputs, outputs].
        rare: for how many rare exponents lossless parts have room, by parameter; see `squeezable`.
        phases: of the parameters by name, heeded where they are kept; see `bank.Parameter.phase_of`.

    Raises:
        UnsupportedModel: elements that are no floating-point numbers can only be kept.
    """
    parts: list[Part] = []
    end = 0
    for each in parameters:
        content = _content(each, kind, group, transposed, rare or {})
        quantised = isinstance(content, Format)
        phase = (phases or {}).get(each.name, 0) if content in PHASED else 0
        part = Part(
            name=each.name,
            offset=round_up(end, ALIGNMENT) + phase,
            shape=each.shape,
            content=content,
            transposed=transposed and quantised,
            levelled=quantised,
        )
        parts.append(part)
        end = part.offset + part.nbytes
    return tuple(parts)


def blocks(parts: Iterable[Part], parameters: Mapping[str, Tensor]) -> Iterator[Tensor | bytes]:
    """The content of a record, piece by piece.

    Args:
        parts: from `arrange`.
        parameters: the expert's, by name, as the checkpoint has them.

    Raises:
        InvalidInput: a matrix to be quantised has elements that are not finite.
    """
    end = 0
    for part in parts:
        if part.offset > end:
            yield bytes(part.offset - end)
        yield _converted(part, parameters[part.name])
        end = part.offset + part.nbytes


def squeezable(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """How many rare exponents each parameter of an expert has that lossless records squeeze: those in bfloat16.

    Args:
        parameters: the expert's, by name, as the checkpoint has them.
    """
    return {name: rare_in(each) for name, each in parameters.items() if each.dtype is torch.bfloat16}


def parse_parts(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], nbytes: int
) -> tuple[Part, ...]:
    """The parts that a record's metadata describes, trusting nothing in it.

    Args:
        metadata: of the record.
        shapes: of the expert's parameters, by name.
        nbytes: of the record.

    Raises:
        CorruptRecord: it does not say where in the record each parameter lies.
    """
    try:
        parts = tuple(_parse(entry, shapes) for entry in metadata["parts"])
        placed = all(part.offset + part.nbytes <= nbytes for part in parts)
    except (KeyError, TypeError, ValueError) as error:  # InvalidInput is a ValueError
        raise CorruptRecord(f"a record does not say what it holds: {error}") from error
    if not placed or sorted(part.name for part in parts) != sorted(shapes):
        raise CorruptRecord("a record does not hold each parameter of its expert, whole and once")
    return parts


def _parse(entry: Any, shapes: Mapping[str, tuple[int, ...]]) -> Part:
    name, offset, shape = entry["name"], entry["offset"], tuple(entry["shape"])
    step = DTYPES[entry["dtype"]].itemsize if "dtype" in entry else ALIGNMENT
    if type(offset) is not int or offset < 0 or offset % step or shape != shapes[name]:
        raise ValueError(f"{name!r} cannot be {shape!r} at {offset!r}")
    if "rare" in entry:
        if type(entry["rare"]) is not int:
            raise ValueError(f"{entry['rare']!r} is no count")
        content = Lossless(math.prod(shape), entry["rare"])
        return Part(name=name, offset=offset, shape=shapes[name], content=content)
    if "dtype" in entry:
        return Part(name=name, offset=offset, shape=shapes[name], content=DTYPES[entry["dtype"]])
    bits, group, transposed = entry["bits"], entry["group"], entry["transposed"]
    levelled = entry.get("levelled", False)
    flags = type(transposed) is type(levelled) is bool
    if not (type(bits) is type(group) is int and flags and len(shape) == 2):
        raise ValueError(f"{name!r} of {shape!r} cannot be a packed matrix")
    content = Format(bits, group)
    return Part(
        name=name,
        offset=offset,
        shape=shapes[name],
        content=content,
        transposed=transposed,
        levelled=levelled,
    )


def _content(
    parameter: Described, kind: str, group: int, transposed: bool, rare: Mapping[str, int]
) -> torch.dtype | Format | Lossless:
    if kind == LOSSLESS and parameter.name in rare:
        squeezed = Lossless(math.prod(parameter.shape), rare[parameter.name])
        return squeezed if squeezed.nbytes < 2 * squeezed.count else parameter.stored
    if kind in ("keep", LOSSLESS):
        return parameter.stored
    if not parameter.stored.is_floating_point:
        raise UnsupportedModel(
            f"{parameter.name} is {parameter.stored} in the checkpoint, no floating-point numbers; pack with high "
            '"keep" and no low copies'
        )
    if kind == "bfloat16":
        return torch.bfloat16
    if len(parameter.shape) != 2:
        return parameter.stored
    columns = parameter.shape[0 if transposed else 1]
    fitting = [each for each in GROUPS if each <= group and columns % each == 0]
    return Format(QUANTISED[kind], fitting[-1]) if fitting else parameter.stored


def _converted(part: Part, parameter: Tensor) -> Tensor:
    if isinstance(part.content, Lossless):
        return squeeze(parameter, part.content)
    if not isinstance(part.content, Format):
        return parameter.to(part.content).contiguous()
    matrix = parameter.t() if part.transposed else parameter
    levels = levels_of(matrix) if part.levelled else None
    try:
        if levels is None:
            return quantise(matrix, part.content)
        return torch.cat([quantise(matrix.float() / factors(levels), part.content), levels.view(torch.uint8)])
    except InvalidInput as error:
        raise InvalidInput(f"{part.name}: {error}") from error
