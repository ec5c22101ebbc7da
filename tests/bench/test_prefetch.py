"""The benchmark of reading ahead: it says what it found, whatever that is."""

from pathlib import Path

import pytest
import transformers
from tests.moe.conftest import qwen

from undercroft.bench.prefetch import PrefetchSettings, measure_prefetch
from undercroft.errors import InvalidInput


def test_it_compares_the_same_text_from_every_disk(tmp_path: Path) -> None:
    transformers.logging.set_verbosity_error()
    qwen(0).save_pretrained(tmp_path)
    said: list[str] = []
    settings = PrefetchSettings(model=str(tmp_path), share=0.5, reads=(1.0, 20.0), tokens=12, rounds=1)
    answer = measure_prefetch(settings, said.append)
    assert [row[0] for row in answer.rows] == ["1", "20"]
    assert [len(disk["seconds"]["ahead"]) for disk in answer.figures["disks"]] == [1, 1]
    assert len(answer.lines) == 4
    texts = answer.lines[-1]
    assert (texts.found, texts.verdict) == (0, "PASS")
    assert len(said) == 3


@pytest.mark.parametrize(
    "wrong", [{"share": 0.0}, {"reads": ()}, {"reads": (0.0,)}, {"rounds": 0}, {"tokens": 1}]
)
def test_settings_that_compare_nothing(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput):
        PrefetchSettings(**wrong)  # pyright: ignore
