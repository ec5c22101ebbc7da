"""Training with spilling is bit-identical for real architectures: small random models of transformers."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PretrainedConfig

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
GPT2 = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
T5 = {
    "decoder_start_token_id": 0,
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
}

CONFIGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "GPT2Config": (AutoModelForCausalLM, GPT2),
    "BertConfig": (AutoModelForMaskedLM, SMALL),
    "T5Config": (AutoModelForSeq2SeqLM, T5),
    "LlamaConfig": (AutoModelForCausalLM, SMALL),
    "Qwen3Config": (AutoModelForCausalLM, SMALL | {"tie_word_embeddings": True}),
    "Gemma2Config": (AutoModelForCausalLM, SMALL | {"sliding_window": 8}),
    "MixtralConfig": (AutoModelForCausalLM, SMALL | EXPERTS),
    "GptOssConfig": (AutoModelForCausalLM, SMALL | EXPERTS | {"sliding_window": 8}),
}


def config_of(name: str, **changes: Any) -> PretrainedConfig:
    return getattr(transformers, name)(**(CONFIGS[name][1] | changes))


def build_of(name: str, **changes: Any) -> Callable[[], nn.Module]:
    kind = CONFIGS[name][0]
    return lambda: kind.from_config(config_of(name, **changes)).train()


def tokens_of(x: Tensor) -> dict[str, Tensor]:
    ids = (x.detach().abs() * 1000).long()[:2, :24] % 95 + 1
    mask = torch.ones_like(ids)
    mask[0, 18:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def language_modelling(
    model: nn.Module, inputs: list[Tensor], context: AbstractContextManager[object]
) -> Iterable[object]:
    with context:
        output = model(**tokens_of(inputs[0]))
        output.loss.backward()
    return [output.loss, output.logits]


@pytest.mark.parametrize("name", CONFIGS)
def test_architectures(bench: Any, name: str) -> None:
    bench.check(build_of(name), language_modelling)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations(bench: Any, attention: str) -> None:
    bench.check(build_of("LlamaConfig", attn_implementation=attention), language_modelling)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(bench: Any, reentrant: bool) -> None:
    def build() -> nn.Module:
        model = build_of("LlamaConfig")()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    bench.check(build, language_modelling)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
def test_adapters(bench: Any) -> None:
    from peft import LoraConfig, get_peft_model

    def build() -> nn.Module:
        config = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(build_of("Qwen3Config")(), config)

    bench.check(build, language_modelling)


def test_brain_floats(bench: Any) -> None:
    bench.check(lambda: build_of("LlamaConfig")().to(torch.bfloat16), language_modelling)
