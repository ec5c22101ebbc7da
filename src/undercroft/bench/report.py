"""Writes an answer down: theme, hardware, date, then what was asked and found.

Invariant: the three files of a theme come from one measurement.
"""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from undercroft import machine
from undercroft.bench.answer import Answer
from undercroft.errors import UnsafeDirectory
from undercroft.units import format_size


def write_report(answer: Answer, directory: Path) -> Path:
    """Write ``THEME.md``, ``THEME.json`` and, where there is a plot, ``THEME.svg``; returns the first.

    Raises:
        UnsafeDirectory: the directory cannot be made or written.
    """
    report = directory / f"{answer.theme}.md"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        report.write_text(_markdown(answer), encoding="utf-8")
        report.with_suffix(".json").write_text(json.dumps(answer.as_dict(), indent=1), encoding="utf-8")
        if answer.plot:
            report.with_suffix(".svg").write_text(answer.plot, encoding="utf-8")
    except OSError as error:
        raise UnsafeDirectory(f"cannot write the report {report}: {error.strerror}") from error
    return report


def _markdown(answer: Answer) -> str:
    plot = f"\n![{answer.question}]({answer.theme}.svg)\n" if answer.plot else ""
    return (
        f"# {answer.theme}\n\n"
        f"- theme: {answer.theme}\n"
        f"- hardware: {_hardware()}\n"
        f"- date: {datetime.now(UTC).date().isoformat()}\n\n"
        f"```\n{answer}\n```\n{plot}"
    )


def _hardware() -> str:
    devices = ", ".join(f"{each.label} ({each.name})" for each in machine.devices())
    return (
        f"{devices}, {len(os.sched_getaffinity(0))} CPUs, {format_size(machine.ram().total)} RAM, "
        f"Linux {platform.release()}, Python {platform.python_version()}, torch {version('torch')}"
    )
