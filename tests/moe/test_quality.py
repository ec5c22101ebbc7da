"""Quality and its account: the promise holds after every step, however the steps come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.errors import InvalidInput
from undercroft.moe.importance import Importance
from undercroft.moe.quality import Account, Offer, Quality

offers = st.builds(Offer, st.floats(0, 2), st.integers(0, 10**7), st.integers(0, 10**7), st.booleans())
stream = st.lists(st.tuples(st.floats(0, 600), st.lists(offers, max_size=8)), max_size=40)
share = st.floats(0, 1)


@given(stream, share, share)
def test_the_promise_holds_after_every_step(
    steps: list[tuple[float, list[Offer]]], low: float, skip: float
) -> None:
    account = Account(Quality(low=low, skip=skip), fair_price=1e-6)
    total = spent_low = spent_skip = 0.0
    for mass, offered in steps:
        classes = account.decide(mass, offered)
        total += mass
        charged = [(offer.mass, each) for offer, each in zip(offered, classes, strict=True) if offer.is_miss]
        spent_low += sum(mass for mass, each in charged if each is Importance.LOW)
        spent_skip += sum(mass for mass, each in charged if each is Importance.SKIP)
        assert account.low_mass <= low * account.mass
        assert account.skip_mass <= skip * account.mass
        assert (account.mass, account.low_mass, account.skip_mass) == pytest.approx(
            (total, spent_low, spent_skip)
        )


@given(stream)
def test_what_is_exact_never_degrades(steps: list[tuple[float, list[Offer]]]) -> None:
    account = Account(Quality.preset("exact"), fair_price=1e-6)
    for mass, offered in steps:
        massive = [offer._replace(mass=offer.mass + 0.1) for offer in offered]
        assert set(account.decide(mass, massive)) <= {Importance.HIGH}


def miss(mass: float, low_saves: int, skip_saves: int = 0) -> Offer:
    return Offer(mass, low_saves, skip_saves, True)


def test_the_cheapest_mass_for_a_byte_goes_first() -> None:
    account = Account(Quality(low=0.2), fair_price=1.0)
    classes = account.decide(1.0, [miss(0.15, 100), miss(0.15, 300), miss(0.15, 200)])
    assert classes == [Importance.HIGH, Importance.LOW, Importance.HIGH]
    assert account.low_mass == 0.15


def test_a_dear_miss_waits_until_there_is_plenty() -> None:
    account = Account(Quality(low=0.5), fair_price=1.0)
    dear = miss(0.4, 1)  # four times the price at which an empty account buys
    assert account.decide(1.0, [dear]) == [Importance.HIGH]
    for _ in range(400):
        account.decide(1.0, [])
    assert account.decide(1.0, [dear]) == [Importance.LOW]


def test_what_is_unspent_for_long_expires() -> None:
    account = Account(Quality(low=0.5), fair_price=1.0)
    for _ in range(100):
        account.decide(1000.0, [])  # prompts of 1000 tokens that needed nothing
    spent = sum(each is Importance.LOW for each in account.decide(1.0, [miss(10.0, 1000)] * 100))
    assert spent == 50  # of 500 that are kept, not of the 50000 that were allowed


def test_a_hit_costs_nothing() -> None:
    account = Account(Quality(low=0.5), fair_price=1.0)
    assert account.decide(1.0, [Offer(0.1, 10, 0, False)]) == [Importance.LOW]
    assert account.low_mass == 0


def test_what_may_be_skipped_is_skipped_first() -> None:
    account = Account(Quality(low=0.5, skip=0.1), fair_price=1.0)
    assert account.decide(1.0, [miss(0.1, 10, 10), miss(0.2, 10, 10)]) == [Importance.SKIP, Importance.LOW]
    assert (account.low_mass, account.skip_mass) == (0.2, 0.1)


def test_presets_say_what_they_are() -> None:
    assert Quality.preset("exact").is_exact
    assert not Quality.preset("exact").degrades
    assert Quality.preset("hobbit").thresholds == (0.6, 0.9)
    for name in ("balanced", "fast", "hobbit"):
        assert Quality.preset(name).degrades
        assert not Quality.preset(name).is_exact
    assert not Quality(low=0.0, high="int8").is_exact
    with pytest.raises(InvalidInput, match="'best' is no quality; there are exact, balanced, fast, hobbit"):
        Quality.preset("best")


@pytest.mark.parametrize(
    "wrong",
    [
        {"low": 1.5},
        {"skip": -0.1},
        {"low": float("nan")},
        {"high": "fp4"},
        {"low_precision": "int8"},
        {"dense": "int4"},
        {"high": "int4", "low_precision": "int4"},
        {"thresholds": (0.9, 0.6)},
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        Quality(**wrong)  # type: ignore[arg-type]
