"""The front door: exactly the names it promises, from where it says, at the price of an error module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import undercroft
from undercroft import errors

FRONT_DOOR = Path(undercroft.__file__)


def test_the_list_of_names_is_sorted_without_doubles() -> None:
    assert undercroft.__all__ == sorted(set(undercroft.__all__))


@pytest.mark.parametrize("name", undercroft.__all__)
def test_every_promised_name_is_there(name: str) -> None:
    assert getattr(undercroft, name) is not None
    assert name in dir(undercroft)


def test_every_error_is_exported() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.UndercroftError)
    }
    assert defined <= set(undercroft.__all__)


def test_type_checkers_see_the_names_where_they_live_when_run() -> None:
    tree = ast.parse(FRONT_DOOR.read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for name, module in seen.items():
        assert getattr(undercroft, name).__module__ == module
    assert seen == undercroft._HOMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ActivationSpil'"):
        undercroft.ActivationSpil  # noqa: B018


@pytest.mark.parametrize(
    "statement",
    [
        "import undercroft; undercroft.__version__; undercroft.BudgetExceeded",
        "import undercroft.machine, undercroft.units",
    ],
)
def test_importing_it_imports_no_heavy_package(statement: str) -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'typer', 'rich', 'xxhash'}"
    script = f"{statement}\nimport sys; sys.exit(' '.join(sorted({heavy} & set(sys.modules))) or 0)"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, f"imported: {finished.stderr}"
