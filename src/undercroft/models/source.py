"""What a checkpoint says it is, before its weights are touched.

It knows configurations, not weights. Invariant: a configuration that passes is one that transformers itself knows, of
a causal language model; no code of the checkpoint is run.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from undercroft.errors import UnsupportedModel
from undercroft.models.place import explain

_CAUSAL_CLASSES = frozenset[str](MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def read_config(source: str) -> PreTrainedConfig:
    """The configuration of a located causal language model.

    Raises:
        UnsupportedModel: it cannot be read, needs code of its own, or is of no causal language model.
        TransferFailed: the hub does not give it.
    """
    opener: Any = AutoConfig
    try:
        config: PreTrainedConfig = opener.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise explain(source, error) from error
    _check_causal(source, config)
    return config


def _check_causal(source: str, config: PreTrainedConfig) -> None:
    names = list(config.architectures or ())
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    suits = not names or any(name in _CAUSAL_CLASSES for name in names)
    # The causal class of an encoder such as BERT looks ahead unless its configuration makes it a decoder.
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", True
    )
    if not known or not suits or encoder:
        what = " or ".join(names) or config.model_type
        raise UnsupportedModel(
            f"{source} is a {what}, not a causal language model (one that predicts the next token); "
            "choose one whose architecture ends in ForCausalLM or LMHeadModel"
        )
