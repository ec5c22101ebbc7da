"""What a fine-tuning run is told: a frozen record, checked when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from undercroft.errors import InvalidInput
from undercroft.units import parse_size

Activations = Literal["spill", "keep", "recompute"]
"""What becomes of activations until backward: spilled to disk, kept in memory, or computed again."""

_PLACES = {"data", "output", "disks", "save_every", "resume", "measure_memory"}
_MEANS = {"activations", "budget", "min_bytes", "write_cap", "disk_capacity", "checksums"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings:
    """All that `finetune` is told.

    Attributes:
        model: a folder with a causal language model, or its name on the Hugging Face hub.
        data: a text file, or JSON lines with "text" or "messages".
        output: the folder to write; None writes nothing.
        lora: train an adapter beside the frozen model instead of all weights.
        rank, alpha: of the adapter.
        steps: how many optimizer steps; None for what `epochs` makes.
        epochs: how often each block of the data is seen.
        batch_size: sequences in one forward pass.
        accumulate: forward passes in one optimizer step.
        sequence_length: tokens in a sequence.
        learning_rate: the highest; it climbs there in `warmup` steps, then falls to a tenth along a cosine.
        warmup: steps of climbing; None for a twentieth of all.
        weight_decay: of AdamW.
        clip: the largest norm of all gradients together.
        seed: of the order of the data, of dropout and of a new adapter.
        activations: "spill", "keep" or "recompute".
        budget: the most bytes of activations in memory, for "spill".
        disks: directories to spill to; Undercroft's own if empty.
        min_bytes: tensors smaller than this are not spilled.
        write_cap: the most bytes ever to write for spilling, to spare an SSD.
        disk_capacity: the most bytes of disk to occupy.
        checksums: verify what comes back from disk.
        save_every: steps between checkpoints; 0 for none but that of an interrupt.
        resume: go on from the newest checkpoint in `output`.
        measure_memory: measure the peak of the last step.
        device: as torch names it; None for the first GPU, or the CPU where there is none.

    Raises:
        InvalidInput: a value that cannot be meant.
    """

    model: str
    data: Path
    output: Path | None
    lora: bool = False
    rank: int = 16
    alpha: int = 32
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 4
    accumulate: int = 1
    sequence_length: int = 512
    learning_rate: float = 2e-5
    warmup: int | None = None
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    activations: Activations = "spill"
    budget: int | str = "512MiB"
    disks: tuple[Path, ...] = ()
    min_bytes: int | str = "1MiB"
    write_cap: int | str | None = None
    disk_capacity: int | str | None = None
    checksums: bool = False
    save_every: int = 0
    resume: bool = False
    measure_memory: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        at_least_one = (
            "batch_size",
            "accumulate",
            "rank",
            "alpha",
            *(() if self.steps is None else ("steps",)),
        )
        for name in at_least_one:
            _check(self, name, getattr(self, name) >= 1, "must be 1 or more")
        for name in ("epochs", "learning_rate", "clip"):
            _check(self, name, 0 < getattr(self, name) < float("inf"), "must be more than 0")
        for name in ("save_every", "weight_decay", *(() if self.warmup is None else ("warmup",))):
            _check(self, name, getattr(self, name) >= 0, "must not be negative")
        _check(self, "sequence_length", self.sequence_length >= 2, "must be 2 or more")
        for size in (self.budget, self.min_bytes, self.write_cap or 0, self.disk_capacity or 0):
            parse_size(size)
        if self.resume and self.output is None:
            raise InvalidInput("resume needs an output: the folder that holds the checkpoint")

    def as_dict(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        values = asdict(self)
        values["data"] = str(self.data)
        values["output"] = None if self.output is None else str(self.output)
        values["disks"] = [str(disk) for disk in self.disks]
        return values

    def decisive(self) -> dict[str, Any]:
        """Those values that decide the numbers of a run, besides the data: a resumed run needs the same."""
        return {name: value for name, value in self.as_dict().items() if name not in _PLACES | _MEANS}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FinetuneSettings:
        """The inverse of `as_dict`."""
        output = values["output"]
        given: dict[str, Any] = {
            **values,
            "data": Path(values["data"]),
            "output": None if output is None else Path(output),
            "disks": tuple(Path(disk) for disk in values["disks"]),
        }
        return cls(**given)


def _check(settings: FinetuneSettings, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise InvalidInput(f"{name} {rule}, not {getattr(settings, name)}")
