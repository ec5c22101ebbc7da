"""The way to a device, run where there is none: slots in memory, copies by the carrier of the host."""

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.moe.conftest import ALWAYS, mixtral, prompt, qwen, stock
from tests.moe.families import fill, tiny_config
from tests.moe.test_exact import BANK, EXPERT, same
from tests.moe.test_served import FAMILIES, distance, heed_experts
from torch import Tensor

from undercroft.errors import BudgetExceeded, InvalidInput, TierFull
from undercroft.moe.carriage import Carriage, Done, HostCarrier, Mark
from undercroft.moe.device import find_device, put_trunk, room_for
from undercroft.moe.device_engine import DeviceEngine
from undercroft.moe.governor import Governor
from undercroft.moe.load import engine_of, expert_report, load_moe
from undercroft.moe.pack import pack
from undercroft.moe.quality import Quality

SLOT = EXPERT + 8192
SLOTS = {"one": SLOT, "three": 3 * SLOT, "one token": 4 * SLOT, "half": BANK // 2, "all": BANK}
OPTIONS: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}


def device_engine(model: Any) -> DeviceEngine:
    engine = engine_of(model)
    assert isinstance(engine, DeviceEngine)
    return engine


@pytest.mark.parametrize("make", [qwen, mixtral])
@pytest.mark.parametrize("budget", [4 * SLOT, BANK])
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS.keys())
def test_bit_for_bit(
    checkpoint: Callable[..., Path], slots: int, budget: int, make: Callable[[int], Any]
) -> None:
    folder = checkpoint(make=make)
    model = load_moe(folder, budget, device_budget=slots, prefetch=False)
    same(stock(folder), model, prompt(), tokens=16)
    same(stock(folder), model, prompt(rows=3, length=5), tokens=4)
    report, engine = expert_report(model), device_engine(model)
    assert 0 < report.device_held <= report.device_budget == slots // 4096 * 4096
    assert report.moved_nbytes > 0
    assert report.computed == 0
    assert not engine.cooperates
    assert engine.cache.pinned == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bit_for_bit_in_packed_folders(
    checkpoint: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = checkpoint()
    pack(folder, tmp_path / "packed")
    model = load_moe(tmp_path / "packed", BANK // 2, dtype=dtype, device_budget=BANK // 3)
    same(stock(folder, dtype), model, prompt(), tokens=8)


@pytest.mark.filterwarnings("ignore")  # of the families' own code
@pytest.mark.parametrize("name", FAMILIES)
def test_bit_for_bit_in_other_families(name: str, tmp_path: Path) -> None:
    make, build = FAMILIES[name]
    model = build(tiny_config(make))
    fill(model, 0)
    heed_experts(model)
    model.save_pretrained(tmp_path)
    twin = load_moe(tmp_path, "4MiB", device_budget="128KiB")
    ids = prompt(length=6) % model.config.get_text_config().vocab_size
    same(stock(tmp_path), twin, ids, tokens=4)
    assert expert_report(twin).moved_nbytes > 2 * expert_report(twin).device_budget


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("quality", ["exact", "degrading"])
def test_lossless_experts_are_restored_on_their_way(
    checkpoint: Callable[..., Path], tmp_path: Path, quality: str, late: bool
) -> None:
    plain, carrier = stock(checkpoint(), torch.bfloat16), Late()
    plain.save_pretrained(tmp_path / "model")
    pack(tmp_path / "model", tmp_path / "packed", high="lossless", low="int4")
    wanted = (
        Quality.preset("exact") if quality == "exact" else Quality(low=0.0, skip=1e-6, low_precision=None)
    )
    model = load_moe(tmp_path / "packed", BANK, wanted, device_budget=4 * SLOT)
    if late:
        device_engine(model).slots._carrier = carrier
    if quality == "exact":
        same(plain, model, prompt(), tokens=8)
    for _ in range(200):
        device_engine(model).estimates.note_move(1, 1.0)
    ids = prompt(length=16)
    assert distance(logits(plain, ids), logits(model, ids)) < 0.02
    assert (expert_report(model).computed > 0) == (quality != "exact")
    carrier.link.shutdown()


class Late(HostCarrier):
    """A link of its own that begins every copy late."""

    def __init__(self) -> None:
        self.link = ThreadPoolExecutor(1)

    def carry(self, pieces: Sequence[tuple[Tensor, Tensor]], after: Iterable[Mark]) -> Any:
        def copy() -> Done:
            time.sleep(1e-3)
            return HostCarrier.carry(self, pieces, ())

        return Under(self.link.submit(copy))

    def wait(self, carriage: Carriage) -> None:
        carriage.synchronize()


class Under:
    """A copy on its way."""

    def __init__(self, future: Future[Done]) -> None:
        self._future = future

    @property
    def seconds(self) -> float:
        return self._future.result().seconds

    def query(self) -> bool:
        return self._future.done()

    def synchronize(self) -> None:
        self._future.result()


@pytest.mark.parametrize("budget", [2 * SLOT, BANK // 2])
@pytest.mark.parametrize("slots", list(SLOTS.values())[:-1], ids=list(SLOTS)[:-1])
def test_late_copies_change_no_number(checkpoint: Callable[..., Path], slots: int, budget: int) -> None:
    folder, carrier = checkpoint(), Late()
    model = load_moe(folder, budget + 2**17, device_budget=slots, prefetch=False)
    device_engine(model).slots._carrier = carrier
    same(stock(folder), model, prompt(), tokens=8)
    same(stock(folder), model, prompt(rows=2), tokens=4)
    carrier.link.shutdown()


def test_bit_for_bit_with_predictions(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    model = load_moe(folder, BANK // 2, device_budget=BANK // 8, prefetch=Governor(ALWAYS))
    same(stock(folder), model, prompt(), tokens=32)
    assert expert_report(model).predicted > 0


def test_what_is_on_the_device_is_not_asked_of_memory(checkpoint: Callable[..., Path]) -> None:
    model: Any = load_moe(checkpoint(), 4 * SLOT + 2**17, device_budget=BANK)
    model.generate(prompt(), max_new_tokens=24, **OPTIONS)
    before = expert_report(model)
    model.generate(prompt(), max_new_tokens=24, **OPTIONS)
    after = expert_report(model)
    assert (after.moved_nbytes, after.read_nbytes, after.misses) == (
        before.moved_nbytes,
        before.read_nbytes,
        before.misses,
    )
    assert after.hits - before.hits == after.device_hits - before.device_hits > 0


@pytest.fixture
def both(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    folder = checkpoint()
    strong = stock(folder)
    heed_experts(strong)
    strong.save_pretrained(folder)
    pack(folder, tmp_path / "packed", high="int8", low="int4")
    return tmp_path / "packed"


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of decoding, token by token."""
    past, found = None, []
    for token in tokens.unbind(1):
        with torch.no_grad():
            out = model(input_ids=token[:, None], past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("slots", [2 * SLOT, BANK // 4])
def test_packed_experts_are_served_as_without_a_device(both: Path, slots: int) -> None:
    quality = Quality(low=0.0, high="int8", low_precision=None)
    plain, ours = load_moe(both, BANK, quality), load_moe(both, BANK // 4, quality, device_budget=slots)
    ids = prompt(length=24)
    assert distance(logits(plain, ids), logits(ours, ids)) < 0.02
    with torch.no_grad():
        assert distance(plain(input_ids=ids).logits, ours(input_ids=ids).logits) < 0.02


@pytest.mark.parametrize("source", ["packed", "plain"])
def test_the_cpu_computes_what_it_computes_sooner(
    both: Path, checkpoint: Callable[..., Path], source: str
) -> None:
    """The host's carrier copies for nothing, so a slow link is what was noted of it."""
    folder = both if source == "packed" else checkpoint()
    low: dict[str, Any] = {"low": 0.01, "high": "int8"} if source == "packed" else {"low_precision": None}
    quality = Quality(**low, skip=0.0 if source == "packed" else 0.01)
    ids = prompt(length=24)
    found: list[torch.Tensor] = []
    for cooperate in (True, False):
        model = load_moe(folder, BANK, quality, device_budget=2 * SLOT, cooperate=cooperate)
        engine = device_engine(model)
        assert engine.cooperates == cooperate
        for _ in range(200):
            engine.estimates.note_move(1, 1.0)
        found.append(logits(model, ids))
        report = expert_report(model)
        assert (report.computed > 24) == cooperate
        assert report.device_held > 0
    assert distance(*found) < 0.05


def test_a_link_that_is_fast_leaves_the_cpu_nothing_but_a_try(both: Path) -> None:
    model = load_moe(both, BANK, Quality(low=0.01, high="int8"), device_budget=2 * SLOT)
    engine = device_engine(model)
    engine.estimates.note_compute(1, 1e3, 0.0)
    logits(model, prompt(length=24))
    assert expert_report(model).computed == 0


def test_the_account_counts_what_is_on_the_device_as_there(both: Path) -> None:
    model = load_moe(both, BANK, Quality(low=0.3, high="int8"), device_budget=BANK)
    ids = prompt(length=24)
    logits(model, ids)
    before = expert_report(model)
    logits(model, ids)
    assert expert_report(model).misses == before.misses
    assert expert_report(model).low_mass <= 0.3


@pytest.mark.usefixtures("nothing_left")
def test_nothing_is_left_when_a_model_goes(checkpoint: Callable[..., Path]) -> None:
    model = load_moe(checkpoint(), BANK // 2, device_budget=BANK // 4)
    with torch.no_grad():
        model(input_ids=prompt())
    del model
    gc.collect()


def test_a_device_budget_below_one_expert_says_what_would_do(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(BudgetExceeded, match="device tier") as caught:
        load_moe(checkpoint(), BANK, device_budget="4KiB")
    least = caught.value.least
    assert least is not None
    folder = checkpoint(seed=1)
    same(stock(folder), load_moe(folder, BANK, device_budget=least), prompt(), tokens=4)


@pytest.mark.parametrize(
    ("asked", "said"), [("gpu", "is no device"), ("meta", "not to meta"), ("cuda:99", "cuda:99")]
)
def test_a_device_that_is_not_there_is_refused(asked: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        find_device(asked)


def test_a_device_without_room_is_named_with_what_it_has_no_room_for() -> None:
    said = "CUDA out of memory. Tried to allocate 9.00 GiB. If reserved but unallocated memory is large, …"
    with (
        pytest.raises(TierFull, match=r"^cuda:1 has no room for these; try fewer: .* 9\.00 GiB\.$"),
        room_for("these", torch.device("cuda:1"), "try fewer"),
    ):
        raise torch.OutOfMemoryError(said)


def test_the_cpu_is_a_device() -> None:
    assert find_device("cpu") == find_device("cpu:0") == torch.device("cpu")


def test_a_trunk_goes_without_its_experts(checkpoint: Callable[..., Path]) -> None:
    model: Any = stock(checkpoint())
    model.lm_head.weight = model.model.embed_tokens.weight
    experts = model.model.layers[0].mlp.experts
    experts.to("meta")
    gone, kept = experts.gate_up_proj, model.model.layers[0].mlp.gate.weight.clone()
    put_trunk(model, torch.device("cpu"))
    assert experts.gate_up_proj is gone
    assert torch.equal(model.model.layers[0].mlp.gate.weight, kept)
    assert model.lm_head.weight is model.model.embed_tokens.weight
