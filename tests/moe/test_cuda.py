"""Experts served to a GPU: the numbers of stock eager there, within a budget. Skipped where there is none."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.moe.conftest import ALWAYS, mixtral, prompt, qwen, stock
from tests.moe.test_device import OPTIONS, SLOT, SLOTS, device_engine, logits
from tests.moe.test_exact import BANK, same
from tests.moe.test_served import distance, heed_experts

from undercroft.errors import InvalidInput, TierFull, UnsupportedModel
from undercroft.moe.carriage import CudaCarrier, send
from undercroft.moe.device import find_device
from undercroft.moe.governor import Governor
from undercroft.moe.load import expert_report, load_moe
from undercroft.moe.pack import pack
from undercroft.moe.quality import Quality
from undercroft.store.slab import Slab
from undercroft.units import MIB

pytestmark = pytest.mark.gpu
LONG = 1_000_000_000  # cycles: half a second or more


def on_gpu(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return stock(folder, dtype).cuda()


def ids(**options: int) -> torch.Tensor:
    return prompt(**options).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [qwen, mixtral])
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS.keys())
def test_bit_for_bit(
    checkpoint: Callable[..., Path], slots: int, make: Callable[[int], Any], dtype: torch.dtype
) -> None:
    folder = checkpoint(make=make)
    options: dict[str, Any] = {"dtype": dtype, "device": "cuda", "device_budget": slots}
    model = load_moe(folder, BANK // 2, prefetch=False, **options)
    same(on_gpu(folder, dtype), model, ids(), tokens=16)
    same(on_gpu(folder, dtype), model, ids(rows=3, length=5), tokens=4)
    report = expert_report(model)
    assert 0 < report.device_held <= report.device_budget <= slots
    assert report.computed == 0


def test_bit_for_bit_with_predictions(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    options: dict[str, Any] = {"device": "cuda", "device_budget": BANK // 8, "prefetch": Governor(ALWAYS)}
    model = load_moe(folder, BANK // 2, **options)
    same(on_gpu(folder), model, ids(), tokens=32)
    assert expert_report(model).predicted > 0


class LateProducts(torch.nn.Module):
    """An activation that lets the GPU wait before it, and so all that is computed with an expert's second matrix."""

    def __init__(self, activation: torch.nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(LONG // 100)
        return self.activation(x)


class LateCopies(CudaCarrier):
    """A link that begins every copy late."""

    def carry(self, pieces: Any, after: Any) -> Any:
        with torch.cuda.stream(self._side):
            torch.cuda._sleep(LONG // 100)
        return super().carry(pieces, after)


@pytest.mark.parametrize("slots", [SLOT, 3 * SLOT, BANK // 2])
@pytest.mark.parametrize("late", ["what computes", "what copies"])
def test_a_late_stream_changes_no_number(checkpoint: Callable[..., Path], late: str, slots: int) -> None:
    """A race shows when the work that should be over has not even begun.

    That of a token, for in a longer forward the family's own code waits for each expert.
    """
    folder = checkpoint()
    plain = on_gpu(folder)
    model: Any = load_moe(folder, BANK // 2, device="cuda", device_budget=slots, prefetch=False)
    if late == "what copies":
        device_engine(model).slots._carrier = LateCopies(model.device)
    else:
        for layer in model.model.layers:
            layer.mlp.experts.act_fn = LateProducts(layer.mlp.experts.act_fn)
    for seed in range(2):
        tokens = ids(seed=seed)
        assert torch.equal(logits(plain, tokens), logits(model, tokens))
        with torch.no_grad():
            assert torch.equal(plain(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_a_copy_goes_on_beside_what_is_computed() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    carrier, slab = CudaCarrier(device), Slab(2**21)
    slab.register_cuda(device)
    lease = slab.lease(2**20)
    assert lease is not None
    here = torch.empty(0, dtype=torch.uint8).set_(lease.storage(0, 2**20))
    here.fill_(7)
    assert here.is_pinned()
    there = carrier.arena(2**20)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    mark = carrier.mark()
    carriage = carrier.carry([(there, here)], [])
    carriage.synchronize()
    assert not mark.query()
    assert carriage.seconds > 0
    behind = carrier.carry([(there, here)], [mark])
    assert not behind.query()
    behind.synchronize()
    assert mark.query()
    assert (there == 7).all()
    del here, lease
    slab.close()


def test_what_the_cpu_computed_is_sent_without_waiting_for_the_gpu() -> None:
    device, found = torch.device("cuda", torch.cuda.current_device()), torch.arange(4096.0)
    send(found, device)  # memory is pinned for the first time
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    mark = CudaCarrier(device).mark()
    there = send(found, device)
    assert not mark.query()
    assert torch.equal(there.cpu(), found)


def test_slots_take_their_budget_and_no_more(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()

    def held(budget: int) -> int:
        gc.collect()
        before = torch.cuda.memory_allocated()
        model: Any = load_moe(folder, BANK, device="cuda", device_budget=budget, prefetch=False)
        loaded = torch.cuda.memory_allocated() - before
        during: list[int] = []
        for seed in range(4):
            with torch.no_grad():
                model(input_ids=ids(seed=seed), use_cache=False)
            during.append(torch.cuda.memory_allocated())
        assert len(set(during[1:])) == 1
        return loaded

    held(BANK)  # what libraries take at their first call
    small, large = held(64 * MIB), held(256 * MIB)
    assert abs(large - small - 192 * MIB) < 4 * MIB  # the allocator may leave a little of a block unused


def test_unasked_they_take_a_share_of_what_is_free(checkpoint: Callable[..., Path]) -> None:
    model = load_moe(checkpoint(), BANK, device="cuda")
    assert expert_report(model).device_budget <= 0.8 * torch.cuda.mem_get_info()[1]
    model.generate(ids(), max_new_tokens=8, **OPTIONS)  # pyright: ignore
    assert expert_report(model).device_hits > 0


@pytest.fixture
def both(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    folder = checkpoint()
    strong = stock(folder)
    heed_experts(strong)
    strong.save_pretrained(folder)
    pack(folder, tmp_path / "packed", high="int8", low="int4")
    return tmp_path / "packed"


def test_packed_experts_are_served_as_on_the_cpu(both: Path) -> None:
    quality = Quality(low=0.0, high="int8", low_precision=None)
    here = load_moe(both, BANK, quality)
    there = load_moe(both, BANK // 4, quality, device="cuda", device_budget=BANK // 4)
    tokens = prompt(length=24)
    assert distance(logits(here, tokens), logits(there, tokens.cuda()).cpu()) < 0.02
    with torch.no_grad():
        assert distance(here(input_ids=tokens).logits, there(input_ids=tokens.cuda()).logits.cpu()) < 0.02


def test_balanced_runs(both: Path) -> None:
    model: Any = load_moe(both, BANK // 4, "balanced", device="cuda", device_budget=4 * SLOT)
    out = model.generate(ids(), max_new_tokens=40, **OPTIONS)
    assert out.shape == (1, 52)
    assert expert_report(model).low_mass <= 0.05
    assert 0 < expert_report(model).device_held <= 4 * SLOT


def test_the_cpu_computes_what_it_computes_sooner(both: Path) -> None:
    tokens, found = ids(length=24), list[torch.Tensor]()
    quality = Quality(low=0.01, high="int8")
    for cooperate in (True, False):
        options: dict[str, Any] = {"device": "cuda", "device_budget": 2 * SLOT, "cooperate": cooperate}
        model = load_moe(both, BANK, quality, **options)
        for _ in range(200):
            device_engine(model).estimates.note_move(1, 1.0)
        found.append(logits(model, tokens))
        assert (expert_report(model).computed > 24) == cooperate
    assert distance(*found) < 0.05


def test_it_stays_where_it_is(checkpoint: Callable[..., Path]) -> None:
    model: Any = load_moe(checkpoint(), BANK, device="cuda", device_budget=BANK)
    assert model.device.type == "cuda"
    assert model.to("cuda") is model
    with pytest.raises(UnsupportedModel, match="load_moe"):
        model.to("cpu")


def test_more_than_a_gpu_has_is_refused(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(TierFull, match="give them a smaller device budget"):
        load_moe(checkpoint(), BANK, device="cuda", device_budget="16TiB")


def test_a_gpu_beyond_the_last_is_refused() -> None:
    with pytest.raises(InvalidInput, match="this machine has"):
        find_device("cuda:99")


def test_nothing_is_left_when_a_model_goes(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()

    def use() -> None:
        model: Any = load_moe(folder, BANK, device="cuda", device_budget=BANK)
        with torch.no_grad():
            model(input_ids=ids())

    use()
    gc.collect()
    before = torch.cuda.memory_allocated()
    use()
    gc.collect()
    assert torch.cuda.memory_allocated() == before
