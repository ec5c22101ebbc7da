"""A trunk that need not be exact: near to the exact one in every family, the stock way where kernels know none."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.moe.conftest import mixtral, prompt, qwen, stock
from tests.moe.families import Family, decorated, fill, tiny_config
from tests.moe.test_families import COMPOSITE
from tests.moe.test_served import distance

from undercroft.kernels import trunk
from undercroft.moe.attention import IMPLEMENTATION, attend_here
from undercroft.moe.light import lighten
from undercroft.moe.light_attention import joined
from undercroft.moe.load import load_moe
from undercroft.moe.pack import pack
from undercroft.moe.quality import Quality
from undercroft.moe.token_attention import shorten
from undercroft.moe.token_router import shorten_routers
from undercroft.moe.token_walk import is_short
from undercroft.moe.trunk import Norm, PackedLinear, quantise_trunk, replace_norms

FAMILIES = [each for each in decorated() if each[0].model_type not in COMPOSITE]
needs_kernels = pytest.mark.skipif(not trunk.available(), reason="no C++ compiler here")


def light(model: Any) -> Any:
    """A copy that differs in its last bits only: norms and attention in the kernels, weights as they were."""
    other = deepcopy(model)
    replace_norms(other)
    attend_here(other)
    return other


@needs_kernels
@pytest.mark.filterwarnings("ignore")  # of the families' own code
@pytest.mark.parametrize("family", FAMILIES, ids=lambda each: each[0].model_type)
def test_a_light_trunk_is_near_in_every_family(family: Family) -> None:
    make, build = family
    model: Any = build(tiny_config(make)).eval()
    fill(model, 0)
    ids = prompt(length=20) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        wanted, found = (
            each.generate(
                **{"input_ids": ids, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0},
                **{"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None},
            )
            for each in (model, light(model))
        )
    assert distance(torch.stack(wanted.logits), torch.stack(found.logits)) < 1e-4


ROUTED = {
    "qwen3_moe": 2,
    "qwen2_moe": 2,
    "mixtral": 2,
    "dots1": 0,
}  # how many routers are Qwen3-MoE's or Mixtral's
SHORT = [each for each in FAMILIES if each[0].model_type in ROUTED]


@needs_kernels
@pytest.mark.parametrize("family", SHORT, ids=lambda each: each[0].model_type)
def test_a_token_takes_the_short_way_to_the_same_place(family: Family) -> None:
    make, build = family
    model: Any = build(tiny_config(make)).eval()
    fill(model, 0)
    assert shorten(model.modules(), joined) == 0  # nothing is packed
    quantise_trunk(model, experts=8)
    other = deepcopy(model)
    lighten(other, experts=8)
    assert sum(hasattr(each, "_undercroft_attention") for each in other.modules()) == 2
    assert (
        sum(hasattr(each, "_undercroft_way") for each in other.modules()) == ROUTED[model.config.model_type]
    )
    is_usual = model.config.model_type in {"qwen3_moe", "mixtral"}
    assert is_short(other) == (is_usual and model.config.sliding_window is None)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in other.named_modules()]
    wanted, found = (
        each.generate(
            **{"input_ids": prompt(length=20), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0},
            **{"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None},
        )
        for each in (model, other)
    )
    assert 0 < distance(torch.stack(wanted.logits), torch.stack(found.logits)) < 5e-3


@needs_kernels
def test_a_layer_whose_parts_were_changed_does_not_take_the_short_way(
    checkpoint: Callable[..., Path],
) -> None:
    model = stock(checkpoint())
    lighten(model, experts=16)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        past = model(input_ids=prompt()).past_key_values
        step = prompt()[:, -1:]
        before = model(input_ids=step, past_key_values=deepcopy(past)).logits
        attention.v_proj = torch.nn.Linear(
            attention.v_proj.in_features, attention.v_proj.out_features, bias=False
        )
        attention.v_proj.weight.zero_()
        after = model(input_ids=step, past_key_values=deepcopy(past)).logits
    assert distance(before, after) > 1e-3


@needs_kernels
def test_the_kernels_are_asked(checkpoint: Callable[..., Path]) -> None:
    model = stock(checkpoint())
    other = light(model)
    norms = [each for each in other.modules() if isinstance(each, Norm)]
    assert len(norms) == 3 * 4 + 1  # two of each layer, those of query and key, and the last
    assert other.config._attn_implementation == IMPLEMENTATION
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        past = model(input_ids=prompt()).past_key_values
        step = prompt()[:, -1:]
        wanted, found = (
            each(input_ids=step, past_key_values=deepcopy(past)).logits for each in (model, other)
        )
    assert 0 < distance(wanted, found) < 1e-5


@needs_kernels
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}], ids=str
)
def test_rows_of_unequal_length_are_near(checkpoint: Callable[..., Path], options: dict[str, Any]) -> None:
    model = stock(checkpoint())
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    answers: list[torch.Tensor] = []
    for each in (model, light(model)):
        torch.manual_seed(0)
        given = {"input_ids": prompt(2), "attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0}
        answers.append(each.generate(**given, **options))
    assert torch.equal(*answers)


@needs_kernels
def test_gradients_and_compilers_get_the_stock_way(checkpoint: Callable[..., Path]) -> None:
    model = stock(checkpoint())
    other = light(model)
    losses = [each(input_ids=prompt(), labels=prompt()).loss for each in (model, other)]
    assert torch.equal(*losses)
    for each in losses:
        each.backward()
    assert torch.equal(model.model.norm.weight.grad, other.model.norm.weight.grad)


@needs_kernels
def test_a_quality_with_a_trunk_in_8_bits_has_a_light_one(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pack(checkpoint(), tmp_path / "packed", high="int8", low="none")
    shares: dict[str, Any] = {"low": 0.0, "low_precision": None, "high": "int8"}
    model = load_moe(tmp_path / "packed", "4MiB", Quality(**shares, dense="int8"))
    assert model.config._attn_implementation == IMPLEMENTATION
    assert any(isinstance(each, Norm) for each in model.modules())
    model = load_moe(tmp_path / "packed", "4MiB", Quality(**shares))
    assert model.config._attn_implementation == "sdpa"
    assert not any(isinstance(each, Norm) for each in model.modules())


def test_the_trunk_in_8_bits_is_near(checkpoint: Callable[..., Path]) -> None:
    model, plain = stock(checkpoint()), stock(checkpoint())
    replaced = quantise_trunk(model, experts=16)
    assert replaced == 3 * 4 + 1  # q, k, v and o of each layer, and the head
    assert {type(each) for each in model.modules() if hasattr(each, "out_features")} == {PackedLinear}
    with torch.no_grad():
        wanted, found = plain(input_ids=prompt()).logits, model(input_ids=prompt()).logits
    assert 0 < distance(wanted, found) < 0.1
    head = model.lm_head
    assert head.nbytes < 0.3 * plain.lm_head.weight.nbytes
    assert distance(plain.lm_head.weight, head.weight) < 0.02


def test_a_tied_head_and_a_router_stay(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    qwen(0, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    model = stock(tmp_path / "tied")
    assert (
        quantise_trunk(model, experts=64) == 3 * 2
    )  # k and v have 32 rows, q and o 64, as experts would here
    assert model.lm_head.weight is model.get_input_embeddings().weight


@needs_kernels
@pytest.mark.parametrize("make", [qwen, mixtral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_short_router_answers_as_its_own_would(make: Callable[..., Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = make(0).to(dtype)
    other = deepcopy(model)
    assert shorten_routers(other) == len(model.model.layers)
    with torch.no_grad():
        for rows in (1, 3):
            x = torch.randn(rows, 64).to(dtype)
            for layer, short in zip(model.model.layers, other.model.layers, strict=True):
                wanted, found = layer.mlp.gate(x), short.mlp.gate(x)
                assert [(each.dtype, each.shape) for each in wanted] == [
                    (each.dtype, each.shape) for each in found
                ]
                assert torch.equal(wanted[2], found[2])
                assert distance(wanted[1].float(), found[1].float()) < (
                    0.02 if dtype is torch.bfloat16 else 1e-5
                )
