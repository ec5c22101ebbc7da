"""A trace: which experts each token of a model was routed to, and with what weight.

It knows a CSV format and its order; not policies or memory. The format is `route_trace v1` of BigMoeOnEdge:
lines that start with # carry `key=value` metadata, then come the names of the columns, then one line for each
expert of each token, in the order in which layers were served. Columns that are not listed below are ignored.

    turn     conversation turn, from 0          layer    among the layers with experts, from 0
    phase    0 prefill, 1 decode                slot     0 to n_expert_used - 1, in turn for each token
    step     position of the token              expert   0 to n_expert - 1
                                                weight   the gate weight, as routed

Invariant: what a `Trace` holds is within its own bounds, so nothing behind it needs to check.
"""

from __future__ import annotations

import math
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from undercroft.errors import InvalidInput
from undercroft.moe.stock import MOST_EXPERTS

COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert", "weight")
_LONGEST_LINE = 65536
_LARGEST = 2**31 - 1
_PAIR = re.compile(r"(\w+)=(\S+)")


class Step(NamedTuple):
    """What one forward wants of one layer.

    Attributes:
        turn: of the conversation.
        is_prefill: or else the forward is one step of decoding.
        is_first: whether a forward begins with it.
        layer: which.
        experts: (tokens, used) int32.
        weights: (tokens, used) float64, gate weights.
    """

    turn: int
    is_prefill: bool
    is_first: bool
    layer: int
    experts: NDArray[np.int32]
    weights: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """The routing of a run. Arrays have one row a token and layer, in the order of the run.

    Attributes:
        layers: with experts, in the model.
        experts: in each layer.
        used: by a token.
        expert_nbytes: bytes of an expert by layer, where the trace says so.
        turn, phase, step, layer: (rows,) int32.
        expert: (rows, used) int32.
        weight: (rows, used) float64.
    """

    layers: int
    experts: int
    used: int
    turn: NDArray[np.int32]
    phase: NDArray[np.int32]
    step: NDArray[np.int32]
    layer: NDArray[np.int32]
    expert: NDArray[np.int32]
    weight: NDArray[np.float64]
    expert_nbytes: Mapping[int, int] = field(default_factory=dict[int, int])

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Trace:
        """Read a trace from a CSV file.

        Raises:
            InvalidInput: there is no such file, or it is no trace; the text names the line.
        """
        try:
            with Path(path).open(encoding="utf-8", errors="replace") as file:
                return _Reader(str(path), file).read()
        except OSError as error:
            raise InvalidInput(f"no trace can be read from {path}: {error.strerror}") from error

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it as a CSV file that `read` reads back as the same trace."""
        with Path(path).open("w", encoding="utf-8") as file:
            file.write("# route_trace v1\n")
            file.write(f"# n_layer={self.layers} n_expert={self.experts} n_expert_used={self.used}\n")
            file.writelines(f"# layer={layer} expert_bytes={n}\n" for layer, n in self.expert_nbytes.items())
            file.write(",".join(COLUMNS) + "\n")
            for row in range(len(self.layer)):
                file.writelines(self._lines(row))

    def steps(self) -> Iterator[Step]:
        """What forwards want of layers, in order; all tokens of a prefill chunk are one forward."""
        starts = self._starts()
        before: tuple[int, int, int] | None = None
        for first, end in zip(starts, [*starts[1:], len(self.layer)], strict=True):
            turn, phase, layer = int(self.turn[first]), int(self.phase[first]), int(self.layer[first])
            is_first = before is None or before[:2] != (turn, phase) or layer <= before[2]
            before = (turn, phase, layer)
            yield Step(turn, phase == 0, is_first, layer, self.expert[first:end], self.weight[first:end])

    @property
    def step_count(self) -> int:
        """How many `steps` there are."""
        return len(self._starts())

    def _starts(self) -> list[int]:
        """Rows at which a forward turns to a layer."""
        if not len(self.layer):
            return []
        changes = np.ones(len(self.layer), dtype=bool)
        changes[1:] = (np.diff(self.layer) != 0) | (np.diff(self.turn) != 0) | (np.diff(self.phase) != 0)
        changes[1:] |= (np.diff(self.step) != 0) & (self.phase[1:] == 1)
        return np.flatnonzero(changes).tolist()

    def _lines(self, row: int) -> Iterator[str]:
        head = f"{self.turn[row]},{self.phase[row]},{self.step[row]},{self.layer[row]}"
        for slot in range(self.used):
            yield f"{head},{slot},{self.expert[row, slot]},{float(self.weight[row, slot])!r}\n"


class _Reader:
    """Reads one file; keeps where it is for the error that names the line."""

    def __init__(self, path: str, file: TextIO) -> None:
        self._path, self._file, self._number = path, file, 0
        self._facts: dict[str, int] = {}
        self._nbytes: dict[int, int] = {}

    def read(self) -> Trace:
        places = self._places(self._header())
        ids, weights = array("i"), array("d")
        for cells in self._rows():
            self._append(cells, places, ids, weights)
        return self._trace(np.array(ids, dtype=np.int32).reshape(-1, 6), np.array(weights))

    def _lines(self) -> Iterator[str]:
        """Lines that are not empty and no comment; metadata is kept."""
        while line := self._file.readline(_LONGEST_LINE):
            self._number += 1
            if len(line) == _LONGEST_LINE:
                raise self._error("is too long")
            if line.startswith("#"):
                self._note(line)
            elif line.strip():
                yield line

    def _rows(self) -> Iterator[list[str]]:
        for line in self._lines():
            yield line.split(",")

    def _header(self) -> list[str]:
        first = next(self._lines(), None)
        if first is None:
            raise InvalidInput(f"{self._path} is empty; a trace names its columns: {','.join(COLUMNS)}")
        return [name.strip() for name in first.split(",")]

    def _places(self, header: list[str]) -> list[int]:
        missing = [name for name in COLUMNS if name not in header]
        if missing:
            raise self._error(f"names no column {', '.join(missing)}")
        return [header.index(name) for name in COLUMNS]

    def _note(self, line: str) -> None:
        pairs = dict(_PAIR.findall(line))
        for name in ("n_layer", "n_expert", "n_expert_used"):
            if name in pairs:
                self._facts[name] = self._integer(pairs[name], name, least=1)
        if "layer" in pairs and "expert_bytes" in pairs:
            layer = self._integer(pairs["layer"], "layer")
            self._nbytes[layer] = self._integer(pairs["expert_bytes"], "expert_bytes", least=1)

    def _append(self, cells: list[str], places: list[int], ids: array[int], weights: array[float]) -> None:
        try:
            *numbers, weight = [cells[place] for place in places]
            row = [int(number) for number in numbers]
            value = float(weight)
        except (ValueError, IndexError) as error:
            raise self._error(f"is no row of numbers for {','.join(COLUMNS)}") from error
        used = self._facts.get("n_expert_used", _LARGEST)
        if not (min(row) >= 0 and max(row) <= _LARGEST and row[1] <= 1 and row[4] < used):
            raise self._error("has a number out of range")
        if not (math.isfinite(value) and value >= 0):
            raise self._error(f"has {value} for a gate weight")
        ids.extend(row)
        weights.append(value)

    def _trace(self, ids: NDArray[np.int32], weights: NDArray[np.float64]) -> Trace:
        if not len(ids):
            raise InvalidInput(f"{self._path} has no rows")
        layers = self._bound("n_layer", int(ids[:, 3].max()) + 1)
        experts = self._bound("n_expert", int(ids[:, 5].max()) + 1)
        used = self._bound("n_expert_used", int(ids[:, 4].max()) + 1)
        if layers * experts > MOST_EXPERTS or used > experts:
            raise InvalidInput(f"{self._path}: {used} of {experts} experts in {layers} layers is no model")
        self._check_tokens(ids, used)
        tokens = ids[::used]
        turn, phase, step, layer = (np.ascontiguousarray(tokens[:, column]) for column in range(4))
        return Trace(
            layers=layers,
            experts=experts,
            used=used,
            turn=turn,
            phase=phase,
            step=step,
            layer=layer,
            expert=np.ascontiguousarray(ids[:, 5].reshape(-1, used)),
            weight=weights.reshape(-1, used),
            expert_nbytes={layer: n for layer, n in sorted(self._nbytes.items()) if layer < layers},
        )

    def _bound(self, name: str, least: int) -> int:
        """What the metadata says of a number, which the rows must not exceed; or what the rows say."""
        stated = self._facts.get(name, least)
        if stated < least:
            raise InvalidInput(f"{self._path} has {name}={stated}, but rows for {least}")
        return stated

    def _check_tokens(self, ids: NDArray[np.int32], used: int) -> None:
        """Every token has its slots in turn, each time for one and the same token, and different experts."""
        slots = np.resize(np.arange(used), len(ids))
        whole = len(ids) - len(ids) % used
        heads = ids[:whole, :4].reshape(-1, used, 4)
        chosen = np.sort(ids[:whole, 5].reshape(-1, used), axis=1)
        faults = [
            *np.flatnonzero(ids[:, 4] != slots)[:1],
            *used * np.flatnonzero((heads != heads[:, :1]).any(axis=(1, 2)))[:1],
            *used * np.flatnonzero((np.diff(chosen, axis=1) == 0).any(axis=1))[:1],
            *([whole] if whole < len(ids) else []),
        ]
        if faults:
            raise InvalidInput(
                f"{self._path}, row {min(map(int, faults)) + 1} after the header: "
                f"each token has slots 0 to {used - 1} in order, with different experts"
            )

    def _integer(self, text: str, name: str, least: int = 0) -> int:
        try:
            number = int(text)
        except ValueError as error:
            raise self._error(f"has {name}={text[:40]}") from error
        if not least <= number <= 2**53:
            raise self._error(f"has {name}={text[:40]}, which is out of range")
        return number

    def _error(self, what: str) -> InvalidInput:
        return InvalidInput(f"{self._path}, line {self._number} {what}")
