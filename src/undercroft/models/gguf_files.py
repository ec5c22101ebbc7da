"""Writes what a folder of transformers has besides weights, from what a GGUF file says: configuration, tokenizer.

It knows transformers, which makes the tokenizer; what the configuration is made of is in `gguf_config`. Invariant: the
same GGUF file gives the same files.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerFast

from undercroft.errors import UnsupportedModel
from undercroft.models.gguf_checkpoint import GgufCheckpoint


def write_files(checkpoint: GgufCheckpoint, folder: Path) -> None:
    """Write configuration, and tokenizer if there is one.

    Args:
        checkpoint: of the GGUF file.
        folder: that is empty.

    Raises:
        UnsupportedModel: its family is not read, or its tokenizer is of a kind that transformers cannot make.
        CorruptRecord: its settings contradict its tensors.
    """
    settings = checkpoint.configuration()
    config: Any = AutoConfig.for_model(**settings)
    config.save_pretrained(folder)
    if checkpoint.has_tokenizer:
        _tokenizer(checkpoint.paths[0]).save_pretrained(folder)


def _tokenizer(path: Path) -> Any:
    opener: Any = PreTrainedTokenizerFast
    with tempfile.TemporaryDirectory() as alone:  # files that lie beside the GGUF file are not part of it
        (Path(alone) / "model.gguf").symlink_to(path)
        try:
            return opener.from_pretrained(alone, gguf_file="model.gguf")
        except Exception as error:  # tokenizers raises nothing more exact
            raise UnsupportedModel(f"the tokenizer of {path} cannot be made: {error}") from error
