"""Question: what do the lossy qualities cost in quality, with a quarter of the experts in memory?

It judges what `quality_runs` found, beside what HOBBIT's thresholds would do to the same routing, and what full
precision reads. Invariant: whatever was taken with synthetic outliers says so.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from undercroft.bench.answer import Answer
from undercroft.bench.quality_runs import OUTLIERS, PLAIN, Found, Progress, QualityRuns, QualitySettings
from undercroft.bench.verdict import Line
from undercroft.moe.importance import Importance, classify, weigh_token
from undercroft.moe.quality import Quality
from undercroft.moe.reading import one_thread
from undercroft.moe.simulate import simulate
from undercroft.moe.trace import Trace

MOST_CHANGE = {"balanced": 0.5, "fast": 2.0}
"""Percent of perplexity that a quality may cost."""
PAPER = {Importance.HIGH: 67, Importance.LOW: 30, Importance.SKIP: 3}
"""Percent of uses by class that HOBBIT reports for Mixtral (arXiv 2411.01433, section 3.2)."""
_LEAST_USED = 0.25
_MOST_POINTS = 1.0
_MOST_BYTES = 0.95
_SMALL_BUDGET = "12.5%"


def measure_quality(settings: QualitySettings, progress: Progress) -> Answer:
    """Read and ask with every quality, on one thread.

    Raises:
        TierFull, UnsafeDirectory: there is no room for packed experts among the temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="undercroft-bench-") as folder, one_thread():
        runs = QualityRuns(settings, Path(folder), progress)
        found = [runs.exact()]
        for model in (PLAIN, OUTLIERS):
            found += [runs.lossy(model, name, is_asked=name == "balanced") for name in MOST_CHANGE]
        found.append(runs.lossy(PLAIN, "hobbit", is_asked=False))
    shares, nbytes = class_shares(runs.trace), _simulated(runs.trace, runs.lossless_share)
    return Answer(
        theme="quality",
        question=f"What do lossy qualities cost, with {settings.share:.0%} of the experts in memory?",
        falsified_by="a perplexity or a share of solved exercises that falls by more than the line says, although the "
        "low copies were really used; a bit that differs where nothing was given up.",
        head=(
            "model",
            "quality",
            "perplexity",
            "change",
            "same top",
            "KL",
            "low mass",
            "hits",
            "KB/token",
            "solved",
        ),
        rows=tuple(map(_row, found)),
        lines=tuple(_lines(found, runs.unequal, nbytes)),
        notes=(_note(settings, found), _note_of_classes(shares)),
        figures={
            "settings": {**asdict(settings), "model": settings.model and str(settings.model)},
            "runs": [asdict(each) for each in found],
            "unequal": runs.unequal,
            "hobbit_shares": {each.name.lower(): share for each, share in shares.items()},
            "nbytes_per_token_at_12.5%": nbytes,
        },
    )


def class_shares(trace: Trace) -> dict[Importance, float]:
    """Percent of uses in each class under HOBBIT's thresholds, every token by itself, in memory or not."""
    thresholds = Quality.preset("hobbit").thresholds
    assert thresholds is not None
    tokens = zip(trace.expert.tolist(), trace.weight.tolist(), strict=True)
    counted = Counter(
        classify(use.score, thresholds)
        for experts, weights in tokens
        for use in weigh_token(experts, weights)
    )
    return {each: 100 * counted[each] / counted.total() for each in sorted(Importance, reverse=True)}


def _simulated(trace: Trace, lossless_share: float) -> dict[str, float]:
    """Bytes that exact decoding reads for a token: by LRU, by ours, and by ours with lossless copies."""
    ways = {
        "lru": ("lru", 1.0),
        "expected-use": ("expected-use", 1.0),
        "lossless": ("expected-use", lossless_share),
    }
    return {
        name: simulate(
            trace, budget=_SMALL_BUDGET, policy=policy, high_share=share, bound=False
        ).nbytes_per_token
        for name, (policy, share) in ways.items()
    }


def _lines(found: Sequence[Found], unequal: int, nbytes: dict[str, float]) -> Iterator[Line]:
    exact, *lossy = found
    yield Line(
        claim="exact: tokens of a window of which the model in memory expects otherwise",
        found=unequal,
        bound=0,
    )
    yield Line(
        claim=f"exact: bytes read over LRU's at {_SMALL_BUDGET}, simulated on the same routing",
        found=nbytes["lossless"] / nbytes["lru"],
        bound=_MOST_BYTES,
        note=f"expected-use and lossless copies; the policy alone {nbytes['expected-use'] / nbytes['lru']:.3f}",
    )
    for each in lossy:
        if each.quality in MOST_CHANGE:
            yield from _lines_of(each, exact)


def _lines_of(each: Found, exact: Found) -> Iterator[Line]:
    name = f"{each.quality}, {each.model}"
    used = each.low_mass / each.allowed
    yield Line(
        claim=f"{name}: perplexity",
        found=100 * each.fidelity.perplexity_change,
        bound=MOST_CHANGE[each.quality],
        unit=" %",
        void="" if used >= _LEAST_USED else f"only {used:.0%} of the allowed mass was served low",
        note=f"{used:.0%} of the allowed mass served low",
    )
    if each.exact_match is not None and exact.exact_match is not None:
        yield Line(
            claim=f"{name}: points of exercises solved, lost",
            found=exact.exact_match - each.exact_match,
            bound=_MOST_POINTS,
            note=f"{each.exact_match:.1f} % of exact's {exact.exact_match:.1f} %",
        )


def _row(each: Found) -> tuple[str, ...]:
    fidelity = each.fidelity
    return (
        each.model,
        each.quality,
        f"{each.perplexity:.3f}",
        f"{fidelity.perplexity_change:+.2%}",
        f"{fidelity.top_agreement:.1%}",
        f"{fidelity.divergence:.1e}",
        f"{each.low_mass:.1%}" + (f" + {each.skip_mass:.1%} skipped" if each.skip_mass else ""),
        f"{each.hit_rate:.1%}",
        f"{each.nbytes_per_token / 1e3:.0f}",
        "" if each.exact_match is None else f"{each.exact_match:.1f}%",
    )


def _note(settings: QualitySettings, found: Sequence[Found]) -> str:
    return (
        f"Text: {settings.windows} windows of {settings.length} tokens of worked exercises and as many of PyTorch's "
        "documentation, neither of them seen in training; each token is a forward of its own, in float32.\n"
        f"The budget is {settings.share:.0%} of the full copies that a quality serves, in their precision. "
        f"Synthetic outliers: channels {settings.outliers} times larger, which change nothing but how weights quantise."
    )


def _note_of_classes(shares: dict[Importance, float]) -> str:
    ours = "/".join(f"{share:.0f}" for share in shares.values())
    theirs = "/".join(map(str, PAPER.values()))
    return f"Uses by class under HOBBIT's thresholds, high/low/skip: {ours} %; the paper's, of Mixtral: {theirs} %."
