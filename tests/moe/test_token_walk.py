"""A token's short way through a whole model: the bits of stock transformers, whatever became of its modules."""

import copy
import gc
import weakref
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
from transformers.cache_utils import DynamicCache, DynamicLayer

from undercroft.kernels.bitwise import reproduces
from undercroft.kernels.bitwise_attention import attends
from undercroft.kernels.bitwise_router import routes
from undercroft.kernels.trunk import available
from undercroft.moe.governor import Governor
from undercroft.moe.growing import grown, spare
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
    """Two that are alike; of the first, every module is called."""
    models = stock(folder, BF16), stock(folder, BF16)
    for model in models:
        lighten(model, experts=8)
    models[0].model.layers[0].mlp.register_forward_hook(watched)
    return models


@pytest.mark.skipif(not available(), reason="nothing compiles kernels here")
@pytest.mark.parametrize("change", [None, *CHANGES], ids=str)
def test_light_layers_give_what_their_modules_give(folder: Path, change: str | None) -> None:
    if change in {"weight", "storage", "in place"}:
        pytest.skip("packed layers have no weights to change")
    models = light_models(folder)
    assert hasattr(models[1], "_undercroft_walk")
    if change is not None:
        for model in models:
            CHANGES[change](model.model.layers[1])
    same(*models, prompt(), tokens=8)


OUTER: dict[str, Callable[[Any], object]] = {
    "hook on the inner model": lambda model: model.model.register_forward_hook(scaled_state),
    "hook on a decoder layer": lambda model: model.model.layers[1].register_forward_hook(doubled),
    "hook on a decoder layer's input": lambda model: model.model.layers[1].register_forward_pre_hook(halved),
    "hook on the embedding": lambda model: model.model.embed_tokens.register_forward_hook(doubled),
    "hook on the rotary embedding": lambda model: model.model.rotary_emb.register_forward_hook(swapped),
    "hook on the last norm": lambda model: model.model.norm.register_forward_hook(doubled),
    "hook on the head": lambda model: model.lm_head.register_forward_pre_hook(halved),
    "embedding": lambda model: setattr(model.model, "embed_tokens", other_embedding(model)),
    "a row of the embedding": lambda model: model.model.embed_tokens.weight.data[3:99].mul_(2),
    "frequencies": lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
    "layers in another order": lambda model: setattr(model.model, "layers", swapped_layers(model)),
    "fewer layers": lambda model: setattr(model.config, "num_hidden_layers", LAYERS - 1),
}


def scaled_state(module: nn.Module, args: Any, output: Any) -> Any:
    output.last_hidden_state = 2 * output.last_hidden_state
    return output


def swapped(module: nn.Module, args: Any, output: Any) -> Any:
    return output[0], -output[1]


def other_embedding(model: Any) -> nn.Embedding:
    weight = model.model.embed_tokens.weight
    other = nn.Embedding(*weight.shape, dtype=weight.dtype)
    other.weight = nn.Parameter(weight.flip(0), requires_grad=False)
    return other


def swapped_layers(model: Any) -> nn.ModuleList:
    first, second, *others = model.model.layers
    return nn.ModuleList([first, *others, second])


@pytest.mark.parametrize("change", OUTER.values(), ids=OUTER.keys())
def test_what_became_of_a_model_is_heeded(models: tuple[Any, Any], change: Callable[[Any], object]) -> None:
    for model in models:
        with torch.no_grad():
            past = model(input_ids=prompt()).past_key_values
            model(input_ids=prompt(1, 1), past_key_values=past)
            change(model)
    same(*models, prompt(), tokens=8)


