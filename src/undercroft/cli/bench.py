"""``undercroft bench``: questions put to this machine, with what would falsify the claims.

A thin shell over `undercroft.bench`: flags become settings, answers are printed and, if asked, written down.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undercroft import machine
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
    model: Annotated[
        str | None,
        typer.Argument(help="With --trace: folder of a Mixture-of-Experts model, or its name on the hub."),
    ] = None,
    simulate: Annotated[
        Path | None,
        typer.Option("--simulate", help="CSV file of routed experts to replay.", show_default=False),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Instead, run MODEL and write its routed experts here.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="With --trace: texts to go on from, one a line.", show_default="built in"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="With --trace: most tokens to write for each prompt.")] = 64,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="Bytes, or to replay a share of all experts; may be repeated.",
            show_default="6%, 12.5%, 25% and 50% to replay, 2GiB to record",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Which expert leaves first; may be repeated.", show_default="all")
    ] = None,
    quality: Annotated[str, typer.Option(help="exact, balanced, fast or hobbit.")] = "exact",
    expert_bytes: Annotated[
        str | None, typer.Option(help="Bytes of an expert.", show_default="what the trace says")
    ] = None,
    high_share: Annotated[
        float, typer.Option(help="Bytes of a high copy for each of these: 0.7 lossless, 0.53 in int8.")
    ] = 1.0,
    low_share: Annotated[float, typer.Option(help="Bytes of a low copy for each of these.")] = 0.28,
    read_rate: Annotated[
        str | None,
        typer.Option(
            help='Bytes read per second, like "1.7GB", to predict tokens per second.',
            show_default="as doctor finds here",
        ),
    ] = None,
    results: Results = None,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Simulate which experts a budget keeps in memory, from a trace of their routing; or record such a trace."""
    from undercroft.bench.moe import BUDGETS, MoeSettings, measure_moe
    from undercroft.moe.policies import ONLINE
    from undercroft.store.probe import disk_rates

    if trace is not None and model is not None and simulate is None:
        _record(model, trace, prompts, tokens, budget or ["2GiB"], quality, as_json=as_json)
        return
    if simulate is None or model is not None or trace is not None or prompts is not None:
        raise typer.BadParameter("either --simulate TRACE.csv, or MODEL --trace OUT.csv [--prompts FILE]")
    settings = MoeSettings(
        trace=simulate,
        budgets=tuple(budget or BUDGETS),
        policies=tuple(policy or ONLINE),
        quality=quality,
        expert_nbytes=None if expert_bytes is None else parse_size(expert_bytes),
        high_share=high_share,
        low_share=low_share,
        read_bytes_per_second=parse_size(read_rate) if read_rate else disk_rates(machine.home()).read,
    )
    _tell([measure_moe(settings, _progress)], results, as_json=as_json, strict=strict)


def _record(
    model: str,
    trace: Path,
    prompts: Path | None,
    tokens: int,
    budget: list[str],
    quality: str,
    *,
    as_json: bool,
) -> None:
    from undercroft.models.load import be_quiet
    from undercroft.moe.recording import PROMPTS, read_prompts, record_trace

    if tokens < 1 or len(budget) > 1:
        raise typer.BadParameter("with --trace, --tokens is at least 1 and there is one --budget")
    be_quiet()
    texts = read_prompts(prompts) if prompts else PROMPTS
    found = record_trace(
        model,
        trace,
        prompts=texts,
        tokens=tokens,
        budget=budget[0],
        quality=quality,
        on_prompt=lambda done: _progress(f"prompt {done}/{len(texts)}"),
    )
    typer.echo(json.dumps(asdict(found), indent=2) if as_json else str(found))


