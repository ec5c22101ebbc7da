"""Budgets to try, slopes, and the plot of them."""

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.bench.flatness import slope_percent
from undercroft.bench.plot import Series, plot
from undercroft.bench.sweep import budgets
from undercroft.units import MIB, round_up_size


def test_budgets_fall_in_equal_steps_to_the_least() -> None:
    assert budgets(900 * MIB, 100 * MIB, 5) == [900 * MIB, 700 * MIB, 500 * MIB, 300 * MIB, 100 * MIB]


@given(st.integers(8 * MIB, 1 << 40), st.integers(1, 8 * MIB), st.integers(2, 20))
def test_budgets_stay_between_all_and_least(activations: int, least: int, points: int) -> None:
    found = budgets(activations, least, points)
    assert len(found) == points
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (activations, min(round_up_size(least), activations))


@pytest.mark.parametrize(
    ("values", "slope"),
    [([5.0] * 9, 0.0), ([0.0] * 9, 0.0), ([99.0, 100.0, 101.0], 1.0), ([3.0, 1.0], -100.0)],
)
def test_a_slope_is_in_percent_of_the_mean(values: list[float], slope: float) -> None:
    assert slope_percent(values) == pytest.approx(slope)


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6))
def test_a_plot_is_xml_and_keeps_within_its_frame(x: float, y: float) -> None:
    series = [
        Series(name="measured <&>", points=((0, 0), (x * MIB, y * MIB)), color="red"),
        Series(name="expected", points=((0, y * MIB), (x * MIB, 0)), color="blue", dashed=True),
    ]
    root = ElementTree.fromstring(plot("peak", "budget", "memory", series))
    space = "{http://www.w3.org/2000/svg}"
    dots = root.findall(f"{space}circle")
    assert len(dots) == 2  # the dashed line has none
    assert all(0 <= float(dot.attrib["cx"]) <= 720 and 0 <= float(dot.attrib["cy"]) <= 440 for dot in dots)
    assert len(root.findall(f"{space}text")) <= 30
    assert "measured <&>" in {text.text for text in root.findall(f"{space}text")}
