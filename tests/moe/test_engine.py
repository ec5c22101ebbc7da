"""The engine does what the simulation says, read for read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.moe.conftest import prompt
from tests.moe.test_exact import BUDGETS

from undercroft.moe.engine import ServedLayer
from undercroft.moe.load import engine_of, load_moe
from undercroft.moe.policies import ONLINE
from undercroft.moe.simulate import simulate
from undercroft.moe.trace import Trace
from undercroft.store.record import Key

EXPERT = 28 * 1024  # one of the small model's, with the blocks around it
CONTEXT = 64 * 1024  # more than 64 tokens' keys and values


@pytest.mark.parametrize("policy", ONLINE)
@pytest.mark.parametrize("budget", [2 * EXPERT, *BUDGETS.values()])
def test_hits_and_bytes_are_those_of_the_simulation(
    checkpoint: Callable[..., Path], tmp_path: Path, policy: str, budget: int
) -> None:
    model = load_moe(checkpoint(), budget + CONTEXT, policy=policy, context=64, prefetch=False)
    engine = engine_of(model)
    assert budget <= engine.cache.budget < budget + CONTEXT
    budget = engine.cache.budget
    engine.keep_journal()
    for seed in range(2):
        ids = prompt(length=20, seed=seed)
        model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    engine.trace().write(tmp_path / "trace.csv")
    found, said = engine.report(), simulate(Trace.read(tmp_path / "trace.csv"), budget=budget, policy=policy)
    assert found.hits == said.prefill.hits + said.decode.hits
    assert found.misses == said.prefill.misses + said.decode.misses
    assert found.read_nbytes == said.prefill.read_nbytes + said.decode.read_nbytes
    assert found.hits + found.misses > 500


def test_the_trace_is_what_the_router_chose(checkpoint: Callable[..., Path]) -> None:
    model = load_moe(checkpoint(), BUDGETS["half"])
    engine = engine_of(model)
    engine.keep_journal()
    ids = prompt(length=5)
    with torch.no_grad():
        out = model(input_ids=ids, output_router_logits=True)
    trace = engine.trace()
    assert (trace.layers, trace.experts, trace.used) == (3, 16, 4)
    assert set(trace.phase.tolist()) == {0}
    for layer, logits in enumerate(out.router_logits):
        chosen = torch.from_numpy(trace.expert[trace.layer == layer].copy()).long()
        assert torch.equal(chosen.sort().values, logits.topk(4).indices.sort().values)


def test_views_of_an_expert_are_made_once_and_go_with_it(checkpoint: Callable[..., Path]) -> None:
    model = load_moe(checkpoint(), 2 * EXPERT, prefetch=False)
    engine = engine_of(model)
    layer = ServedLayer(
        number=0, experts=16, dtypes=dict.fromkeys(("gate_up_proj", "down_proj"), torch.float32)
    )
    first, *others = engine.stock.high_keys[0]

    def look(key: Key) -> tuple[int, torch.Tensor]:
        [(_, lease)] = engine.cache.fetch([key])
        views, stays = engine.view(layer, key, lease)
        assert stays
        assert views is engine.view(layer, key, lease)[0]
        return id(views), views["down_proj"].clone()

    seen, wanted = look(first)
    assert look(first)[0] == seen
    for key in others:  # which take its room, and each other's
        look(key)
        assert len(engine._opened) <= 2
    assert torch.equal(look(first)[1], wanted)
    assert engine.cache.held <= engine.cache.budget


def test_copies_of_an_expert_are_not_kept(checkpoint: Callable[..., Path]) -> None:
    """In another dtype than the checkpoint's, or they would take memory that no budget knows of."""
    model = load_moe(checkpoint(), BUDGETS["all"], dtype=torch.bfloat16, prefetch=False)
    with torch.no_grad():
        model(input_ids=prompt(length=1))
    assert engine_of(model).report().hits + engine_of(model).report().misses > 0
    assert not len(engine_of(model)._opened)
