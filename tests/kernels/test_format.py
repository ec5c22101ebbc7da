"""Names and sizes of the packed formats."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.errors import InvalidInput
from undercroft.kernels.format import BITS, GROUPS, Format, packed_nbytes

formats = st.builds(Format, st.sampled_from(BITS), st.sampled_from(GROUPS))


@given(formats)
def test_a_name_stands_for_its_format(format: Format) -> None:
    assert Format.parse(str(format)) == format


def test_names_that_people_type() -> None:
    assert Format.parse("int8") == Format(8, 32)
    assert Format.parse("int4-g128") == Format(4, 128)
    assert str(Format(2, 32)) == "int2"


@pytest.mark.parametrize("name", ["", "int", "int3", "int4-g48", "int4-g", "Int4", "int4 ", "fp16", "int44"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        Format.parse(name)


@pytest.mark.parametrize(("bits", "group"), [(3, 32), (4, 16), (16, 32), (4, 0), (0, 32)])
def test_other_formats_are_refused(bits: int, group: int) -> None:
    with pytest.raises(InvalidInput, match="bits are one of"):
        Format(bits, group)


@given(formats, st.integers(1, 300), st.integers(1, 20))
def test_bytes_are_codes_and_headers_of_whole_blocks(format: Format, rows: int, groups: int) -> None:
    whole = (rows + 31) // 32 * 32
    codes = whole * groups * format.group * format.bits // 8
    headers = whole * groups * (2 if format.bits == 8 else 4)
    assert packed_nbytes(format, rows, groups * format.group) == codes + headers


def test_columns_that_do_not_divide_are_refused_with_what_would_do() -> None:
    with pytest.raises(InvalidInput, match="groups of 64 would"):
        packed_nbytes(Format(4, 128), 8, 64)
    with pytest.raises(InvalidInput, match="pad it"):
        packed_nbytes(Format(4, 32), 8, 33)
    for rows, columns in ((0, 32), (-1, 32), (8, 0), (8, -32)):
        with pytest.raises(InvalidInput):
            packed_nbytes(Format(4), rows, columns)
