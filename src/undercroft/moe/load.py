"""Opens a Mixture-of-Experts model whose experts are never resident.

It knows how the parts fit: checkpoint, recipes, cache, engine, model. Invariant: what it returns computes what
transformers' eager forward computes, with every weight from the checkpoint.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from undercroft import arithmetic, machine
from undercroft.errors import BudgetExceeded, InvalidInput
from undercroft.events import Recorder
from undercroft.kernels.bitwise_experts import BitwiseExperts
from undercroft.models.checkpoint import Checkpoint
from undercroft.models.place import download, locate
from undercroft.models.source import read_config
from undercroft.models.tensor_files import StoredTensor
from undercroft.models.tracing import Lazy, load
from undercroft.moe.bank import Layer
from undercroft.moe.beneath import Beneath
from undercroft.moe.cooperate import Estimates
from undercroft.moe.copies import check_served
from undercroft.moe.device import carrier_to, find_device, put_trunk, room_for, slots_nbytes
from undercroft.moe.device_engine import DeviceEngine
from undercroft.moe.engine import Engine, ExpertReport, ExpertSource, ServedLayer, Server
from undercroft.moe.exactly import hasten
from undercroft.moe.foresight import look_ahead
from undercroft.moe.governor import Governor
from undercroft.moe.headroom import Headroom, advice, row_nbytes, token_nbytes
from undercroft.moe.indexed import IndexedExperts
from undercroft.moe.layered import ExpertPolicy
from undercroft.moe.light import lighten
from undercroft.moe.manifest import PackedLayer
from undercroft.moe.model import adopt
from undercroft.moe.packed import WORKED_ON, PackedExperts, is_packed, open_packed
from undercroft.moe.policies import make_policy
from undercroft.moe.quality import Quality
from undercroft.moe.slots import Slots
from undercroft.moe.stock import Stock
from undercroft.moe.streamed import IMPLEMENTATION, attach, is_usual, own_forward, places, refuse_wrapped
from undercroft.moe.survey import survey
from undercroft.moe.token_walk import is_short
from undercroft.store.budget import Budget
from undercroft.store.cache import RecordCache
from undercroft.store.disk import Syscalls
from undercroft.store.ranges import BLOCK, round_up
from undercroft.store.slab import HUGE_PAGE, Slab
from undercroft.store.transfer import TransferQueue
from undercroft.units import format_size, parse_size

_ENGINE = "_undercroft_engine"
_WORKSHOP = "experts as they are computed with"
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k")


def load_moe(
    source: str | Path,
    budget: int | str = "2GiB",
    quality: str | Quality = "exact",
    *,
    dtype: torch.dtype | None = None,
    policy: str = "expected-use",
    readers: int | None = None,
    context: int = 0,
    prefetch: bool | Governor = True,
    device: str | torch.device = "cpu",
    device_budget: int | str | None = None,
    cooperate: bool = True,
    syscalls: Syscalls | None = None,
) -> PreTrainedModel:
    """A causal language model of transformers whose experts stay on disk but for as many as a budget holds.

    Experts, the KV cache and what experts compute with in a prefill share the budget: as a text grows, fewer experts
    stay. Warns of a budget that is less than one token uses.

    On a GPU, all other weights and the KV cache are there, and as many experts as `device_budget` holds; `budget` is
    then for experts alone, in pinned memory that is taken at once. See docs/devices.md.

    Args:
        source: a folder that holds config.json and *.safetensors, one that `pack` wrote, or a name on the hub.
        budget: bytes for all of that; what else a model is made of comes on top.
        quality: what may be given up, by name or in full; see `Quality`.
        dtype: of the model; what the checkpoint's configuration says if None.
        policy: which experts leave first; see `make_policy`.
        readers: reads in flight; as many as suit the disk if None, see `machine.readers`.
        context: tokens whose KV cache is set aside at once, so that experts do not leave for them later.
        prefetch: whether experts may be read before they are wanted, while that pays; a governor says when that is.
            Nothing is where `quality` degrades: what is in memory decides there what serves, so results would depend
            on time.
        device: that computes: the CPU, or a GPU such as "cuda".
        device_budget: bytes of experts there; if None, four fifths of what is free once all other weights are there,
            less the KV cache of `context` tokens. On the CPU it is for trying the way to a device where there is none:
            experts are copied to that much more memory.
        cooperate: whether the CPU may compute an expert that is not on the device where that takes less time than to
            move it, in qualities that serve low copies or skip experts.
        syscalls: through which experts are read: the seam for doubles, such as a slow disk.

    Raises:
        InvalidInput, UnsupportedModel, TransferFailed: see `locate` and `read_config`.
        InvalidInput: there is no such device.
        UnsupportedModel: the model has no experts, or its family's code does not let them be streamed.
        CorruptRecord: a file contradicts itself.
        BudgetExceeded: the budget does not hold one expert, or, from a forward, none beside the KV cache.
        TierFull: the device has no room for the other weights, or for `device_budget`.
    """
    wanted = quality if isinstance(quality, Quality) else Quality.preset(quality)
    where = find_device(device)
    arithmetic.settle()
    place = locate(source)
    config = read_config(place)
    kind = dtype or getattr(config, "dtype", None) or torch.float32
    with ExitStack() as opened:
        checkpoint = opened.enter_context(Checkpoint(download(place)))
        found = _found(checkpoint, config, kind, syscalls)
        opened.callback(found.experts.close)
        stock = found.experts.stock(_used(config))
        check_served(wanted, stock)
        model = _dense(config, checkpoint, found.absent, kind)
        if where.type != "cpu":
            put_trunk(model, where)
        elif wanted.dense == "int8":
            lighten(model, experts=stock.experts)
        else:
            hasten(model)
        whole, token = parse_size(budget), token_nbytes(config, kind)
        shared = Budget(host=_whole_pages(whole))
        least = max((*stock.high_nbytes, *stock.low_nbytes))
        most = _restored_nbytes(found.experts) * stock.layers * stock.experts or stock.nbytes
        room = slots_nbytes(device_budget, where, most=most, aside=context * token)
        worked_on = WORKED_ON if room is None else 2 * WORKED_ON  # to be copied, and by the CPU beside it
        left = whole - _open_workshop(found.experts, worked_on, whole, least, shared, opened)
        flying = machine.readers(checkpoint.paths[0].parent) if readers is None else readers
        serving = _Serving(found.experts, stock, wanted, policy)
        memory = partial(_memory, found.experts, left, shared, flying, opened)
        if room is None:
            engine = _engine(serving, memory)
        else:
            engine = _device_engine(serving, memory, where, room, cooperate, opened)
        headroom = None
        if where.type == "cpu":
            headroom = Headroom(
                shared,
                engine.cache,
                least=least,
                token_nbytes=token,
                row_nbytes=row_nbytes(_shapes(model, found.experts), kind),
                context=context,
                grows=is_short(model),
            )
        _wire(model, found.experts, engine, headroom, prefetch)
        held = engine.cache.budget + (room or 0)
        if (said := advice(held, stock.used * sum(stock.high_nbytes))) is not None:
            warnings.warn(said, RuntimeWarning, stacklevel=2)
        weakref.finalize(model, opened.pop_all().close)
    adopt(model, found.files, where)
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


class _Found(NamedTuple):
    """The experts of a folder, the tensors that are theirs and not the model's, and the files to copy."""

    experts: IndexedExperts | PackedExperts
    absent: Mapping[str, StoredTensor]
    files: Sequence[Path]


