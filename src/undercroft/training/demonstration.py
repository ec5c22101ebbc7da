"""The first act of the demonstration: a small transformer trained plain, checkpointed and spilled.

It knows what is shown, not how it is printed. The text is Python's own reference manual, which every Python
carries; the model is new, of a stock shape. Invariant: nothing is downloaded, and nothing is left behind.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from undercroft.errors import InvalidInput
from undercroft.models.fresh import Shape, write_fresh_model
from undercroft.training.compare import Row, compare
from undercroft.training.settings import FinetuneSettings
from undercroft.training.trial import OnTrialStep

_VOCABULARY = 2048
_HEAD_WIDTH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the demonstration is.

    Attributes:
        layers, width: of the model; the width is a multiple of 64.
        sequence_length, batch_size: of what it is trained on.
        steps: optimizer steps of each run.
        budget: bytes of activations to hold in memory when spilling.
        min_bytes: tensors smaller than this are not spilled.
    """

    layers: int = 6
    width: int = 256
    sequence_length: int = 1024
    batch_size: int = 2
    steps: int = 5
    budget: str = "64MiB"
    min_bytes: str = "1MiB"

    def __post_init__(self) -> None:
        if self.layers < 1 or self.width < _HEAD_WIDTH or self.width % _HEAD_WIDTH:
            raise InvalidInput(
                f"a model of {self.layers} layers, {self.width} wide: there must be one layer at least, "
                f"and the width must be a multiple of {_HEAD_WIDTH}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingShown:
    """What the act showed.

    Attributes:
        parameters: of the model.
        scale: as asked.
        rows: plain, checkpointed and spilled.
    """

    parameters: int
    scale: Scale
    rows: tuple[Row, ...]


def show_training(scale: Scale, *, watch: Callable[[str], OnTrialStep | None] | None = None) -> TrainingShown:
    """Train the same model three ways, each in a process of its own.

    Args:
        scale: how large.
        watch: see `compare`.

    Raises:
        TierFull, UnsafeDirectory: there is no room for the model among the temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="undercroft-demo-") as name:
        folder = Path(name)
        text = "\n".join(topics[topic] for topic in sorted(topics))
        (folder / "text.txt").write_text(text, encoding="utf-8")
        shape = Shape(
            layers=scale.layers,
            width=scale.width,
            heads=scale.width // _HEAD_WIDTH,
            vocabulary=_VOCABULARY,
            longest=scale.sequence_length,
        )
        parameters = write_fresh_model(folder / "model", shape, text.splitlines())
        return TrainingShown(
            parameters=parameters, scale=scale, rows=compare(_settings(folder, scale), watch=watch)
        )


def _settings(folder: Path, scale: Scale) -> FinetuneSettings:
    return FinetuneSettings(
        model=str(folder / "model"),
        data=folder / "text.txt",
        output=None,
        steps=scale.steps,
        batch_size=scale.batch_size,
        sequence_length=scale.sequence_length,
        learning_rate=1e-3,
        warmup=1,
        budget=scale.budget,
        disks=(),
        min_bytes=scale.min_bytes,
    )
