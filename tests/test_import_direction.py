"""Imports point down only, and a package that costs much is imported only in the rooms that need it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "undercroft"
FLOOR = {"errors", "units", "events", "machine", "native", "arithmetic"}

# Which rooms a room may import from, beside itself.
ROOMS: dict[str, set[str]] = {
    "errors": {"units"},  # inside one function, to print sizes
    "units": {"errors"},
    "events": {"errors"},
    "machine": {"errors", "units"},
    "native": {"machine"},
    "arithmetic": set(),
    "kernels": FLOOR,
    "store": FLOOR,
    "models": FLOOR | {"store", "kernels"},
    "training": FLOOR | {"store", "models"},
    "moe": FLOOR | {"store", "models", "kernels"},
    "routing": FLOOR | {"store", "models"},
    "memory": FLOOR | {"store", "models", "training"},
    "serving": FLOOR | {"store", "models", "kernels"},
    "testing": FLOOR | {"store"},
    "bench": FLOOR | {"store", "models", "training", "kernels", "moe", "bundled", "testing"},
    "bundled": {"errors"},
    "cli": FLOOR
    | {"", "store", "models", "training", "moe", "routing", "memory", "serving", "bundled", "bench"},
    "__main__": {"cli"},
}

# Packages that only some rooms may import.
GUARDED: dict[str, set[str]] = {
    "transformers": {"models", "moe", "training", "memory", "cli"},
    "typer": {"cli"},
    "rich": {"cli"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "kvikio": {"store"},
    "triton": {"kernels"},
    "gguf": {"models"},
    "numpy": set(ROOMS) - FLOOR,
}
THIRD_PARTY_OF_STORE = {"torch", "numpy", "xxhash", "kvikio"}


def _files() -> list[Path]:
    """All sources but the front door, which names every room; tests/test_exported.py proves it lazy."""
    return sorted(set(SOURCE.rglob("*.py")) - {SOURCE / "__init__.py"})


def _room(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module by its dotted name, with its line; ``from a import b`` counts as ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _at_module_level(tree: ast.Module) -> ast.Module:
    return ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])


def _room_imported(module: str) -> str | None:
    """The room that a dotted name of ours belongs to, or None for another package's."""
    top, _, rest = module.partition(".")
    if top != "undercroft":
        return None
    room = rest.partition(".")[0]
    return room if room in ROOMS else ""


@pytest.mark.parametrize("file", _files(), ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_down(file: Path) -> None:
    allowed = ROOMS[_room(file)] | {_room(file)}
    for module, line in _imports(ast.parse(file.read_text())):
        imported = _room_imported(module)
        assert imported is None or imported in allowed, f"{file}:{line} imports {module}"


@pytest.mark.parametrize("file", _files(), ids=lambda file: str(file.relative_to(SOURCE)))
def test_packages_stay_in_their_rooms(file: Path) -> None:
    for module, line in _imports(ast.parse(file.read_text())):
        package = module.partition(".")[0]
        assert _room(file) in GUARDED.get(package, {_room(file)}), f"{file}:{line} imports {module}"


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_the_floor_imports_the_standard_library_only(name: str) -> None:
    tree = ast.parse((SOURCE / f"{name}.py").read_text())
    packages = {module.partition(".")[0] for module, _ in _imports(_at_module_level(tree))}
    assert packages <= sys.stdlib_module_names | {"undercroft"}


def test_the_store_needs_tensors_arrays_and_a_checksum_only() -> None:
    for file in sorted((SOURCE / "store").rglob("*.py")):
        packages = {module.partition(".")[0] for module, _ in _imports(ast.parse(file.read_text()))}
        assert packages <= sys.stdlib_module_names | {"undercroft"} | THIRD_PARTY_OF_STORE, file


def test_an_upward_import_would_be_found() -> None:
    tree = ast.parse(
        "def late():\n    from undercroft.training import spill\nimport undercroft.cli.doctor\nimport torch"
    )
    assert [_room_imported(module) for module, _ in _imports(tree)] == ["cli", None, "training"]
