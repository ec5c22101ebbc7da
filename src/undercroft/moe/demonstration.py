"""The second act of the demonstration: a model with experts in a quarter of the memory they take, four ways.

It knows what is shown, not how it is printed, nor which model and texts it is given. Every way gets the same bytes and
the same text. Invariant: nothing is downloaded, and nothing is left behind.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from undercroft.models.load import open_causal_model, open_tokenizer
from undercroft.models.tokenizer import Tokenizer
from undercroft.moe.headroom import token_nbytes
from undercroft.moe.load import expert_report, load_moe
from undercroft.moe.pack import pack
from undercroft.moe.quality import Quality
from undercroft.moe.reading import Reading, compare, one_thread, read, windows_of

SHARE = 0.25
"""Of the bytes of all experts, what the streamed ways may hold."""
WAYS = (
    ("LRU", "exact", "lru"),
    ("exact", "exact", "expected-use"),
    ("balanced", "balanced", "expected-use"),
    ("fast", "fast", "expected-use"),
)
"""What is shown: a name, a quality and a policy."""
_WRITTEN = 48

OnToken = Callable[[int, int], None]
Watch = Callable[[str], OnToken]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedRow:
    """How one way did.

    Attributes:
        name: of the way.
        tokens_per_second: read one after another.
        nbytes_per_token: read from disk; None where all experts are in memory, as for the next two.
        hit_rate: of experts that were wanted, 0 to 1.
        low_mass: share of the gate mass that low copies served.
        perplexity_change: over that of the model in memory, less 1.
        same: whether text and all probabilities are those of the model in memory, to the bit.
    """

    name: str
    tokens_per_second: float
    nbytes_per_token: float | None = None
    hit_rate: float | None = None
    low_mass: float | None = None
    perplexity_change: float = 0.0
    same: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingShown:
    """What the act showed.

    Attributes:
        experts_nbytes: of all experts, as the model stores them.
        budget: for experts, of each streamed way; the KV cache has room of its own.
        tokens: read by each way.
        question: that was asked.
        answer: of the model in memory, and so of every way whose row says `same`.
        rows: in memory, then `WAYS`.
    """

    experts_nbytes: int
    budget: int
    tokens: int
    question: str
    answer: str
    rows: tuple[StreamedRow, ...]

    @property
    def held(self) -> bool:
        """Whether every way that is exact gave the same as the model in memory, to the bit."""
        exact = {name for name, quality, _ in WAYS if quality == "exact"}
        return all(row.same for row in self.rows if row.name in exact)


def show_streaming(
    model: Path, texts: Mapping[str, Sequence[str]], question: str, *, tokens: int, watch: Watch | None = None
) -> StreamingShown:
    """Run a model in memory and streamed, on one thread, for it is small.

    Args:
        model: folder of a Mixture-of-Experts model with a chat template.
        texts: documents by domain, which it was not trained on.
        question: to answer.
        tokens: to read of each domain.
        watch: called with a way's name before it runs; gives what is told of its tokens.

    Raises:
        InvalidInput: the texts are shorter than that.
        TierFull, UnsafeDirectory: there is no room for packed experts among the temporary files.
    """
    tokenizer = open_tokenizer(model)
    windows = [_window(tokenizer, documents, tokens) for documents in texts.values()]
    asked = tokenizer.ask([{"role": "user", "content": question}])
    told = watch or _unwatched
    with tempfile.TemporaryDirectory(prefix="undercroft-demo-") as name, one_thread():
        sources, nbytes = _packed(model, Path(name))
        resident: Any = open_causal_model(model, precision="stored").module
        resident.set_experts_implementation("eager")
        best = read(resident.eval(), windows, told("in memory"))
        answer = _write(resident, asked)
        context, budget = max(tokens, len(asked) + _WRITTEN), int(SHARE * nbytes)
        room = context * token_nbytes(resident.config, resident.dtype)
        rows = [StreamedRow(name="in memory", tokens_per_second=best.forwards / best.seconds)]
        for way, quality, policy in WAYS:
            streamed = load_moe(
                sources[quality],
                budget + room,
                quality,
                policy=policy,
                context=context,
                prefetch=policy != "lru",
            )
            row = _row(way, streamed, read(streamed, windows, told(way)), best)
            rows.append(replace(row, same=row.same and _write(streamed, asked) == answer))
    return StreamingShown(
        experts_nbytes=nbytes,
        budget=budget,
        tokens=best.forwards,
        question=question,
        answer=str(tokenizer.inner.decode(answer, skip_special_tokens=True)).strip(),
        rows=tuple(rows),
    )


def _unwatched(_: str) -> OnToken:
    return lambda done, total: None


def _window(tokenizer: Tokenizer, documents: Sequence[str], tokens: int) -> list[int]:
    encoded = [tokenizer.encode(document) for document in documents]
    return windows_of(encoded, tokenizer.end, length=tokens, count=1)[0]


def _packed(model: Path, folder: Path) -> tuple[dict[str, Path], int]:
    """Where each quality finds its experts, and what they take in the model's own files."""
    sources, nbytes = {"exact": model}, 0
    for name in ("balanced", "fast"):
        quality = Quality.preset(name)
        sources[name] = folder / name
        nbytes = pack(model, sources[name], high=quality.high, low=quality.low_precision).stored_nbytes
    return sources, nbytes


def _row(name: str, model: Any, reading: Reading, best: Reading) -> StreamedRow:
    report, fidelity = expert_report(model), compare(reading, best)
    return StreamedRow(
        name=name,
        tokens_per_second=reading.forwards / reading.seconds,
        nbytes_per_token=report.read_nbytes / reading.forwards,
        hit_rate=report.hit_rate,
        low_mass=report.low_mass,
        perplexity_change=fidelity.perplexity_change,
        same=fidelity.same,
    )


def _write(model: Any, asked: list[int]) -> list[int]:
    """The likeliest answer."""
    prompt = torch.tensor([asked])
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=_WRITTEN,
        max_length=None,
        do_sample=False,
    )
    return written[0, len(asked) :].tolist()
