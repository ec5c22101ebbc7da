"""Exercises: their solutions against what they ask, and a split that wording cannot cross."""

import re
from collections import Counter
from itertools import islice
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.bundled.skills import MARK, SKILLS, Exercise, examination, exercise, exercises

dice = st.integers(0, 2**32).map(Random)
WEEK = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
PER_UNIT = {"hours": 60, "minutes": 60, "days": 24, "weeks": 7, "feet": 12, "metres": 100, "kilograms": 1000}
PER_UNIT |= {"dozens": 12, "yards": 3, "decades": 10}
ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def letters(question: str) -> list[str]:
    return re.findall(r"\b[a-p]\b", question)


def value_of(numerals: list[str]) -> int:
    values = [ROMAN[each] for each in numerals]
    pairs = zip(values, [*values[1:], 0], strict=True)
    return sum(-value if value < following else value for value, following in pairs)


def solve(skill: str, question: str) -> str:
    """The result, from the words of the question alone."""
    found = numbers(question)
    if skill == "add":
        return str(sum(found))
    if skill == "multiply":
        return str(found[0] * found[1])
    if skill == "convert":
        unit = next(
            word for word in re.findall("[a-z]+", question.partition(str(found[0]))[2]) if word in PER_UNIT
        )
        return str(found[0] * PER_UNIT[unit])
    if skill == "weekday":
        day = next(n for n, name in enumerate(WEEK) if name in question)
        return WEEK[(day + found[0]) % 7]
    if skill == "reverse":
        return " ".join(reversed(letters(question)))
    if skill == "logic":
        formula = question[question.index("(") :].rstrip(".?")
        return str(eval(formula.replace("true", "True").replace("false", "False"))).lower()
    wanted, *among = letters(question)
    return str(among.count(wanted))


@pytest.mark.parametrize("skill", [skill for skill in SKILLS if skill != "roman"])
@given(dice=dice)
def test_the_result_answers_the_question(skill: str, dice: Random) -> None:
    found = exercise(skill, "train", dice)
    assert found.result == solve(skill, found.question)


@given(dice)
def test_numerals_are_worth_the_number(dice: Random) -> None:
    found = exercise("roman", "train", dice)
    assert value_of(found.result.split()) == numbers(found.question)[0]


@pytest.mark.parametrize("skill", ["add", "multiply", "convert"])
@given(dice=dice)
def test_every_equation_of_the_working_holds(skill: str, dice: Random) -> None:
    working = exercise(skill, "test", dice).working
    equations = re.findall(r"([\d+*]+)=(\d+)", working)
    assert equations
    for left, right in equations:
        assert eval(left) == int(right), working


@given(dice)
def test_only_the_exact_result_solves(dice: Random) -> None:
    found = next(exercises("train", dice))
    assert found.solved_by(f" {found.solution}")
    assert not found.solved_by(found.working)
    assert not found.solved_by(f"{found.solution} {MARK} {found.result}")
    assert not found.solved_by(f"{found.working} {MARK} {found.result}x")


def facts(found: Exercise) -> tuple[str, tuple[int, ...], str, str]:
    """What an exercise is about, without its wording; sums are the same either way round."""
    numeric = tuple(sorted(numbers(found.question)) if found.skill == "add" else numbers(found.question))
    words = found.working if found.skill != "add" else ""
    formula = found.question[found.question.index("(") :].rstrip(".?") if found.skill == "logic" else ""
    result = solve(found.skill, found.question) if found.skill in ("convert", "weekday") else ""
    asked = letters(found.question)[0] if found.skill == "count" else ""
    return found.skill, numeric, words, formula + result + asked


def test_no_fact_is_on_both_sides_of_the_split() -> None:
    trained = {facts(each) for each in islice(exercises("train", Random(3)), 4000)}
    tested = {facts(each) for each in islice(exercises("test", Random(3)), 1000)}
    assert len(tested) > 300
    assert not trained & tested


def test_an_examination_is_the_same_every_time_and_repeats_nothing() -> None:
    paper = examination(25)
    assert paper == examination(25)
    assert [each.skill for each in paper] == [skill for skill in SKILLS for _ in range(25)]
    assert len({facts(each) for each in paper}) == len(paper)


def test_an_examination_takes_no_more_than_there_is() -> None:
    counted = Counter(each.skill for each in examination(100))
    assert counted["add"] == 100
    assert 30 <= counted["logic"] < 100  # 256 formulas in all