class _Serving(NamedTuple):
    """What is served, how well, and what leaves first."""

    experts: IndexedExperts | PackedExperts
    stock: Stock
    quality: Quality
    policy: str


class _Memory(NamedTuple):
    """What holds experts in memory."""

    slab: Slab
    cache: RecordCache
    recorder: Recorder


def _found(
    checkpoint: Checkpoint, config: PreTrainedConfig, dtype: torch.dtype, syscalls: Syscalls | None
) -> _Found:
    folder = checkpoint.paths[0].parent
    if is_packed(folder):
        experts = open_packed(folder, syscalls=syscalls)
        return _Found(experts, experts.tensors, [file for file in folder.iterdir() if file.is_file()])
    surveyed = survey(config, checkpoint, dtype)
    absent = {name: checkpoint[name] for name in surveyed.tensors()}
    return _Found(IndexedExperts(checkpoint, surveyed.layers, syscalls=syscalls), absent, checkpoint.files)


def _wire(
    model: PreTrainedModel,
    experts: IndexedExperts | PackedExperts,
    engine: Engine,
    headroom: Headroom | None,
    prefetch: bool | Governor,
) -> None:
    """Let the model's forwards ask the engine."""
    for layer in experts.layers:
        module = model.get_submodule(layer.module)
        attach(module, Server(engine, _served(experts, layer, module, low=not engine.is_exact)))
    if prefetch and engine.is_exact:
        governor = prefetch if isinstance(prefetch, Governor) else Governor()
        look_ahead(model, engine, {layer.number: layer.module for layer in experts.layers}, governor)
    model.register_forward_pre_hook(partial(_tell, engine, headroom), with_kwargs=True)
    model.register_forward_pre_hook(
        partial(refuse_wrapped, places(model, [layer.module for layer in experts.layers]))
    )
    setattr(model, _ENGINE, engine)


