"""Which language models do around their layers what Qwen3-MoE's or Mixtral's does, instruction by instruction."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM, MixtralModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeModel

from undercroft.moe.alike import alike_throughout
from undercroft.moe.turns import has_turns

_OUTER, _INNER = (Qwen3MoeForCausalLM, MixtralForCausalLM), (Qwen3MoeModel, MixtralModel)
_PARTS = ("embed_tokens", "layers", "rotary_emb")


class UsualModel(NamedTuple):
    """The parts of such a model.

    Attributes:
        inner: the module that has all but the head.
        embedding: the module.
        layers: the modules.
        rotary: the module.
        experts: what transformers calls the way in which experts run.
        places: of all these, each a parent and a name.
        numbers: attributes that are to stay what they are, each a module and a name.
    """

    inner: Any
    embedding: Any
    layers: list[nn.Module]
    rotary: Any
    experts: str
    places: list[tuple[nn.Module, str]]
    numbers: list[tuple[nn.Module, str]]

    @property
    def config(self) -> dict[str, Any]:
        """All that it is configured with."""
        config: Any = self.inner.config
        return cast("dict[str, Any]", vars(config))

    @property
    def is_usual(self) -> bool:
        """Whether it would now run its layers one after another over all that came before, and give a plain output."""
        config = self.inner.config
        return (
            config._experts_implementation == self.experts
            and config.num_hidden_layers == len(self.layers)
            and config.return_dict
            and config.sliding_window is None
            and not (config.output_attentions or config.output_hidden_states or config.output_router_logits)
        )


def usual_model(model: nn.Module) -> UsualModel | None:
    """The parts of a model that is one of those."""
    inner: Any = getattr(model, "model", None)
    if not _is_one(model, _OUTER) or inner is None or not _is_one(inner, _INNER):
        return None
    if inner.config is not cast("Any", model).config:
        return None
    embedding, layers = inner.embed_tokens, list[nn.Module](inner.layers)
    if (
        type(embedding) is not nn.Embedding
        or embedding.max_norm is not None
        or not has_turns(inner.rotary_emb)
    ):
        return None
    places: list[tuple[nn.Module, str]] = [
        (model, "model"),
        *((cast("nn.Module", inner), name) for name in _PARTS),
        *((cast("nn.Module", inner.layers), str(number)) for number in range(len(layers))),
    ]
    implementation: str = inner.config._experts_implementation
    numbers: list[tuple[nn.Module, str]] = [(model, "config"), (inner, "config")]
    found = UsualModel(inner, embedding, layers, inner.rotary_emb, implementation, places, numbers)
    return found if found.is_usual else None


def _is_one(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    return any(alike_throughout(type(module).forward, kind.forward) for kind in kinds)
