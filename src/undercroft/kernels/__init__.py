"""Group-quantised linear layers: their weights as bytes, and the products with them."""

from undercroft.kernels.format import Format, packed_nbytes
from undercroft.kernels.linear import backend, expert, linear
from undercroft.kernels.quantise import dequantise, quantise

__all__ = ["Format", "backend", "dequantise", "expert", "linear", "packed_nbytes", "quantise"]
