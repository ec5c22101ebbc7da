"""Small exercises with worked solutions: what the bundled models are asked to show that they still think.

It makes questions and marks answers; it knows no model and no tokenizer. Invariant: the facts of an exercise
(its numbers or letters, not its wording) decide whether it is held out, so what a test asks was never seen in
training under another wording. Letters stand apart ("k a t e"), so that each is a token of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

MARK = "####"
"""Stands between the working of a solution and its result."""

Split = Literal["train", "test"]
HELD_OUT_PERCENT = 15

_WEEK = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_LETTERS = "abcdefghijklmnop"
_UNITS = (
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("feet", "inches", 12),
    ("metres", "centimetres", 100),
    ("kilograms", "grams", 1000),
    ("dozens", "items", 12),
    ("yards", "feet", 3),
    ("decades", "years", 10),
)
_NUMERALS = (
    (100, "C"),
    (90, "XC"),
    (50, "L"),
    (40, "XL"),
    (10, "X"),
    (9, "IX"),
    (5, "V"),
    (4, "IV"),
    (1, "I"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exercise:
    """A question with its solution.

    Attributes:
        skill: what it exercises, one of `SKILLS`.
        question: in one of several wordings.
        working: the steps to the result.
        result: what counts as right.
    """

    skill: str
    question: str
    working: str
    result: str

    @property
    def solution(self) -> str:
        """What a model should write: working, mark, result."""
        return f"{self.working} {MARK} {self.result}"

    def solved_by(self, text: str) -> bool:
        """Whether a model's text ends, after the first mark, in the result and nothing else."""
        return text.partition(MARK)[2].strip() == self.result


@dataclass(frozen=True, slots=True)
class _Draft:
    facts: tuple[object, ...]
    wordings: tuple[str, str, str]
    working: str
    result: str


def exercise(skill: str, split: Split, dice: Random) -> Exercise:
    """A random exercise of a skill, from the given side of the split."""
    return _worded(skill, _draw(skill, split, dice), dice)


def exercises(split: Split, dice: Random) -> Iterator[Exercise]:
    """Exercises without end, each of a random skill."""
    names = list(SKILLS)
    while True:
        yield exercise(dice.choice(names), split, dice)


def examination(per_skill: int = 30, seed: int = 7) -> list[Exercise]:
    """Held-out exercises, the same for the same seed, no facts twice: `per_skill` of each skill, or all there are."""
    paper: list[Exercise] = []
    for skill in SKILLS:
        dice = Random(f"{seed} {skill}")
        drafts = (_draw(skill, "test", dice) for _ in range(20 * per_skill))
        unique = {draft.facts: draft for draft in drafts}
        paper += [_worded(skill, draft, dice) for draft in list(unique.values())[:per_skill]]
    return paper


def _draw(skill: str, split: Split, dice: Random) -> _Draft:
    while True:
        draft = SKILLS[skill](dice)
        if _held_out(skill, draft.facts) == (split == "test"):
            return draft


def _worded(skill: str, draft: _Draft, dice: Random) -> Exercise:
    question = dice.choice(draft.wordings)
    return Exercise(skill=skill, question=question, working=draft.working, result=draft.result)