def _used(config: PreTrainedConfig) -> int:
    """How many experts a token uses; a guess of 1 if the configuration has its own word for it."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in _TOP_K]
    return next((number for number in found if isinstance(number, int) and number > 0), 1)


def _tell(
    engine: Engine, headroom: Headroom | None, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Tell the engine where a sequence begins, and what is prefill; make room for its keys and values in memory."""
    past = kwargs.get("past_key_values")
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    rows, added = tokens.shape[:2] if tokens is not None else (1, 1)
    before = 0 if past is None else int(past.get_seq_length())
    if headroom is not None:
        headroom.make_room(past, before, rows, added)
    engine.turn_to(is_first=before == 0, is_prefill=before == 0 or tokens is None or added > 1)


def _served(source: ExpertSource, layer: Layer | PackedLayer, module: Any, *, low: bool) -> ServedLayer:
    dtypes = {name: weight.dtype for name, weight in module.named_parameters(recurse=False)}
    kernel = source.kernel(layer.number, low=low)
    if isinstance(kernel, BitwiseExperts) and any(dtype is not torch.bfloat16 for dtype in dtypes.values()):
        kernel = None  # they are converted before they are computed with
    return ServedLayer(
        number=layer.number,
        experts=layer.experts,
        dtypes=dtypes,
        kernel=kernel,
        is_usual=is_usual(own_forward(module)),
    )


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


def _restored_nbytes(experts: IndexedExperts | PackedExperts) -> int:
    """What the largest lossless expert takes restored; 0 where none is so."""
    return 0 if isinstance(experts, IndexedExperts) else experts.restored_nbytes


def _open_workshop(
    experts: IndexedExperts | PackedExperts,
    worked_on: int,
    budget: int,
    least: int,
    shared: Budget,
    opened: ExitStack,
) -> int:
    """Set aside where lossless experts are restored, if they are so; its bytes.

    Raises:
        BudgetExceeded: the budget has not that much and room for an expert.
    """
    if isinstance(experts, IndexedExperts) or not experts.restored_nbytes:
        return 0
    nbytes = round_up(worked_on * round_up(experts.restored_nbytes), _page(budget))
    if budget < nbytes + least:
        raise BudgetExceeded(least, budget, {_WORKSHOP: nbytes}, least=nbytes + least)
    workshop = Slab(nbytes, budget=shared, holder=_WORKSHOP, prefault=True, page=_page(budget))
    opened.callback(workshop.close)
    experts.workshop = workshop
    return nbytes


def _memory(
    experts: IndexedExperts | PackedExperts,
    budget: int,
    shared: Budget,
    readers: int,
    opened: ExitStack,
    leaving: ExpertPolicy,
) -> _Memory:
    slab = Slab(budget, budget=shared, holder="experts", page=_page(budget))
    opened.callback(slab.close)
    queue = TransferQueue(workers=readers + 1)
    opened.callback(queue.close)
    recorder = Recorder(enabled=False)
    cache = RecordCache(experts.files, budget, slab, queue, policy=leaving, recorder=recorder)
    opened.callback(cache.close)
    return _Memory(slab, cache, recorder)


def _engine(serving: _Serving, memory: Callable[[ExpertPolicy], _Memory]) -> Engine:
    experts, stock, quality, policy = serving
    leaving = make_policy(policy, stock)
    _, cache, recorder = memory(leaving)
    return Engine(experts, stock, cache, quality, leaving, recorder)


def _device_engine(
    serving: _Serving,
    memory: Callable[[ExpertPolicy], _Memory],
    device: torch.device,
    room: int,
    cooperate: bool,
    opened: ExitStack,
) -> DeviceEngine:
    experts, stock, quality, policy = serving
    estimates, above = Estimates(), make_policy(policy, stock)
    with room_for(f"{format_size(room)} of experts", device, "give them a smaller device budget"):
        slots = Slots(room, stock, above, carrier_to(device), estimates.note_move)
    leaving = Beneath(make_policy(policy, stock), slots, stock)
    slab, cache, recorder = memory(leaving)
    opened.callback(slots.settle)  # before the memory is given back that copies are made of
    workshop = None if isinstance(experts, IndexedExperts) else experts.workshop
    for each in (slab, workshop):
        if device.type == "cuda" and isinstance(each, Slab):
            each.register_cuda(device)
    return DeviceEngine(
        experts,
        stock,
        cache,
        quality,
        leaving,
        recorder,
        slots=slots,
        estimates=estimates,
        cooperate=cooperate,
        restores=workshop is not None,
    )


def _page(budget: int) -> int:
    return HUGE_PAGE if budget >= 64 * HUGE_PAGE else BLOCK


def _whole_pages(budget: int) -> int:
    return round_up(budget, _page(budget))


def _shapes(
    model: PreTrainedModel, experts: IndexedExperts | PackedExperts
) -> list[dict[str, tuple[int, ...]]]:
    """Of one expert's parameters in the model, by layer."""
    modules = [model.get_submodule(layer.module) for layer in experts.layers]
    return [
        {name: tuple(weight.shape[1:]) for name, weight in module.named_parameters(recurse=False)}
        for module in modules
    ]
