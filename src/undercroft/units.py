"""The only parser and printer of sizes, rates and durations.

A size is an int of bytes everywhere inside Undercroft; a text such as ``"8GiB"`` lives only at its edges.
Invariants: ``parse_size(exact_size(n)) == n``, and ``parse_size(format_size(n))`` differs from ``n`` by at
most half of the last digit printed, and a byte.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from undercroft.errors import InvalidInput

KIB = 1024
MIB = 1024**2
GIB = 1024**3
TIB = 1024**4

_BINARY = {"TiB": TIB, "GiB": GIB, "MiB": MIB, "KiB": KIB, "B": 1}
_FACTORS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}i": 1024**power for power, letter in enumerate("kmgt", start=1)},
    **{letter: 1024**power for power, letter in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", re.ASCII)
_LARGEST = 2**63 - 1


def parse_size(size: int | str) -> int:
    """Bytes meant by a size.

    Args:
        size: bytes as an int, or text: a decimal number and a unit. ``KiB MiB GiB TiB`` (or
            ``K M G T``) count in 1024s, ``KB MB GB TB`` in 1000s; ``B`` or no unit are bytes. Case and
            spaces do not matter.

    Returns:
        A whole number of bytes; a fraction of a byte is dropped.

    Raises:
        InvalidInput: the text is no size, or the number is negative or 2**63 and more.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise _no_size(size)
    nbytes = size if isinstance(size, int) else _parse_text(size)
    if not 0 <= nbytes <= _LARGEST:
        raise _no_size(size)
    return nbytes


def _parse_text(text: str) -> int:
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in _FACTORS:
        raise _no_size(text)
    return int(Fraction(match[1]) * _FACTORS[match[2]])


def _no_size(given: object) -> InvalidInput:
    return InvalidInput(f'{given!r} is not a size; write it like "8GiB", "512MB", "1.5 GiB" or 4096')


def exact_size(nbytes: int) -> str:
    """The shortest exact spelling in binary units: ``exact_size(1536 * 1024) == "1536KiB"``."""
    unit = next(unit for unit, factor in _BINARY.items() if nbytes % factor == 0)
    return f"{nbytes // _BINARY[unit]}{unit}" if nbytes else "0B"


def round_up_size(nbytes: int) -> int:
    """The next whole MiB (or 4 KiB, below one MiB): a size fit to be advised, never less than `nbytes`."""
    step = MIB if nbytes >= MIB else 4 * KIB
    return -(-nbytes // step) * step


def format_size(nbytes: float) -> str:
    """A size for people: ``"1.50 GiB"``, ``"512 MiB"``, ``"37 B"``; a negative one keeps its sign."""
    if nbytes < 0:
        return f"-{format_size(-nbytes)}"
    unit, factor = next(((u, f) for u, f in _BINARY.items() if nbytes >= f), ("B", 1))
    return f"{_short(nbytes, factor)} {unit}"


def _short(amount: float, factor: int) -> str:
    if amount % factor == 0 or factor == 1:
        return f"{amount / factor:.0f}"
    return f"{amount / factor:.2f}"


def format_rate(bytes_per_second: float) -> str:
    """A rate for people, in 1000s as disks are sold: ``"1.85 GB/s"``."""
    for unit, factor in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if bytes_per_second >= factor:
            return f"{bytes_per_second / factor:.2f} {unit}"
    return f"{bytes_per_second:.0f} B/s"


def format_seconds(seconds: float) -> str:
    """A duration for people: ``"850 us"``, ``"12.3 ms"``, ``"4.20 s"``, ``"3 min 20 s"``, ``"2 h 5 min"``."""
    if seconds < 0:
        return f"-{format_seconds(-seconds)}"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(math.floor(seconds + 0.5), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
