"""The documentation is true: its code runs, its links resolve, and it describes every verb, option and error.

Every ```` ```python ```` block runs, the blocks of a page one after another in one namespace; the lines after
``$`` of a ```` ```console run ```` block run in a shell. A block that cannot run here says why in its first
line: ```` ```python no-run: needs a GPU ````.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main

from undercroft import errors
from undercroft.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True, kw_only=True)
class Block:
    info: str
    code: str
    line: int


def _blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        yield Block(info=match["info"].strip(), code=match["code"], line=line)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _pages_with(*infos: str) -> list[Path]:
    return [page for page in PAGES if any(block.info in infos for block in _blocks(page))]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory, and this environment's commands on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("page", _pages_with("python"), ids=_name)
def test_python_blocks_run(page: Path) -> None:
    namespace = {"__name__": "__main__"}
    for block in _blocks(page):
        if block.info == "python":  # blank lines before it make a traceback point into the page
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("page", _pages_with("console run", "bash run"), ids=_name)
def test_shell_blocks_run(page: Path) -> None:
    for block in _blocks(page):
        if block.info in ("console run", "bash run"):
            subprocess.run(["bash", "-euo", "pipefail", "-c", _script(block)], check=True)


def _script(block: Block) -> str:
    if block.info == "bash run":
        return block.code
    return "\n".join(line[2:] for line in block.code.splitlines() if line.startswith("$ "))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_blocks_state_what_they_are(page: Path) -> None:
    for block in _blocks(page):
        language, _, rest = block.info.partition(" ")
        allowed = {"python": r"(no-run: \S.*)?", "console": "(run)?", "bash": "(run)?"}.get(language, "")
        assert re.fullmatch(allowed, rest), f"{_name(page)}:{block.line}: ```{block.info}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_relative_links_resolve(page: Path) -> None:
    for match in LINK.finditer(page.read_text(encoding="utf-8")):
        target = match["target"].partition("#")[0]
        if target and "://" not in target:
            assert (page.parent / target).exists(), f"{_name(page)} links to {target}"


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = {(ROOT / match["target"].partition("#")[0]).resolve() for match in LINK.finditer(readme)}
    assert {page for page in PAGES if page.name != "README.md"} <= linked


def _verbs() -> dict[str, list[str]]:
    """Every verb of the command line, such as "doctor" or "bench store", and its long options."""
    verbs: dict[str, list[str]] = {}
    pending = list(typer.main.get_group(app).commands.items())
    while pending:
        name, command = pending.pop()
        verbs[name] = [option for parameter in command.params for option in parameter.opts]
        pending += [(f"{name} {inner}", verb) for inner, verb in getattr(command, "commands", {}).items()]
    return verbs


@pytest.mark.parametrize("verb", _verbs())
def test_every_verb_and_option_is_described(verb: str) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert f"undercroft {verb}" in text
    missing = [option for option in _verbs()[verb] if option.startswith("--") and option not in text]
    assert not missing, f"no page describes {missing} of undercroft {verb}"


def test_every_error_is_explained() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.UndercroftError):
            assert f"`{name}`" in page


def test_every_dependency_has_a_reason() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    groups = project["dependency-groups"].values()
    named = {
        re.split(r"[\[>=<;]", requirement)[0]
        for requirements in (project["project"]["dependencies"], *extras, *groups)
        for requirement in requirements
    } - {"undercroft"}
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert not [name for name in sorted(named) if not re.search(rf"[|,] {name}\b", page)]
