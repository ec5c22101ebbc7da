"""Which storage is this, and how was it seen: what must be known of a saved tensor to give it back exactly.

It knows storages, views and version counters; not where bytes go. Invariants: a storage is recognised by a weak
reference, never by its address alone, because addresses are used again; a rebuilt view has the size, stride, offset
and lazy conjugate and negative bits of the tensor that was saved.
"""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class StorageRef:
    """A weak reference to a storage. While it exists, no other storage can have its `key`."""

    __slots__ = ("_weak", "key")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._weak = StorageWeakRef(storage)
        self.key: int = self._weak.cdata

    def alive(self) -> torch.UntypedStorage | None:
        """The storage itself if anything still holds it."""
        return torch.UntypedStorage._new_with_weak_ptr(self.key)  # pyright: ignore


def storage_key(tensor: torch.Tensor) -> int:
    """The key that a `StorageRef` to the tensor's storage has."""
    return tensor.untyped_storage()._cdata  # pyright: ignore


def why_kept(tensor: torch.Tensor) -> str | None:
    """Why a tensor can only be kept by reference, or None for a plain strided tensor over one storage of bytes."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return "subclass"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # pyright: ignore
        return "inside vmap or grad"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_mkldnn:
        return "layout"
    if tensor._is_zerotensor():  # forward-mode differentiation makes them: a size without bytes
        return "zeros"
    if tensor.device.type not in ("cpu", "cuda") or tensor.is_inference():
        return "device"
    return None


class SavedView:
    """How a saved tensor lay over its storage, and which version of it was saved.

    Plain autograd compares version counters when it unpacks; it cannot do so through hooks, so this does. The alias
    it keeps shares the tensor's counter but has a storage of no bytes: it sees every in-place edit and keeps nothing
    alive.
    """

    __slots__ = ("_conjugate", "_counter", "_dtype", "_negative", "_offset", "_size", "_stride", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._dtype = tensor.dtype
        self._size = tensor.size()
        self._stride = tensor.stride()
        self._offset = tensor.storage_offset()
        self._conjugate = tensor.is_conj()
        self._negative = tensor.is_neg()
        self._version = tensor._version
        self._counter = _counter_of(tensor)

    def check(self) -> None:
        """Raise as plain autograd does if the tensor was edited in place since it was saved.

        Raises:
            RuntimeError: it was.
        """
        check_version(self._counter, self._version)

    def is_same_version_as(self, other: SavedView) -> bool:
        """Whether both tensors share one version counter and were saved at the same version.

        Equal numbers do not make one counter: `unsafe_chunk` and `.data` give several to one storage. Whether two
        tensors share theirs can be asked only by moving one and looking at the other.
        """
        if self._version != other._version or self._counter._version != other._counter._version:
            return False
        now = other._counter._version
        torch.autograd.graph.increment_version(other._counter)
        moved = self._counter._version != now
        torch._C._autograd._unsafe_set_version_counter((other._counter,), (now,))  # pyright: ignore
        return moved

    def over(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The saved view over a storage that holds its bytes; it shares the saved tensor's version counter."""
        plain = torch.empty(0, dtype=self._dtype, device=storage.device)
        plain.set_(storage, self._offset, self._size, self._stride)  # pyright: ignore
        if self._conjugate:
            plain = torch._conj(plain)  # pyright: ignore
        if self._negative:
            plain = torch._neg_view(plain)  # pyright: ignore
        view = self._counter.detach()
        view.data = plain
        return view


def check_version(tensor: torch.Tensor, saved: int) -> None:
    """Raise what plain autograd raises if a tensor's version is not the saved one.

    Raises:
        RuntimeError: it is not.
    """
    if tensor._version != saved:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.dtype}] is at version {tensor._version}; expected version {saved} instead. "
            "Hint: enable anomaly detection to find the operation that failed to compute its gradient, "
            "with torch.autograd.set_detect_anomaly(True)."
        )


def _counter_of(tensor: torch.Tensor) -> torch.Tensor:
    alias = tensor.detach()
    alias.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias
