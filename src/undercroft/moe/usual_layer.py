"""Which decoder layers do what Qwen3-MoE's or Mixtral's does, instruction by instruction, down to their routers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

from torch import nn
from transformers.models.mixtral.modeling_mixtral import (
    MixtralDecoderLayer,
    MixtralSparseMoeBlock,
    MixtralTopKRouter,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeDecoderLayer,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)

from undercroft.moe.alike import alike
from undercroft.moe.usual_attention import LINEAR, NORMS, is_rms_norm, norms_of

_LAYERS, _BLOCKS = (
    (Qwen3MoeDecoderLayer, MixtralDecoderLayer),
    (Qwen3MoeSparseMoeBlock, MixtralSparseMoeBlock),
)
_OUT = "o_proj"
_NORMS = ("input_layernorm", "post_attention_layernorm")


class Routing(NamedTuple):
    """How a router weighs those that it chose.

    Attributes:
        among: their shares add up to one.
        rounded: to the dtype of the model; else they are float32.
    """

    among: bool
    rounded: bool


class Usual(NamedTuple):
    """The parts of such a layer.

    Attributes:
        norms: before attention, and before experts.
        attention: the module.
        linear: of queries, keys and values.
        out: what comes behind attention.
        head_norms: of queries and of keys, or none.
        router: the module.
        routing: what it does.
        experts: the module.
        block: the module that has router and experts.
        places: of all these and what they are made of, each a parent and a name.
    """

    norms: tuple[Any, Any]
    attention: Any
    linear: list[Any]
    out: Any
    head_norms: list[Any]
    router: Any
    routing: Routing
    experts: Any
    block: nn.Module
    places: list[tuple[nn.Module, str]]

    def numbers(self) -> list[tuple[nn.Module, str]]:
        """Attributes beside the weights that it computes with, each a module and a name."""
        of_router = [name for name in ("top_k", "norm_topk_prob") if hasattr(self.router, name)]
        return [
            *((self.router, name) for name in of_router),
            *((self.attention, name) for name in ("head_dim", "scaling", "training")),
            (self.block, "training"),
            *((norm, "variance_epsilon") for norm in (*self.norms, *self.head_norms)),
        ]


def routing_of(router: nn.Module) -> Routing | None:
    """What a router does that is one of those known here."""
    forward = _forward(router)
    if alike(forward, _forward_of(Qwen3MoeTopKRouter)):
        return Routing(cast("Any", router).norm_topk_prob, rounded=True)
    return Routing(among=True, rounded=False) if alike(forward, _forward_of(MixtralTopKRouter)) else None


def usual(layer: nn.Module, is_norm: Callable[[nn.Module], bool] = is_rms_norm) -> Usual | None:
    """The parts of a decoder layer that is one of those.

    Args:
        layer: any module.
        is_norm: whether a norm does what Llama's does.
    """
    module = cast("Any", layer)
    if not _is_one(layer, _LAYERS) or not _is_one(module.mlp, _BLOCKS):
        return None
    attention, router = module.self_attn, module.mlp.gate
    routing, head_norms = routing_of(router), norms_of(attention)
    norms = (module.input_layernorm, module.post_attention_layernorm)
    if routing is None or head_norms is None or not all(map(is_norm, norms)):
        return None
    return Usual(
        norms=norms,
        attention=attention,
        linear=[getattr(attention, name) for name in LINEAR],
        out=getattr(attention, _OUT),
        head_norms=head_norms,
        router=router,
        routing=routing,
        experts=module.mlp.experts,
        block=module.mlp,
        places=[
            *((layer, name) for name in (*_NORMS, "self_attn", "mlp")),
            *((attention, name) for name in (*LINEAR, _OUT, *NORMS[: len(head_norms)])),
            *((module.mlp, name) for name in ("gate", "experts")),
            *((module.mlp.experts, name) for name, _ in module.mlp.experts.named_children()),
        ],
    )


def _is_one(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    return any(alike(_forward(module), _forward_of(kind)) for kind in kinds)


def _forward(module: nn.Module) -> Callable[..., Any]:
    return _forward_of(type(module))


def _forward_of(kind: type) -> Callable[..., Any]:
    """A class's own, beneath what gradient checkpointing wraps around it."""
    forward: Any = cast("Any", kind).forward
    return getattr(forward, "__wrapped__", forward)
