"""Experts served in less precision: near to what their bytes stand for, within what was allowed, and never unasked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.moe.conftest import prompt, stock
from tests.moe.families import decorated, fill, tiny_config
from tests.moe.test_exact import BUDGETS, same

from undercroft.errors import InvalidInput
from undercroft.moe.load import expert_report, load_moe
from undercroft.moe.pack import pack
from undercroft.moe.packed import PackedMatrix, open_packed
from undercroft.moe.quality import Quality
from undercroft.store.slab import Slab

ALL_HIGH = {"low": 0.0, "low_precision": None}
FAMILIES = {
    each[0].model_type: each
    for each in decorated()
    if each[0].model_type in {"qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3"}
}


def packed_weights(folder: Path, model: Any) -> None:
    """Put what the high copies stand for into a resident model."""
    with open_packed(folder) as experts:
        for layer, file in zip(experts.layers, experts.files, strict=True):
            module = model.get_submodule(layer.module)
            for expert in range(layer.experts):
                key = layer.key(expert, experts.high)
                lease = Slab(file[key].occupied).lease(file[key].occupied)
                assert lease is not None
                file.read(key, lease)
                for name, value in experts.parameters(key, lease).items():
                    tensor = value.tensor() if isinstance(value, PackedMatrix) else value
                    getattr(module, name).data[expert] = tensor


def heed_experts(model: Any, factor: float = 10.0) -> None:
    """Make experts matter, so that a wrong one is seen in the logits."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(factor if "experts." in name else 1.0)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of logits, relative to how much they vary."""
    return ((one - other).norm() / (one - one.mean(-1, keepdim=True)).norm()).item()


@pytest.mark.filterwarnings("ignore")  # of the families' own code
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("high", ["int8", "int4"])
def test_products_on_packed_bytes_are_those_of_what_they_stand_for(
    name: str, high: Any, tmp_path: Path
) -> None:
    make, build = FAMILIES[name][0], FAMILIES[name][1]
    model = build(tiny_config(make))
    fill(model, 0)
    heed_experts(model)
    model.save_pretrained(tmp_path / "plain")
    pack(tmp_path / "plain", tmp_path / "packed", high=high, low="none")
    near = stock(tmp_path / "plain")
    packed_weights(tmp_path / "packed", near)
    ours = load_moe(tmp_path / "packed", "4MiB", Quality(high=high, **ALL_HIGH))
    ids = prompt(length=6) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        wanted, found = near(input_ids=ids), ours(input_ids=ids)
        assert distance(wanted.logits, found.logits) < 0.02
        step = ids[:, -1:]
        wanted = near(input_ids=step, past_key_values=wanted.past_key_values)
        found = ours(input_ids=step, past_key_values=found.past_key_values)
        assert distance(wanted.logits, found.logits) < 0.02
        heed_experts(near, 0.0)
        assert distance(found.logits, near(input_ids=ids).logits[:, -1:]) > 0.2


def test_full_copies_are_exact_in_a_packed_folder_too(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pack(checkpoint(), tmp_path / "packed")
    for budget in BUDGETS.values():
        same(stock(checkpoint()), load_moe(tmp_path / "packed", budget), prompt(), tokens=8)


@pytest.fixture
def both(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    pack(checkpoint(), tmp_path / "packed", high="int8", low="int4")
    return tmp_path / "packed"


@pytest.mark.parametrize("low", [0.0, 0.05, 0.3])
def test_no_more_mass_is_served_low_than_allowed(both: Path, low: float) -> None:
    model: Any = load_moe(both, BUDGETS["eighth"] // 2, Quality(low=low, high="int8"))
    for seed in range(3):
        model.generate(prompt(seed=seed), max_new_tokens=30, do_sample=False, pad_token_id=0)
        report = expert_report(model)
        assert report.low_mass <= low
        assert report.skip_mass == 0
    assert expert_report(model).low_mass >= low / 8


def test_what_is_left_out_is_as_if_its_weight_were_none(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    strong = stock(folder)
    heed_experts(strong)
    strong.save_pretrained(folder)
    quality = Quality(
        low_precision=None, skip=1.0, thresholds=(0.6, 0.6)
    )  # the last of four, if it is not there
    model: Any = load_moe(folder, BUDGETS["one token"] + 2**16, quality)
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    out = model.generate(prompt(), max_new_tokens=20, output_logits=True, **options)
    report = expert_report(model)
    assert 0.05 <= report.skip_mass <= 0.25
    with torch.no_grad():
        wanted = strong(input_ids=out.sequences).logits[:, -21:-1]
    assert 0.01 < distance(wanted, torch.stack(out.logits, dim=1)) < 0.5


def test_a_copy_that_is_not_there_is_asked_for_by_name(
    both: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match="--high keep"):
        load_moe(both, BUDGETS["all"])
    with pytest.raises(InvalidInput, match="undercroft pack SRC DST"):
        load_moe(checkpoint(), BUDGETS["all"], Quality(low=0.05))
    pack(checkpoint(), tmp_path / "coarse", high="int8", low="int2")
    with pytest.raises(InvalidInput, match="--low int4"):
        load_moe(tmp_path / "coarse", BUDGETS["all"], Quality(low=0.05, high="int8"))
    pack(checkpoint(), tmp_path / "coarser", high="int4", low="none")
    with pytest.raises(InvalidInput, match="--high int8"):
        load_moe(tmp_path / "coarser", BUDGETS["all"], Quality(low=0.0, high="int8", low_precision=None))
