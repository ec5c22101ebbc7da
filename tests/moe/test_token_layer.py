"""A token's short way through whole decoder layers: the bits of stock transformers, whatever became of the layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.moe.conftest import ALWAYS, SMALL, prompt, qwen, stock
from tests.moe.families import fill
from tests.moe.test_exact import same
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from undercroft.kernels.bitwise import reproduces
from undercroft.kernels.bitwise_attention import attends
from undercroft.kernels.bitwise_router import routes
from undercroft.kernels.trunk import available
from undercroft.moe.governor import Governor
from undercroft.moe.light import lighten
from undercroft.moe.load import load_moe

BF16 = torch.bfloat16
LAYERS = SMALL["num_hidden_layers"]


def qwen_of_eight(seed: int) -> Any:
    return qwen(seed, hidden_size=128, moe_intermediate_size=64, num_experts=8)


def mixtral_of_eight(seed: int) -> Any:
    sizes = {**SMALL, "hidden_size": 128, "head_dim": 32}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=8, intermediate_size=64))
    fill(model, seed)
    return model


@pytest.fixture(params=[qwen_of_eight, mixtral_of_eight])
def folder(request: pytest.FixtureRequest, checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    saved = tmp_path / "model"
    stock(checkpoint(make=request.param), BF16).save_pretrained(saved)
    return saved


@pytest.fixture
def models(folder: Path) -> tuple[Any, Any]:
    return stock(folder, BF16), load_moe(folder, "4MiB", dtype=BF16, prefetch=False)


def chosen_by_pytorch(model: Any, **inputs: Any) -> int:
    """How many layers of a token's forward choose experts by PyTorch, after a text of 12 tokens."""
    with torch.no_grad():
        cache = model(input_ids=prompt()).past_key_values
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(input_ids=prompt(1, 1), past_key_values=cache, **inputs)
    return sum(event.name == "aten::topk" for event in profile.events() or ())


@pytest.fixture
def _is_short(folder: Path) -> None:
    model = load_moe(folder, "4MiB", dtype=BF16)
    config = model.config
    shape = config.num_attention_heads, config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
    if not (reproduces(128) and reproduces(shape[0] * shape[2]) and attends(*shape) and routes(8, 4)):
        pytest.skip("PyTorch computes in another order on this processor")


@pytest.mark.usefixtures("_is_short")
def test_a_token_goes_the_short_way_unless_something_is_masked(models: tuple[Any, Any]) -> None:
    _, model = models
    assert chosen_by_pytorch(model) == 0
    padded = torch.ones(1, 13, dtype=torch.long)
    padded[0, :3] = 0
    assert chosen_by_pytorch(model, attention_mask=padded) == LAYERS


def test_bit_for_bit(models: tuple[Any, Any]) -> None:
    same(*models, prompt(), tokens=48)


def test_bit_for_bit_where_predictions_listen_to_norms(folder: Path) -> None:
    model = load_moe(folder, "200KiB", dtype=BF16, prefetch=Governor(ALWAYS))
    same(stock(folder, BF16), model, prompt(), tokens=24)


def doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


def halved(module: nn.Module, args: Any) -> Any:
    return (args[0] / 2, *args[1:])


def hook(name: str) -> Callable[[Any], None]:
    return lambda layer: layer.get_submodule(name).register_forward_hook(doubled)


def pre_hook(name: str) -> Callable[[Any], None]:
    return lambda layer: layer.get_submodule(name).register_forward_pre_hook(halved)


def another_weight(layer: Any) -> None:
    layer.self_attn.o_proj.weight = nn.Parameter(-layer.self_attn.o_proj.weight, requires_grad=False)


def another_storage(layer: Any) -> None:
    weight = layer.mlp.gate.weight
    weight.data = weight.data.flip(0).t().contiguous().t()  # nor does it lie in one piece


def changed_in_place(layer: Any) -> None:
    layer.self_attn.v_proj.weight.mul_(3)


def another_forward(layer: Any) -> None:
    own = layer.self_attn.q_proj.forward
    layer.self_attn.q_proj.forward = lambda x: own(x) * 0.5


def fewer_experts(layer: Any) -> None:
    layer.mlp.gate.top_k = 2


