"""``undercroft train``: fine-tune a model on a file, with its activations on disk.

A thin shell over `undercroft.training.finetune`: flags become settings, steps become a bar, the report is
printed.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undercroft.cli.progress import Steps, warnings_as_lines
from undercroft.cli.table import comparison_table
from undercroft.units import format_seconds, format_size

if TYPE_CHECKING:
    from undercroft.training.compare import Row
    from undercroft.training.finetune_report import FinetuneReport, StepReport
    from undercroft.training.settings import FinetuneSettings
    from undercroft.training.trial import OnTrialStep


def train(
    model: Annotated[str, typer.Argument(help="Folder of a causal language model, or its name on the hub.")],
    data: Annotated[Path, typer.Argument(help='Text, or JSON lines with "text" or "messages".')],
    output: Annotated[Path, typer.Option(help="Folder to write: the model or adapter, and report.json.")],
    lora: Annotated[
        bool, typer.Option("--lora/--full", help="Train an adapter beside the frozen model, or all weights.")
    ] = False,
    budget: Annotated[str, typer.Option(help="Most bytes of activations to hold in memory.")] = "512MiB",
    disk: Annotated[
        list[Path] | None,
        typer.Option(
            help="Directory to spill to; repeat for several disks.", show_default="Undercroft's own"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; overrides --epochs.")] = None,
    epochs: Annotated[float, typer.Option(help="How often to see the data.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Forward passes in an optimizer step.")] = 1,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest.", show_default="2e-5, for an adapter 2e-4")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of data, dropout and a new adapter.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0 for none.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --output.")] = False,
    min_bytes: Annotated[str, typer.Option(help="Tensors smaller than this are not spilled.")] = "1MiB",
    disk_capacity: Annotated[str | None, typer.Option(help="Most bytes of disk to occupy.")] = None,
    write_cap: Annotated[str | None, typer.Option(help="Most bytes ever to write, to spare an SSD.")] = None,
    checksums: Annotated[bool, typer.Option("--checksums", help="Verify what comes back from disk.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run plain and checkpointed, and compare.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    r"""Fine-tune a model whose activations do not fit: the same numbers, in a fraction of the memory.

    \b
    Example:
      undercroft train HuggingFaceTB/SmolLM2-135M notes.txt --output tuned --budget 512MiB
    """
    from undercroft.models.place import locate

    if compare and resume:
        raise typer.BadParameter("--compare needs a run from the beginning; leave --resume out")
    model = locate(model)  # before PyTorch, which takes seconds to come
    from undercroft.models.load import be_quiet
    from undercroft.training.finetune import finetune
    from undercroft.training.interrupt import Interrupted
    from undercroft.training.settings import FinetuneSettings

    be_quiet()
    settings = FinetuneSettings(
        model=model,
        data=data,
        output=output,
        lora=lora,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        sequence_length=sequence_length,
        learning_rate=learning_rate if learning_rate is not None else 2e-4 if lora else 2e-5,
        seed=seed,
        budget=budget,
        disks=tuple(disk or ()),
        min_bytes=min_bytes,
        write_cap=write_cap,
        disk_capacity=disk_capacity,
        checksums=checksums,
        save_every=save_every,
        resume=resume,
        measure_memory=compare,
    )
    typer.echo(_intention(settings), err=True)
    try:
        with warnings_as_lines(), Steps("train") as bar:
            report = finetune(
                settings, on_step=lambda step: bar.show(step.step, step.steps, _step_text(step))
            )
    except Interrupted as interrupted:
        typer.echo(_how_to_resume(interrupted), err=True)
        raise typer.Exit(130) from None
    rows = _compare(settings, report) if compare else ()
    if as_json:
        facts: dict[str, Any] = {**report.as_dict(), "comparison": [row.as_dict() for row in rows]}
        typer.echo(json.dumps(facts, indent=2))
    else:
        typer.echo(_describe(report, output) + (f"\n\n{comparison_table(rows)}" if rows else ""))


def _intention(settings: FinetuneSettings) -> str:
    what = f"an adapter of rank {settings.rank} beside" if settings.lora else "all weights of"
    where = ", ".join(str(disk) for disk in settings.disks) or "Undercroft's own directory"
    return (
        f"training {what} {settings.model} on {settings.data}: {settings.batch_size} x {settings.accumulate} "
        f"sequences of {settings.sequence_length} tokens a step, learning rate {settings.learning_rate:g}\n"
        f"activations: {settings.budget} in memory, the rest in {where}"
    )


def _step_text(step: StepReport) -> str:
    text = f"loss {step.loss:.4f}  {step.tokens_per_second:.0f} tokens/s"
    if step.spill is None:
        return text
    return (
        f"{text}  live {format_size(step.live_nbytes)}  spilled {format_size(step.spill.spilled_nbytes)}  "
        f"stalled {step.spill.stall_fraction:.1%}"
    )


def _how_to_resume(interrupted: BaseException) -> str:
    command = shlex.join(["undercroft", *(word for word in sys.argv[1:] if word != "--resume")])
    return f"{interrupted}\ngo on with: {command} --resume"


def _compare(settings: FinetuneSettings, report: FinetuneReport) -> tuple[Row, ...]:
    from undercroft.training.compare import compare

    bars: list[Steps] = []

    def watch(name: str) -> OnTrialStep:
        bars.append(Steps(name))
        return lambda step, steps, loss: bars[-1].show(step, steps, f"loss {loss:.4f}")

    try:
        return compare(settings, ways=("keep", "recompute"), known=report, watch=watch)
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)


def _describe(report: FinetuneReport, output: Path) -> str:
    result = output / ("adapter" if report.settings["lora"] else "model")
    lines = [
        f"{result} after {report.steps} steps, loss {report.losses[0]:.4f} to {report.losses[-1]:.4f}, "
        f"{report.tokens_per_second:.0f} tokens/s",
        f"trained {report.trained:,} parameters; the loss counts {report.loss_counts}",
    ]
    if report.left_out:
        lines.append(f"{report.left_out} tokens at the end of the data filled no sequence")
    if report.spill is not None:
        spill = report.spill
        lines.append(
            f"activations: {format_size(spill.spilled_nbytes)} spilled, at most "
            f"{format_size(spill.peak_nbytes)} of {format_size(spill.budget)} held, "
            f"{format_seconds(spill.stall_seconds)} stalled ({spill.stall_fraction:.1%})"
        )
    return "\n".join(lines)
