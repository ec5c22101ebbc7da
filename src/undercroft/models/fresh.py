"""A new, untrained model of a stock shape with a tokenizer of its own, made on the spot from some text.

For demonstrations and tests, where nothing may be downloaded. It knows transformers' Llama and tokenizers'
BPE. Invariant: the same text, shape and seed give the same files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_END = "<end>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The shape of a Llama.

    Attributes:
        layers, width, heads: of the transformer; its feed-forward blocks are four times as wide.
        vocabulary: the most tokens of its tokenizer; 257 are single bytes and the end.
        longest: the most tokens of a sequence.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    longest: int


def write_fresh_model(directory: Path, shape: Shape, texts: Iterable[str], *, seed: int = 0) -> int:
    """Write a model and its tokenizer to a folder; returns the number of its parameters."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_learn_tokens(texts, shape.vocabulary), eos_token=_END
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(shape, len(tokenizer)))
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return sum(weight.numel() for weight in model.parameters())


def _config(shape: Shape, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.longest,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )


def _learn_tokens(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
