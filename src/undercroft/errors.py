"""Every error a user of Undercroft can meet.

    UndercroftError
    ├── BudgetExceeded    (also MemoryError)   a byte budget would be broken
    ├── TierFull          (also OSError)       a disk, or a device, has no room left
    ├── TransferFailed    (also OSError)       bytes could not be moved
    ├── CorruptRecord                          bytes came back, but not those that were written
    ├── WrongVersion                           a file was written by another version
    ├── UnsafeDirectory                        a directory that must not hold private bytes
    ├── InvalidInput      (also ValueError)    an argument that cannot be meant
    ├── SpillMisuse       (also RuntimeError)  a call at a time when it cannot be right
    ├── UnsupportedModel                       a model this code would compute wrongly
    └── MissingExtra      (also ImportError)   an optional dependency is not installed

The text of an error says what was asked, what there is, who holds it and what to try. Every error survives
pickling with its attributes, so one raised in a worker process arrives whole.
"""

from __future__ import annotations

import errno as errno_codes
from collections.abc import Mapping
from typing import Any


class UndercroftError(Exception):
    """The root of all errors that Undercroft raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(vars(self))
        if isinstance(self, OSError):
            state["errno"] = self.errno
        return _revive, (type(self), self.args, state)


def _revive(kind: type[UndercroftError], args: tuple[Any, ...], state: dict[str, Any]) -> UndercroftError:
    error = kind.__new__(kind)
    error.args = args
    for name, value in state.items():
        setattr(error, name, value)
    return error


class BudgetExceeded(MemoryError, UndercroftError):  # MemoryError first: only it may allocate its subclasses
    """A reservation would have broken a byte budget; nothing was reserved.

    Attributes:
        asked: bytes the refused reservation asked for.
        budget: bytes the budget allows in all.
        held: bytes held at that moment, by holder.
        least: the smallest budget known to work, or None where that is not known.
        tier: "device", "host" or "disk".
    """

    def __init__(
        self,
        asked: int,
        budget: int,
        held: Mapping[str, int] | None = None,
        least: int | None = None,
        *,
        tier: str = "host",
        hint: str = "",
    ) -> None:
        self.asked = asked
        self.budget = budget
        self.held = dict(held or {})
        self.least = least
        self.tier = tier
        super().__init__(self._message(hint))

    def _message(self, hint: str) -> str:
        from undercroft.units import exact_size, format_size, round_up_size  # units raises our InvalidInput

        total = sum(self.held.values())
        short = self.asked + total - self.budget
        largest_first = sorted(self.held.items(), key=lambda item: -item[1])
        holders = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in largest_first if nbytes)
        text = (
            f"{format_size(self.asked)} more in the {self.tier} tier would exceed its budget of "
            f"{format_size(self.budget)} by {format_size(short)}: {format_size(total)} held already"
        )
        text += f" ({holders})." if holders else "."
        if self.least is not None:
            text += f' Smallest budget known to work: "{exact_size(round_up_size(self.least))}".'
        return f"{text} {hint}".rstrip()


class TierFull(UndercroftError, OSError):
    """A tier has no room left, though its budget would allow more; `errno` says which limit was met."""

    def __init__(self, message: str, *, errno: int = errno_codes.ENOSPC) -> None:
        super().__init__(message)
        self.errno = errno


class TransferFailed(UndercroftError, OSError):
    """Bytes could not be moved; `errno` is the system's reason, or None where the data ended early."""

    def __init__(self, message: str, *, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class CorruptRecord(UndercroftError):
    """Bytes read back differ from those written: a checksum, a length or a header does not match."""


class WrongVersion(UndercroftError):
    """A file was written by a version of Undercroft that this one cannot read."""


class UnsafeDirectory(UndercroftError):
    """A directory for private bytes is missing, read-only, a link, another user's, or open to others."""


class InvalidInput(UndercroftError, ValueError):
    """An argument, a size or a configuration that cannot be meant."""


class SpillMisuse(UndercroftError, RuntimeError):
    """A call at a time when it cannot be right: use after close, in a forked child, or nested."""


class UnsupportedModel(UndercroftError):
    """A model whose structure this code would compute wrongly, so it does not try."""


class MissingExtra(UndercroftError, ImportError):
    """An optional dependency is not installed.

    Attributes:
        extra: the extra of this package that brings it, as in ``pip install 'undercroft[extra]'``.
        feature: what was asked for.
    """

    def __init__(self, extra: str, feature: str) -> None:
        self.extra = extra
        self.feature = feature
        super().__init__(f"{feature} needs an optional dependency: pip install 'undercroft[{extra}]'")
