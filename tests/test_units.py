"""Sizes, rates and durations: examples, and round trips over every size there can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.errors import InvalidInput
from undercroft.units import (
    GIB,
    KIB,
    MIB,
    TIB,
    exact_size,
    format_rate,
    format_seconds,
    format_size,
    parse_size,
    round_up_size,
)

SIZES = st.integers(min_value=0, max_value=2**63 - 1)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 * GIB),
        ("512MB", 512_000_000),
        ("1.5 GiB", 3 * GIB // 2),
        ("  2 tib ", 2 * TIB),
        ("4K", 4096),
        ("4Ki", 4096),
        ("4kB", 4000),
        ("0.1MiB", 104857),
        ("4096", 4096),
        ("7 B", 7),
        (12, 12),
        (0, 0),
    ],
)
def test_parse_size_understands(text: int | str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "-1GiB",
        -1,
        "1e9",
        "8 bits",
        "1,5GiB",
        "1..5GiB",
        "٣GiB",
        2**63,
        "8388608TiB",
        True,
        1.5,
        None,
    ],
)
def test_parse_size_refuses_and_gives_examples(text: object) -> None:
    with pytest.raises(InvalidInput, match=r'is not a size; write it like "8GiB"'):
        parse_size(text)  # type: ignore[arg-type]


@given(SIZES)
def test_an_exact_size_parses_back_to_the_same_bytes(nbytes: int) -> None:
    assert parse_size(exact_size(nbytes)) == nbytes


@given(st.integers(min_value=0, max_value=4096 * TIB))
def test_a_formatted_size_parses_back_within_half_a_printed_digit(nbytes: int) -> None:
    unit = max((factor for factor in (1, KIB, MIB, GIB, TIB) if factor <= nbytes), default=1)
    assert abs(parse_size(format_size(nbytes)) - nbytes) <= unit * 0.005 + 1


@given(SIZES)
def test_a_rounded_up_size_is_never_less_and_short_to_write(nbytes: int) -> None:
    rounded = round_up_size(nbytes)
    assert 0 <= rounded - nbytes < MIB
    assert rounded % (4 * KIB) == 0


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (37, "37 B"),
        (1536, "1.50 KiB"),
        (512 * MIB, "512 MiB"),
        (TIB * 2048, "2048 TiB"),
        (-KIB, "-1 KiB"),
    ],
)
def test_format_size(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


def test_exact_size_takes_the_largest_unit_that_divides() -> None:
    assert [exact_size(n) for n in (0, 1, 1536 * KIB, 8 * GIB)] == ["0B", "1B", "1536KiB", "8GiB"]


@pytest.mark.parametrize(
    ("rate", "text"), [(0, "0 B/s"), (1.85e9, "1.85 GB/s"), (640e6, "640.00 MB/s"), (1500, "1.50 kB/s")]
)
def test_format_rate(rate: float, text: str) -> None:
    assert format_rate(rate) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 us"),
        (0.00085, "850 us"),
        (0.0123, "12.3 ms"),
        (4.2, "4.20 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (-4.2, "-4.20 s"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
