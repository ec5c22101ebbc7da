"""Traces of models that do not exist: routing with as much order in it as is asked for.

Pure, and the same for the same seed. Real routers favour some experts (Zipf), stay with those of the last token (a
Markov chain), and favour others in another text (a switch of domain); with none of the three routing is pure
chance, at which no policy can do better than any other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from undercroft.moe.trace import Trace


def synthetic_trace(
    *,
    layers: int = 8,
    experts: int = 32,
    used: int = 4,
    prompt: int = 16,
    tokens: int = 128,
    skew: float = 1.0,
    stickiness: float = 1.0,
    domain_tokens: int = 64,
    expert_nbytes: int = 3 * 4096,
    seed: int = 0,
) -> Trace:
    """A prompt and the tokens after it.

    Args:
        layers: with experts.
        experts: in each layer.
        used: by a token.
        prompt: tokens of the prefill, which is one forward.
        tokens: decoded.
        skew: exponent of Zipf's law for how popular experts are; 0 makes all alike.
        stickiness: what having been used by the last token adds to an expert's logit.
        domain_tokens: after so many tokens other experts become the popular ones.
        expert_nbytes: of each expert.
        seed: of all randomness.
    """
    random = np.random.default_rng(seed)
    total = prompt + tokens
    chosen = np.empty((total, layers, used), dtype=np.int32)
    weights = np.empty((total, layers, used))
    bonus = np.zeros((layers, experts))
    logits = np.zeros((layers, experts))
    for token in range(total):
        if token % domain_tokens == 0:
            logits = _popularity(random, layers, experts, skew)
        scores = logits + bonus + random.gumbel(size=logits.shape)
        order = np.argsort(-scores, axis=1)[:, :used]
        chosen[token] = order
        weights[token] = _softmax(np.take_along_axis(scores, order, axis=1))
        bonus[:] = 0
        np.put_along_axis(bonus, order, stickiness, axis=1)
    return _trace(chosen, weights, prompt, experts, expert_nbytes)


def _popularity(random: np.random.Generator, layers: int, experts: int, skew: float) -> NDArray[np.float64]:
    """Logits that fall with a rank drawn anew for each layer."""
    ranks = random.permuted(np.tile(np.arange(1, experts + 1), (layers, 1)), axis=1)
    return -skew * np.log(ranks)


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _trace(
    chosen: NDArray[np.int32], weights: NDArray[np.float64], prompt: int, experts: int, expert_nbytes: int
) -> Trace:
    """Rows as a run would write them: a prompt layer by layer, then token by token."""
    total, layers, used = chosen.shape
    token, layer = np.divmod(np.arange(total * layers, dtype=np.int32), layers)
    head = prompt * layers
    layer[:head], token[:head] = np.divmod(np.arange(head, dtype=np.int32), max(prompt, 1))
    return Trace(
        layers=layers,
        experts=experts,
        used=used,
        turn=np.zeros_like(token),
        phase=(token >= prompt).astype(np.int32),
        step=token,
        layer=layer,
        expert=chosen[token, layer],
        weight=weights[token, layer].reshape(-1, used),
        expert_nbytes=dict.fromkeys(range(layers), expert_nbytes),
    )
