"""What a record holds: parts that are aligned and apart, in the precision asked for, and said as they are."""

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from undercroft import kernels
from undercroft.errors import CorruptRecord, InvalidInput, UnsupportedModel
from undercroft.kernels.format import Format
from undercroft.kernels.lossless import Lossless, restore
from undercroft.moe.levels import factors, levels_of
from undercroft.moe.manifest import PackedParameter
from undercroft.moe.packing import ALIGNMENT, KINDS, Part, arrange, blocks, parse_parts, squeezable

WIDTHS = (1, 7, 32, 48, 64, 96, 128, 192)
shapes = st.one_of(
    st.just(()),
    st.tuples(st.sampled_from(WIDTHS)),
    st.tuples(st.sampled_from(WIDTHS), st.sampled_from(WIDTHS)),
)


def view(part: Part, content: Tensor) -> Tensor:
    """A part's bytes of a record's: in its dtype and shape, or packed and levels."""
    mine = content[part.offset : part.offset + part.nbytes]
    if isinstance(part.content, Lossless):
        restored = torch.empty(part.shape, dtype=torch.bfloat16)
        restore(mine, part.content, restored)
        return restored
    return mine if isinstance(part.content, Format) else mine.view(part.content).view(part.shape)


def parameter(name: str, shape: tuple[int, ...], stored: torch.dtype = torch.float32) -> PackedParameter:
    return PackedParameter(name=name, shape=shape, stored=stored, dtype=stored)


@given(
    st.lists(st.tuples(shapes, st.sampled_from([torch.float32, torch.bfloat16])), min_size=1, max_size=4),
    st.sampled_from(KINDS),
    st.sampled_from([32, 64, 128]),
    st.booleans(),
)
def test_parts_are_aligned_apart_and_what_they_say(
    given: list[tuple[tuple[int, ...], torch.dtype]], kind: str, group: int, transposed: bool
) -> None:
    parameters = [parameter(f"p{number}", *each) for number, each in enumerate(given)]
    tensors = {each.name: torch.randn(each.shape).to(each.stored) for each in parameters}
    rare = squeezable(tensors)
    parts = arrange(parameters, kind, group, transposed=transposed, rare=rare)
    pieces = [torch.frombuffer(bytearray(raw(each)), dtype=torch.uint8) for each in blocks(parts, tensors)]
    content = torch.cat(pieces)
    assert all(part.offset % ALIGNMENT == 0 for part in parts)
    assert all(one.offset + one.nbytes <= other.offset for one, other in itertools.pairwise(parts))
    assert len(content) == parts[-1].offset + parts[-1].nbytes
    said: Any = json.loads(json.dumps({"parts": [part.entry() for part in parts]}))
    assert parse_parts(said, {each.name: each.shape for each in parameters}, len(content)) == parts
    for part in parts:
        check(kind, tensors[part.name], part, view(part, content))


def test_what_is_kept_begins_at_its_phase() -> None:
    parameters = [parameter("a", (5, 3)), parameter("b", (4, 4)), parameter("c", (32, 32))]
    phases = {"a": 8, "b": 12, "c": 8}
    kept = arrange(parameters, "keep", 32, transposed=False, phases=phases)
    assert [part.offset % ALIGNMENT for part in kept] == [8, 12, 8]
    shapes = {each.name: each.shape for each in parameters}
    said: Any = {"parts": [part.entry() for part in kept]}
    assert parse_parts(said, shapes, kept[-1].offset + kept[-1].nbytes) == kept
    packed = arrange(parameters, "int4", 32, transposed=False, phases=phases)
    assert packed[2].offset % ALIGNMENT == 0
    said["parts"][0]["offset"] = 6  # where no float32 begins
    with pytest.raises(CorruptRecord):
        parse_parts(said, shapes, 1 << 20)


def raw(block: torch.Tensor | bytes) -> bytes:
    return block if isinstance(block, bytes) else block.reshape(-1).view(torch.uint8).numpy().tobytes()


