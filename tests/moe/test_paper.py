"""The cache on paper does what the real one does: the same hits, misses and evictions, holes included."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from undercroft.errors import BudgetExceeded, TierFull
from undercroft.events import Recorder
from undercroft.moe.layered import Wanted
from undercroft.moe.paper import PaperCache, PaperSlab
from undercroft.moe.policies import make_policy
from undercroft.moe.serving_order import waves
from undercroft.moe.stock import Stock
from undercroft.store.cache import RecordCache
from undercroft.store.record import Key
from undercroft.store.records import RecordFile
from undercroft.store.slab import Slab
from undercroft.store.transfer import TransferQueue
from undercroft.store.writer import RecordWriter

BLOCK = 4096
STOCK = Stock.of([3 * BLOCK, 5 * BLOCK, 2 * BLOCK], experts=6, used=2)
BUDGET = 20 * BLOCK


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordFile]:
    path: Path = tmp_path_factory.mktemp("paper") / "experts"
    with RecordWriter(path) as writer:
        for key in STOCK.places:
            writer.add(*key, bytes(STOCK.occupied(key)))
    file = RecordFile.open(path)
    yield file
    file.close()


def fetch(cache: RecordCache, keys: list[Key]) -> list[Key]:
    """What was not there, as `PaperCache.fetch` says it."""
    missing = [key for key in keys if key not in cache]
    leases = [lease for _, lease in cache.fetch(keys)]
    assert len(leases) == len(keys)
    return missing


served = st.lists(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True), min_size=3, max_size=3),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("name", ["lru", "expected-use", "apex"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(forwards=served)
def test_it_misses_what_the_real_cache_misses(
    name: str, records: RecordFile, forwards: list[list[list[int]]]
) -> None:
    policies = make_policy(name, STOCK), make_policy(name, STOCK)
    recorder = Recorder()
    paper = PaperCache(STOCK, BUDGET, policies[0], page=BLOCK)
    slab, queue = Slab(BUDGET, page=BLOCK), TransferQueue()
    missed = 0
    with RecordCache([records], BUDGET, slab, queue, policy=policies[1], recorder=recorder) as real:
        for layer, experts in ((layer, experts) for each in forwards for layer, experts in enumerate(each)):
            for policy in policies:
                policy.turn_to(layer, [Wanted(expert) for expert in sorted(experts)])
            for wave in waves([STOCK.high_keys[layer][e] for e in sorted(experts)], STOCK, BUDGET):
                missing = paper.fetch(wave)
                assert fetch(real, wave) == missing
                assert real.held == paper.held
                missed += len(missing)
            assert [key in real for key in STOCK.places] == [key in paper for key in STOCK.places]
        assert recorder.counters["misses"] == missed
    queue.close()
    slab.close()


def test_what_was_fetched_is_there_until_room_is_needed() -> None:
    cache = PaperCache(STOCK, BUDGET, make_policy("lru", STOCK), page=BLOCK)
    keys = STOCK.high_keys[1]
    assert cache.fetch(keys[:2]) == list(keys[:2])
    assert cache.fetch(keys[:3]) == [keys[2]]
    assert cache.fetch(keys[3:5]) == list(keys[3:5])
    assert [key in cache for key in keys] == [False, True, True, True, True, False]
    assert cache.held == BUDGET


def test_what_cannot_fit_is_a_typed_error() -> None:
    cache = PaperCache(STOCK, 4 * BLOCK, make_policy("lru", STOCK), page=BLOCK)
    with pytest.raises((BudgetExceeded, TierFull)):
        cache.fetch(STOCK.high_keys[1][:1])


def test_leases_of_paper_come_back() -> None:
    slab = PaperSlab(3 * BLOCK, page=BLOCK)
    leases = [slab.lease(1) for _ in range(3)]
    assert slab.lease(1) is None
    assert slab.leased == 3 * BLOCK
    leases.pop(0)
    assert slab.leased == 2 * BLOCK
    assert slab.lease(2 * BLOCK) is None
    leases.clear()
    assert slab.leased == 0
