"""Texts that the bundled models were not trained on and that lie on every machine on which they run.

It knows where text is; no tokenizer and no model. Exercises are held out by their facts (`skills`); PyTorch's own prose
is held out as a whole, for nothing of it is in the corpus of `lab/moe_corpus.py`. It changes with PyTorch's version, so
perplexities are compared within a run, not between machines.
"""

from __future__ import annotations

import inspect
from random import Random

from torch import nn

from undercroft.bundled.skills import examination

_MODULES = (nn.Linear, nn.Embedding, nn.CrossEntropyLoss, nn.LSTM, nn.MultiheadAttention, nn.Transformer)


def held_out() -> dict[str, list[str]]:
    """Documents by domain: 160 worked exercises, and some of PyTorch's descriptions of its modules."""
    paper = examination(20, seed=11)
    Random(11).shuffle(paper)
    return {
        "exercises": [f"Question: {each.question}\nAnswer: {each.solution}" for each in paper],
        "prose": [inspect.getdoc(module) or "" for module in _MODULES],
    }
