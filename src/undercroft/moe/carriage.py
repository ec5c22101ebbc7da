"""How the bytes of an expert get from memory to a device, and in which order what computes and what copies may run.

It knows streams and events; not experts, slots or budgets. Host memory is copied at once. CUDA memory is written on a
stream of its own, beside what computes. Invariants: a copy begins after all that it is told to come after; what is
submitted to compute after `Carrier.wait` runs when the copy is there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A point in the order of some work."""

    def query(self) -> bool:
        """Whether all before it is done."""
        ...

    def synchronize(self) -> None:
        """Let the CPU wait until it is."""
        ...


class Carriage(Mark, Protocol):
    """A copy under way; a mark of its end."""

    @property
    def seconds(self) -> float:
        """That it took, without what it waited for; to be asked once it is done."""
        ...


class Carrier(Protocol):
    """What copies to one device."""

    def arena(self, nbytes: int) -> Tensor:
        """Memory there: uint8 [nbytes]."""
        ...

    def carry(self, pieces: Sequence[tuple[Tensor, Tensor]], after: Iterable[Mark]) -> Carriage:
        """Begin to copy, behind all copies that were begun before.

        Args:
            pieces: bytes there, and bytes here that they become; these must stay until the copy is done.
            after: marks of what must be done before.
        """
        ...

    def mark(self) -> Mark:
        """A mark behind all that was submitted to compute so far."""
        ...

    def wait(self, carriage: Carriage) -> None:
        """Let what is submitted to compute from now on wait for a copy."""
        ...


class Done(NamedTuple):
    """What was done when it was asked for; a `Carriage`."""

    seconds: float = 0.0

    def query(self) -> bool:
        """Yes."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


class HostCarrier:
    """Copies within host memory: for trying the way to a device where there is none."""

    def arena(self, nbytes: int) -> Tensor:
        """See `Carrier`."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def carry(self, pieces: Sequence[tuple[Tensor, Tensor]], after: Iterable[Mark]) -> Done:
        """Copy; what comes before is done."""
        began = time.perf_counter()
        for there, here in pieces:
            there.copy_(here)
        return Done(time.perf_counter() - began)

    def mark(self) -> Done:
        """Host memory is computed with at once."""
        return Done()

    def wait(self, carriage: Carriage) -> None:
        """Nothing to wait for."""


def send(small: Tensor, device: torch.device) -> Tensor:
    """A copy of something small on a device, for what is submitted to compute from now on.

    `Tensor.to` alone would wait until all is done that was submitted before.
    """
    return small if device.type == "cpu" else small.pin_memory().to(device, non_blocking=True)


class _CudaCarriage:
    """A copy on a stream."""

    def __init__(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> None:
        self._began, self.ended = began, ended

    @property
    def seconds(self) -> float:
        return self._began.elapsed_time(self.ended) / 1000

    def query(self) -> bool:
        return self.ended.query()

    def synchronize(self) -> None:
        self.ended.synchronize()


class CudaCarrier:
    """Copies to one GPU on a side stream. What is copied from should be pinned, or the CPU waits.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def arena(self, nbytes: int) -> Tensor:
        """See `Carrier`. Work that its memory was freed from is done before anything is copied there."""
        found = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        found.record_stream(self._side)
        return found

    def carry(self, pieces: Sequence[tuple[Tensor, Tensor]], after: Iterable[Mark]) -> _CudaCarriage:
        """See `Carrier`."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._side):
            for mark in after:
                assert isinstance(mark, torch.cuda.Event)
                self._side.wait_event(mark)
            began = _now(self._side, is_timed=True)
            for there, here in pieces:
                there.copy_(here, non_blocking=True)
            return _CudaCarriage(began, _now(self._side, is_timed=True))

    def mark(self) -> torch.cuda.Event:
        """See `Carrier`; of the present stream."""
        return _now(torch.cuda.current_stream(self._device))

    def wait(self, carriage: Carriage) -> None:
        """See `Carrier`; of the present stream."""
        assert isinstance(carriage, _CudaCarriage)
        torch.cuda.current_stream(self._device).wait_event(carriage.ended)


def _now(stream: torch.cuda.Stream, *, is_timed: bool = False) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=is_timed)
    event.record(stream)
    return event
