"""A stock knows where each key belongs and what it weighs."""

import pytest

from undercroft.errors import InvalidInput
from undercroft.moe.stock import Stock


def test_every_key_has_its_place_and_weight() -> None:
    stock = Stock.of([5000, 9000], experts=3, used=2, high="bfloat16", low="int4", low_nbytes=[100, 4097])
    assert stock.high_keys[1][2] == ("layers.1.experts.2", "bfloat16")
    assert stock.places[stock.low_keys[0][1]] == (0, 1, False)
    assert len(stock.places) == 2 * 2 * 3
    assert [
        stock.occupied(keys[layer][0]) for keys in (stock.high_keys, stock.low_keys) for layer in (0, 1)
    ] == [
        8192,
        12288,
        4096,
        8192,
    ]
    assert stock.nbytes == 3 * (8192 + 12288)


@pytest.mark.parametrize(
    "wrong",
    [
        {"experts": 0},
        {"used": 0},
        {"used": 5},
        {"experts": 2**40},
        {"high_nbytes": []},
        {"high_nbytes": [0]},
        {"low": "int4"},
        {"low": "bfloat16", "low_nbytes": [4096]},
        {"low_nbytes": [4096]},
    ],
)
def test_numbers_that_cannot_be_a_models(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        Stock.of(**{"high_nbytes": [4096], "experts": 4, "used": 2, **wrong})  # type: ignore[arg-type]
