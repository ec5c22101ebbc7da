"""One budget for experts and the KV cache: experts leave as a text grows, and no number changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.moe.conftest import mixtral, prompt, qwen, stock
from transformers.cache_utils import StaticCache

from undercroft.errors import BudgetExceeded
from undercroft.moe.headroom import Headroom, kv_nbytes, token_nbytes
from undercroft.moe.load import engine_of, load_moe

EXPERT = 3 * 64 * 32 * 4 + 4096
BANK = 3 * 16 * EXPERT


def headroom_of(model: Any) -> Headroom:
    hook, *_ = model._forward_pre_hooks.values()
    return hook.args[1]


@pytest.mark.parametrize("make", [qwen, mixtral])
def test_the_first_guess_is_what_transformers_keeps(
    checkpoint: Callable[..., Path], make: Callable[[int], Any]
) -> None:
    model = stock(checkpoint(make=make))
    past = model(input_ids=prompt(rows=2, length=9)).past_key_values
    assert kv_nbytes(past) == 2 * 9 * token_nbytes(model.config, torch.float32)
    assert kv_nbytes(None) == 0


def test_experts_leave_as_the_text_grows(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    total = BANK // 4
    model: Any = load_moe(folder, total)
    engine, headroom, plain = engine_of(model), headroom_of(model), stock(folder)
    one = two = prompt(length=8)
    pasts: list[Any] = [None, None]
    budgets: list[int] = []
    for _ in range(200):
        with torch.no_grad():
            outs = [
                each(input_ids=ids, past_key_values=past)
                for each, ids, past in zip((plain, model), (one, two), pasts, strict=True)
            ]
        assert torch.equal(outs[0].logits, outs[1].logits)
        pasts = [out.past_key_values for out in outs]
        one = two = outs[0].logits[:, -1:].argmax(-1)
        budgets.append(engine.cache.budget)
        assert engine.cache.budget + headroom.nbytes == total
        assert engine.cache.held <= engine.cache.budget
        assert kv_nbytes(pasts[1]) <= headroom.nbytes
    assert budgets[1:] == sorted(budgets[1:], reverse=True)
    assert budgets[1] - budgets[-1] > EXPERT
    model(input_ids=prompt(length=8))
    assert engine.cache.budget == budgets[0]  # the next text begins


def test_a_text_too_long_says_what_would_do(checkpoint: Callable[..., Path]) -> None:
    folder, long = checkpoint(), prompt(length=200)
    model: Any = load_moe(folder, 2 * EXPERT)
    with pytest.raises(BudgetExceeded, match="shorter text") as caught:
        model(input_ids=long)
    least = caught.value.least
    assert least is not None
    assert torch.equal(load_moe(folder, least)(input_ids=long).logits, stock(folder)(input_ids=long).logits)
    with torch.no_grad():
        assert model(input_ids=long[:, :4]).logits.isfinite().all()  # it goes on after the error


def test_context_is_set_aside_at_once(checkpoint: Callable[..., Path]) -> None:
    model: Any = load_moe(checkpoint(), BANK, context=100)
    engine, before = engine_of(model), engine_of(model).cache.budget
    assert BANK - before >= 100 * token_nbytes(model.config, torch.float32)
    model.generate(prompt(length=5), max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert engine.cache.budget == before
    with pytest.raises(BudgetExceeded):
        load_moe(checkpoint(seed=1), 2 * EXPERT, context=100_000)


def test_a_budget_below_one_token_is_warned_of(
    checkpoint: Callable[..., Path], recwarn: pytest.WarningsRecorder
) -> None:
    demand = 3 * 4 * EXPERT
    with pytest.warns(RuntimeWarning, match=r"less than one token uses in all layers: 336 KiB"):
        load_moe(checkpoint(), demand - 4096)
    load_moe(checkpoint(seed=1), demand)
    assert not recwarn.list


@pytest.mark.parametrize("grows", [False, True])
def test_a_cache_of_fixed_size_is_covered(checkpoint: Callable[..., Path], grows: bool) -> None:
    folder = checkpoint()
    model: Any = load_moe(folder, 4 * BANK)
    headroom = headroom_of(model)
    headroom._grows = grows
    past = StaticCache(config=model.config, max_cache_len=512)
    with torch.no_grad():
        model(input_ids=prompt(), past_key_values=past)
        for _ in range(3):
            model(input_ids=prompt(1, 1), past_key_values=past)
            assert kv_nbytes(past) <= headroom.nbytes <= 2 * kv_nbytes(past) + BANK // 4
