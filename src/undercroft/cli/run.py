"""``undercroft run``: write text with a Mixture-of-Experts model that is larger than memory.

A thin shell over `undercroft.load_moe`: text goes to stdout as it is written, how it goes to stderr.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from undercroft.units import format_seconds, format_size

if TYPE_CHECKING:
    from undercroft.models.generate import Writing
    from undercroft.moe.engine import Engine, ExpertReport


def run(
    model: Annotated[
        str, typer.Argument(help="Folder of a Mixture-of-Experts model, or its name on the hub.")
    ],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    budget: Annotated[str, typer.Option(help="Most bytes of experts and KV cache in memory.")] = "2GiB",
    quality: Annotated[str, typer.Option(help="exact, balanced, fast or hobbit.")] = "exact",
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 256,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    policy: Annotated[str, typer.Option(help="Which expert leaves memory first.")] = "expected-use",
    readers: Annotated[
        int | None,
        typer.Option(help="Reads in flight.", show_default="as doctor found best for the disk, or 2"),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens whose KV cache is set aside at once.")] = 0,
    device: Annotated[str, typer.Option(help="What computes: cpu, or a GPU such as cuda.")] = "cpu",
    device_budget: Annotated[str | None, typer.Option(help="Most bytes of experts on the GPU.")] = None,
) -> None:
    r"""Write text with a model whose experts stay on disk but for a budget: the same text, in less memory.

    \b
    Example:
      undercroft run Qwen/Qwen3-30B-A3B "Why is the sky blue?" --chat --budget 8GiB
    """
    from undercroft.models.place import locate

    if tokens < 1 or temperature < 0 or context < 0:
        raise typer.BadParameter("--tokens is at least 1, --temperature and --context at least 0")
    if device == "cpu" and device_budget is not None:
        raise typer.BadParameter("--device-budget is of a GPU; name it with --device cuda")
    model = locate(model)  # before PyTorch, which takes seconds to come
    import torch

    from undercroft.cli.progress import warnings_as_lines
    from undercroft.errors import InvalidInput
    from undercroft.models.generate import generate_text
    from undercroft.models.load import be_quiet, open_tokenizer
    from undercroft.moe.load import engine_of, load_moe

    be_quiet()
    tokenizer = open_tokenizer(model)
    ids = (
        tokenizer.ask([{"role": "user", "content": prompt}])
        if chat
        else tokenizer.beginning + tokenizer.encode(prompt)
    )
    if not ids:
        raise InvalidInput("the prompt is empty; give the model something to go on from")
    with warnings_as_lines():
        opened = load_moe(
            model,
            budget,
            quality,
            policy=policy,
            readers=readers,
            context=context,
            device=device,
            device_budget=device_budget,
        )
    engine = engine_of(opened)
    torch.manual_seed(seed)
    with Screen(engine) as screen:
        writing = generate_text(
            opened, tokenizer, ids, most_tokens=tokens, temperature=temperature, say=screen.say
        )
    typer.echo(describe(writing, engine.report()), err=True)


class Screen:
    """Shows text as it is written, and below it how that goes.

    Where stdout and stderr are the same terminal, finished lines scroll up and the last two are drawn anew; where
    stdout is a file or a pipe, it gets the text alone.

    Args:
        engine: whose report is shown.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._together = sys.stdout.isatty() and sys.stderr.isatty()
        self._line = self._status = ""
        self._live: Any = None

    def say(self, text: str, writing: Writing) -> None:
        """A piece of text, and how far it is."""
        self._status = status(writing, self._engine.report())
        if not self._together:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        *finished, self._line = (self._line + text).split("\n")
        for line in finished:
            self._live.console.print(line, markup=False, highlight=False)

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console, Group
            from rich.live import Live
            from rich.text import Text

            def draw() -> Group:
                status_line = Text(self._status, style="dim", overflow="ellipsis", no_wrap=True)
                return Group(Text(self._line), status_line) if self._together else Group(status_line)

            self._live = Live(console=Console(stderr=True), get_renderable=draw, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        print(self._line)


def status(writing: Writing, report: ExpertReport) -> str:
    """One line about a text that is being written."""
    seconds = writing.prefill_seconds + writing.decode_seconds
    rate = report.read_nbytes / seconds if seconds else 0.0
    return (
        f"{writing.tokens_per_second:.1f} tokens/s  hits {report.hit_rate:.0%}  "
        f"read {format_size(rate)}/s  holding {format_size(report.held)} of {format_size(report.budget)}"
    )


def describe(writing: Writing, report: ExpertReport) -> str:
    """What a text cost."""
    seconds = writing.prefill_seconds + writing.decode_seconds
    lines = [
        f"{writing.prompt} tokens read in {format_seconds(writing.prefill_seconds)}, {writing.tokens} written at "
        f"{writing.tokens_per_second:.1f} tokens/s",
        f"experts: {report.hits} of {report.hits + report.misses} were in memory ({report.hit_rate:.1%}), "
        f"{format_size(report.read_nbytes)} read, at most {format_size(report.budget)} held",
        f"time: {format_seconds(report.waited_seconds)} of {format_seconds(seconds)} waiting for the disk",
    ]
    if report.device_budget:
        lines.append(
            f"device: {report.device_hits} of these were there, {format_size(report.moved_nbytes)} moved, at most "
            f"{format_size(report.device_budget)} held; the CPU computed {report.computed}"
        )
    if report.predicted:
        lines.append(
            f"read ahead: {format_size(report.predicted)} begun, {format_size(report.useful)} of it wanted"
        )
    if report.low_mass or report.skip_mass:
        lines.append(f"gate mass: {report.low_mass:.1%} in low precision, {report.skip_mass:.1%} left out")
    return "\n".join(lines)
