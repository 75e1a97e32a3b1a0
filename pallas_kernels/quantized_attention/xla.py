"""The definition of quantized attention, and its implementation wherever there is no kernel.

A loop over blocks of tokens unpacks one block of keys and values, attends, and folds the result into a
running `AttentionPartial`, so at most one block is ever dequantized.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.packing import PAGE
from pallas_kernels.partials import AttentionPartial, empty, merge
from pallas_kernels.partials import attend as attend_dense
from pallas_kernels.quantization import QuantizedTensor, dequantize


def newest_token(end: Int[Array, "B"], slot: Int[Array, "S"], slots: int) -> Int[Array, "B S"]:
    """The newest token before `end` that lives in each slot of a ring of `slots`; negative if none."""
    last = end[:, None] - 1
    return last - (last - slot[None, :]) % slots


def attend(
    query: Float[Array, "B N H"],
    key: QuantizedTensor,
    value: QuantizedTensor,
    *,
    start: Int[Array, "B"],
    end: Int[Array, "B"],
    scale: float,
    block_elements: int = 1 << 20,
) -> AttentionPartial:
    """See `quantized_attention`; about `block_elements` keys are dequantized at a time."""
    batch, kv_heads, slots, dim = key.shape
    block = _block_tokens(slots, key.group_size, block_elements // (batch * kv_heads * dim))
    # Rows that have not wrapped around fill slots from 0 on; the rest of the ring is not visited.
    blocks = (jnp.minimum(end.max(), slots) + block - 1) // block

    def body(i: Array, running: AttentionPartial) -> AttentionPartial:
        slot = i * block + jnp.arange(block)
        token = newest_token(end, slot, slots)
        visible = token >= jnp.maximum(start, 0)[:, None]
        keys = dequantize(_slice(key, i * block, block))
        values = dequantize(_slice(value, i * block, block))
        return merge(running, attend_dense(query, keys, values, visible[:, None], scale=scale))

    return jax.lax.fori_loop(0, blocks, body, empty(query.shape))


def _block_tokens(slots: int, group_size: int, at_most: int) -> int:
    """The largest divisor of `slots` of whole pages and groups that is not above `at_most`."""
    unit = math.lcm(PAGE, group_size)
    sizes = [n * unit for n in range(1, slots // unit + 1) if slots % (n * unit) == 0]
    return max([size for size in sizes if size <= at_most], default=unit)


def _slice(tensor: QuantizedTensor, start: Array, tokens: int) -> QuantizedTensor:
    def cut(part: Array, axis: int) -> Array:
        per_row = part.shape[axis] * tokens // tensor.shape[-2]
        return jax.lax.dynamic_slice_in_dim(part, start * per_row // tokens, per_row, axis)

    axis = 2
    return QuantizedTensor(
        cut(tensor.words, axis),
        cut(tensor.scale, axis),
        cut(tensor.zero, axis),
        tensor.bits,
        tensor.group_size,
        tensor.group_axis,
    )