CHANGES = {
    "hook on a norm": hook("input_layernorm"),
    "hook on the norm before experts": hook("post_attention_layernorm"),
    "hook on a router's input": pre_hook("mlp.gate"),
    "hook on the input of the norm before experts": pre_hook("post_attention_layernorm"),
    "hook on a linear layer": hook("self_attn.q_proj"),
    "hook on experts": hook("mlp.experts"),
    "hook on attention": hook("self_attn"),
    "hook on the block": hook("mlp"),
    "weight": another_weight,
    "storage": another_storage,
    "in place": changed_in_place,
    "forward": another_forward,
    "fewer experts": fewer_experts,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_became_of_a_layer_is_heeded(models: tuple[Any, Any], change: Callable[[Any], None]) -> None:
    for model in models:
        with torch.no_grad():
            model(input_ids=prompt())
            change(model.model.layers[1])
    same(*models, prompt(), tokens=8)


def test_a_layer_that_is_called_alone_keeps_its_bits(models: tuple[Any, Any]) -> None:
    states: list[Tensor] = []
    x = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(3)).to(BF16)
    with torch.no_grad():
        for model in models:
            past = model(input_ids=prompt()).past_key_values
            turns = model.model.rotary_emb(x, position_ids=torch.tensor([[12]]))
            states.append(model.model.layers[0](x, past_key_values=past, position_embeddings=turns))
    assert torch.equal(*states)


def test_hooks_of_all_modules_are_heeded(models: tuple[Any, Any]) -> None:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if isinstance(module, nn.Linear) else output
    )
    try:
        same(*models, prompt(), tokens=8)
    finally:
        handle.remove()


@pytest.mark.parametrize("width", [64, 256])
def test_a_token_of_another_width_is_refused_as_by_pytorch(models: tuple[Any, Any], width: int) -> None:
    x = torch.ones(1, 1, width, dtype=BF16)
    for model in models:
        with torch.no_grad():
            past = model(input_ids=prompt()).past_key_values
            with pytest.raises(RuntimeError, match="size"):
                model(inputs_embeds=x, past_key_values=past)


def test_casts_of_autocast_are_heeded(models: tuple[Any, Any]) -> None:
    with torch.autocast("cpu", dtype=torch.float16):
        same(*models, prompt(), tokens=8)


def test_states_of_another_cache_are_heeded(models: tuple[Any, Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    assert torch.equal(*(model.generate(prompt(), pad_token_id=0, **options) for model in models))


def test_a_token_that_breaks_off_leaves_no_way_open(folder: Path) -> None:
    model: Any = load_moe(folder, "4MiB", dtype=BF16, prefetch=False)
    reference = stock(folder, BF16)

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        past = model(input_ids=prompt()).past_key_values
        handle = model.model.layers[2].register_forward_pre_hook(fails)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=prompt(1, 1), past_key_values=past)
        handle.remove()
        for each in (model, reference):
            another_weight(each.model.layers[0])
        x = torch.ones(1, 1, 128, dtype=BF16)
        found = [
            each.model.layers[0](
                x,
                past_key_values=each(input_ids=prompt()).past_key_values,
                position_embeddings=each.model.rotary_emb(x, position_ids=torch.tensor([[12]])),
            )
            for each in (model, reference)
        ]
    assert torch.equal(*found)


def watched(module: nn.Module, args: Any, output: Any) -> None:
    """Does nothing but to be asked, which a short way would not."""


def light_models(folder: Path) -> tuple[Any, Any]:
    """Two that are alike; of the first, every module of a layer is called."""
    models = stock(folder, BF16), stock(folder, BF16)
    for model in models:
        lighten(model, experts=8)
    for layer in models[0].model.layers:
        layer.mlp.register_forward_hook(watched)
    return models


@pytest.mark.skipif(not available(), reason="nothing compiles kernels here")
@pytest.mark.parametrize("change", [None, *CHANGES], ids=str)
def test_light_layers_give_what_their_modules_give(folder: Path, change: str | None) -> None:
    if change in {"weight", "storage", "in place"}:
        pytest.skip("packed layers have no weights to change")
    models = light_models(folder)
    assert sum(hasattr(each, "_undercroft_layer") for each in models[1].modules()) == LAYERS
    if change is not None:
        for model in models:
            CHANGES[change](model.model.layers[1])
    same(*models, prompt(), tokens=8)
