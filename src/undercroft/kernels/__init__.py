"""Group-quantised linear layers: their weights as bytes, and the products with them."""

from undercroft.kernels.block import Block, ExpertKernel, Gated, add_up, feed_forwards, mix
from undercroft.kernels.format import Format, packed_nbytes
from undercroft.kernels.linear import Weight, backend, expert, linear
from undercroft.kernels.quantise import dequantise, quantise

__all__ = [
    "Block",
    "ExpertKernel",
    "Format",
    "Gated",
    "Weight",
    "add_up",
    "backend",
    "dequantise",
    "expert",
    "feed_forwards",
    "linear",
    "mix",
    "packed_nbytes",
    "quantise",
]
