"""What a packed folder says of itself: where it came from, in which forms it has the experts, and of which shapes.

It knows the JSON text and its rules (`docs/disk-format.md`); not how experts are packed or read. Invariant: a manifest
that `parse` returned has the types and the ranges that it says, whoever wrote the text.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import xxhash

from undercroft.errors import CorruptRecord, InvalidInput, TransferFailed, WrongVersion
from undercroft.kernels.format import GROUPS
from undercroft.store.record import DTYPES, MOST_DIMENSIONS, Key

FORMAT = "undercroft-pack"
VERSION = 1
FILE = "undercroft-pack.json"
DENSE = "dense.safetensors"
HIGH = ("keep", "lossless", "bfloat16", "int8", "int4")
LOW = ("int4", "int2", None)
_LARGEST = 256 * 1024 * 1024
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def records_file(layer: int) -> str:
    """The name of the record file of a layer's experts."""
    return f"experts-{layer:05}.records"


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """In which forms the experts are packed.

    Attributes:
        high: the kind of the full copies; "keep" and "lossless" have the checkpoint's own bits.
        low: that of the low copies; None means there are none.
        group: columns of a quantised matrix that share a scale.

    Raises:
        InvalidInput: a form that is not offered.
    """

    high: str
    low: str | None
    group: int

    def __post_init__(self) -> None:
        for name, offered in (("high", HIGH), ("low", LOW), ("group", GROUPS)):
            if getattr(self, name) not in offered:
                raise InvalidInput(f"{name} is one of {offered}, not {getattr(self, name)!r}")
        if self.high == self.low:
            raise InvalidInput(f"low copies in {self.low}, like the high ones, would save nothing")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of records that each expert has."""
        return (self.high,) if self.low is None else (self.high, self.low)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedParameter:
    """One parameter of the experts of a layer.

    Attributes:
        name: the attribute of the experts module.
        shape: of one expert's part, in the model.
        stored: its dtype in the checkpoint.
        dtype: its dtype in the model, opened as its configuration says.
    """

    name: str
    shape: tuple[int, ...]
    stored: torch.dtype
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayer:
    """The experts of one layer; what an engine needs of `bank.Layer`.

    Attributes:
        number: among the layers that have experts.
        module: the experts module's name in the model.
        experts: how many there are.
        parameters: by name.
    """

    number: int
    module: str
    experts: int
    parameters: Mapping[str, PackedParameter]

    def key(self, expert: int, kind: str) -> Key:
        """What one expert is asked for by."""
        return Key(f"layers.{self.number}.experts.{expert}", kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file of the checkpoint that was packed.

    Attributes:
        name: within its folder.
        nbytes: its length.
        changed_ns: when it was last written to, nanoseconds since 1970.
        xxh3_64: of its header and the first MiB after it, hexadecimal.
    """

    name: str
    nbytes: int
    changed_ns: int
    xxh3_64: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `undercroft-pack.json`.

    Attributes:
        source: the name on the hub, or of the folder, that was packed.
        files: its files.
        forms: of the experts.
        layers: of which the experts are.
        tensors: the checkpoint's tensors that experts were made of, and that are no longer there: dtype and shape.
        indexes: checksum of the index of each layer's record file; none while packing is under way.
        dense: checksum of `dense.safetensors`; empty while packing is under way.
    """

    source: str
    files: tuple[SourceFile, ...]
    forms: Forms
    layers: tuple[PackedLayer, ...]
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    indexes: tuple[str, ...] = ()
    dense: str = ""

    def text(self) -> str:
        """The JSON text that `parse` reads."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "source": {"name": self.source, "files": [asdict(file) for file in self.files]},
            **asdict(self.forms),
            "layers": [_layer_entry(layer) for layer in self.layers],
            "tensors": {
                name: {"dtype": _NAMES[dtype], "shape": list(shape)}
                for name, (dtype, shape) in self.tensors.items()
            },
            "indexes": list(self.indexes),
            "dense": self.dense,
        }
        return json.dumps({**content, "xxh3_64": _digest(content)})

    @staticmethod
    def parse(text: str | bytes, name: str) -> Manifest:
        """Read a manifest from anywhere, trusting nothing in it.

        Args:
            text: the JSON text.
            name: what errors call it.

        Raises:
            WrongVersion: it was written by a version that this one cannot read.
            CorruptRecord: it is no manifest, was changed, or describes what cannot be.
        """
        try:
            whole = json.loads(text)
            if whole["format"] != FORMAT or type(whole["version"]) is not int:
                raise ValueError(f"it does not say format {FORMAT!r} and its version")
            if whole["version"] != VERSION:
                raise WrongVersion(
                    f"{name} has version {whole['version']}; this Undercroft reads version {VERSION}"
                )
            if whole.pop("xxh3_64") != _digest(whole):
                raise ValueError("it was changed after it was written")
            return _manifest(whole)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CorruptRecord(f"{name} describes no packed model: {error}; pack it again") from error


