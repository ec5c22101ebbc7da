"""What routers of later layers say now is read now; what they say wrongly costs little and decides nothing."""

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.moe.conftest import ALWAYS, prompt, qwen
from tests.moe.families import fill, tiny_config
from tests.moe.test_exact import BANK, BUDGETS
from transformers import PhimoeConfig, PhimoeForCausalLM

from undercroft.moe.engine import Engine, ExpertReport, Server
from undercroft.moe.foresight import Foresight
from undercroft.moe.governor import Governor, Limits, Totals
from undercroft.moe.load import engine_of, expert_report, load_moe
from undercroft.moe.streamed import attached

UNTIMED = replace(ALWAYS, window=4, least_precise=0.5, least_useful=0.5)
"""Decide by what is useful, however the machine is feeling."""


class Noted(Governor):
    """A governor that remembers how deep it looked."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.depths: list[int] = []

    def turn(self, totals: Totals) -> None:
        super().turn(totals)
        self.depths.append(self.depth)


def scaled(seed: int, factor: float) -> Any:
    """A model of five layers in which attention and experts add so many times what they would to the residual."""
    model = qwen(seed, num_hidden_layers=5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                weight *= factor
    return model


def still(seed: int) -> Any:
    return scaled(seed, 0.0)


def restless(seed: int) -> Any:
    return scaled(seed, 300.0)


def write(model: Any, tokens: int, seed: int = 0) -> ExpertReport:
    """Let a model write words at random, so that each wants other experts."""
    torch.manual_seed(seed)
    model.generate(prompt(), max_new_tokens=tokens, do_sample=True, top_k=0, temperature=9.0, pad_token_id=0)
    return expert_report(model)


def foresight_of(model: Any) -> Foresight:
    (owner,) = {owner_of(each) for each in experts_of(model)}
    return owner


def owner_of(experts: torch.nn.Module) -> Any:
    served: Any = attached(experts)
    return served.engine if isinstance(served, Server) else served.foresight


def experts_of(model: Any) -> list[torch.nn.Module]:
    return [layer.mlp.experts for layer in model.model.layers]


def test_a_residual_that_stays_is_foreseen_rightly(checkpoint: Callable[..., Path]) -> None:
    model = load_moe(checkpoint(make=still), BANK // 2, prefetch=Governor(UNTIMED))
    report = write(model, 60)
    assert report.useful > 0.95 * report.predicted
    assert report.useful > 0.2 * report.read_nbytes
    assert report.predicted >= report.useful + report.wasted


def test_routers_that_cannot_be_foreseen_turn_it_off(checkpoint: Callable[..., Path]) -> None:
    governor = Noted(UNTIMED)
    model = load_moe(checkpoint(make=restless), BANK // 2, prefetch=governor)
    report = write(model, 200)
    assert max(governor.depths) == 1
    assert governor.depths.count(0) > 0.75 * len(governor.depths)
    assert report.useful < 0.5 * report.predicted


def test_nothing_is_foreseen_where_all_is_in_memory(checkpoint: Callable[..., Path]) -> None:
    governor = Noted(UNTIMED)
    model = load_moe(checkpoint(), 2 * BANK, prefetch=governor)
    write(model, 40)
    governor.depths.clear()
    report = write(model, 40, seed=1)
    assert report.hit_rate > 0.9
    later = write(model, 40, seed=2)
    assert later.predicted == report.predicted
    assert set(governor.depths[-30:]) == {0}


def test_a_prefill_foresees_nothing(checkpoint: Callable[..., Path]) -> None:
    model: Any = load_moe(checkpoint(), BUDGETS["half"], prefetch=Governor(ALWAYS))
    write(model, 30)
    before = expert_report(model)
    for seed in range(4):
        model(input_ids=prompt(seed=seed, length=40))
    assert expert_report(model).predicted == before.predicted > 0


def test_a_budget_of_one_token_is_left_to_demands(checkpoint: Callable[..., Path]) -> None:
    model = load_moe(checkpoint(), BUDGETS["one token"] + 2**16, prefetch=Governor(ALWAYS))
    assert write(model, 30).predicted == 0


def test_without_prefetch_nothing_is_attached(checkpoint: Callable[..., Path]) -> None:
    model: Any = load_moe(checkpoint(), BUDGETS["half"], prefetch=False)
    assert foresight_of(model) is engine_of(model)
    inner = {*model.modules()} - {model}
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in inner)
    assert write(model, 10).predicted == 0


def test_once_routers_are_found_only_their_norms_are_hooked(checkpoint: Callable[..., Path]) -> None:
    model: Any = load_moe(checkpoint(), BUDGETS["half"])
    write(model, 10)
    assert not foresight_of(model).unseen
    norms = {layer.post_attention_layernorm for layer in model.model.layers}
    assert {each for each in model.modules() if each._forward_pre_hooks} == {*norms, model}
    assert not any(each._forward_hooks for each in model.modules())


def test_a_family_without_a_gate_runs_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = PhimoeForCausalLM(tiny_config(PhimoeConfig))  # pyright: ignore
    fill(model, seed=0)
    model.save_pretrained(tmp_path)
    opened = load_moe(tmp_path, "256KiB", prefetch=Governor(ALWAYS))
    with caplog.at_level(logging.WARNING):
        assert write(opened, 20).predicted == 0
    assert foresight_of_layers(opened).unseen == {0, 1}
    assert "no experts are predicted for 2 of 2 layers" in caplog.text


def foresight_of_layers(model: Any) -> Foresight:
    found = [each for each in model.modules() if hasattr(type(each), "_apply_gate")]
    return owner_of(found[0])


def test_beams_are_foreseen_together(checkpoint: Callable[..., Path]) -> None:
    model: Any = load_moe(checkpoint(make=still), BANK // 2, prefetch=Governor(UNTIMED))
    model.generate(prompt(), num_beams=3, max_new_tokens=30, do_sample=True, top_k=0, pad_token_id=0)
    report = expert_report(model)
    assert report.useful > 0.95 * report.predicted > 0


def test_nothing_of_a_model_is_left_when_it_goes(checkpoint: Callable[..., Path]) -> None:
    import weakref

    model = load_moe(checkpoint(), BUDGETS["half"], prefetch=Governor(ALWAYS))
    write(model, 30)
    engine = weakref.ref(engine_of(model))
    del model
    gc.collect()
    assert engine() is None


class TestHints:
    """The engine's own part, without anyone who predicts."""

    @pytest.fixture
    def serving(
        self, checkpoint: Callable[..., Path]
    ) -> tuple[Engine, Callable[[int, list[int]], None], Any]:
        model: Any = load_moe(checkpoint(), BUDGETS["half"], prefetch=False)

        def serve(layer: int, experts: list[int]) -> None:
            chosen = torch.tensor([experts])
            service = attached(experts_of(model)[layer])(chosen, torch.ones(chosen.shape))
            for expert in sorted(experts):
                service[expert]
            service.close()

        return engine_of(model), serve, model

    def test_what_is_wanted_is_useful_and_what_is_not_is_wasted(self, serving: Any) -> None:
        engine, serve, _ = serving
        serve(0, [0, 1, 2, 3])
        assert engine.foresee(1, [5, 6, 7]) == 3
        assert (engine.report().useful, engine.report().wasted) == (0, 0)
        serve(1, [5, 6, 8, 9])
        report, nbytes = engine.report(), engine.stock.high_nbytes[1]
        assert (report.predicted, report.useful) == (3 * nbytes, 2 * nbytes)
        assert report.wasted <= nbytes
        assert report.hits == 2
        assert report.misses == 6

    def test_what_is_there_or_on_its_way_is_not_read_again(self, serving: Any) -> None:
        engine, serve, _ = serving
        serve(1, [4, 5, 6, 7])
        serve(0, [0, 1, 2, 3])
        assert engine.foresee(1, [4, 5]) == 0
        assert engine.foresee(1, [8, 9]) == 2
        assert engine.foresee(1, [8, 9]) == 0

    def test_what_is_wanted_sooner_stays(self, serving: Any) -> None:
        engine, serve, _ = serving
        for layer in (0, 1, 2):
            for first in (0, 4, 8, 12):
                serve(layer, list(range(first, first + 4)))
        serve(0, [0, 1, 2, 3])
        sooner = [key for key in engine.stock.high_keys[1] if key in engine.cache]
        while engine.foresee(1, [each for each in range(16) if each > 3]):
            pass
        assert [key for key in sooner if key not in engine.cache] == []

    def test_what_is_likelier_to_be_wanted_stays(self, serving: Any) -> None:
        engine, serve, _ = serving
        for layer in (0, 1, 2):
            for first in (0, 4, 8, 12):
                serve(layer, list(range(first, first + 4)))
        serve(0, [0, 1, 2, 3])
        assert engine.foresee(2, list(range(16)), chance=0.0) == 0
        assert engine.foresee(2, list(range(16)), chance=1.0) > 0

    def test_demands_keep_their_half_of_the_budget(self, serving: Any) -> None:
        engine, serve, _ = serving
        serve(0, [0, 1, 2, 3])
        most = engine.cache.budget // (2 * max(engine.stock.high_nbytes)) - 4
        assert engine.foresee(1, list(range(16))) + engine.foresee(2, list(range(16))) == most > 0

    def test_a_forward_that_never_came_so_far_takes_its_hints_along(self, serving: Any) -> None:
        engine, serve, _ = serving
        serve(0, [0, 1, 2, 3])
        assert engine.foresee(2, [0, 1]) == 2
        serve(0, [0, 1, 2, 3])
        serve(1, [0, 1, 2, 3])
        serve(2, [0, 1, 2, 3])
        report = engine.report()
        assert report.useful == 0 < report.predicted


def test_a_lossy_quality_reads_nothing_ahead(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from undercroft.moe.pack import pack

    pack(checkpoint(), tmp_path / "packed")
    model: Any = load_moe(tmp_path / "packed", BUDGETS["half"], "balanced", prefetch=Governor(ALWAYS))
    assert write(model, 20).predicted == 0
    assert engine_of(model).foresee(1, [0, 1, 2]) == 0