@bench.command()
def quality(
    windows: Annotated[int, typer.Option(help="Windows of text of each kind to read.")] = 4,
    exercises: Annotated[int, typer.Option(help="Exercises of each skill; 0 for no examination.")] = 30,
    results: Results = None,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Compare what the bundled model thinks and solves in each quality."""
    from undercroft.bench.quality import measure_quality
    from undercroft.bench.quality_runs import QualitySettings
    from undercroft.models.load import be_quiet

    be_quiet()
    settings = QualitySettings(windows=windows, exercises=exercises)
    _tell([measure_quality(settings, _progress)], results, as_json=as_json, strict=strict)


@bench.command()
def peers(
    directory: Annotated[
        Path, typer.Option("--model", help="Folder for the model's files, which stay; 25 GB by default.")
    ],
    python: Annotated[
        Path | None, typer.Option(help="A Python that has llama-cpp-python or ik-llama-cpp-python, and gguf.")
    ] = None,
    limit: Annotated[
        list[str], typer.Option(help='Memory, as a share of the experts\' bytes, or "none"; root.')
    ] = [*("50%", "25%", "none")],  # noqa: B006
    bits: Annotated[list[str], typer.Option(help="bf16 or int8; may be repeated.")] = ["bf16", "int8"],  # noqa: B006
    reserve: Annotated[str, typer.Option(help="Bytes of a limit for our side's own needs.")] = "500MiB",
    rounds: Rounds = 5,
    tokens: Annotated[
        int, typer.Option(help="Tokens that each side decodes in a round; 4 times as many without a limit.")
    ] = 8,
    threads: Annotated[int, typer.Option(help="Threads of each side.")] = 2,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 4,
    experts: Annotated[int, typer.Option(help="Experts of a layer.")] = 120,
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 2048,
    intermediate: Annotated[int, typer.Option(help="Width of an expert.")] = 768,
    results: Results = None,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Compare decoding under a memory limit with accelerate and llama.cpp."""
    from undercroft.bench.peers import PeersSettings, measure_peers
    from undercroft.bench.peers_model import PeerShape

    settings = PeersSettings(
        directory=directory,
        shape=PeerShape(layers=layers, experts=experts, hidden=hidden, intermediate=intermediate),
        python=python,
        limits=tuple(limit),
        bits=tuple(bits),
        reserve=parse_size(reserve),
        rounds=rounds,
        tokens=tokens,
        threads=threads,
    )
    _tell([measure_peers(settings, _progress)], results, as_json=as_json, strict=strict)


@bench.command()
def overlap(
    rounds: Rounds = 5,
    attempts: Attempts = 2,
    trace: Annotated[
        Path | None,
        typer.Option(help="CSV file of routed experts to follow.", show_default="a synthetic one"),
    ] = None,
    high: Annotated[
        list[str], typer.Option(help="Precision of the experts: bfloat16, int8 or int4; may be repeated.")
    ] = ["bfloat16", "int4"],  # noqa: B006
    hidden: Annotated[int, typer.Option(help="Width of the activations.")] = 2048,
    intermediate: Annotated[int, typer.Option(help="Width within an expert.")] = 768,
    layers: Annotated[int, typer.Option(help="Most layers.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens in a pass.")] = 32,
    size: Annotated[str, typer.Option(help="Most bytes of experts, on disk and in memory.")] = "2GiB",
    policy: Annotated[str, typer.Option(help="Which expert leaves memory first.")] = "expected-use",
    disk: Disk = None,
    results: Results = None,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Compare streamed experts with their reads alone and their products alone."""
    from undercroft import machine
    from undercroft.bench.overlap import OverlapSettings, measure_overlap

    settings = OverlapSettings(
        directory=disk or machine.home(),
        trace=trace,
        kinds=tuple(high),
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        tokens=tokens,
        nbytes=parse_size(size),
        policy=policy,
        rounds=rounds,
        attempts=attempts,
    )
    _tell([measure_overlap(settings, _progress)], results, as_json=as_json, strict=strict)


@bench.command()
def prefetch(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a Mixture-of-Experts model, or its name on the hub.", show_default="bundled"
        ),
    ] = None,
    rounds: Rounds = 7,
    tokens: Annotated[int, typer.Option(help="Tokens that are written in a sample.")] = 96,
    share: Annotated[float, typer.Option(help="Share of all experts that may be in memory.")] = 0.3,
    results: Results = None,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Compare reading experts ahead with reading them when they are wanted, from slower and slower disks."""
    from undercroft.bench.prefetch import PrefetchSettings, measure_prefetch

    settings = PrefetchSettings(model=model, share=share, tokens=tokens, rounds=rounds)
    _tell([measure_prefetch(settings, _progress)], results, as_json=as_json, strict=strict)


@bench.command()
def train(
    rounds: Rounds = 7,
    attempts: Attempts = 3,
    budget: Annotated[str, typer.Option(help="Bytes of activations in memory, when spilling.")] = "72MiB",
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
