"""The small models that ship with Undercroft, trained by this project, each with its card.

It knows where they lie and what their exercises are (`skills`), not how a model is loaded. Invariant: a folder that
`model_folder` gives can be opened without a network.
"""

from __future__ import annotations

from pathlib import Path

from undercroft.errors import InvalidInput

_HERE = Path(__file__).parent


def model_names() -> tuple[str, ...]:
    """What is bundled, by name."""
    return tuple(sorted(config.parent.name for config in _HERE.glob("*/config.json")))


def model_folder(name: str) -> Path:
    """The folder of a bundled model: config.json, model.safetensors, the tokenizer and the card README.md.

    Args:
        name: one of `model_names()`, such as "moe".

    Raises:
        InvalidInput: no bundled model has that name.
    """
    names = model_names()
    if name not in names:
        raise InvalidInput(f"no bundled model is called {name!r}; there is {', '.join(names) or 'none'}")
    return _HERE / name
