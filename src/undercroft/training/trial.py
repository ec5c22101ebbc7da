"""A run in a process of its own, so that its peak of memory is its own.

The parent starts ``python -m undercroft.training.trial`` and writes the settings to its stdin as JSON; the
child answers on stdout, one JSON object a line: a "step" after each, then a "report" or an "error". It knows
processes, not what is compared. Invariant: no child outlives `run_trial`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from undercroft.errors import UndercroftError
from undercroft.training.finetune_report import FinetuneReport, StepReport
from undercroft.training.settings import FinetuneSettings

OnTrialStep = Callable[[int, int, float], None]
"""Called with the number of the step, how many there will be, and the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A run that has ended, well or not.

    Attributes:
        settings: what was asked.
        report: what was done, or None where it failed.
        failure: why it failed, or None.
    """

    settings: FinetuneSettings
    report: FinetuneReport | None
    failure: str | None


def run_trial(settings: FinetuneSettings, *, on_step: OnTrialStep | None = None) -> Trial:
    """Run `finetune` in another process and wait for it. Errors of that process are part of the answer."""
    command = [sys.executable, "-m", "undercroft.training.trial"]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, text=True
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it died before it listened; its last words say why
                child.stdin.write(json.dumps(settings.as_dict()))
                child.stdin.close()
            answer = _listen(child.stdout, on_step)
            child.wait()
        finally:
            child.kill()
        if "report" in answer:
            return Trial(settings=settings, report=FinetuneReport.from_dict(answer["report"]), failure=None)
        failure = answer.get("error") or _last_words(child.returncode, complaints)
        return Trial(settings=settings, report=None, failure=failure)


def _listen(lines: Iterable[str], on_step: OnTrialStep | None) -> dict[str, Any]:
    """Pass the steps on; the last answer that is none, or nothing."""
    answer: dict[str, Any] = {}
    for line in lines:
        answer = json.loads(line)
        if "step" in answer and on_step is not None:
            on_step(answer["step"], answer["steps"], answer["loss"])
    return answer


def _last_words(code: int, complaints: IO[str]) -> str:
    if code == -signal.SIGKILL:
        return "killed by the system, most likely because memory ran out"
    complaints.seek(0)
    lines = complaints.read().strip().splitlines()
    return lines[-1] if lines else f"ended with exit code {code}"


def main() -> None:
    """The child: settings from stdin, answers to stdout."""
    from undercroft.models.load import be_quiet
    from undercroft.training.finetune import finetune

    be_quiet()
    settings = FinetuneSettings.from_dict(json.load(sys.stdin))
    try:
        _say({"report": finetune(settings, on_step=_say_step).as_dict()})
    except UndercroftError as error:
        _say({"error": str(error)})
    except KeyboardInterrupt:
        _say({"error": "interrupted"})


def _say_step(step: StepReport) -> None:
    _say({"step": step.step, "steps": step.steps, "loss": step.loss})


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
