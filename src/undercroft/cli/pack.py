"""``undercroft pack``: each expert of a Mixture-of-Experts model as one record, in two precisions.

A thin shell over `undercroft.moe.pack`: flags become arguments, experts become a bar, the report is printed.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undercroft.cli.progress import Steps
from undercroft.units import format_seconds, format_size

if TYPE_CHECKING:
    from undercroft.moe.pack_report import PackProgress, PackReport


class High(StrEnum):
    """Precisions of full copies."""

    KEEP = "keep"
    LOSSLESS = "lossless"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


class Low(StrEnum):
    """Precisions of low copies."""

    INT4 = "int4"
    INT2 = "int2"
    NONE = "none"


def pack(
    source: Annotated[
        str, typer.Argument(help="Folder or GGUF file of a Mixture-of-Experts model, or its name on the hub.")
    ],
    destination: Annotated[Path, typer.Argument(help="Folder to write, new or begun by this command.")],
    high: Annotated[
        High, typer.Option(help="Precision of the full copies; keep and lossless are exact.")
    ] = High.KEEP,
    low: Annotated[Low, typer.Option(help="Precision of the low copies.")] = Low.INT4,
    group: Annotated[int, typer.Option(help="Columns that share a scale: 32, 64 or 128.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    r"""Pack a model with experts, so that each is read with one call, and in less precision where that is allowed.

    \b
    Example:
      undercroft pack Qwen/Qwen3-30B-A3B packed --high keep --low int4
    """
    from undercroft.models.place import locate_weights

    source = locate_weights(source)  # before PyTorch, which takes seconds to come
    from undercroft.models.load import be_quiet
    from undercroft.moe.pack import pack

    be_quiet()
    with Steps("pack") as bar:
        report = pack(
            source,
            destination,
            high=high.value,
            low=low.value,
            group=group,
            on_progress=lambda progress: _show(bar, progress, destination),
        )
    typer.echo(json.dumps(report.as_dict(), indent=2) if as_json else _describe(report))


def _show(bar: Steps, progress: PackProgress, destination: Path) -> None:
    if progress.seconds_left is None:
        here = f", {progress.experts} of them there already" if progress.experts else ""
        size = format_size(progress.all_nbytes)
        typer.echo(
            f"packing {progress.all_experts} experts{here} into {destination}: {size} in all", err=True
        )
        return
    left = f"  about {format_seconds(progress.seconds_left)} left" if progress.seconds_left else ""
    bar.show(progress.experts, progress.all_experts, f"{format_size(progress.nbytes)} written{left}")


def _describe(report: PackReport) -> str:
    low = f", {report.low} {format_size(report.low_nbytes)}" if report.low else ", no low copies"
    lines = [
        f"{report.destination}: {report.experts} experts of {report.layers} layers in "
        f"{format_seconds(report.seconds)}",
        f"experts: {report.high} {format_size(report.high_nbytes)}{low}; "
        f"in the checkpoint {format_size(report.stored_nbytes)}",
        f"all other weights: {format_size(report.dense_nbytes)}",
    ]
    if report.kept_layers:
        lines.append(f"{report.kept_layers} layers were there already")
    if report.not_quantised:
        lines.append(
            f"{len(report.not_quantised)} matrices are in the checkpoint's precision, since no group divides their "
            f"columns: {report.not_quantised[0]} first"
        )
    return "\n".join(lines)
