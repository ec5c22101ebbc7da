"""Models in bfloat16 whose products kernels of ours make: the bits of stock transformers, in prefill and decoding."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.moe.conftest import prompt, qwen, stock
from tests.moe.test_exact import same
from torch import Tensor, nn
from transformers.activations import ACT2FN

from undercroft.errors import SpillMisuse
from undercroft.kernels import bitwise, bitwise_lossless
from undercroft.kernels.bitwise_attention import attends
from undercroft.kernels.bitwise_router import routes
from undercroft.kernels.bitwise_trunk import normalises, turns
from undercroft.moe.exactly import hasten
from undercroft.moe.feed_forward import FeedForward
from undercroft.moe.load import engine_of, expert_report, load_moe
from undercroft.moe.pack import pack
from undercroft.moe.products import Products
from undercroft.moe.quality import Quality

WIDE = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 8}
BANK = 3 * 8 * 3 * 64 * 128 * 2


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    saved = tmp_path / "model"
    stock(checkpoint(make=wide), torch.bfloat16).save_pretrained(saved)
    return saved


def wide(seed: int, **changes: Any) -> Any:
    return qwen(seed, **WIDE, **changes)


def counted(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("share", [0.5, 2.0])
@pytest.mark.parametrize("high", [None, "keep", "lossless"])
def test_bit_for_bit(folder: Path, tmp_path: Path, high: Any, share: float) -> None:
    source = folder
    if high is not None:
        source = tmp_path / "packed"
        pack(folder, source, high=high, low="none")
    model = load_moe(source, int(share * BANK) + 65536, dtype=torch.bfloat16)
    for each in counted(model):
        assert (type(each) is nn.Linear) != bitwise.reproduces(each.in_features)
    for rows in (1, 3):
        same(stock(folder, torch.bfloat16), model, prompt(rows), tokens=24)


@pytest.fixture
def squeezed(folder: Path, tmp_path: Path) -> Path:
    """The model in fewer bytes, and in few, where a kernel multiplies with the former."""
    if not (bitwise_lossless.reproduces(128) and bitwise_lossless.reproduces(64)):
        pytest.skip("PyTorch multiplies bfloat16 in another way on this processor")
    pack(folder, tmp_path / "packed", high="lossless", low="int4")
    return tmp_path / "packed"


def test_a_token_is_multiplied_with_squeezed_experts_as_they_lie(folder: Path, squeezed: Path) -> None:
    one, other = stock(folder, torch.bfloat16), load_moe(squeezed, "4MiB")
    with torch.no_grad():
        caches = [model(input_ids=prompt()).past_key_values for model in (one, other)]
        engine_of(other)._source.workshop.close()  # pyright: ignore  # where experts are restored
        step = prompt(1, 1)
        for _ in range(8):
            logits = [
                model(input_ids=step, past_key_values=cache).logits
                for model, cache in zip((one, other), caches, strict=True)
            ]
            assert torch.equal(*logits)
            step = logits[0][:, -1:].argmax(-1)
        with pytest.raises(SpillMisuse, match="closed"):
            other(input_ids=prompt())


def test_squeezed_experts_are_restored_where_they_cannot_be_multiplied_with(
    folder: Path, squeezed: Path
) -> None:
    one, other = stock(folder, torch.bfloat16), load_moe(squeezed, "4MiB")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(one(input_ids=prompt(1, 1)).logits, other(input_ids=prompt(1, 1)).logits)
    same(stock(folder), load_moe(squeezed, "4MiB", dtype=torch.float32), prompt(), tokens=8)


def test_squeezed_experts_are_served_beside_low_copies(folder: Path, squeezed: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "kept", high="keep", low="int4")
    quality, texts = Quality(low=1.0, thresholds=(0.3, 1.0)), []
    for source in (squeezed, tmp_path / "kept"):
        model: Any = load_moe(source, "4MiB", quality)
        texts.append(model.generate(prompt(), max_new_tokens=24, do_sample=False, pad_token_id=0))
        assert 0 < expert_report(model).low_mass < 1
    assert torch.equal(*texts)


def test_biases_and_tied_heads_keep_their_bits(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    make = partial(wide, attention_bias=True, tie_word_embeddings=True)
    make.__name__ = "biased"
    saved = tmp_path / "model"
    stock(checkpoint(make=make), torch.bfloat16).save_pretrained(saved)
    same(stock(saved, torch.bfloat16), load_moe(saved, "1MiB", dtype=torch.bfloat16), prompt(2), tokens=16)


def test_another_attention_keeps_its_bits(folder: Path) -> None:
    one, other = stock(folder, torch.bfloat16), load_moe(folder, "1MiB", dtype=torch.bfloat16)
    for model in (one, other):
        model.set_attn_implementation("eager")
    same(one, other, prompt(), tokens=8)


def test_another_cache_keeps_its_bits(folder: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    models = stock(folder, torch.bfloat16), load_moe(folder, "1MiB", dtype=torch.bfloat16)
    texts = [each.generate(prompt(), pad_token_id=0, **options) for each in models]
    assert torch.equal(*texts)


class Adapted(nn.Module):
    """Stands where an adapter of peft would."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * 1.5


