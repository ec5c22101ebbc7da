"""``undercroft demo``: what Undercroft does, shown on this machine, in acts.

Each act is a function that shows its progress on stderr, and returns its facts and its text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undercroft.cli.progress import Steps
from undercroft.cli.table import comparison_table, streaming_table
from undercroft.units import format_size

if TYPE_CHECKING:
    from undercroft.moe.demonstration import OnToken, StreamingShown
    from undercroft.training.compare import Row
    from undercroft.training.demonstration import Scale, TrainingShown
    from undercroft.training.trial import OnTrialStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What an act showed.

    Attributes:
        act: its name.
        facts: for programs.
        text: for people.
        held: whether what it claims came out.
    """

    act: str
    facts: dict[str, Any]
    text: str
    held: bool


def _training(scale: Scale) -> Shown:
    from undercroft.training.demonstration import show_training

    bars: list[Steps] = []

    def watch(name: str) -> OnTrialStep:
        bars.append(Steps(name))
        return lambda step, steps, loss: bars[-1].show(step, steps, f"loss {loss:.4f}")

    try:
        shown = show_training(scale, watch=watch)
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)
    return Shown(act="training", facts=asdict(shown), text=training_text(shown), held=_all_equal(shown.rows))


def _streaming(tokens: int) -> Shown:
    from undercroft.bundled import model_folder
    from undercroft.bundled.skills import examination
    from undercroft.bundled.texts import held_out
    from undercroft.moe.demonstration import show_streaming

    bars: list[Steps] = []

    def watch(name: str) -> OnToken:
        bars.append(Steps(name))
        return lambda done, total: bars[-1].show(done, total, "tokens read")

    question = examination(1)[0].question
    try:
        shown = show_streaming(model_folder("moe"), held_out(), question, tokens=tokens, watch=watch)
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)
    return Shown(act="streaming", facts=asdict(shown), text=streaming_text(shown), held=shown.held)


def demo(
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 6,
    width: Annotated[int, typer.Option(help="Its width, a multiple of 64.")] = 256,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Sequences in a step.")] = 2,
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 5,
    budget: Annotated[str, typer.Option(help="Bytes of activations in memory, when spilling.")] = "64MiB",
    min_bytes: Annotated[str, typer.Option(help="Tensors smaller than this are not spilled.")] = "1MiB",
    tokens: Annotated[int, typer.Option(help="Tokens of each text that the streamed model reads.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show it on this machine: training with spilled activations, then a model whose experts stay on disk."""
    from undercroft.models.load import be_quiet
    from undercroft.training.demonstration import Scale

    be_quiet()
    scale = Scale(
        layers=layers,
        width=width,
        sequence_length=sequence_length,
        batch_size=batch_size,
        steps=steps,
        budget=budget,
        min_bytes=min_bytes,
    )
    shown = [_training(scale), _streaming(tokens)]
    if as_json:
        typer.echo(json.dumps({"acts": [{"act": each.act, **each.facts} for each in shown]}, indent=2))
    else:
        typer.echo("\n\n".join(each.text for each in shown))
    if not all(each.held for each in shown):
        raise typer.Exit(1)


def training_text(shown: TrainingShown) -> str:
    """What the first act showed, for people."""
    scale = shown.scale
    head = (
        f"A model of {shown.parameters / 1e6:.1f} million parameters learns Python's own manual, "
        f"{scale.steps} steps of {scale.batch_size} sequences of {scale.sequence_length} tokens:\n"
        "plain; with every layer checkpointed, which computes it twice; and with its activations spilled,\n"
        f"{scale.budget} of them in memory."
    )
    return f"{head}\n\n{comparison_table(shown.rows)}\n\n{_conclusion(shown.rows)}"


def streaming_text(shown: StreamingShown) -> str:
    """What the second act showed, for people."""
    head = (
        f"The bundled Mixture-of-Experts model reads {shown.tokens} tokens that it was not trained on, one by one:\n"
        f"with all its experts in memory, {format_size(shown.experts_nbytes)}; then with the most used ones in "
        f"{format_size(shown.budget)},\n"
        "the others on disk. LRU and exact use them as they are, balanced in int8 and int4, fast in int4 and int2."
    )
    return f"{head}\n\n{streaming_table(shown.rows)}\n\n{_streaming_conclusion(shown)}"


def _streaming_conclusion(shown: StreamingShown) -> str:
    if not shown.held:
        return "This should not be: please report it with the output of undercroft doctor."
    return (
        "LRU and exact expect and write what the model in memory does, bit for bit. Asked\n"
        f"  {shown.question}\nthey answer\n  {shown.answer}"
    )


def _conclusion(rows: Sequence[Row]) -> str:
    plain, spilled = rows[0], rows[-1]
    if not _all_equal(rows) or plain.peak_nbytes is None or spilled.peak_nbytes is None:
        return "This should not be: please report it with the output of undercroft doctor."
    return (
        f"Losses and weights are the same, bit for bit. Memory above what is held between steps: "
        f"{format_size(spilled.peak_nbytes)} in the place of {format_size(plain.peak_nbytes)}."
    )


def _all_equal(rows: Sequence[Row]) -> bool:
    return all(row.equal for row in rows)
