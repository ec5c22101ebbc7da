"""Ways to multiply activations with one weight: ours, and PyTorch's own, over more memory than the caches hold.

It knows what each way needs and how many bytes of weights it reads; it judges nothing. Invariant: a sample multiplies
with every copy of the weight once, so that none is in a cache when its turn comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from undercroft import kernels
from undercroft.kernels.format import BLOCK_ROWS

READ = "torch fp32"
"""The way whose rate of reading weights is the yardstick."""

OURS = ("int8", "int4", "int4-g128", "int2", "int2-g128")
Weight = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One way.

    Attributes:
        multiply: activations with a weight.
        weights: equal copies; tensors that one product reads.
        dtype: of the activations.
    """

    multiply: Callable[[Tensor, Weight], Tensor]
    weights: list[Weight]
    dtype: torch.dtype = torch.bfloat16

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a product reads, scales included."""
        return sum(part.nbytes for part in self.weights[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one product took.

    Attributes:
        seconds: of the clock on the wall.
        nbytes: of the weights it read.
    """

    seconds: float
    nbytes: int

    @property
    def rate(self) -> float:
        """Bytes of weights per second."""
        return self.nbytes / self.seconds


def products(rows: int, columns: int, working_set: int) -> dict[str, Product]:
    """All ways to multiply with a weight [rows, columns], each with copies of `working_set` bytes in all."""

    def over(multiply: Callable[[Tensor, Weight], Tensor], *weight: Tensor) -> Product:
        copies = -(-working_set // sum(part.nbytes for part in weight))
        return Product(
            multiply=multiply, weights=[tuple(part.clone() for part in weight) for _ in range(copies)]
        )

    dense = torch.randn(rows, columns) / columns**0.5
    ways = {READ: Product(multiply=_dense, weights=over(_dense, dense).weights, dtype=torch.float32)}
    codes, scale = torch.randint(-127, 128, (rows, columns), dtype=torch.int8), torch.rand(rows).bfloat16()
    ways["torch int8"] = over(_torch_int8, codes, scale)
    nibbles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() & 15, 2)
    for group in (32, 128):
        scales = torch.rand(columns // group, rows, 2).bfloat16()
        ways[f"torch int4-g{group}"] = over(_torch_int4(group), nibbles, scales)
    for name in OURS:
        format = kernels.Format.parse(name)
        block = kernels.quantise(dense[:BLOCK_ROWS], format)
        ways[name] = over(_ours(format, rows), block.repeat(-(-rows // BLOCK_ROWS)))
    return ways


def sample(product: Product, batch: int, columns: int) -> Sample:
    """Multiply `batch` rows of activations with every copy of the weight once; the mean of them all."""
    x = torch.randn(batch, columns).to(product.dtype)
    with torch.inference_mode():
        begin = time.perf_counter()
        for weight in product.weights:
            product.multiply(x, weight)
        seconds = time.perf_counter() - begin
    return Sample(seconds=seconds / len(product.weights), nbytes=product.nbytes)


def _dense(x: Tensor, weight: Weight) -> Tensor:
    return functional.linear(x, weight[0])


def _torch_int8(x: Tensor, weight: Weight) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(x, *weight)


def _torch_int4(group: int) -> Callable[[Tensor, Weight], Tensor]:
    def multiply(x: Tensor, weight: Weight) -> Tensor:
        codes, scales = weight
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, scales)

    return multiply


def _ours(format: kernels.Format, rows: int) -> Callable[[Tensor, Weight], Tensor]:
    return lambda x, weight: kernels.linear(x, weight[0], format, rows)
