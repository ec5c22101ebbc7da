"""Memory beneath a device: what the device keeps leaves first, and fewer experts are read for it."""

import pytest

from undercroft.moe.beneath import Beneath
from undercroft.moe.layered import Wanted
from undercroft.moe.paper import PaperCache
from undercroft.moe.policies import make_policy
from undercroft.moe.serving_order import waves
from undercroft.moe.stock import Stock
from undercroft.moe.synthetic import synthetic_trace
from undercroft.store.record import Key

STOCK = Stock.of([4096, 4096], experts=16, used=2)


class Device:
    """A cache on paper that says what it holds first."""

    def __init__(self, stock: Stock, budget: int, policy: str = "expected-use") -> None:
        self.policy = make_policy(policy, stock)
        self.cache = PaperCache(stock, budget, self.policy)

    def __contains__(self, key: Key) -> bool:
        return key in self.cache


def beneath(keys: list[Key], above: list[Key]) -> Beneath:
    device = Device(STOCK, 64 * 4096, "lru")
    found = Beneath(make_policy("lru", STOCK), device, STOCK)
    for key in above:
        device.cache.fetch([key])
    for key in keys:
        found.insert(key)
    return found


def test_what_the_device_keeps_leaves_first_the_surest_before_the_rest() -> None:
    keys = [*STOCK.high_keys[0], *STOCK.high_keys[1]][:14]
    policy = beneath(keys, above=keys[:12])
    assert list(policy.victims()) == [*keys[8:12][::-1], *keys[:8], *keys[12:]]


def test_every_key_is_given_once_and_what_left_not_at_all() -> None:
    keys = list(STOCK.high_keys[0])
    policy = beneath(keys, above=keys)
    assert sorted(policy.victims()) == sorted(keys)
    policy.remove(keys[-1])
    policy.touch(keys[0])
    assert sorted(policy.victims()) == sorted(keys[:-1])
    assert list(policy.victims()) == list(policy.victims())


def test_a_small_device_changes_nothing() -> None:
    keys = list(STOCK.high_keys[0])
    assert list(beneath(keys, above=keys[:8]).victims()) == keys


def reads(device_share: float, memory_share: float, *, with_it: bool) -> int:
    """Experts read in decoding."""
    trace = synthetic_trace(layers=8, experts=32, used=3, tokens=160)
    stock = Stock.of([trace.expert_nbytes[0]] * 8, experts=32, used=3)
    device, budget = Device(stock, int(stock.nbytes * device_share)), int(stock.nbytes * memory_share)
    plain = make_policy("expected-use", stock)
    policy = Beneath(plain, device, stock) if with_it else plain
    memory, found = PaperCache(stock, budget, policy), 0
    for step in trace.steps():
        chosen = step.experts.ravel().tolist()
        wanted = [Wanted(expert, chosen.count(expert)) for expert in sorted(set(chosen))]
        keys = [stock.high_keys[step.layer][each.expert] for each in wanted]
        for each in (device.policy, policy):
            each.turn_to(step.layer, wanted, len(step.experts))
        for wave in waves([key for key in keys if key not in device], stock, budget):
            found += len(memory.fetch(wave)) * (not step.is_prefill)
        for wave in waves(keys, stock, int(stock.nbytes * device_share)):
            device.cache.fetch(wave)
    return found


@pytest.mark.parametrize(("device", "memory", "share"), [(0.5, 0.5, 0.6), (0.4, 0.3, 0.9), (0.1, 0.8, 1.0)])
def test_fewer_experts_are_read(device: float, memory: float, share: float) -> None:
    assert 0 < reads(device, memory, with_it=True) <= share * reads(device, memory, with_it=False)