ASKED: dict[str, dict[str, Any]] = {
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "router logits": {"output_router_logits": True},
    "a tuple": {"return_dict": False},
    "a place": {"position_ids": torch.tensor([[12]])},
    "another place": {"position_ids": torch.tensor([[40]])},
    "a whole mask": {"attention_mask": torch.ones(1, 13, dtype=torch.long)},
    "a mask": {"attention_mask": torch.tensor([[0, 0, *[1] * 11]])},
    "all logits": {"logits_to_keep": 0},
    "logits by number": {"logits_to_keep": torch.tensor([0])},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_what_is_asked_for_is_given(models: tuple[Any, Any], asked: dict[str, Any]) -> None:
    found: list[Any] = []
    for model in models:
        if asked.get("output_attentions"):
            model.set_attn_implementation("eager")
        with torch.no_grad():
            past = model(input_ids=prompt()).past_key_values
            out = model(input_ids=prompt(1, 1), past_key_values=past, **asked)
            found.append(out if isinstance(out, tuple) else tuple(out.to_tuple()))
    tensors = [[part for part in flat(each) if isinstance(part, Tensor)] for each in found]
    assert len(tensors[0]) == len(tensors[1]) > 0
    assert all(map(torch.equal, *tensors))


def flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [part for each in value for part in flat(each)]
    layers = getattr(value, "layers", None)
    return [value] if layers is None else [part for each in layers for part in (each.keys, each.values)]


def test_a_token_that_is_none_is_refused_as_by_pytorch(models: tuple[Any, Any]) -> None:
    for model in models:
        with torch.no_grad():
            past = model(input_ids=prompt()).past_key_values
            with pytest.raises(IndexError):
                model(input_ids=torch.tensor([[4000]]), past_key_values=past)


def test_bit_for_bit_while_a_cache_is_cut_copied_and_kept(models: tuple[Any, Any], tmp_path: Path) -> None:
    logits: list[list[Tensor]] = []
    for model in models:
        found: list[Tensor] = []

        def step(past: Any, number: int, model: Any = model, found: list[Tensor] = found) -> Any:
            out = model(input_ids=torch.tensor([[number]]), past_key_values=past)
            found.append(out.logits)
            return out.past_key_values

        with torch.no_grad():
            past = model(input_ids=prompt()).past_key_values
            past = step(step(past, 5), 6)
            kept = past.layers[1].keys, past.layers[1].values
            before = [each.clone() for each in kept]
            copies = copy.deepcopy(past), copy.copy(past.layers[0])
            torch.save(past, tmp_path / "past.pt")
            past.crop(-1)
            past = step(step(past, 9), 10)
            step(step(copies[0], 11), 12)
            step(torch.load(tmp_path / "past.pt", weights_only=False), 13)
            assert all(map(torch.equal, kept, before))
            assert copies[1].keys.shape[2] == 14
            past.batch_repeat_interleave(2)
            found.append(model(input_ids=torch.tensor([[3], [4]]), past_key_values=past).logits)
            past.batch_select_indices(torch.tensor([1]))
            step(step(past, 14), 15)
            past.reset()
            found.append(model(input_ids=prompt(), past_key_values=past).logits)
            step(past, 16)
        logits.append(found)
    assert all(map(torch.equal, *logits))


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"num_beams": 3}])
def test_ways_to_generate(models: tuple[Any, Any], options: dict[str, Any]) -> None:
    ids = prompt().repeat(1, 3)
    asked: dict[str, Any] = {"max_new_tokens": 90, "do_sample": False, "pad_token_id": 0, **options}
    assert torch.equal(*(model.generate(ids, **asked) for model in models))


def test_a_token_within_another_keeps_the_bits_of_both(models: tuple[Any, Any]) -> None:
    logits: list[list[Tensor]] = []
    for model in models:
        found: list[Tensor] = []

        with torch.no_grad():
            past, other = (model(input_ids=prompt(seed=seed)).past_key_values for seed in (5, 6))

            def listen(*_: Any, model: Any = model, found: list[Tensor] = found, other: Any = other) -> None:
                if not found:
                    found.append(torch.empty(0))
                    found[0] = model(input_ids=prompt(1, 1), past_key_values=other).logits

            model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(listen)
            found.append(model(input_ids=prompt(1, 1), past_key_values=past).logits)
        logits.append(found)
    assert len(logits[1]) == 2
    assert all(map(torch.equal, *logits))


def test_bit_for_bit_with_another_number_of_threads(models: tuple[Any, Any]) -> None:
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            same(*models, prompt(), tokens=4)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("_is_short")
def test_what_is_set_aside_covers_the_room_of_keys_and_values(folder: Path) -> None:
    model: Any = load_moe(folder, "4MiB", dtype=BF16, prefetch=False)
    headroom = next(hook.args[1] for hook in model._forward_pre_hooks.values() if hasattr(hook, "args"))
    with torch.no_grad():
        past = model(input_ids=prompt()).past_key_values
        for _ in range(150):
            model(input_ids=prompt(1, 1), past_key_values=past)
            rooms = [each.both for each in past.layers]
            assert sum(room.nbytes for room in rooms) <= headroom.nbytes
            assert all(
                room.shape[2] <= past.get_seq_length() + spare(past.get_seq_length()) for room in rooms
            )


def test_bit_for_bit_after_inference_mode(folder: Path) -> None:
    model: Any = load_moe(folder, "200KiB", dtype=BF16, prefetch=False)
    with torch.inference_mode():
        same(stock(folder, BF16), model, prompt(), tokens=8)
    same(stock(folder, BF16), model, prompt(), tokens=24)


