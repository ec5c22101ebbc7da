"""``undercroft bench``: questions put to this machine, with what would falsify the claims.

A thin shell over `undercroft.bench`: flags become settings, answers are printed and, if asked, written down.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undercroft.units import parse_size

if TYPE_CHECKING:
    from undercroft.bench.answer import Answer
    from undercroft.bench.modes import TrainingSettings

bench = typer.Typer(
    help="Measure what Undercroft claims, on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Rounds = Annotated[int, typer.Option(help="Samples of each way, taken in turns.")]
Attempts = Annotated[int, typer.Option(help="How often to take the rounds until the reference is steady.")]
Disk = Annotated[
    Path | None, typer.Option(help="Directory on the disk to use.", show_default="Undercroft's own")
]
Results = Annotated[
    Path | None, typer.Option(help="Folder for reports: Markdown, JSON and plots.", show_default="none")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 unless every line passes.")]


@bench.command()
def store(
    rounds: Rounds = 7,
    attempts: Attempts = 3,
    size: Annotated[str, typer.Option(help="Bytes that each way moves in a round.")] = "512MiB",
    queued: Annotated[str, typer.Option(help="Bytes of prefetch before a demand.")] = "1GiB",
    depth: Annotated[int, typer.Option(help="I/O threads, of the store and of the raw loop.")] = 2,
    disk: Disk = None,
    results: Results = None,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Compare the store with plain O_DIRECT system calls."""
    from undercroft import machine
    from undercroft.bench.store import StoreSettings, measure_store

    settings = StoreSettings(
        directory=disk or machine.home(),
        nbytes=parse_size(size),
        queued=parse_size(queued),
        rounds=rounds,
        attempts=attempts,
        depth=depth,
    )
    _tell([measure_store(settings, _progress)], results, as_json=as_json, strict=strict)


@bench.command()
def kernels(
    rounds: Rounds = 11,
    attempts: Attempts = 3,
    threads: Annotated[int, typer.Option(help="Threads of every way.")] = 2,
    shape: Annotated[list[str], typer.Option(help="Rows x columns of a weight; may be repeated.")] = [  # noqa: B006
        "14336x4096",
        "2048x768",
    ],
    batch: Annotated[list[int], typer.Option(help="Rows of activations; may be repeated.")] = [1, 32],  # noqa: B006
    working_set: Annotated[str, typer.Option(help="Bytes of weights that a way walks through.")] = "160MiB",
    results: Results = None,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Compare products with packed weights with PyTorch's own kernels."""
    from undercroft.bench.kernels import KernelSettings, measure_kernels

    settings = KernelSettings(
        shapes=tuple(map(_shape, shape)),
        batches=tuple(batch),
        threads=threads,
        working_set=parse_size(working_set),
        rounds=rounds,
        attempts=attempts,
    )
    _tell([measure_kernels(settings, _progress)], results, as_json=as_json, strict=strict)


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise typer.BadParameter(f'--shape is like "2048x768", not {text!r}')
    return int(rows), int(columns)


@bench.command()
def moe(
    trace: Annotated[Path, typer.Option("--simulate", help="CSV file of routed experts to replay.")],
    budget: Annotated[list[str], typer.Option(help="Bytes, or a share of all experts; may be repeated.")] = [  # noqa: B006
        *("6%", "12.5%", "25%", "50%")
    ],
    policy: Annotated[
        list[str] | None, typer.Option(help="Which expert leaves first; may be repeated.", show_default="all")
    ] = None,
    quality: Annotated[str, typer.Option(help="exact, balanced, fast or hobbit.")] = "exact",
    expert_bytes: Annotated[
        str | None, typer.Option(help="Bytes of an expert.", show_default="what the trace says")
    ] = None,
    read_rate: Annotated[
        str | None, typer.Option(help='Bytes read per second, like "1.7GB", to predict tokens per second.')
    ] = None,
    results: Results = None,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Simulate which experts a budget keeps in memory, from a trace of their routing."""
    from undercroft.bench.moe import MoeSettings, measure_moe
    from undercroft.moe.policies import ONLINE

    settings = MoeSettings(
        trace=trace,
        budgets=tuple(budget),
        policies=tuple(policy or ONLINE),
        quality=quality,
        expert_nbytes=None if expert_bytes is None else parse_size(expert_bytes),
        read_bytes_per_second=None if read_rate is None else parse_size(read_rate),
    )
    _tell([measure_moe(settings, _progress)], results, as_json=as_json, strict=strict)


@bench.command()
def train(
    rounds: Rounds = 7,
    attempts: Attempts = 3,
    budget: Annotated[str, typer.Option(help="Bytes of activations in memory, when spilling.")] = "160MiB",
    disk: Disk = None,
    sweep: Annotated[int, typer.Option(help="Instead, train at this many budgets.")] = 0,
    limits: Annotated[int, typer.Option(help="Instead, this many steps under a memory limit; root.")] = 0,
    flat: Annotated[int, typer.Option(help="Instead, watch this many steps for growth.")] = 0,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 8,
    width: Annotated[int, typer.Option(help="Its width, a multiple of 64.")] = 512,
    vocabulary: Annotated[int, typer.Option(help="Different tokens.")] = 8192,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences in a step.")] = 4,
    min_bytes: Annotated[str, typer.Option(help="Tensors smaller than this are not spilled.")] = "1MiB",
    results: Results = None,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Compare spilled training with plain and checkpointed training."""
    from undercroft.bench.gpt import Shape
    from undercroft.bench.modes import TrainingSettings

    if width < 64 or width % 64:
        raise typer.BadParameter("--width must be a multiple of 64, for attention heads of 64")
    shape = Shape(
        layers=layers,
        hidden=width,
        heads=width // 64,
        vocabulary=vocabulary,
        sequence=sequence_length,
        batch=batch_size,
    )
    settings = TrainingSettings(
        shape=shape,
        budget=parse_size(budget),
        directory=disk,
        min_bytes=parse_size(min_bytes),
        rounds=rounds,
        attempts=attempts,
    )
    answers = _training_answers(settings, sweep=sweep, limits=limits, flat=flat)
    _tell(answers, results, as_json=as_json, strict=strict)


def _training_answers(settings: TrainingSettings, *, sweep: int, limits: int, flat: int) -> list[Answer]:
    from undercroft.bench.flatness import measure_flatness
    from undercroft.bench.limits import measure_limits
    from undercroft.bench.sweep import measure_sweep
    from undercroft.bench.training import measure_training

    special = ((measure_sweep, sweep), (measure_limits, limits), (measure_flatness, flat))
    answers = [measure(settings, number, _progress) for measure, number in special if number]
    return answers or [measure_training(settings, _progress)]


def _tell(answers: Sequence[Answer], results: Path | None, *, as_json: bool, strict: bool) -> None:
    from undercroft.bench.report import write_report

    if results is not None:
        for answer in answers:
            _progress(f"written: {write_report(answer, results)}")
    if as_json:
        typer.echo(json.dumps({"answers": [answer.as_dict() for answer in answers]}, indent=2))
    else:
        typer.echo("\n\n".join(map(str, answers)))
    if strict and not all(answer.passed for answer in answers):
        raise typer.Exit(1)


def _progress(text: str) -> None:
    typer.echo(text, err=True)