def check(kind: str, tensor: torch.Tensor, part: Any, found: torch.Tensor) -> None:
    if isinstance(part.content, kernels.Format):
        matrix = tensor.t() if part.transposed else tensor
        assert str(part.content).startswith(kind)
        assert part.matrix == tuple(matrix.shape)
        levels = levels_of(matrix)
        levelled = kernels.quantise(matrix.float() / factors(levels), part.content)
        assert torch.equal(found, torch.cat([levelled, levels.view(torch.uint8)]))
    else:
        wanted = tensor.bfloat16() if kind == "bfloat16" else tensor
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("shape", "group", "transposed", "expected"),
    [
        ((96, 2880), 128, False, kernels.Format(4, 64)),
        ((2880, 96), 128, True, kernels.Format(4, 64)),
        ((2880, 100), 32, False, torch.float32),
        ((64, 128), 128, False, kernels.Format(4, 128)),
        ((64,), 32, False, torch.float32),
    ],
)
def test_a_group_that_does_not_fit_gives_way(
    shape: tuple[int, ...], group: int, transposed: bool, expected: Any
) -> None:
    (part,) = arrange([parameter("w", shape)], "int4", group, transposed=transposed)
    assert part.content == expected


def test_lossless_squeezes_bfloat16_where_that_saves_bytes() -> None:
    large, small = torch.randn(64, 64).bfloat16(), torch.randn(8).bfloat16()
    tensors = {"large": large, "small": small, "wide": torch.randn(64, 64)}
    parameters = [parameter(name, tuple(each.shape), each.dtype) for name, each in tensors.items()]
    parts = arrange(parameters, "lossless", 32, transposed=True, rare=squeezable(tensors))
    assert [part.content for part in parts] == [
        Lossless(4096, squeezable(tensors)["large"]),
        torch.bfloat16,
        torch.float32,
    ]
    assert parts[0].nbytes < 0.8 * large.nbytes


def test_numbers_that_are_no_floats_are_kept_or_refused() -> None:
    whole = parameter("w", (32, 32), torch.int8)
    assert arrange([whole], "keep", 32, transposed=False)[0].content == torch.int8
    with pytest.raises(UnsupportedModel, match=r"w is torch\.int8"):
        arrange([whole], "int4", 32, transposed=False)


def test_a_weight_that_is_no_number_is_named() -> None:
    parts = arrange([parameter("down_proj", (32, 32))], "int4", 32, transposed=False)
    with pytest.raises(InvalidInput, match="down_proj: some weights are infinite"):
        list(blocks(parts, {"down_proj": torch.full((32, 32), float("nan"))}))


PACKED = {"name": "w", "offset": 0, "shape": [64, 32], "bits": 4, "group": 32, "transposed": False}
SQUEEZED = {"name": "w", "offset": 0, "shape": [64, 32], "rare": 40}
PLAIN = {"name": "w", "offset": 0, "shape": [64, 32], "dtype": "float32"}


@pytest.mark.parametrize(
    "entry",
    [
        *({**PACKED, "bits": bits} for bits in (3, 4.0, True, None, [4], 2**70)),
        *({**PACKED, "group": group} for group in (16, 32.0, "32", 128)),
        *({**PACKED, "transposed": value} for value in (0, "no", None)),
        *({**SQUEEZED, "rare": rare} for rare in (-1, 2049, 2**70, 40.0, "40", None, True)),
        *({**PLAIN, "offset": offset} for offset in (-64, 32, 64, 0.0, None, 2**80)),
        *({**PLAIN, "shape": shape} for shape in ([32, 64], [64], "ab", None, [2**40, 2**40])),
        *({**PLAIN, "dtype": dtype} for dtype in ("float64", "object", None, ["float32"])),
        *({**PLAIN, "name": name} for name in ("x", None, ["w"], {})),
        *({key: value for key, value in PACKED.items() if key != left_out} for left_out in PACKED),
        *(None, "w", 7, []),
    ],
    ids=repr,
)
def test_a_part_that_cannot_be_is_refused(entry: Any) -> None:
    with pytest.raises(CorruptRecord):
        parse_parts({"parts": [entry]}, {"w": (64, 32)}, 8192)


@pytest.mark.parametrize(
    "metadata", [{}, {"parts": []}, {"parts": [PLAIN, PLAIN]}, {"parts": 3}, {"parts": {"w": 1}}]
)
def test_parts_must_be_those_of_the_expert(metadata: dict[str, Any]) -> None:
    with pytest.raises(CorruptRecord):
        parse_parts(metadata, {"w": (64, 32)}, 8192)
