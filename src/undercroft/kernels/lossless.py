"""Weights in bfloat16 as fewer bytes, every bit kept: their exponents are few, and most of them need three bits.

The weights of a trained matrix are spread like a bell, so seven exponents say nearly all of theirs (Zhang et al. 2025,
arXiv 2504.11651, have 2.6 bits as their entropy). Here a code of three bits is one of these seven, or says that the
exponent is rare and stands elsewhere, so that 64 weights are restored at a time, without a branch. docs/kernels.md
specifies the bytes. Invariant: what is restored is what was squeezed, bit for bit; bytes that nobody squeezed are
refused or restored as something, and never make it read or write beyond them.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from undercroft.errors import CorruptRecord, InvalidInput
from undercroft.kernels import library

BLOCK = 64
"""Weights that are restored together."""
CHUNK = 512 * BLOCK
"""Weights that one thread restores at a time: where its rare exponents begin is said."""
COMMON = 7
"""Exponents that have a code of their own; the next code says that one is rare."""
_LINE = 64
_NAMES = ("portable", "avx2", "avx512vbmi2")  # in the order of their numbers in C
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Lossless:
    """A form of some bfloat16 numbers.

    Attributes:
        count: how many they are.
        rare: the most exponents without a code that there is room for.
    """

    count: int
    rare: int

    def __post_init__(self) -> None:
        if not (0 < self.count < 2**40 and 0 <= self.rare <= self.count and self.rare < 2**32):
            raise InvalidInput(f"no {self.count} numbers with {self.rare} rare exponents can be squeezed")

    @property
    def blocks(self) -> int:
        """Of 64 numbers, the last one filled up."""
        return -(-self.count // BLOCK)

    @property
    def chunks(self) -> int:
        """Of 512 blocks."""
        return -(-self.count // CHUNK)

    @property
    def codes(self) -> int:
        """Where codes begin: three words of 64 bits for each block, the first with the lowest bit of each code."""
        return _lines(COMMON + 1 + 4 * self.chunks)

    @property
    def rests(self) -> int:
        """Where signs and mantissas begin, a byte for each number."""
        return self.codes + _lines(3 * 8 * self.blocks)

    @property
    def exponents(self) -> int:
        """Where rare exponents begin, a byte for each."""
        return self.rests + BLOCK * self.blocks

    @property
    def nbytes(self) -> int:
        """Of all."""
        return self.exponents + self.rare


def rare_in(values: Tensor) -> int:
    """How many numbers have an exponent that is none of the seven most frequent.

    Args:
        values: bfloat16, of any shape.
    """
    return int(np.sort(np.bincount(_exponents(_words(values)), minlength=256))[:-COMMON].sum())


def squeeze(values: Tensor, form: Lossless) -> Tensor:
    """The bytes of numbers in fewer bits.

    Args:
        values: bfloat16, of any shape.
        form: for as many, and for as many rare exponents as `rare_in` says at least.

    Returns:
        uint8 [form.nbytes].

    Raises:
        InvalidInput: it is no such form.
    """
    words = _words(values)
    exponents = _exponents(words)
    order = np.argsort(-np.bincount(exponents, minlength=256), kind="stable")[:COMMON]
    codes = np.full(256, COMMON, np.uint8)
    codes[order] = np.arange(COMMON)
    found = codes[exponents]
    is_rare = found == COMMON
    rare = exponents[is_rare]
    if words.size != form.count or rare.size > form.rare:
        raise InvalidInput(f"{words.size} numbers with {rare.size} rare exponents are not {form}")
    out = np.zeros(form.nbytes, np.uint8)
    out[:COMMON] = order
    before = np.add.reduceat(is_rare, np.arange(0, words.size, CHUNK), dtype="<u4")
    _starts(out, form)[1:] = before.cumsum(dtype="<u4")[:-1]
    _planes(out, form)[:] = _bits(found, form)
    out[form.rests : form.rests + words.size] = (words >> 8 & 0x80) | (words & 0x7F)
    out[form.exponents : form.exponents + rare.size] = rare
    return torch.from_numpy(out)


def restore(squeezed: Tensor, form: Lossless, out: Tensor) -> None:
    """Write the numbers that `squeeze` was given.

    Args:
        squeezed: uint8 [form.nbytes], on the CPU.
        form: of these bytes.
        out: bfloat16 of `form.count` elements, contiguous, on the CPU.

    Raises:
        InvalidInput: shapes or types that do not fit.
        CorruptRecord: the bytes are none that `squeeze` gives.
    """
    if squeezed.numel() != form.nbytes or squeezed.dtype is not torch.uint8 or not squeezed.is_contiguous():
        raise InvalidInput(f"{squeezed.numel()} elements of {squeezed.dtype} are no bytes of {form}")
    if out.numel() != form.count or out.dtype is not torch.bfloat16 or not out.is_contiguous():
        raise InvalidInput(f"{list(out.shape)} of {out.dtype} has no room for what {form} is of")
    native = load()
    is_whole = _restore(squeezed, form, out) if native is None else native.restore(squeezed, form, out)
    if not is_whole:
        raise CorruptRecord("squeezed weights ask for more rare exponents than they have")


class Restorer:
    """The compiled `lossless.cpp`.

    Args:
        compiled: it.

    Attributes:
        instructions: names of the instruction sets that work here, the fastest last.
    """

    def __init__(self, compiled: ctypes.CDLL) -> None:
        self._restore = compiled.undercroft_lossless_restore
        self._restore.argtypes = (c_int, c_int, c_int64, c_int64, c_void_p, c_void_p)
        self._restore.restype = c_bool
        self.instructions = _NAMES[: compiled.undercroft_lossless_instructions() + 1]

    def restore(
        self, squeezed: Tensor, form: Lossless, out: Tensor, *, instructions: str | None = None
    ) -> bool:
        """Whether the numbers could be written, with the named or the fastest instruction set."""
        number = len(self.instructions) - 1 if instructions is None else _NAMES.index(instructions)
        sizes = (torch.get_num_threads(), form.count, form.rare)
        return self._restore(number, *sizes, squeezed.data_ptr(), out.data_ptr())


@cache
def load() -> Restorer | None:
    """The native loops; None where they cannot be compiled. See `library.load`."""
    compiled = library.compiled("lossless", "lossless.h")
    return None if compiled is None else Restorer(compiled)


def _restore(squeezed: Tensor, form: Lossless, out: Tensor) -> bool:
    """As the native loops do it."""
    content = squeezed.numpy()
    bits = np.unpackbits(_planes(content, form), axis=-1, bitorder="little")  # [blocks, 3, 64]
    codes = (bits[:, 0] | bits[:, 1] << 1 | bits[:, 2] << 2).reshape(-1)
    is_rare = codes == COMMON
    rare = content[form.exponents :]
    exponents = content[: COMMON + 1][codes]
    for chunk, start in enumerate(_starts(content, form).tolist()):
        some = np.flatnonzero(is_rare[chunk * CHUNK : (chunk + 1) * CHUNK]) + chunk * CHUNK
        if some.size > max(rare.size - start, 0):
            return False
        exponents[some] = rare[start : start + some.size]
    rests = content[form.rests : form.rests + form.count].astype(np.uint16)
    words = (rests & 0x80) << 8 | exponents[: form.count].astype(np.uint16) << 7 | (rests & 0x7F)
    out.view(-1).copy_(torch.from_numpy(words.view(np.int16)).view(torch.bfloat16))
    return True


def _words(values: Tensor) -> NDArray[np.uint16]:
    return values.contiguous().view(-1).view(torch.int16).numpy().view(np.uint16)


def _exponents(words: NDArray[np.uint16]) -> Bytes:
    return (words >> 7).astype(np.uint8)


def _starts(content: Bytes, form: Lossless) -> NDArray[np.uint32]:
    """How many rare exponents come before each chunk's."""
    return content[COMMON + 1 : COMMON + 1 + 4 * form.chunks].view("<u4")


def _planes(content: Bytes, form: Lossless) -> Bytes:
    """Codes: [blocks, 3, 8], a plane of bits after the other."""
    return content[form.codes : form.codes + 3 * 8 * form.blocks].reshape(-1, 3, 8)


def _bits(codes: Bytes, form: Lossless) -> Bytes:
    whole = np.zeros(form.blocks * BLOCK, np.uint8)
    whole[: codes.size] = codes
    planes = [np.packbits(whole >> bit & 1, bitorder="little").reshape(-1, 8) for bit in range(3)]
    return np.stack(planes, axis=1)


def _lines(nbytes: int) -> int:
    return -(-nbytes // _LINE) * _LINE
