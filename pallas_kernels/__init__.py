"""Packed tensors and attention over them. Knows no model and no cache policy.

Start with `quantize/packing.py` (the bit layout), then `quantize/quantization.py`, `partials.py`,
`quantized_attention/`, and `residual/` and `pool/`, whose kernels write to a cache.
"""

from pallas_kernels.partials import AttentionPartial, merge, normalize
from pallas_kernels.quantize.packing import pack, unpack
from pallas_kernels.quantize.quantization import QuantizedTensor, dequantize, quantize
from pallas_kernels.quantized_attention import quantized_attention

__all__ = [
    "AttentionPartial",
    "QuantizedTensor",
    "dequantize",
    "merge",
    "normalize",
    "pack",
    "quantize",
    "quantized_attention",
    "unpack",
]
