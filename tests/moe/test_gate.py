"""Routers and norms are found by what they do, in families that nobody named."""

from typing import Any

import pytest
import torch
from tests.moe.families import decorated, fill, tiny_config

from undercroft.moe.gate import Gate, Watch, normalised, squashed

FAMILIES = {config.model_type: (config, model) for config, model in decorated()}
SEEN = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "ernie4_5_moe", "granitemoe", "minimax_m2")
UNSEEN = ("phimoe", "cohere2_moe")  # LayerNorms take the mean off, too
pytestmark = pytest.mark.filterwarnings("ignore")  # of the families' own code


def experts_of(model: torch.nn.Module) -> dict[int, str]:
    names = [name for name, each in model.named_modules() if hasattr(type(each), "_apply_gate")]
    return dict(enumerate(names))


def watched(family: str, tokens: int = 8) -> tuple[Watch, dict[int, list[torch.Tensor]], Any]:
    """A watch after a prefill and so many steps of decoding, and what each layer chose in those."""
    config, kind = FAMILIES[family]
    model: Any = kind(tiny_config(config)).eval()
    fill(model, seed=3)
    model.set_experts_implementation("eager")
    layers = experts_of(model)
    watch, chosen = Watch(model, layers), {number: list[torch.Tensor]() for number in layers}

    def note(number: int, args: tuple[Any, ...]) -> None:
        if len(args[1]) == 1:
            chosen[number].append(args[1])
            watch.see(number, args[1])

    for number, name in layers.items():
        experts = model.get_submodule(name)
        experts.register_forward_pre_hook(lambda _, args, number=number: note(number, args))
    prompt = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(1))
    model.generate(
        prompt, max_new_tokens=tokens + 1, min_new_tokens=tokens + 1, do_sample=False, pad_token_id=0
    )
    return watch, chosen, model


def choice(gate: Gate, residual: torch.Tensor, used: int) -> set[int]:
    scores = squashed(normalised(residual) @ gate.weight.T, gate.squash) + gate.bias
    return set(scores.topk(used).indices.flatten().tolist())


@pytest.mark.parametrize("family", SEEN)
def test_a_gate_chooses_what_the_model_chooses(family: str) -> None:
    watch, chosen, model = watched(family)
    assert watch.is_over
    assert not watch.unseen
    watch.close()
    gates, residuals = watch.gates, dict[int, torch.Tensor]()
    for number, gate in gates.items():
        gate.norm.register_forward_pre_hook(
            lambda _, args, number=number: residuals.__setitem__(number, args[0])
        )
    for each in chosen.values():
        each.clear()
    alike = list[bool]()
    for token in range(20, 60):
        model(input_ids=torch.tensor([[token]]))
        for number, gate in gates.items():
            wanted = chosen[number][-1]
            alike.append(choice(gate, residuals[number], wanted.shape[1]) == set(wanted.flatten().tolist()))
    assert sum(alike) >= 0.9 * len(alike) >= 36


@pytest.mark.parametrize("family", UNSEEN)
def test_what_does_not_choose_so_gets_no_gate(family: str) -> None:
    watch, _, _ = watched(family)
    assert watch.is_over
    assert not watch.gates


def test_a_watch_leaves_the_model_as_it_was() -> None:
    watch, _, model = watched("mixtral", tokens=2)
    watch.close()
    experts = {model.get_submodule(name) for name in experts_of(model).values()}
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in {*model.modules()} - experts)


def test_a_prefill_is_not_held() -> None:
    watch, _, _ = watched("mixtral", tokens=0)
    assert not watch.gates
    assert not watch._inputs
    assert not watch._normed
