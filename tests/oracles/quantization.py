"""Packed tensors read one channel at a time, in float64."""

import numpy as np


def dequantize(words, scale, zero, *, bits, group_size, group_axis):
    """[B, K, S, H] of the arrays of a QuantizedTensor, as the drawing in `packing.py` says."""
    words, scale, zero = (np.asarray(x).astype(np.float64) for x in (words, scale, zero))
    planes = 8 // bits
    if group_axis == "token":
        batch, kv_heads, tokens, width = words.shape
    else:
        batch, kv_heads, pages, width, _ = words.shape
        tokens = pages * 32
    out = np.zeros((batch, kv_heads, tokens, width * planes))
    token = np.arange(tokens)
    for channel in range(width * planes):
        j, w = channel // width, channel % width
        if group_axis == "token":
            word = words[:, :, token, w]
            at = (token // group_size, channel)
        else:
            word = words[:, :, token // 32, w, token % 32]
            at = (token // 32, channel // group_size, token % 32)
        code = word.astype(np.int64) // 2 ** (bits * j) % 2**bits
        out[:, :, token, channel] = code * scale[:, :, *at] + zero[:, :, *at]
    return out
