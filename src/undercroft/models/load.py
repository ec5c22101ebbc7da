"""Opens a causal language model and its tokenizer from a folder or the Hugging Face hub.

It knows how transformers loads, not what the model is for. Invariant: a model that is returned has every
weight from its checkpoint; none was made up because it was missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from undercroft.errors import CorruptRecord, UnsupportedModel
from undercroft.models.causal import CausalModel
from undercroft.models.place import explain, locate
from undercroft.models.source import read_config
from undercroft.models.tokenizer import Tokenizer

Precision = Literal["float32", "stored"]
"""float32, or what the checkpoint says it is stored in."""


def open_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a causal language model.

    Raises:
        InvalidInput, UnsupportedModel, TransferFailed: see `locate` and `read_config`; or there is no
            tokenizer.
    """
    place = locate(source)
    read_config(place)
    opener: Any = AutoTokenizer
    try:
        return Tokenizer(opener.from_pretrained(place, trust_remote_code=False), source=place)
    except (OSError, ValueError, KeyError) as error:
        if Path(place).is_dir():
            raise UnsupportedModel(
                f"{place} holds no tokenizer that can be read; "
                "copy tokenizer.json and tokenizer_config.json there"
            ) from error
        raise explain(place, error) from error


def open_causal_model(source: str | Path, *, precision: Precision = "float32") -> CausalModel:
    """A causal language model with its weights, on the CPU.

    Raises:
        InvalidInput, UnsupportedModel, TransferFailed: see `locate` and `read_config`; or weights are
            missing.
        CorruptRecord: a file of weights is damaged.
    """
    place = locate(source)
    config = read_config(place)
    opener: Any = AutoModelForCausalLM
    try:
        module, loaded = opener.from_pretrained(
            place,
            config=config,
            dtype=torch.float32 if precision == "float32" else "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise CorruptRecord(f"the weights of {place} are damaged ({error}); fetch them again") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise explain(place, error) from error
    _check_complete(place, loaded)
    return CausalModel(module, source=place)


def _check_complete(place: str, loaded: dict[str, Any]) -> None:
    absent = sorted({*loaded["missing_keys"], *(str(entry[0]) for entry in loaded["mismatched_keys"])})
    if absent:
        raise UnsupportedModel(
            f"{place} lacks {len(absent)} weights of its architecture, or has them in another shape "
            f"({absent[0]} first); they would start from random numbers"
        )


def be_quiet() -> None:
    """Keep transformers' progress bars and warnings off stderr, for a process whose stderr is ours."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
