"""Hostile GGUF files: whatever one says, opening or packing it ends in our errors, soon, and in nothing else."""

import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.moe.conftest import qwen
from tests.moe.gguf_files import write_gguf

from undercroft.errors import CorruptRecord, UndercroftError, UnsupportedModel
from undercroft.models.gguf_checkpoint import GgufCheckpoint
from undercroft.moe.pack import pack

pytestmark = pytest.mark.usefixtures("nothing_left")
HUGE = 2**62


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A good file, with a tokenizer."""
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    return write_gguf(qwen(0, num_hidden_layers=1), path, "Q8_0", tokenizer=True).read_bytes()


def header_nbytes(good: bytes, folder: Path) -> int:
    (folder / "good.gguf").write_bytes(good)
    with GgufCheckpoint(folder / "good.gguf") as checkpoint:
        return checkpoint.header_nbytes[0]


def open_all(path: Path) -> None:
    """What packing does with a file before it writes, and a look at each tensor."""
    with GgufCheckpoint(path) as checkpoint:
        checkpoint.configuration()
        for tensor in checkpoint.values():
            checkpoint.read(tensor)


def refuses(path: Path, content: bytes, told: str, error: type[UndercroftError] = CorruptRecord) -> None:
    path.write_bytes(content)
    with pytest.raises(error, match=told):
        open_all(path)


def number(value: int, kind: str = "Q") -> bytes:
    return struct.pack(f"<{kind}", value)


def text(value: bytes) -> bytes:
    return number(len(value)) + value


def file(
    *said: bytes, tensors: tuple[bytes, ...] = (), version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    """A file that has these settings and entries of tensors."""
    counted = counts or (len(tensors), len(said))
    content = (
        b"GGUF" + number(version, "I") + number(counted[0]) + number(counted[1]) + b"".join(said + tensors)
    )
    return content.ljust(len(content) + 4096, b"\0")


def setting(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + number(kind, "I") + value


def tensor(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return (
        text(name) + number(len(dims), "I") + b"".join(map(number, dims)) + number(kind, "I") + number(offset)
    )


FAMILY = setting(b"general.architecture", 8, text(b"qwen3moe"))


def test_cut_off_anywhere_it_is_refused(good: bytes, tmp_path: Path) -> None:
    end = header_nbytes(good, tmp_path)
    for length in (*range(0, end, 61), end, end + 1, len(good) // 2, len(good) - 64):
        refuses(tmp_path / "m.gguf", good[:length], "fetch it again")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no GGUF file, or was cut off"),
        (b"PK\3\4" + bytes(100), "no GGUF file, or was cut off"),
        (file(counts=(HUGE, 0)), "things that it announces"),
        (file(counts=(0, HUGE)), "things that it announces"),
        (file(counts=(0, 2**64 - 1)), "things that it announces"),
        (file(setting(b"a", 9, number(0, "I") + number(HUGE))), "things that it announces"),
        (file(setting(b"a", 9, number(8, "I") + number(HUGE))), "things that it announces"),
        (file(setting(b"a", 9, number(8, "I") + number(1) + number(HUGE))), "ends within its header"),
        (file(setting(b"a", 9, number(9, "I") + number(1))), "a list of type 9"),
        (file(setting(b"a", 13, b"")), "of type 13, which GGUF does not have"),
        (file(setting(b"a", 8, number(HUGE))), "a text would be"),
        (file(setting(b"a", 8, number(5000))), "ends within its header"),
        (file(setting(b"\xff\xfe", 0, b"\0")), "names that are no text"),
        (file(setting(b"a", 0, b"\0"), setting(b"a", 0, b"\0")), "a is said twice"),
        (file(setting(b"general.alignment", 4, number(0, "I"))), "cannot be aligned to 0 bytes"),
        (file(setting(b"general.alignment", 4, number(24, "I"))), "cannot be aligned to 24 bytes"),
        (file(setting(b"general.alignment", 8, text(b"32"))), "cannot be aligned to '32' bytes"),
        (file(FAMILY, tensors=(tensor(b"output.weight", ()),)), "has 0 dimensions"),
        (file(FAMILY, tensors=(tensor(b"output.weight", (2,) * 99),)), "has 99 dimensions"),
        (file(FAMILY, tensors=(tensor(b"output.weight", (0, 4)),)), "has no elements"),
        (file(FAMILY, tensors=(tensor(b"output.weight", (HUGE, HUGE)),)), "does not lie inside the file"),
        (
            file(FAMILY, tensors=(tensor(b"output.weight", (4,), offset=HUGE),)),
            "does not lie inside the file",
        ),
        (file(FAMILY, tensors=(tensor(b"output.weight", (4, 8), kind=8),)), "does not lie inside the file"),
        (file(FAMILY, tensors=(tensor(b"output.weight", (4,)),) * 2), "has output.weight twice"),
        (file(FAMILY, tensors=(tensor(b"blk.0.ffn_gate_up_exps.weight", (4, 3, 2)),)), "3 rows are not of"),
        (file(FAMILY, setting(b"split.count", 2, number(3, "H"))), "file 0 of 3"),
        (file(FAMILY), "has no token_embd.weight|must say a number"),
    ],
)
def test_a_header_that_lies_is_refused(content: bytes, told: str, tmp_path: Path) -> None:
    refuses(tmp_path / "m.gguf", content, told)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (file(version=1), "GGUF of version 1"),
        (file(version=3 << 24), "GGUF of version"),
        (file(), "of the family None"),
        (file(setting(b"general.architecture", 4, number(7, "I"))), "of the family 7"),
        (file(setting(b"general.architecture", 8, text(b"llama"))), "of the family llama"),
        (
            file(FAMILY, tensors=(tensor(b"output.weight", (4,), kind=77),)),
            "output.weight is of ggml's type 77",
        ),
        (file(FAMILY, tensors=(tensor(b"output.weight", (32,), kind=9),)), "output.weight is of Q8_1"),
        (
            file(FAMILY, tensors=(tensor(b"rope_freqs.weight", (4,)),)),
            "rope_freqs.weight of shape .4. is no part",
        ),
        (file(FAMILY, tensors=(tensor(b"blk.0.ffn_up_exps.scale", (4,)),)), "ffn_up_exps.scale of shape"),
        (file(FAMILY, tensors=(tensor(b"blk.999999999.attn_q.weight", (4,)),)), "is no part"),
    ],
)
def test_what_cannot_be_read_is_said(content: bytes, told: str, tmp_path: Path) -> None:
    refuses(tmp_path / "m.gguf", content, told, UnsupportedModel)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"block_count": 2**31}, "block_count is 2147483648, and its tensors show that it is not"),
        ({"embedding_length": 2**31}, "embedding_length"),
        ({"attention.head_count": 0}, "attention.head_count is 0"),
        ({"attention.head_count": "four"}, "attention.head_count is four"),
        ({"attention.head_count_kv": 3}, "sizes contradict each other"),
        ({"attention.key_length": 2**31}, "attention.key_length"),
        ({"attention.key_length": 15}, "sizes contradict each other"),
        ({"expert_count": 2**31}, "expert_count"),
        ({"expert_used_count": 17}, "sizes contradict each other"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
        ({"rope.freq_base": float("inf")}, "freq_base is inf"),
    ],
)
def test_sizes_that_no_tensor_bears_out_are_refused(said: dict[str, Any], told: str, tmp_path: Path) -> None:
    source = write_gguf(qwen(0, num_hidden_layers=1), tmp_path / "m.gguf", settings=said)
    with pytest.raises(CorruptRecord, match=told):
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "said",
    [
        {"expert_count": 15},
        {"block_count": 2},
        {"embedding_length": 32},
        {"attention.head_count": 8},
        {"attention.key_length": 32},
        {"rope.scaling.type": "yarn"},
    ],
)
def test_what_another_model_would_be_is_refused(said: dict[str, Any], tmp_path: Path) -> None:
    source = write_gguf(qwen(0, num_hidden_layers=1), tmp_path / "m.gguf", settings=said)
    with pytest.raises(UnsupportedModel):
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "gone",
    [
        "rope.freq_base",
        "attention.key_length",
        "token_embd.weight",
        "blk.0.ffn_down_exps.weight",
        "blk.0.ffn_up_exps.weight",
        "blk.0.attn_q.weight",
        "output_norm.weight",
    ],
)
def test_what_is_missing_is_said(gone: str, tmp_path: Path) -> None:
    source = write_gguf(qwen(0, num_hidden_layers=1), tmp_path / "m.gguf", without=(gone,))
    with pytest.raises((CorruptRecord, UnsupportedModel)):
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"he ll", b"zz zz"),
        (b"he ll", b"hello"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergex"),
        (text(b"gpt2"), text(b"gpt3")),
    ],
)
def test_a_tokenizer_that_is_none_is_refused(good: bytes, old: bytes, new: bytes, tmp_path: Path) -> None:
    assert old in good
    (tmp_path / "m.gguf").write_bytes(good.replace(old, new))
    with pytest.raises(UnsupportedModel, match=r"the tokenizer of \S+m\.gguf cannot be made"):
        pack(tmp_path / "m.gguf", tmp_path / "out")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_changed_anywhere_in_the_header_end_in_our_errors(
    data: st.DataObject, good: bytes, tmp_path: Path
) -> None:
    changed = bytearray(good)
    end = header_nbytes(good, tmp_path)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, end - 1))
        changed[place] = data.draw(st.integers(0, 255))
    (tmp_path / "m.gguf").write_bytes(changed)
    with suppress(UndercroftError):
        open_all(tmp_path / "m.gguf")


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_packing_it_ends_in_our_errors_too(data: st.DataObject, good: bytes, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("changed")
    changed = bytearray(good)
    place = data.draw(st.integers(24, header_nbytes(good, folder) - 1))
    changed[place] = data.draw(st.integers(0, 255))
    (folder / "m.gguf").write_bytes(changed)
    with suppress(UndercroftError):
        pack(folder / "m.gguf", folder / "out")


def test_scales_that_are_no_numbers_are_kept_or_refused(good: bytes, tmp_path: Path) -> None:
    end = header_nbytes(good, tmp_path)
    (tmp_path / "m.gguf").write_bytes(good[:end] + b"\xff" * (len(good) - end))
    pack(tmp_path / "m.gguf", tmp_path / "kept", low="none")
    with pytest.raises(UndercroftError, match="finite"):
        pack(tmp_path / "m.gguf", tmp_path / "low")
