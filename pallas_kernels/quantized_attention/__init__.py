"""Decode attention that reads packed keys and values. Start with `api.py`."""

from pallas_kernels.quantized_attention.api import quantized_attention as quantized_attention
