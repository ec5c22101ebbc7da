"""The transformer that the training benchmarks use: GPT-2's shape, plain PyTorch, so that nothing else is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a GPT and of its batches, in fp32."""

    layers: int = 8
    hidden: int = 512
    heads: int = 8
    vocabulary: int = 8192
    sequence: int = 512
    batch: int = 4


class Block(nn.Module):
    """Pre-norm attention and MLP over (batch, sequence, hidden)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = shape.hidden
        self.heads = shape.heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.output = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """One layer: the same shape out as in."""
        batch, sequence, hidden = x.shape
        parts = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        query, key, value = (part.view(batch, sequence, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, sequence, hidden))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """A causal language model that returns its loss.

    Args:
        shape: the sizes.
        recompute: keep only the input of each layer and compute the rest again in backward.
    """

    def __init__(self, shape: Shape, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.positions = nn.Embedding(shape.sequence, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats; `ids` and `targets` are (batch, sequence) int64."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x: Tensor = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)  # pyright: ignore
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())
