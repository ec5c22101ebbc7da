"""Records which experts a model uses, by letting it write.

It knows prompts and models; not what the trace will be used for. Invariant: the trace is of all that was asked for, or
there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from undercroft.errors import InvalidInput, UnsafeDirectory
from undercroft.models.generate import Writing, generate_text
from undercroft.models.load import open_tokenizer
from undercroft.moe.load import engine_of, load_moe
from undercroft.moe.quality import Quality
from undercroft.moe.trace import Trace

PROMPTS = (
    "The history of the steam engine begins",
    "To bake bread at home you need flour, water, salt and",
    "def is_prime(number):\n    ",
    "Question: A train travels 120 kilometres in an hour and a half. How fast is it?\nAnswer:",
    "Once upon a time, in a village beside the sea, there lived",
    "The three most important causes of inflation are",
)
"""Texts of different kinds, because a router favours other experts in another kind of text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What was recorded.

    Attributes:
        trace: the path of the file.
        prompts: how many texts.
        prompt_tokens: tokens of all of them.
        tokens: that the model wrote.
        layers: with experts.
        experts: in each.
        used: by a token.
        hit_rate: experts that were in memory when they were wanted, 0 to 1.
    """

    trace: str
    prompts: int
    prompt_tokens: int
    tokens: int
    layers: int
    experts: int
    used: int
    hit_rate: float

    def __str__(self) -> str:
        return (
            f"{self.trace}: {self.prompts} prompts of {self.prompt_tokens} tokens in all, {self.tokens} written; "
            f"{self.layers} layers of {self.experts} experts, {self.used} used by a token\n"
            f"replay it: undercroft bench moe --simulate {self.trace}"
        )


def record_trace(
    source: str | Path,
    path: Path,
    *,
    prompts: Sequence[str] = PROMPTS,
    tokens: int = 64,
    budget: int | str = "2GiB",
    quality: str | Quality = "exact",
    on_prompt: Callable[[int], None] | None = None,
) -> Recording:
    """Let a model go on from each prompt, the likeliest token always, and write down its routing.

    Args:
        source: of the model; see `load_moe`.
        path: the CSV file to write, see `undercroft.moe.trace`; one that is there is replaced.
        prompts: each is a sequence of its own.
        tokens: the most to write for each.
        budget: the most bytes of experts to hold in memory; it changes how long it takes, not what is recorded.
        quality: what may be given up; anything but "exact" may change what is routed where.
        on_prompt: told how many prompts are done.

    Raises:
        InvalidInput: nothing to go on from, or a path that cannot be a file's.
        UnsafeDirectory: the file cannot be written.
        UnsupportedModel, TransferFailed, CorruptRecord, BudgetExceeded: see `load_moe`.
    """
    if not prompts or tokens < 1:
        raise InvalidInput("recording needs a prompt and a token at least")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InvalidInput(f"{path} cannot be written; name a file in a folder that is there")
    tokenizer = open_tokenizer(source)
    asked = [tokenizer.beginning + tokenizer.encode(prompt) for prompt in prompts]
    if not all(asked):
        raise InvalidInput("a prompt is empty; give the model something to go on from")
    model = load_moe(source, budget, quality)
    engine = engine_of(model)
    engine.keep_journal()
    written = 0
    for number, ids in enumerate(asked, start=1):
        written += generate_text(model, tokenizer, ids, most_tokens=tokens, say=_say_nothing).tokens
        if on_prompt is not None:
            on_prompt(number)
    trace = engine.trace()
    _write(trace, path)
    return Recording(
        trace=str(path),
        prompts=len(asked),
        prompt_tokens=sum(map(len, asked)),
        tokens=written,
        layers=trace.layers,
        experts=trace.experts,
        used=trace.used,
        hit_rate=engine.report().hit_rate,
    )


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are none.

    Raises:
        InvalidInput: there is no such file, it is no text, or it has no prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidInput(f"no prompts can be read from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is no UTF-8 text") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise InvalidInput(f"{path} has no prompts, one a line")
    return prompts


def _say_nothing(text: str, writing: Writing) -> None:
    """The text is not what is wanted."""


def _write(trace: Trace, path: Path) -> None:
    try:
        trace.write(path)
    except OSError as error:
        raise UnsafeDirectory(f"{path} cannot be written: {error.strerror}") from error
