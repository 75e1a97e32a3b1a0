"""The definition of quantized attention, and its implementation wherever there is no kernel.

A loop over blocks of tokens dequantizes one block of keys and of values, attends, and folds the result
into a running `AttentionPartial`, so at most one block is ever dequantized.

Why it reads as it does, for XLA:CPU (measured on 4 Zen cores, jax 0.10.2, keys [1, 8, 32768, 128], 2 bits):

* A block is unpacked into rows that share one scale and one zero, with the row minor: keys as
  [groups, channels, tokens of a group], values as [runs of channels, tokens, channels of a run]. One fusion
  then reads bytes and writes scaled floats, and both products take that array as it lies. Unpacking into
  [tokens, channels] splits the minor axis inside the fusion, which LLVM no longer vectorizes: 2 to 3 times
  slower.
* The words are transposed inside that fusion, byte by byte; the floats, 16 times the bytes, never are.
* `lax.dot_general`, not `einsum`, which turns the operands around to save a transpose of the (tiny) result;
  XLA then finds no fast kernel for it: the whole of attention is 4x slower.
* About a million elements a block: a quarter of it is 10 to 40 % slower, twice of it no faster.

* Rows shorter than 32 vectorize badly. Where a run of value channels is (16, with 64 channels of 2 bits), the
  32 tokens of a page are the rows instead, as they lie in the words: twice as fast there, and up to twice as
  slow anywhere else.

So run, it has 0.8 to 1.3 times the speed of dense float32 attention there, and 0.4 to 1.05 times on two cores
of a virtual machine, where handing each of these small loops to the second core costs what it saves.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from pallas_kernels.partials import NO_SCORE, AttentionPartial, empty, merge, softmax_weights
from pallas_kernels.quantize.packing import PAGE
from pallas_kernels.quantize.quantization import QuantizedTensor
from pallas_kernels.residual.ring import Ring, Token, merge_residual, newest_token


def attend(
    query: Float[Array, "B N H"],
    key: QuantizedTensor,
    value: QuantizedTensor,
    *,
    start: Int[Array, "B"],
    end: Int[Array, "B"],
    scale: float,
    held_back: int = 0,
    residual: Ring | None = None,
    own: Token | None = None,
    block_elements: int = 1 << 20,
) -> AttentionPartial:
    """See `quantized_attention`; about `block_elements` keys are dequantized at a time."""
    batch, kv_heads, slots, dim = key.shape
    end = end - held_back
    unit = math.lcm(PAGE, key.group_size)
    block = _block_tokens(slots, unit, block_elements // (batch * kv_heads * dim))
    blocks = -(-slots // block)

    visible = newest_token(end, slots) >= jnp.maximum(start, 0)[:, None]
    # Only the blocks that some row needs are visited, wherever in the ring they are.
    needed = jnp.pad(visible.any(0), (0, blocks * block - slots)).reshape(blocks, block).any(-1)
    visit = jnp.argsort(~needed, stable=True)

    grouped = (query.astype(jnp.float32) * scale).reshape(batch, kv_heads, -1, dim)

    def body(i: Array, running: AttentionPartial) -> AttentionPartial:
        # The last block ends at the last slot. Slots that it shares with the block before it are masked.
        first = visit[i] * block
        at = jnp.minimum(first, slots - block)
        seen = jax.lax.dynamic_slice_in_dim(visible, at, block, 1)
        seen = seen & (at + jnp.arange(block) >= first)[None, :]
        part = _attend_block(grouped, _slice(key, at, block), _slice(value, at, block), seen)
        return merge(running, part)

    packed = jax.lax.fori_loop(0, needed.sum(), body, empty(query.shape))
    return merge_residual(packed, query, residual, own, start=start, scale=scale)


def _attend_block(
    query: Float[Array, "B K G H"], key: QuantizedTensor, value: QuantizedTensor, seen: Bool[Array, "B S"]
) -> AttentionPartial:
    batch, kv_heads, groups, dim = query.shape
    heads = kv_heads * groups

    keys = _unpack_keys(key)
    score = _matmul(_repeat_at(query, 2, keys.shape[2]), keys)
    score = score.swapaxes(2, 3).reshape(batch, kv_heads, groups, -1)
    score = jnp.where(seen[:, None, None, :], score, NO_SCORE)
    top, weight = softmax_weights(score)

    out = _weigh_runs(weight, value) if _run(value) >= PAGE else _weigh_pages(weight, value)
    return AttentionPartial(
        out.reshape(batch, heads, dim), top.reshape(batch, heads), weight.sum(-1).reshape(batch, heads)
    )


def _unpack_keys(key: QuantizedTensor) -> Float[Array, "B K groups H group"]:
    batch, kv_heads, tokens, dim = key.shape
    group = key.group_size
    words = key.words.reshape(batch, kv_heads, tokens // group, group, -1).swapaxes(3, 4)
    codes = _planes(words, 3, key.bits).reshape(batch, kv_heads, tokens // group, dim, group)
    return _scale(codes, key.scale[..., None], key.zero[..., None])


def _run(value: QuantizedTensor) -> int:
    """The longest stretch of channels inside one bit plane and one group."""
    return math.gcd(value.shape[3] * value.bits // 8, value.group_size)


def _weigh_runs(weight: Float[Array, "B K G S"], value: QuantizedTensor) -> Float[Array, "B K G H"]:
    """weight . value, with values unpacked into rows that are runs of channels."""
    batch, kv_heads, tokens, dim = value.shape
    words, run = dim * value.bits // 8, _run(value)

    def per_run(groups: Array) -> Array:
        column = groups.swapaxes(2, 3).reshape(batch, kv_heads, -1, tokens, 1)
        return jnp.repeat(column, value.group_size // run, axis=2)

    rows = value.words.reshape(batch, kv_heads, tokens // PAGE, words // run, run, PAGE)
    rows = rows.transpose(0, 1, 3, 2, 5, 4).reshape(batch, kv_heads, words // run, tokens, run)
    codes = _planes(rows, 2, value.bits).reshape(batch, kv_heads, dim // run, tokens, run)
    values = _scale(codes, per_run(value.scale), per_run(value.zero))
    out = _matmul(_repeat_at(weight, 2, values.shape[2]), values).swapaxes(2, 3)
    return out.reshape(*weight.shape[:3], dim)


def _weigh_pages(weight: Float[Array, "B K G S"], value: QuantizedTensor) -> Float[Array, "B K G H"]:
    """weight . value, with values unpacked into rows that are the tokens of a page."""
    batch, kv_heads, tokens, dim = value.shape
    pages, group = tokens // PAGE, value.group_size

    def per_token(groups: Array) -> Array:
        return groups.reshape(batch, kv_heads, pages, dim // group, 1, PAGE)

    words = value.words.reshape(batch, kv_heads, pages, dim * value.bits // 8, PAGE)
    codes = _planes(words, 3, value.bits).reshape(batch, kv_heads, pages, dim // group, group, PAGE)
    values = _scale(codes, per_token(value.scale), per_token(value.zero))
    values = values.reshape(batch, kv_heads, pages, dim, PAGE)
    weight = weight.reshape(*weight.shape[:3], pages, PAGE)
    # Values on the left, as they lie: 1.5 times the speed of weight . value.
    return jnp.einsum("bkpht,bkgpt->bkgh", values, weight, preferred_element_type=jnp.float32)


def _planes(words: UInt8[Array, "..."], axis: int, bits: int) -> UInt8[Array, "..."]:
    """`packing.plane` for every bit field at once, on a new `axis`."""
    words = jnp.expand_dims(words, axis)
    shift = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    shift = jnp.expand_dims(shift, [d for d in range(words.ndim) if d != axis])
    return (words >> shift) & jnp.uint8(2**bits - 1)


def _scale(codes: UInt8[Array, "..."], scale: Float[Array, "..."], zero: Float[Array, "..."]) -> Array:
    return codes.astype(jnp.float32) * scale.astype(jnp.float32) + zero.astype(jnp.float32)


def _matmul(x: Float[Array, "B K C M N"], y: Float[Array, "B K C N R"]) -> Float[Array, "B K C M R"]:
    lead = (0, 1, 2)
    return jax.lax.dot_general(x, y, (((4,), (3,)), (lead, lead)), preferred_element_type=jnp.float32)


def _repeat_at(x: Array, axis: int, times: int) -> Array:
    x = jnp.expand_dims(x, axis)
    return jnp.broadcast_to(x, (*x.shape[:axis], times, *x.shape[axis + 1 :]))


def _block_tokens(slots: int, unit: int, at_most: int) -> int:
    """Tokens a block, a multiple of `unit`: as few blocks of `at_most` as cover `slots`, then evenly sized.

    `slots` need not be a multiple of it. Divisors of `slots` would do without a mask for the overlap, but
    where they are small (a prime number of units) the loop would launch thousands of tiny blocks.
    """
    units = slots // unit
    blocks = -(-units // max(1, at_most // unit))
    return -(-units // blocks) * unit


def _slice(tensor: QuantizedTensor, start: Array, tokens: int) -> QuantizedTensor:
    """Tokens [start, start + tokens) of a [B, K, S, H] tensor; both multiples of a page and a group."""
    slots = tensor.shape[2]

    def cut(part: Array) -> Array:
        tokens_per_row = slots // part.shape[2]
        return jax.lax.dynamic_slice_in_dim(part, start // tokens_per_row, tokens // tokens_per_row, 2)

    parts = {name: cut(getattr(tensor, name)) for name in ("words", "scale", "zero")}
    return dataclasses.replace(tensor, **parts)
