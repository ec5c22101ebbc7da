"""Question: does a model larger than memory decode faster here than with accelerate or llama.cpp?

Every side is a process in a control group of its own with the same limit, loads the same weights in its own form, and
is given the same tokens. The sides of one precision live at the same time and decode in turns, some tokens each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from undercroft.bench import llama_worker
from undercroft.bench.answer import Answer
from undercroft.bench.peers_bout import LLAMAS, NO_LIMIT, Bout, claims, figures, row
from undercroft.bench.peers_model import PeerShape
from undercroft.bench.peers_place import INSTALL, PeersPlace, Progress, forget_pages
from undercroft.bench.peers_worker import ACCELERATE, OURS, PeerSettings, Stretch
from undercroft.bench.rounds import Turns, take_turns
from undercroft.bench.side import Side, SideEnded
from undercroft.errors import InvalidInput
from undercroft.units import format_size, parse_size

_SIDES = {"bf16": ("exact", "lossless", "balanced", ACCELERATE, *LLAMAS), "int8": ("int8", *LLAMAS)}
_BITS = {"bf16": 16.0, "int8": 8.5}
_NOTHING = Stretch(tokens=0, seconds=1.0, cpu=0.0, read=0)


@dataclass(frozen=True, kw_only=True)
class PeersSettings:
    """What to measure.

    Attributes:
        directory: for the model's files, which stay there.
        shape: of the model.
        python: one that has llama.cpp or its kin; None leaves them out.
        limits: of memory: a share of the experts' bytes in the precision compared, or "none".
        reserve: bytes of a limit that our side leaves to the interpreter, its libraries and dense weights.
        rounds: stretches of each side.
        tokens: in a stretch; four times as many where everything fits, for they take so much less time there.
        warm_up: tokens before the first; eight times as many where everything fits, so that all has been read.
        prompt: tokens before those.
        threads: of each side, for computing.
    """

    directory: Path
    shape: PeerShape = field(default_factory=PeerShape)
    python: Path | None = None
    limits: tuple[str, ...] = ("50%", "25%", NO_LIMIT)
    bits: tuple[str, ...] = ("bf16", "int8")
    reserve: int = parse_size("500MiB")
    rounds: int = 5
    tokens: int = 8
    warm_up: int = 8
    prompt: int = 128
    threads: int = 2

    def __post_init__(self) -> None:
        if unknown := set(self.bits) - set(_SIDES):
            raise InvalidInput(f"{unknown.pop()!r} is not compared; there are {', '.join(_SIDES)}")
        for limit in self.limits:
            self.nbytes(limit, "bf16")

    def experts(self, bits: str) -> int:
        """Bytes of all experts in a precision, scales included."""
        return int(self.shape.elements * _BITS[bits] / 8)

    def warms_up(self, limit: str) -> int:
        """Tokens before the first stretch."""
        return self.warm_up * (8 if limit == NO_LIMIT else 1)

    def stretch(self, limit: str) -> int:
        """Tokens in a stretch."""
        return self.tokens * (4 if limit == NO_LIMIT else 1)

    def nbytes(self, limit: str, bits: str) -> int | None:
        """What a limit comes to, in whole pages; None for no limit.

        Raises:
            InvalidInput: it is no share.
        """
        if limit == NO_LIMIT:
            return None
        number = limit.removesuffix("%")
        if number == limit or not number.isdecimal() or not 0 < int(number) <= 100:
            raise InvalidInput(
                f'a limit is a share of the experts such as "50%", or "{NO_LIMIT}", not {limit!r}'
            )
        return self.experts(bits) * int(number) // 100 // 4096 * 4096

    def budget(self, limit: str, bits: str) -> int:
        """Bytes of experts that our side may hold."""
        allowed = self.nbytes(limit, bits)
        return int(1.02 * self.experts(bits)) + 2**26 if allowed is None else max(0, allowed - self.reserve)


def measure_peers(settings: PeersSettings, progress: Progress) -> Answer:
    """Write the model's files where they are missing, then let the sides decode in turns.

    Raises:
        NoControlGroup: there is a limit, and this process may not set it.
        InvalidInput, TransferFailed, TierFull: see `PeersPlace`.
    """
    place = PeersPlace(settings.directory, settings.shape, settings.python)
    present = [*OURS, *place.peers()]
    for bits in settings.bits:
        for side in _SIDES[bits]:
            if side in present:
                place.prepare(side, bits, progress)
    bouts = [
        _bout(settings, place, limit, bits, [side for side in _SIDES[bits] if side in present], progress)
        for limit in settings.limits
        for bits in settings.bits
    ]
    missing = [name for name in INSTALL if name not in present]
    return _answer(settings, bouts, missing)


def _bout(
    settings: PeersSettings,
    place: PeersPlace,
    limit: str,
    bits: str,
    sides: Sequence[str],
    progress: Progress,
) -> Bout:
    logits: dict[str, Sequence[float]] = {}
    lost: dict[str, str] = {}
    with ExitStack() as stack:
        alive: dict[str, Side] = {}
        for name in sides:
            if limit == NO_LIMIT and name in ("balanced", "lossless"):
                continue  # where everything fits there is nothing to save
            progress(f"peers: {limit}, {bits}, {name} loads")
            alive[name] = stack.enter_context(_start(settings, place, limit, bits, name))
            try:
                logits[name] = alive[name].hear()["logits"]
            except SideEnded as ended:
                lost[name] = str(ended)
        for name in [name for name in alive if name not in lost]:
            try:  # not before, for what one side loads may take from another what it had near
                alive[name].ask(str(settings.warms_up(limit)))
            except SideEnded as ended:
                lost[name] = str(ended)
        ways = {
            name: partial(_stretch, side, name, settings.stretch(limit), lost) for name, side in alive.items()
        }
        turns = take_turns(
            ways,
            rounds=settings.rounds,
            on_round=lambda number: progress(f"peers: {limit}, {bits}, round {number}"),
        )
        peaks = {name: side.peak for name, side in alive.items()}
    samples = {name: taken for name, taken in turns.samples.items() if name not in lost}
    for words in lost.values():
        progress(f"peers: {words}")
    return Bout(limit=limit, bits=bits, turns=Turns(samples=samples), peaks=peaks, logits=logits, lost=lost)


def _start(settings: PeersSettings, place: PeersPlace, limit: str, bits: str, name: str) -> Side:
    model, nbytes = place.model(name, bits), settings.nbytes(limit, bits)
    forget_pages(model)
    wanted = PeerSettings(
        side=name,
        model=str(model),
        budget=settings.budget(limit, bits),
        limited=nbytes is not None,
        prompt=settings.prompt,
        longest=settings.prompt + settings.warms_up(limit) + settings.rounds * settings.stretch(limit),
        vocabulary=settings.shape.vocabulary,
        threads=settings.threads,
    )
    ours = [sys.executable, "-m", "undercroft.bench.peers_worker"]
    command = [str(settings.python), llama_worker.__file__] if name in LLAMAS else ours
    return Side(name, [*command, json.dumps(asdict(wanted))], limit=nbytes, threads=settings.threads)


def _stretch(side: Side, name: str, tokens: int, lost: dict[str, str]) -> Stretch:
    if name in lost:
        return _NOTHING
    try:
        return Stretch(**side.ask(str(tokens)))
    except SideEnded as ended:
        lost[name] = str(ended)
        return _NOTHING


def _answer(settings: PeersSettings, bouts: Sequence[Bout], missing: Sequence[str]) -> Answer:
    shape = settings.shape
    return Answer(
        theme="peers",
        question="Does a model larger than memory decode faster here than with accelerate or llama.cpp?",
        falsified_by="a peer that, in as much memory and with equal bits, comes nearer than the bounds below, or "
        "more bytes read than the experts that were missing.",
        head=("", "memory", "bits", "tokens/s", "MB read/token", "CPU s/token", "waiting", "most used"),
        rows=tuple(row(bout, side) for bout in bouts for side in bout.sides),
        lines=tuple(line for bout in bouts for line in claims(bout)),
        notes=(
            f"{shape.layers} layers of {shape.experts} random experts of {shape.hidden}x{shape.intermediate}, "
            f"{shape.used} used by a token, {format_size(settings.experts('bf16'))} of experts in bf16; "
            f"{settings.threads} threads; {settings.rounds} rounds of {settings.tokens} tokens after "
            f"{settings.prompt} + {settings.warm_up}, without a limit {settings.stretch(NO_LIMIT)} after "
            f"{settings.prompt} + {settings.warms_up(NO_LIMIT)}",
            *(f"{name} is not installed, so it does not count: {INSTALL[name]}" for name in missing),
            *(f"{bout.limit}, {bout.bits}: {words}" for bout in bouts for words in bout.lost.values()),
        ),
        figures={"settings": _described(settings), "bouts": [figures(bout) for bout in bouts]},
    )


def _described(settings: PeersSettings) -> dict[str, Any]:
    return {**asdict(settings), "directory": None, "python": None}
