"""Opens a Mixture-of-Experts model whose experts are never resident.

It knows how the parts fit: checkpoint, recipes, cache, engine, model. Invariant: what it returns computes what
transformers' eager forward computes, with every weight from the checkpoint.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from undercroft.errors import InvalidInput
from undercroft.events import Recorder
from undercroft.models.checkpoint import Checkpoint, StoredTensor
from undercroft.models.source import download, locate, read_config
from undercroft.models.tracing import Lazy, load
from undercroft.moe.engine import Engine, ExpertReport, ServedLayer
from undercroft.moe.indexed import IndexedExperts
from undercroft.moe.model import adopt
from undercroft.moe.packed import PackedExperts, is_packed, open_packed
from undercroft.moe.policies import make_policy
from undercroft.moe.quality import Quality
from undercroft.moe.stock import Stock
from undercroft.moe.streamed import IMPLEMENTATION, attach
from undercroft.moe.survey import survey
from undercroft.store.cache import RecordCache
from undercroft.store.ranges import BLOCK
from undercroft.store.slab import HUGE_PAGE, Slab
from undercroft.store.transfer import TransferQueue
from undercroft.units import parse_size

_QUANTISED = ("int8", "int4", "int2")
_ENGINE = "_undercroft_engine"
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k")


def load_moe(
    source: str | Path,
    budget: int | str = "2GiB",
    quality: str | Quality = "exact",
    *,
    dtype: torch.dtype | None = None,
    policy: str = "expected-use",
    readers: int = 4,
) -> PreTrainedModel:
    """A causal language model of transformers whose experts stay on disk but for `budget` bytes of them.

    Args:
        source: a folder that holds config.json and *.safetensors, one that `pack` wrote, or a name on the hub.
        budget: the most bytes of experts to hold in memory.
        quality: what may be given up, by name or in full; see `Quality`.
        dtype: of the model; what the checkpoint's configuration says if None.
        policy: which experts leave first; see `make_policy`.
        readers: threads that read.

    Raises:
        InvalidInput, UnsupportedModel, TransferFailed: see `locate` and `read_config`.
        UnsupportedModel: the model has no experts, or its family's code does not let them be streamed.
        CorruptRecord: a file contradicts itself.
        BudgetExceeded: the budget does not hold one expert.
    """
    wanted = quality if isinstance(quality, Quality) else Quality.preset(quality)
    place = locate(source)
    config = read_config(place)
    folder = download(place)
    checkpoint = Checkpoint(folder)
    kind = dtype or getattr(config, "dtype", None) or torch.float32
    experts: IndexedExperts | PackedExperts
    if is_packed(folder):
        experts = open_packed(folder)
        absent, files = experts.tensors, [file for file in folder.iterdir() if file.is_file()]
    else:
        found = survey(config, checkpoint, kind)
        experts = IndexedExperts(checkpoint, found.layers)
        absent, files = {name: checkpoint[name] for name in found.tensors()}, checkpoint.files
    stock = experts.stock(_used(config))
    _check_served(wanted, stock)
    model = _dense(config, checkpoint, absent, kind)
    engine, close = _engine(experts, stock, parse_size(budget), wanted, policy, readers)
    for layer in experts.layers:
        module = model.get_submodule(layer.module)
        attach(module, partial(engine.serve, _served(layer.number, layer.experts, module)))
    model.register_forward_pre_hook(partial(_tell, engine), with_kwargs=True)
    setattr(model, _ENGINE, engine)
    weakref.finalize(model, close, checkpoint)
    adopt(model, files)
    return model.requires_grad_(False).eval()


def expert_report(model: PreTrainedModel) -> ExpertReport:
    """What the experts of a model that `load_moe` opened cost so far.

    Raises:
        InvalidInput: it is another's.
    """
    return engine_of(model).report()


def engine_of(model: PreTrainedModel) -> Engine:
    """The engine of a model that `load_moe` opened.

    Raises:
        InvalidInput: it is another's.
    """
    engine = getattr(model, _ENGINE, None)
    if engine is None:
        raise InvalidInput(f"this {type(model).__name__} was not opened by load_moe")
    return engine


def _used(config: PreTrainedConfig) -> int:
    """How many experts a token uses; a guess of 1 if the configuration has its own word for it."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in _TOP_K]
    return next((number for number in found if isinstance(number, int) and number > 0), 1)


def _tell(engine: Engine, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the engine where a sequence begins, and what is prefill."""
    past = kwargs.get("past_key_values")
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    is_first = past is None or past.get_seq_length() == 0
    engine.turn_to(is_first=is_first, is_prefill=is_first or tokens is None or tokens.shape[1] > 1)


def _check_served(quality: Quality, stock: Stock) -> None:
    """See that the copies are there that a quality would serve.

    Raises:
        InvalidInput: they are not.
    """
    if quality.degrades and quality.low and stock.low is None:
        raise InvalidInput(
            "this quality serves experts in low precision too, and here they have no such copies; "
            "write them first (undercroft pack SRC DST), and name what it wrote"
        )
    if quality.is_exact and stock.high in _QUANTISED:
        raise InvalidInput(
            f"these experts were packed as {stock.high}, so nothing exact can be served; choose another quality, "
            "or pack with --high keep"
        )


def _served(number: int, experts: int, module: Any) -> ServedLayer:
    dtypes = {name: weight.dtype for name, weight in module.named_parameters(recurse=False)}
    return ServedLayer(number=number, experts=experts, dtypes=dtypes)


def _dense(
    config: PreTrainedConfig,
    checkpoint: Checkpoint,
    absent: Mapping[str, StoredTensor],
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The model with all weights but its experts', which are meta tensors."""

    def give(stored: StoredTensor, wanted: torch.dtype | None) -> torch.Tensor:
        if stored.name in absent:
            return torch.empty(stored.shape, dtype=wanted or stored.dtype, device="meta")
        return checkpoint.read(stored).to(wanted or stored.dtype)

    weights = {name: Lazy(stored, give) for name, stored in {**checkpoint, **absent}.items()}
    return load(config, weights, dtype=dtype, experts=IMPLEMENTATION)


def _engine(
    experts: IndexedExperts | PackedExperts,
    stock: Stock,
    budget: int,
    quality: Quality,
    policy: str,
    readers: int,
) -> tuple[Engine, Callable[[Checkpoint], None]]:
    leaving = make_policy(policy, stock)
    slab = Slab(budget, page=HUGE_PAGE if budget >= 64 * HUGE_PAGE else BLOCK)
    queue = TransferQueue(workers=readers + 1)
    recorder = Recorder(enabled=False)
    cache = RecordCache(experts.files, budget, slab, queue, policy=leaving, recorder=recorder)

    def close(checkpoint: Checkpoint) -> None:
        cache.close()
        queue.close()
        slab.close()
        experts.close()
        checkpoint.close()

    return Engine(experts, stock, cache, quality, leaving, recorder), close
