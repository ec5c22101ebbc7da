"""What a simulation of expert streaming found: counts, shares and predicted seconds.

It knows how figures follow from counts; not how they were counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from undercroft.moe.quality import Quality


@dataclass(frozen=True, slots=True)
class Counts:
    """Uses of experts, one for each that a forward wants of a layer.

    Attributes:
        high_hits: served by a high copy in memory.
        low_hits: served by a low copy in memory.
        high_misses: a high copy was read.
        low_misses: a low copy was read.
        skipped: left out.
        read_nbytes: bytes read.
    """

    high_hits: int = 0
    low_hits: int = 0
    high_misses: int = 0
    low_misses: int = 0
    skipped: int = 0
    read_nbytes: int = 0

    @property
    def hits(self) -> int:
        """Served without a read."""
        return self.high_hits + self.low_hits

    @property
    def misses(self) -> int:
        """Served after a read."""
        return self.high_misses + self.low_misses

    @property
    def hit_rate(self) -> float:
        """Hits of all uses that were served, 0 to 1; nan where there were none."""
        served = self.hits + self.misses
        return self.hits / served if served else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What a simulation found.

    Attributes:
        policy: that was simulated.
        quality: likewise.
        budget: bytes.
        stock_nbytes: bytes of all high copies.
        decode: counts of the decoding steps.
        prefill: counts of the prompts.
        decode_tokens: decoding steps.
        low_mass: share of the gate mass that low copies served, 0 to 1, of all steps.
        skip_mass: share that was left out.
        decode_seconds: predicted, of all decoding steps; None without a read rate.
        belady_hit_rate: of decoding, by the policy that knows the future, at the same budget and in full precision;
            None if it was not asked for.
    """

    policy: str
    quality: Quality
    budget: int
    stock_nbytes: int
    decode: Counts
    prefill: Counts
    decode_tokens: int
    low_mass: float
    skip_mass: float
    decode_seconds: float | None = None
    belady_hit_rate: float | None = None

    @property
    def hit_rate(self) -> float:
        """Of decoding."""
        return self.decode.hit_rate

    @property
    def nbytes_per_token(self) -> float:
        """Bytes read for a decoded token; nan where none was decoded."""
        return self.decode.read_nbytes / self.decode_tokens if self.decode_tokens else math.nan

    @property
    def tokens_per_second(self) -> float | None:
        """Predicted rate of decoding; None without a read rate."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else None
