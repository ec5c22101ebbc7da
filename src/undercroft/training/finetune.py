"""Fine-tuning a causal language model on a file, with its activations on disk.

It answers for the order of things: what is checked before anything is loaded, when a checkpoint is written,
what is left behind. Invariants: interrupted and resumed training gives the same bits as training in one go;
a run that fails leaves its checkpoints, or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from undercroft import arithmetic
from undercroft.errors import InvalidInput, UnsafeDirectory, UnsupportedModel
from undercroft.models.causal import CausalModel, require_adapters
from undercroft.models.load import open_causal_model, open_tokenizer
from undercroft.models.tokenizer import Tokenizer
from undercroft.store import heap
from undercroft.store.directory import PrivateDirectory
from undercroft.training.checkpoint import newest_checkpoint, remove_checkpoints
from undercroft.training.corpus import read_corpus
from undercroft.training.durable import clear_partial, whole_folder, write_whole
from undercroft.training.finetune_report import FinetuneReport
from undercroft.training.interrupt import Interruption
from undercroft.training.run import OnStep, Run
from undercroft.training.settings import FinetuneSettings
from undercroft.training.spill import ActivationSpill


def finetune(settings: FinetuneSettings, *, on_step: OnStep | None = None) -> FinetuneReport:
    """Train a model on a file.

    `settings.output` receives ``model/`` (or ``adapter/``), which `from_pretrained` opens, ``report.json``,
    and a checkpoint while training lasts.

    Args:
        settings: what on what, and how.
        on_step: called after each optimizer step.

    Returns:
        What was done.

    Raises:
        InvalidInput, UnsupportedModel, MissingExtra: what was asked cannot be done; the text says what can.
        BudgetExceeded: the budget is too small for one backward step; the text names one that works.
        UnsafeDirectory, TierFull, TransferFailed, CorruptRecord: a disk or the hub failed.
        Interrupted: Ctrl-C, after the step under way was finished and saved.
    """
    arithmetic.settle()
    heap.settle()
    checkpoint = _find_checkpoint(settings)
    _check_means(settings)
    tokenizer = open_tokenizer(settings.model)
    corpus = read_corpus(settings.data, tokenizer, length=settings.sequence_length)
    with ExitStack() as stack:
        stack.enter_context(_output(settings.output))
        torch.manual_seed(settings.seed)
        model = _open_model(settings, tokenizer)
        spill = stack.enter_context(_spilling(settings, model))
        run = Run(settings, corpus, model, spill, on_step)
        if checkpoint is not None:
            run.resume(checkpoint)
        interruption = stack.enter_context(Interruption())
        report = run.train(interruption)
        if settings.output is not None:
            _save(settings.output, model, tokenizer, report)
    return report


# -- before the first step
# ----------------------------------------------------------------------------------------


def _check_means(settings: FinetuneSettings) -> None:
    """Fail before a model is loaded where a directory cannot be spilled to, or an extra is missing."""
    if settings.activations == "spill":
        for disk in settings.disks:
            PrivateDirectory(disk).close()
    if settings.lora:
        require_adapters()


def _find_checkpoint(settings: FinetuneSettings) -> Path | None:
    """The checkpoint to go on from, or None to begin anew in a folder that is empty or not there."""
    output = settings.output
    if output is None:
        return None
    if output.exists() and not output.is_dir():
        raise InvalidInput(f"{output} is a file; choose a folder with --output")
    if settings.resume:
        return _resumable(output)
    if output.is_dir() and any(output.iterdir()):
        raise InvalidInput(f"{output} is not empty; go on from it with --resume, or choose another folder")
    return None


def _resumable(output: Path) -> Path:
    checkpoint = newest_checkpoint(output)
    if checkpoint is None:
        done = (output / "report.json").exists()
        why = "that run is finished" if done else "there is no checkpoint in it"
        raise InvalidInput(
            f"nothing to resume in {output}: {why}; leave --resume out, and choose an empty folder"
        )
    return checkpoint


@contextmanager
def _output(output: Path | None) -> Generator[None]:
    """The folder, there. If it was made here and holds nothing at the end, it is removed."""
    if output is None:
        yield
        return
    existed = output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnsafeDirectory(
            f"cannot create {output}: {error.strerror}; choose another with --output"
        ) from error
    clear_partial(output)
    try:
        yield
    finally:
        if not existed:
            with suppress(OSError):  # it holds a checkpoint, or the result
                output.rmdir()


def _open_model(settings: FinetuneSettings, tokenizer: Tokenizer) -> CausalModel:
    model = open_causal_model(settings.model, precision="stored" if settings.lora else "float32")
    if tokenizer.size > model.vocabulary:
        raise UnsupportedModel(
            f"the tokenizer of {settings.model} has {tokenizer.size} tokens, its model knows "
            f"{model.vocabulary}; use the tokenizer that belongs to it"
        )
    if model.longest is not None and settings.sequence_length > model.longest:
        raise InvalidInput(
            f"{settings.model} reads {model.longest} tokens at once, not {settings.sequence_length}; "
            f"use --sequence-length {model.longest} or less"
        )
    model.module.to(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if settings.lora:
        model.add_adapter(rank=settings.rank, alpha=settings.alpha)
    if settings.activations == "recompute":
        model.recompute_layers()
    return model


@contextmanager
def _spilling(settings: FinetuneSettings, model: CausalModel) -> Generator[ActivationSpill | None]:
    if settings.activations != "spill":
        yield None
        return
    spill = ActivationSpill(
        model.module,
        budget=settings.budget,
        directory=list(settings.disks) or None,
        min_bytes=settings.min_bytes,
        capacity=settings.disk_capacity,
        write_cap=settings.write_cap,
        checksums=settings.checksums,
    )
    try:
        yield spill
    finally:
        spill.close()


# -- after the last step
# ------------------------------------------------------------------------------------------


def _save(output: Path, model: CausalModel, tokenizer: Tokenizer, report: FinetuneReport) -> None:
    """Write the result; checkpoints go once it is safe."""
    is_adapter = bool(report.settings["lora"])
    with whole_folder(output / ("adapter" if is_adapter else "model")) as folder:
        model.save(folder)
        tokenizer.save(folder)
    write_whole(output / "report.json", json.dumps(report.as_dict(), indent=1))
    remove_checkpoints(output)
