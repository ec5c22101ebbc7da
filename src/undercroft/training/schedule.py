"""The learning rate over a run: a linear warm-up, then half a cosine down to a tenth. Pure arithmetic."""

from __future__ import annotations

import math

_FLOOR = 0.1


def learning_rate_at(step: int, *, steps: int, peak: float, warmup: int) -> float:
    """The learning rate of a step, from 0 to `steps` - 1.

    Args:
        step: which step.
        steps: how many there are.
        peak: the highest rate, reached after the warm-up.
        warmup: how many steps climb to it.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    return peak * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * progress)) / 2)
