"""Undercroft: train, run, combine and personalise language models that do not fit in memory.

This is the front door: every public name, and where it lives. Errors come with it; everything else is
imported when it is first asked for, so that ``import undercroft`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from undercroft.errors import (
    BudgetExceeded,
    CorruptRecord,
    InvalidInput,
    MissingExtra,
    SpillMisuse,
    TierFull,
    TransferFailed,
    UndercroftError,
    UnsafeDirectory,
    UnsupportedModel,
    WrongVersion,
)

if TYPE_CHECKING:
    from undercroft.moe.load import expert_report, load_moe
    from undercroft.moe.pack import pack
    from undercroft.moe.quality import Quality
    from undercroft.moe.simulate import simulate
    from undercroft.store.budget import Budget
    from undercroft.training.finetune import finetune
    from undercroft.training.loss import chunked_cross_entropy
    from undercroft.training.settings import FinetuneSettings
    from undercroft.training.spill import ActivationSpill
    from undercroft.training.trainer import SpillCallback

    __version__: str

_HOMES = {
    "ActivationSpill": "undercroft.training.spill",
    "Budget": "undercroft.store.budget",
    "FinetuneSettings": "undercroft.training.settings",
    "Quality": "undercroft.moe.quality",
    "SpillCallback": "undercroft.training.trainer",
    "chunked_cross_entropy": "undercroft.training.loss",
    "expert_report": "undercroft.moe.load",
    "finetune": "undercroft.training.finetune",
    "load_moe": "undercroft.moe.load",
    "pack": "undercroft.moe.pack",
    "simulate": "undercroft.moe.simulate",
}

__all__ = [
    "ActivationSpill",
    "Budget",
    "BudgetExceeded",
    "CorruptRecord",
    "FinetuneSettings",
    "InvalidInput",
    "MissingExtra",
    "Quality",
    "SpillCallback",
    "SpillMisuse",
    "TierFull",
    "TransferFailed",
    "UndercroftError",
    "UnsafeDirectory",
    "UnsupportedModel",
    "WrongVersion",
    "__version__",
    "chunked_cross_entropy",
    "expert_report",
    "finetune",
    "load_moe",
    "pack",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("undercroft")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