def _held_out(skill: str, facts: tuple[object, ...]) -> bool:
    digest = hashlib.blake2b(f"{skill} {facts}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def _add(dice: Random) -> _Draft:
    a, b = dice.randint(10, 99), dice.randint(10, 99)
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    working = f"ones {a % 10}+{b % 10}={ones}, tens {a // 10}+{b // 10}+{carry}={tens}"
    wordings = (f"What is {a} plus {b}?", f"Add {a} and {b}.", f"Compute the sum of {a} and {b}.")
    return _Draft(tuple(sorted((a, b))), wordings, working, str(a + b))


def _multiply(dice: Random) -> _Draft:
    a, b = dice.randint(2, 9), dice.randint(11, 99)
    wordings = (f"What is {a} times {b}?", f"Multiply {a} by {b}.", f"Compute the product of {a} and {b}.")
    return _Draft((a, b), wordings, _product(b, a), str(a * b))


def _convert(dice: Random) -> _Draft:
    (unit, smaller, factor), n = dice.choice(_UNITS), dice.randint(2, 40)
    wordings = (
        f"Convert {n} {unit} to {smaller}.",
        f"{n} {unit} is how many {smaller}?",
        f"Express {n} {unit} in {smaller}.",
    )
    return _Draft((factor, n), wordings, f"factor {factor}, {_product(n, factor)}", str(n * factor))


def _weekday(dice: Random) -> _Draft:
    day, n = dice.randrange(7), dice.randint(1, 60)
    rest = n % 7
    working = f"{n} mod 7={rest}, {_WEEK[day]} is {day}, {day}+{rest}={day + rest}"
    wordings = (
        f"Today is {_WEEK[day]}. Which day is it in {n} days?",
        f"Starting on {_WEEK[day]}, which weekday comes {n} days later?",
        f"Which day follows {_WEEK[day]} by {n} days?",
    )
    return _Draft((day, n), wordings, working, _WEEK[(day + rest) % 7])


def _reverse(dice: Random) -> _Draft:
    letters = [dice.choice(_LETTERS) for _ in range(dice.randint(3, 6))]
    apart = " ".join(letters)
    wordings = (
        f"Reverse the letters {apart}.",
        f"Write backwards {apart}.",
        f"Spell in reverse order {apart}.",
    )
    working = " ".join(f"{n} {letter}" for n, letter in enumerate(letters, 1))
    return _Draft(tuple(letters), wordings, working, " ".join(reversed(letters)))


def _logic(dice: Random) -> _Draft:
    values = [dice.random() < 0.5 for _ in range(3)]
    negated = [dice.random() < 0.35 for _ in range(3)]
    first, second = dice.choice(("and", "or")), dice.choice(("and", "or"))
    a, b, c = (value != no for value, no in zip(values, negated, strict=True))
    inner = _join(a, first, b)
    outer = _join(inner, second, c)
    words = [("not " if no else "") + _truth(value) for value, no in zip(values, negated, strict=True)]
    formula = f"({words[0]} {first} {words[1]}) {second} {words[2]}"
    working = (
        f"{_truth(a)} {first} {_truth(b)} is {_truth(inner)}, "
        f"{_truth(inner)} {second} {_truth(c)} is {_truth(outer)}"
    )
    wordings = (f"Evaluate {formula}.", f"What is the truth value of {formula}?", f"Decide {formula}.")
    return _Draft((formula,), wordings, working, _truth(outer))


def _roman(dice: Random) -> _Draft:
    n = dice.randint(1, 399)
    parts = [part for part in (n // 100 * 100, n // 10 % 10 * 10, n % 10) if part]
    working = ", ".join(f"{part} is {_numeral(part)}" for part in parts)
    wordings = (
        f"Write {n} in Roman numerals.",
        f"What is the Roman numeral for {n}?",
        f"Convert {n} to a Roman number.",
    )
    return _Draft((n,), wordings, working, _numeral(n))


def _count(dice: Random) -> _Draft:
    letters = [dice.choice(_LETTERS[:4]) for _ in range(dice.randint(4, 8))]
    wanted = dice.choice(_LETTERS[:4])
    tally = [f"{letter} {letters[: n + 1].count(wanted)}" for n, letter in enumerate(letters)]
    apart = " ".join(letters)
    wordings = (
        f"How many {wanted} are in {apart}?",
        f"Count the letter {wanted} in {apart}.",
        f"Give the number of {wanted} among {apart}.",
    )
    return _Draft((wanted, *letters), wordings, " ".join(tally), str(letters.count(wanted)))


def _product(n: int, factor: int) -> str:
    if n < 10:
        return f"{n}*{factor}={n * factor}"
    tens, ones = n // 10 * 10 * factor, n % 10 * factor
    return f"{n // 10 * 10}*{factor}={tens}, {n % 10}*{factor}={ones}, {tens}+{ones}={n * factor}"


def _join(a: bool, word: str, b: bool) -> bool:
    return (a and b) if word == "and" else (a or b)


def _truth(value: bool) -> str:
    return "true" if value else "false"


def _numeral(n: int) -> str:
    letters: list[str] = []
    for value, numeral in _NUMERALS:
        letters += list(numeral) * (n // value)
        n %= value
    return " ".join(letters)


SKILLS: dict[str, Callable[[Random], _Draft]] = {
    "add": _add,
    "multiply": _multiply,
    "convert": _convert,
    "weekday": _weekday,
    "reverse": _reverse,
    "logic": _logic,
    "roman": _roman,
    "count": _count,
}
"""What makes an exercise of each skill."""
