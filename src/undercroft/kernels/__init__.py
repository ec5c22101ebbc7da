"""Group-quantised linear layers: their weights as bytes, and the products with them."""

from undercroft.kernels.block import Block, Gated, feed_forwards
from undercroft.kernels.format import Format, packed_nbytes
from undercroft.kernels.linear import backend, expert, linear
from undercroft.kernels.quantise import dequantise, quantise

__all__ = [
    "Block",
    "Format",
    "Gated",
    "backend",
    "dequantise",
    "expert",
    "feed_forwards",
    "linear",
    "packed_nbytes",
    "quantise",
]
