"""The exception tree: what each error also is, what its text carries, and that it survives pickling."""

import errno
import pickle

import pytest

from undercroft import errors
from undercroft.errors import (
    BudgetExceeded,
    CorruptRecord,
    InvalidInput,
    MissingExtra,
    SpillMisuse,
    TierFull,
    TransferFailed,
    UndercroftError,
    UnsafeDirectory,
    UnsupportedModel,
    WrongVersion,
)
from undercroft.units import MIB

EXAMPLES: list[tuple[UndercroftError, type[Exception]]] = [
    (BudgetExceeded(64 * MIB, 512 * MIB, {"slab": 480 * MIB}, least=601 * MIB - 7), MemoryError),
    (TierFull("the disk is full"), OSError),
    (TransferFailed("reading failed", errno=errno.EIO), OSError),
    (CorruptRecord("the checksum differs"), UndercroftError),
    (WrongVersion("format 9"), UndercroftError),
    (UnsafeDirectory("a symbolic link"), UndercroftError),
    (InvalidInput("no"), ValueError),
    (SpillMisuse("closed"), RuntimeError),
    (UnsupportedModel("tied experts"), UndercroftError),
    (MissingExtra("lora", "training an adapter"), ImportError),
]


@pytest.mark.parametrize(("error", "also"), EXAMPLES, ids=lambda value: getattr(value, "__name__", None))
def test_each_error_is_also_the_builtin_that_callers_expect(error: UndercroftError, also: type) -> None:
    assert isinstance(error, UndercroftError)
    assert isinstance(error, also)


@pytest.mark.parametrize("error", [error for error, _ in EXAMPLES], ids=lambda error: type(error).__name__)
def test_pickling_keeps_text_and_attributes(error: UndercroftError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert getattr(copy, "errno", None) == getattr(error, "errno", None)


def test_the_examples_and_the_drawn_tree_name_every_error() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, UndercroftError) and value is not UndercroftError
    }
    assert {type(error).__name__ for error, _ in EXAMPLES} == defined
    assert all(name in (errors.__doc__ or "") for name in defined)


def test_budget_exceeded_says_asked_budget_holders_and_a_budget_that_works() -> None:
    error = BudgetExceeded(
        64 * MIB,
        512 * MIB,
        {"reads": 0, "spill": 80 * MIB, "slab": 400 * MIB},
        least=601 * MIB - 7,
        hint="Do.",
    )
    assert str(error) == (
        "64 MiB more in the host tier would exceed its budget of 512 MiB by 32 MiB: "
        '480 MiB held already (slab 400 MiB, spill 80 MiB). Smallest budget known to work: "601MiB". Do.'
    )


def test_budget_exceeded_keeps_its_own_copy_of_the_holders() -> None:
    held = {"slab": 1}
    error = BudgetExceeded(2, 2, held)
    held["slab"] = 99
    assert error.held == {"slab": 1}
    assert error.least is None


def test_tier_full_is_no_space_left_unless_told_otherwise() -> None:
    assert TierFull("full").errno == errno.ENOSPC
    assert TierFull("quota", errno=errno.EDQUOT).errno == errno.EDQUOT
    assert str(TierFull("full")) == "full"


def test_missing_extra_gives_the_command() -> None:
    assert str(MissingExtra("lora", "training an adapter")) == (
        "training an adapter needs an optional dependency: pip install 'undercroft[lora]'"
    )
