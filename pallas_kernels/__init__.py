"""Packed tensors and attention over them. Knows no model and no cache policy.

Start with `quantize/packing.py` (the bit layout), then `quantize/quantization.py`, `partials.py`,
`quantized_attention/`, and `residual/`, whose kernels write to a cache.
"""

from pallas_kernels.partials import AttentionPartial as AttentionPartial
from pallas_kernels.partials import merge as merge
from pallas_kernels.partials import normalize as normalize
from pallas_kernels.quantize.packing import pack as pack
from pallas_kernels.quantize.packing import unpack as unpack
from pallas_kernels.quantize.quantization import QuantizedTensor as QuantizedTensor
from pallas_kernels.quantize.quantization import dequantize as dequantize
from pallas_kernels.quantize.quantization import quantize as quantize
from pallas_kernels.quantized_attention import quantized_attention as quantized_attention
