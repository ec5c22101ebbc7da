"""The second act, tiny: every way on the same text and bytes, the exact ones with the same bits, nothing left."""

import tempfile
from pathlib import Path

import pytest
import torch

from undercroft.bundled.texts import held_out
from undercroft.errors import InvalidInput
from undercroft.moe.demonstration import SHARE, WAYS, StreamingShown, show_streaming

TOKENS = 6
NAMES = ["in memory", *(name for name, _, _ in WAYS)]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def told() -> dict[str, list[int]]:
    return {}


@pytest.fixture(scope="module")
def shown(small_moe: Path, places: Path, told: dict[str, list[int]]) -> StreamingShown:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(places))
        return show_streaming(
            small_moe,
            held_out(),
            "What is 1 plus 1?",
            tokens=TOKENS,
            watch=lambda name: lambda done, total: told.setdefault(name, []).append(done),
        )


def test_what_is_exact_is_what_is_in_memory(shown: StreamingShown) -> None:
    assert [row.name for row in shown.rows] == NAMES
    assert {row.name: row.same for row in shown.rows if row.same} == dict.fromkeys(NAMES[:3], True)
    assert [row.perplexity_change for row in shown.rows[:3]] == [0, 0, 0]
    assert all(row.perplexity_change for row in shown.rows[3:])
    assert shown.held


def test_every_streamed_way_reads_from_disk(shown: StreamingShown) -> None:
    assert shown.rows[0].nbytes_per_token is None
    read = {row.name: row.nbytes_per_token or 0 for row in shown.rows[1:]}
    assert read["exact"] > read["balanced"] > read["fast"] > 0
    assert all(row.hit_rate is not None and 0 <= row.hit_rate < 1 for row in shown.rows[1:])
    assert shown.budget == int(SHARE * shown.experts_nbytes)


def test_every_token_is_told_and_nothing_is_left(
    shown: StreamingShown, told: dict[str, list[int]], places: Path
) -> None:
    assert told == {name: list(range(1, 2 * TOKENS + 1)) for name in NAMES}
    assert shown.tokens == 2 * TOKENS
    assert list(places.iterdir()) == []


def test_threads_are_as_before_even_after_a_failure(small_moe: Path) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(InvalidInput, match="were asked of a text"):
        show_streaming(small_moe, {"short": ["a"]}, "?", tokens=TOKENS)
    assert torch.get_num_threads() == threads
