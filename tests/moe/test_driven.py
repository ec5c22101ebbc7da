"""A driven engine: it reads what the simulation says, and computes what stock transformers would, bit for bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from undercroft.errors import BudgetExceeded, InvalidInput
from undercroft.kernels import Gated, feed_forwards
from undercroft.moe.driven import Driven
from undercroft.moe.forwards import Forward, fold, forwards, twice
from undercroft.moe.manifest import PackedLayer, PackedParameter
from undercroft.moe.packed import PackedExperts
from undercroft.moe.policies import ONLINE
from undercroft.moe.random_experts import ExpertShape, random_experts
from undercroft.moe.simulate import simulate
from undercroft.moe.synthetic import synthetic_trace
from undercroft.moe.trace import Trace

HIDDEN = 64


def shape(high: str = "int4") -> ExpertShape:
    return ExpertShape(layers=3, experts=12, hidden=HIDDEN, intermediate=96, high=high)


def routing(high: str = "int4") -> Trace:
    trace = synthetic_trace(layers=3, experts=12, used=3, prompt=6, tokens=10)
    return twice(fold(trace, layers=3, experts=12, expert_nbytes=shape(high).record_nbytes(high)))


@pytest.fixture(scope="module", params=["int4", "bfloat16"])
def experts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PackedExperts]:
    with random_experts(tmp_path_factory.mktemp("random") / "experts", shape(request.param)) as opened:
        yield opened


def steps(trace: Trace) -> list[Forward]:
    return list(forwards(trace, HIDDEN, torch.bfloat16))


@pytest.mark.parametrize(
    ("policy", "held"), [*((each, 5) for each in ONLINE), ("expected-use", 1), ("expected-use", 36)]
)
def test_hits_and_bytes_are_those_of_the_simulation(experts: PackedExperts, policy: str, held: int) -> None:
    trace = routing(experts.high)
    budget = held * trace.expert_nbytes[0]
    said = simulate(trace, budget=budget, policy=policy, bound=False)
    hits, misses = said.prefill.hits + said.decode.hits, said.prefill.misses + said.decode.misses
    for only_reads in (False, True):
        with Driven(experts, used=3, budget=budget, policy=policy) as driven:
            driven.read(steps(trace)) if only_reads else list(driven.run(steps(trace)))
            found = driven.engine.report()
        assert (found.hits, found.misses) == (hits, misses)
        assert found.read_nbytes == said.prefill.read_nbytes + said.decode.read_nbytes
        assert found.held <= budget


@pytest.mark.parametrize("held", [1, 9])
def test_what_is_streamed_is_what_is_resident(experts: PackedExperts, held: int) -> None:
    trace = routing(experts.high)
    record = trace.expert_nbytes[0]
    with (
        Driven(experts, used=3, budget=36 * record) as whole,
        Driven(experts, used=3, budget=held * record) as part,
    ):
        resident = whole.resident()
        before = whole.engine.report().read_nbytes
        streamed = list(part.run(steps(trace)))
        for out, wanted, served in zip(
            streamed, resident.run(steps(trace)), whole.run(steps(trace)), strict=True
        ):
            assert torch.equal(out, wanted)
            assert torch.equal(out, served)
        assert whole.engine.report().read_nbytes == before == 36 * record
        assert len({tuple(out.flatten().tolist()) for out in streamed}) == len(streamed) / 2 == 33
        assert all(0.01 < out.float().std() < 10 for out in streamed)


def test_a_token_meets_packed_experts_in_one_call(tmp_path: Path) -> None:
    with random_experts(tmp_path / "experts", shape()) as experts:
        trace = routing()
        with Driven(experts, used=3, budget=36 * trace.expert_nbytes[0]) as driven:
            resident, decoded = driven.resident(), 0
            for each, out in zip(steps(trace), driven.run(steps(trace)), strict=True):
                if len(each.chosen) > 1:
                    continue
                held = resident.held[each.layer]
                assert isinstance(held.kernel, Gated)
                order = sorted(range(3), key=each.chosen[0].tolist().__getitem__)
                blocks = [held.blocks[each.chosen[0].tolist()[slot]] for slot in order]
                products = feed_forwards(each.hidden, blocks, held.kernel)
                assert torch.equal(out, (each.weights[:, order].float() @ products).to(out.dtype))
                decoded += 1
            assert decoded > 10


def test_products_are_those_of_stock_transformers(tmp_path: Path) -> None:
    with random_experts(tmp_path / "experts", shape("bfloat16")) as experts:
        trace = routing("bfloat16")
        with Driven(experts, used=3, budget=36 * trace.expert_nbytes[0]) as driven:
            module = stock(driven)
            for each, out in zip(steps(trace), driven.run(steps(trace)), strict=True):
                with torch.no_grad():
                    eager: Any = MixtralExperts.forward.__wrapped__
                    wanted = eager(module[each.layer], each.hidden, each.chosen, each.weights)
                assert torch.equal(out, wanted)


def stock(driven: Driven) -> list[MixtralExperts]:
    """The experts as transformers has them: stacked, in memory."""
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=96, num_local_experts=12)
    modules: list[MixtralExperts] = []
    for held in driven.resident().held:
        module = MixtralExperts(config).to(torch.bfloat16)
        for name in ("gate_up_proj", "down_proj"):
            stacked = torch.stack([held.parameters[expert][name] for expert in range(12)])
            setattr(module, name, torch.nn.Parameter(stacked))
        modules.append(module)
    return modules


def test_nothing_is_left_when_it_is_closed(experts: PackedExperts) -> None:
    trace = routing(experts.high)
    with Driven(experts, used=3, budget=8 * trace.expert_nbytes[0]) as driven:
        list(driven.run(steps(trace)))
        assert driven.engine.cache.pinned == 0
    assert driven.engine.cache.held == 0
    driven.close()


def test_what_cannot_be_driven_is_refused(experts: PackedExperts) -> None:
    record = routing(experts.high).expert_nbytes[0]
    with pytest.raises(BudgetExceeded):
        Driven(experts, used=3, budget=record - 1)
    with pytest.raises(InvalidInput, match="is no policy"):
        Driven(experts, used=3, budget=record, policy="best")
    with Driven(experts, used=3, budget=4 * record) as small, pytest.raises(BudgetExceeded):
        small.resident()


def test_experts_of_another_form_are_refused(experts: PackedExperts) -> None:
    layer = experts.layers[0]
    bias = PackedParameter(name="bias", shape=(4,), stored=torch.float32, dtype=torch.float32)
    other = PackedLayer(number=0, module="odd", experts=12, parameters={**layer.parameters, "bias": bias})
    odd = object.__new__(PackedExperts)
    odd.__dict__.update(experts.__dict__, layers=[other])
    with pytest.raises(InvalidInput, match="only gated feed-forward blocks"):
        Driven(odd, used=3, budget=1 << 20)


def test_what_a_token_wants_is_asked_for_before_anything_can_be_read_ahead(experts: PackedExperts) -> None:
    trace = routing(experts.high)
    token = next(each for each in steps(trace) if len(each.chosen) == 1)
    with Driven(experts, used=3, budget=36 * trace.expert_nbytes[0]) as driven:
        layer = driven._layers[token.layer]
        for _ in range(2):
            service = driven.engine.serve(layer, token.chosen, token.weights)
            assert driven.engine.report().misses == 3
            assert all(service[expert] for expert in token.chosen[0].tolist())
            service.close()
            del service
        service = driven.engine.serve(layer, token.chosen, token.weights)
        assert driven.engine.cache.pinned == 3 * trace.expert_nbytes[0]
        service.close()
        assert driven.engine.cache.pinned == 0
        assert driven.engine.report().hits == 6
