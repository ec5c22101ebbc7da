"""What is driven to see reads and products overlap: experts of a kind, forwards, and a budget that hits half of them.

It chooses by arithmetic and simulation; it measures nothing. Invariant: the trace fits the shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from undercroft.moe.forwards import decoding, fold, twice
from undercroft.moe.random_experts import ExpertShape
from undercroft.moe.simulate import simulate
from undercroft.moe.synthetic import synthetic_trace
from undercroft.moe.trace import Trace

SKEW, STICKINESS = 1.0, 1.5
"""Of synthetic traces: how much some experts are favoured, and how much those of the last token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """Experts, and what is asked of them.

    Attributes:
        shape: of the experts.
        trace: decoding steps alone.
        budget: bytes of experts in memory.
    """

    shape: ExpertShape
    trace: Trace
    budget: int

    @property
    def name(self) -> str:
        """The kind of the experts."""
        return self.shape.high

    @property
    def tokens(self) -> int:
        """Decoded in a pass."""
        return int((self.trace.layer == 0).sum())

    @property
    def record_nbytes(self) -> int:
        """Bytes of an expert."""
        return self.shape.record_nbytes(self.shape.high)


def plan_workload(
    like: ExpertShape, given: Trace | None, *, used: int, tokens: int, nbytes: int, policy: str
) -> Workload:
    """Make a trace, or fit one, and choose a budget for it.

    Args:
        like: the shape, whose layers are a limit; a given trace says how many experts a layer has.
        given: the trace whose decoding is followed; None for a synthetic one.
        used: by a token of a synthetic trace.
        tokens: at most.
        nbytes: of all experts, at most, but two layers there are.
        policy: which expert leaves first.

    Raises:
        InvalidInput: nothing is decoded in the trace.
    """
    experts = like.experts if given is None else given.experts
    one = replace(like, layers=1, experts=experts)
    most = like.layers if given is None else min(like.layers, given.layers)
    shape = replace(one, layers=max(2, min(most, nbytes // one.nbytes)))
    trace = given or synthetic_trace(
        layers=shape.layers,
        experts=experts,
        used=used,
        prompt=0,
        tokens=tokens,
        skew=SKEW,
        stickiness=STICKINESS,
    )
    decoded = decoding(trace, layers=shape.layers, tokens=tokens)
    record = shape.record_nbytes(shape.high)
    fitted = fold(decoded, layers=shape.layers, experts=experts, expert_nbytes=record)
    return Workload(shape=shape, trace=fitted, budget=even_budget(fitted, policy))


def even_budget(trace: Trace, policy: str) -> int:
    """The bytes at which half of the experts are hits, when a trace is driven again and again.

    Args:
        trace: of decoding alone, with layers that are all alike.
        policy: which expert leaves first.
    """
    record, again = trace.expert_nbytes[0], twice(trace)

    def hit_rate(experts: int) -> float:
        once, both = (
            simulate(each, budget=experts * record, policy=policy, bound=False).decode
            for each in (trace, again)
        )
        return (both.hits - once.hits) / (both.hits + both.misses - once.hits - once.misses)

    low, high = trace.used, trace.layers * trace.experts
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if hit_rate(middle) < 0.5 else (low, middle)
    return record * min((low, high), key=lambda experts: abs(hit_rate(experts) - 0.5))
