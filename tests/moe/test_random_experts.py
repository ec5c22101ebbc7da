"""Random experts: a packed folder like any other, the same for the same seed, and never mixed with something else."""

from pathlib import Path
from typing import Any

import pytest
import torch

from undercroft.errors import CorruptRecord, InvalidInput
from undercroft.moe.manifest import FILE, records_file
from undercroft.moe.packed import PackedExperts, PackedMatrix
from undercroft.moe.random_experts import ExpertShape, random_experts
from undercroft.store.slab import Slab

SMALL = {"layers": 2, "experts": 3, "hidden": 64, "intermediate": 32}


def weights(experts: PackedExperts, layer: int, expert: int, kind: str) -> dict[str, torch.Tensor]:
    """What a record stands for."""
    key = experts.layers[layer].key(expert, kind)
    slab = Slab(1 << 20)
    lease = slab.lease(experts.files[layer][key].occupied)
    assert lease is not None
    experts.files[layer].read(key, lease)
    found = experts.parameters(key, lease)
    made = {
        name: (each.tensor() if isinstance(each, PackedMatrix) else each).float().clone()
        for name, each in found.items()
    }
    del found, lease
    slab.close()
    return made


@pytest.mark.parametrize("high", ["keep", "bfloat16", "int8", "int4"])
def test_experts_have_the_shape_and_the_size_of_products_that_were_asked_for(
    tmp_path: Path, high: str
) -> None:
    shape = ExpertShape(**SMALL, high=high, low="int2", dtype=torch.float32)
    with random_experts(tmp_path / "experts", shape) as experts:
        assert [layer.experts for layer in experts.layers] == [3, 3]
        assert (experts.high, experts.low) == (high, "int2")
        for kind in (high, "int2"):
            found = weights(experts, 0, 0, kind)
            assert found["gate_up_proj"].shape == (64, 64)
            assert found["down_proj"].shape == (64, 32)
            assert found["gate_up_proj"].std().item() == pytest.approx(64**-0.5, rel=0.15)
            assert found["down_proj"].std().item() == pytest.approx(32**-0.5, rel=0.15)
            assert abs(found["gate_up_proj"].mean().item()) < 0.02
            assert experts.files[0][experts.layers[0].key(0, kind)].occupied == shape.record_nbytes(kind)
        sizes = sum((tmp_path / "experts" / records_file(layer)).stat().st_size for layer in range(2))
        assert sizes == shape.nbytes


def test_experts_differ_from_one_another(tmp_path: Path) -> None:
    with random_experts(tmp_path / "experts", ExpertShape(**SMALL)) as experts:
        found = [weights(experts, layer, expert, "int4") for layer in range(2) for expert in range(3)]
    for name in ("gate_up_proj", "down_proj"):
        assert len({tuple(each[name].flatten().tolist()) for each in found}) == 6


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    shape = ExpertShape(**SMALL)
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        random_experts(tmp_path / name, shape, seed=seed).close()
    one, again, two = ((tmp_path / name / records_file(1)).read_bytes() for name in ("one", "again", "two"))
    assert one == again != two


def test_a_folder_is_written_once_and_opened_afterwards(tmp_path: Path) -> None:
    written: list[int] = []
    for _ in range(2):
        random_experts(tmp_path / "experts", ExpertShape(**SMALL), on_layer=written.append).close()
    assert written == [1, 2]


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    random_experts(tmp_path / "experts", ExpertShape(**SMALL)).close()
    for shape, seed in ((ExpertShape(**{**SMALL, "experts": 4}), 0), (ExpertShape(**SMALL), 1)):
        with pytest.raises(InvalidInput, match="name a folder that is new or empty"):
            random_experts(tmp_path / "experts", shape, seed=seed)
    (tmp_path / "experts" / FILE).unlink()
    with pytest.raises(InvalidInput, match=r"holds \S+; name a folder that is new or empty"):
        random_experts(tmp_path / "experts", ExpertShape(**SMALL))


def test_a_folder_that_was_changed_is_refused(tmp_path: Path) -> None:
    random_experts(tmp_path / "experts", ExpertShape(**SMALL)).close()
    index = tmp_path / "experts" / f"{records_file(0)}.json"
    index.write_text(index.read_text().replace("int4", "int8"))
    with pytest.raises(CorruptRecord, match="was changed"):
        random_experts(tmp_path / "experts", ExpertShape(**SMALL))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 0}, "at least 1"),
        ({"hidden": 48}, "multiples of 32"),
        ({"intermediate": 16}, "multiples of 32"),
        ({"high": "int3"}, "high is one of"),
        ({"low": "int4"}, "would save nothing"),
        ({"group": 48}, "group is one of"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        ExpertShape(**{**SMALL, **changes})