def test_bit_for_bit_under_another_default_device(models: tuple[Any, Any]) -> None:
    logits: list[Tensor] = []
    for model in models:
        with torch.no_grad():
            past = model(input_ids=prompt()).past_key_values
            step = prompt(1, 1)
            with torch.device("meta"):
                logits.append(model(input_ids=step, past_key_values=past).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("factor", [1, 2])
def test_who_listens_to_a_residual_may_keep_and_change_it(models: tuple[Any, Any], factor: int) -> None:
    heard: list[list[Tensor]] = []
    for model in models:
        found: list[Tensor] = []

        def listen(module: nn.Module, args: Any, found: list[Tensor] = found) -> None:
            found.append(args[0].mul_(factor))

        with torch.no_grad():
            past = model(input_ids=prompt()).past_key_values
            for layer in model.model.layers:
                layer.post_attention_layernorm.register_forward_pre_hook(listen)
            for _ in range(3):
                found.append(model(input_ids=prompt(1, 1), past_key_values=past).logits)
        heard.append(found)
    assert all(map(torch.equal, *heard))


def transposed(layer: Any) -> None:
    weight = layer.self_attn.o_proj.weight
    weight.data = weight.data.t()


def reversed_view(layer: Any) -> None:
    weight = layer.mlp.gate.weight
    weight.data = weight.data.view(2, -1)[:, : weight.numel() // 2].view_as(weight).t().contiguous().t()


@pytest.mark.parametrize("change", [transposed, reversed_view])
def test_weights_that_lie_otherwise_in_the_same_place_are_heeded(
    tmp_path: Path, checkpoint: Callable[..., Path], change: Callable[[Any], None]
) -> None:
    make = lambda seed: qwen(seed, hidden_size=128, moe_intermediate_size=64, num_experts=8, head_dim=32)  # noqa: E731
    stock(checkpoint(make=make), BF16).save_pretrained(tmp_path)
    models = stock(tmp_path, BF16), load_moe(tmp_path, "4MiB", dtype=BF16, prefetch=False)
    for model in models:
        with torch.no_grad():
            past = model(input_ids=prompt()).past_key_values
            model(input_ids=prompt(1, 1), past_key_values=past)
            change(model.model.layers[1])
    same(*models, prompt(), tokens=8)


@pytest.mark.skipif(not available(), reason="nothing compiles kernels here")
def test_light_layers_heed_other_norms_of_heads(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    stock(checkpoint(make=qwen_of_eight), BF16).save_pretrained(tmp_path)
    models = light_models(tmp_path)
    for model in models:
        with torch.no_grad():
            past = model(input_ids=prompt()).past_key_values
            model(input_ids=prompt(1, 1), past_key_values=past)
            weight = model.model.layers[1].self_attn.q_norm.weight
            weight.data = 3 * weight.data
    same(*models, prompt(), tokens=8)


def test_a_cache_and_its_layers_stay_the_callers(models: tuple[Any, Any]) -> None:
    for model in models:
        with torch.no_grad():
            past = model(input_ids=prompt()).past_key_values
            layers, layer, other = past.layers, past.layers[0], copy.copy(past)
            model(input_ids=prompt(1, 1), past_key_values=past)
        assert past.layers is layers
        assert layer is layers[0]
        assert layer.get_seq_length() == other.get_seq_length() == layer.keys.shape[2] == 13


@pytest.mark.usefixtures("_is_short")
def test_keys_and_values_go_with_their_cache(models: tuple[Any, Any]) -> None:
    _, model = models
    with torch.no_grad():
        past = model(input_ids=prompt()).past_key_values
        model(input_ids=prompt(1, 1), past_key_values=past)
    both = [weakref.ref(layer.both) for layer in past.layers]
    assert all(each() is not None for each in both)
    del past
    gc.collect()
    assert all(each() is None for each in both)


@pytest.mark.usefixtures("_is_short")
def test_copies_and_files_have_plain_layers_without_room(models: tuple[Any, Any], tmp_path: Path) -> None:
    _, model = models
    with torch.no_grad():
        past = model(input_ids=prompt()).past_key_values
        model(input_ids=prompt(1, 1), past_key_values=past)
    torch.save(past, tmp_path / "past.pt")
    for other in (copy.deepcopy(past), torch.load(tmp_path / "past.pt", weights_only=False)):
        for layer, plain in zip(past.layers, other.layers, strict=True):
            assert type(plain) is DynamicLayer
            assert torch.equal(plain.keys, layer.keys)
            assert torch.equal(plain.values, layer.values)
            assert plain.keys.untyped_storage().nbytes() == layer.keys.nbytes


def test_a_token_that_breaks_off_is_not_kept() -> None:
    layer = DynamicLayer()
    layer.update(*torch.ones(2, 1, 2, 5, 16))
    past = DynamicCache()
    past.layers = [layer]

    def attend(before: int) -> None:
        raise KeyboardInterrupt

    (growing,) = grown(past)
    with pytest.raises(KeyboardInterrupt):
        growing.add(lambda both: attend)
    assert growing.keys is not None
    assert growing.keys.shape[2] == 5
