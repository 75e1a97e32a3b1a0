"""Packed tensors and attention over them. Knows no model and no cache policy.

Start with `packing.py` (the bit layout), then `quantization.py`, `partials.py`, `quantized_attention/`.
"""

from pallas_kernels.packing import pack as pack
from pallas_kernels.packing import unpack as unpack
from pallas_kernels.partials import AttentionPartial as AttentionPartial
from pallas_kernels.partials import merge as merge
from pallas_kernels.partials import normalize as normalize
from pallas_kernels.quantization import QuantizedTensor as QuantizedTensor
from pallas_kernels.quantization import dequantize as dequantize
from pallas_kernels.quantization import quantize as quantize
from pallas_kernels.quantized_attention import quantized_attention as quantized_attention