@pytest.mark.parametrize("name", ["q_proj", "k_norm", "o_proj"])
def test_what_took_the_place_of_a_part_is_heeded(folder: Path, name: str) -> None:
    one, other = stock(folder, torch.bfloat16), load_moe(folder, "1MiB", dtype=torch.bfloat16)
    for model in (one, other):
        attention = model.model.layers[1].self_attn
        setattr(attention, name, Adapted(getattr(attention, name)))
    same(one, other, prompt(), tokens=8)


@pytest.mark.parametrize("length", [1, 7, 510, 1022])
def test_tokens_after_a_long_text_keep_their_bits(folder: Path, length: int) -> None:
    model = load_moe(folder, "4MiB", dtype=torch.bfloat16)
    same(stock(folder, torch.bfloat16), model, prompt(1, length), tokens=8)


def attended_by_pytorch(model: Any, **inputs: Tensor) -> int:
    """How many layers' attention of a token PyTorch computes, after a text of 12 tokens."""
    with torch.no_grad():
        cache = model(input_ids=prompt()).past_key_values
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(input_ids=prompt(1, 1), past_key_values=cache, **inputs)
    return sum(event.name == "aten::scaled_dot_product_attention" for event in profile.events() or ())


def test_a_token_is_attended_for_here_unless_something_is_masked(folder: Path) -> None:
    model = load_moe(folder, "1MiB", dtype=torch.bfloat16)
    layers, config = model.config.num_hidden_layers, model.config
    shape = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert attended_by_pytorch(model) == (0 if attends(*shape) else layers)
    padded = torch.ones(1, 13, dtype=torch.long)
    padded[0, :3] = 0
    assert attended_by_pytorch(model, attention_mask=padded) == layers


def test_modules_stay_what_they_were(folder: Path) -> None:
    is_reproduced = bitwise.reproduces(64) and normalises(128) and normalises(16, 4) and turns(16)
    if not (is_reproduced and attends(4, 2, 16) and routes(8, 4)):
        pytest.skip("PyTorch computes in another order on this processor")
    model = stock(folder, torch.bfloat16)
    kinds = [type(each) for each in model.modules()]
    names = {"Linear", "Qwen3MoeRMSNorm", "Qwen3MoeAttention", "Qwen3MoeForCausalLM"}
    assert hasten(model) == sum(each.__name__ in names for each in kinds) == 13 + 13 + 3 + 1
    assert hasten(model) == 0
    assert [type(each).__name__ for each in model.modules()] == [each.__name__ for each in kinds]
    assert all(isinstance(each, kind) for each, kind in zip(model.modules(), kinds, strict=True))
    assert hasten(stock(folder)) == 0  # float32


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("count", [1, 3, 600])
def test_experts_of_a_token_together_have_the_bits_of_each(activation: str, count: int) -> None:
    torch.manual_seed(0)
    feed_forward = FeedForward(ACT2FN[activation])
    with torch.no_grad():
        x = torch.randn(1, 128).to(torch.bfloat16)
        stacked = (
            torch.randn(count, 128, 128).to(torch.bfloat16),
            torch.randn(count, 70, 64).to(torch.bfloat16),
        )
        experts = [
            {"gate_up_proj": gate_up, "down_proj": down} for gate_up, down in zip(*stacked, strict=True)
        ]
        together = feed_forward.of_each(x, experts)
        for row, parts in enumerate(experts):
            assert torch.equal(together[row : row + 1], feed_forward(x, parts))


def test_the_mode_multiplies_and_leaves_all_else(folder: Path) -> None:
    x, weight = torch.randn(5, 128).to(torch.bfloat16), torch.randn(9, 128).to(torch.bfloat16)
    calls: list[Tensor] = []
    with torch.no_grad(), Products():
        calls += [torch.nn.functional.linear(x, weight), x @ weight.t(), torch.cat([x, x])]
    assert torch.equal(calls[0], torch.nn.functional.linear(x, weight))
    assert torch.equal(calls[1], x @ weight.t())
    assert calls[2].shape == (10, 128)
