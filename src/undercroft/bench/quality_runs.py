"""The runs behind the question what lossy qualities cost: a model, a quality, a text and an examination.

Each token is a forward of its own, so that experts come and go as in decoding; none is read ahead. Models are computed
in float32, so that what differs is what lower precision does, and nothing else. It judges nothing. Invariant: no figure
depends on how fast the machine is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from undercroft.bundled import model_folder
from undercroft.bundled.outliers import with_outliers
from undercroft.bundled.skills import Exercise, examination
from undercroft.bundled.texts import held_out
from undercroft.errors import InvalidInput
from undercroft.models.load import open_causal_model, open_tokenizer
from undercroft.models.source import read_config
from undercroft.moe.headroom import token_nbytes
from undercroft.moe.load import engine_of, expert_report, load_moe
from undercroft.moe.pack import pack
from undercroft.moe.quality import Quality
from undercroft.moe.reading import Fidelity, Reading, compare, read, windows_of
from undercroft.moe.trace import Trace

PLAIN, OUTLIERS = "bundled", "synthetic outliers"
_LONGEST_QUESTION, _LONGEST_ANSWER = 56, 72

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class QualitySettings:
    """What to read and ask.

    Attributes:
        model: folder of a model of the bundled one's layout and tokenizer; None for that one.
        windows: of text of each domain.
        length: tokens of a window, each of which begins with an empty KV cache.
        exercises: of each skill; 0 sets no examination.
        share: what the budget holds of the full copies that a quality serves; the KV cache has room of its own.
        outliers: scale of the synthetic outlier channels, a power of two.

    Raises:
        InvalidInput: that would measure nothing.
    """

    model: Path | None = None
    windows: int = 4
    length: int = 256
    exercises: int = 30
    share: float = 0.25
    outliers: int = 64

    def __post_init__(self) -> None:
        if self.windows < 1 or self.length < 2 or self.exercises < 0 or not 0 < self.share <= 1:
            raise InvalidInput(
                f"{self.windows} windows of {self.length} tokens, {self.exercises} exercises and a share of "
                f"{self.share} of the experts measure nothing"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a quality did to a model.

    Attributes:
        model: `PLAIN` or `OUTLIERS`.
        quality: by name.
        allowed: share of the gate mass that it may serve low.
        perplexity: of the text.
        fidelity: to the exact reading of the plain model, which the other one equals to the bit.
        low_mass, skip_mass: share of the gate mass served low and left out, while reading.
        hit_rate: likewise.
        nbytes_per_token: read from disk, likewise.
        exact_match: percent of the exercises solved; None where it was asked none.
    """

    model: str
    quality: str
    allowed: float
    perplexity: float
    fidelity: Fidelity
    low_mass: float
    skip_mass: float
    hit_rate: float
    nbytes_per_token: float
    exact_match: float | None