def read_whole(path: Path) -> bytes:
    """The bytes of a small file that may be anything.

    Raises:
        InvalidInput: there is none.
        CorruptRecord: it is no regular file, or larger than any of ours.
        TransferFailed: it cannot be read.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
                raise CorruptRecord(f"{path} is no regular file of at most 256 MiB")
            return file.read(_LARGEST)
    except FileNotFoundError as error:
        raise InvalidInput(f"there is no {path}; pack a model first: undercroft pack MODEL FOLDER") from error
    except OSError as error:
        raise TransferFailed(f"{path}: {error.strerror}", errno=error.errno) from error


def _digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _layer_entry(layer: PackedLayer) -> dict[str, Any]:
    parameters = [
        {
            "name": each.name,
            "shape": list(each.shape),
            "stored": _NAMES[each.stored],
            "dtype": _NAMES[each.dtype],
        }
        for each in layer.parameters.values()
    ]
    return {"module": layer.module, "experts": layer.experts, "parameters": parameters}


def _manifest(whole: dict[str, Any]) -> Manifest:
    if type(whole["group"]) is not int:
        raise ValueError(f"{whole['group']!r} is no group")
    return Manifest(
        source=_text(whole["source"]["name"]),
        files=tuple(_source_file(entry) for entry in _list(whole["source"]["files"])),
        forms=Forms(high=whole["high"], low=whole["low"], group=whole["group"]),
        layers=tuple(_layer(number, entry) for number, entry in enumerate(_list(whole["layers"]))),
        tensors={
            name: (DTYPES[entry["dtype"]], _shape(entry["shape"])) for name, entry in whole["tensors"].items()
        },
        indexes=tuple(map(_text, _list(whole["indexes"]))),
        dense=_text(whole["dense"]),
    )


def _source_file(entry: Any) -> SourceFile:
    return SourceFile(
        name=_text(entry["name"]),
        nbytes=_count(entry["nbytes"]),
        changed_ns=_count(entry["changed_ns"]),
        xxh3_64=_text(entry["xxh3_64"]),
    )


def _layer(number: int, entry: Any) -> PackedLayer:
    parameters = [
        PackedParameter(
            name=_text(each["name"]),
            shape=_shape(each["shape"]),
            stored=DTYPES[each["stored"]],
            dtype=DTYPES[each["dtype"]],
        )
        for each in _list(entry["parameters"])
    ]
    by_name = {each.name: each for each in parameters}
    experts = _count(entry["experts"])
    if not by_name or len(by_name) < len(parameters) or not experts:
        raise ValueError(f"layer {number} has no experts, or none that could be")
    return PackedLayer(number=number, module=_text(entry["module"]), experts=experts, parameters=by_name)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list")
    return cast("list[Any]", value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no count")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    shape = tuple(map(_count, _list(value)))
    if len(shape) > MOST_DIMENSIONS or 0 in shape:
        raise ValueError(f"{value!r} is no shape")
    return shape
