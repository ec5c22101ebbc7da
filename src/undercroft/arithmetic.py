"""What must be settled in a process before results can be compared bit by bit.

oneMKL 2024.2, which PyTorch's wheels contain, finds out what processor it runs on when the first of its vector
functions (sqrt, exp, cos and others) is called. Where several threads make that call at once, one of them may
compute its share with half the bits: PyTorch's issue 188792. Then AdamW's first step, or the turns of the first rotary
embedding, are off by up to three parts in ten thousand, with nothing said (`lab/LOG.md`).
"""

from __future__ import annotations

_FUNCTIONS = ("sqrt", "exp", "log", "sin", "cos", "tan", "tanh", "asin", "acos", "atan", "erf")


def settle() -> None:
    """Make the first call of each vector function here, on one thread; again is allowed, and takes microseconds."""
    import torch

    for dtype in (torch.float32, torch.float64):
        half = torch.full((1,), 0.5, dtype=dtype)
        for name in _FUNCTIONS:
            getattr(torch, name)(half)