class QualityRuns:
    """The models, texts and exercises of one measurement.

    Args:
        settings: what to read and ask.
        folder: an empty one, for what is written on the way.
        progress: told of each run.

    Attributes:
        trace: of the exact reading.
        unequal: tokens of its first window of which the model in memory expects anything else, in any bit.
        lossless_share: bytes of its experts' lossless copies, for each of the checkpoint's.
    """

    trace: Trace
    unequal: int
    lossless_share: float

    def __init__(self, settings: QualitySettings, folder: Path, progress: Progress) -> None:
        self._settings, self._folder, self._progress = settings, folder, progress
        self._sources = {PLAIN: settings.model or model_folder("moe"), OUTLIERS: folder / "outliers"}
        self._tokenizer = open_tokenizer(self._sources[PLAIN])
        self._windows = [window for each in held_out().values() for window in self._cut(each)]
        self._paper = examination(settings.exercises) if settings.exercises else []
        self._best: Reading | None = None

    def exact(self) -> Found:
        """Out of the checkpoint's own files, and beside it in memory; to be run first."""
        packed = pack(self._sources[PLAIN], self._folder / PLAIN / "hobbit")
        squeezed = pack(self._sources[PLAIN], self._folder / PLAIN / "lossless", high="lossless", low="none")
        self.lossless_share = squeezed.high_nbytes / squeezed.stored_nbytes
        model = self._open(self._sources[PLAIN], packed.stored_nbytes, Quality.preset("exact"))
        engine_of(model).keep_journal()
        found = self._found(PLAIN, "exact", model, is_asked=True)
        self.unequal = self._compare_in_memory()
        return found

    def lossy(self, model: str, name: str, *, is_asked: bool) -> Found:
        """A model packed for a quality.

        Args:
            model: `PLAIN` or `OUTLIERS`.
            name: of a preset.
            is_asked: whether it takes the examination too.
        """
        quality, folder = Quality.preset(name), self._folder / model / name
        packed = pack(self._source(model), folder, high=quality.high, low=quality.low_precision)
        opened = self._open(folder, packed.high_nbytes, quality)
        return self._found(model, name, opened, is_asked=is_asked)

    def _found(self, model: str, name: str, opened: Any, *, is_asked: bool) -> Found:
        reading = read(opened, self._windows, self._told)
        report = expert_report(opened)
        if self._best is None:
            self._best, self.trace = reading, engine_of(opened).trace()
        self._progress(f"{name}, {model}: perplexity {reading.perplexity:.3f}")
        return Found(
            model=model,
            quality=name,
            allowed=Quality.preset(name).low,
            perplexity=reading.perplexity,
            fidelity=compare(reading, self._best),
            low_mass=report.low_mass,
            skip_mass=report.skip_mass,
            hit_rate=report.hit_rate,
            nbytes_per_token=report.read_nbytes / reading.forwards,
            exact_match=self._examine(opened) if is_asked and self._paper else None,
        )

    def _told(self, done: int, total: int) -> None:
        if done % self._settings.length == 0:
            self._progress(f"  {done} of {total} tokens read")

    def _compare_in_memory(self) -> int:
        assert self._best is not None
        resident: Any = open_causal_model(self._sources[PLAIN]).module
        resident.set_experts_implementation("eager")
        expected = read(resident.eval(), self._windows[:1]).expected
        return int((expected != self._best.expected[: len(expected)]).any(-1).sum())

    def _source(self, model: str) -> Path:
        source = self._sources[model]
        if not source.exists():
            changed = open_causal_model(self._sources[PLAIN])
            with_outliers(changed.module, self._settings.outliers).to(torch.bfloat16)
            changed.save(source)
        return source

    def _cut(self, documents: list[str]) -> list[list[int]]:
        encoded = [self._tokenizer.encode(document) for document in documents]
        settings = self._settings
        return windows_of(encoded, self._tokenizer.end, length=settings.length, count=settings.windows)

    def _open(self, source: Path, nbytes: int, quality: Quality) -> Any:
        """A model that holds its share of experts of so many bytes in all."""
        context = max(self._settings.length, _LONGEST_QUESTION + _LONGEST_ANSWER)
        room = token_nbytes(read_config(str(source)), torch.float32) * context
        budget = int(self._settings.share * nbytes) + room
        return load_moe(source, budget, quality, dtype=torch.float32, context=context, prefetch=False)

    def _examine(self, model: Any) -> float:
        solved = 0
        for number, exercise in enumerate(self._paper, 1):
            solved += exercise.solved_by(self._answer(model, exercise))
            if number % 40 == 0:
                self._progress(f"  {solved} of {number} exercises solved")
        return 100 * solved / len(self._paper)

    def _answer(self, model: Any, exercise: Exercise) -> str:
        asked = torch.tensor([self._tokenizer.ask([{"role": "user", "content": exercise.question}])])
        options: dict[str, Any] = {"max_new_tokens": _LONGEST_ANSWER, "max_length": None, "do_sample": False}
        written = model.generate(asked, attention_mask=torch.ones_like(asked), **options)
        return str(self._tokenizer.inner.decode(written[0, asked.shape[1] :], skip_special_tokens=True))
