"""Causal attention of prompts, with bounded memory. Read `llama.py` next.

The prompt attends in full precision (KIVI quantizes only what is stored). Scores exist for one block of
queries against one block of keys at a time; blocks of keys that no query may see are not visited.
On NVIDIA GPUs, cuDNN's flash attention does the same for a whole prompt without writing the scores down.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.device import compute_capability, default_device
from pallas_kernels.partials import NO_SCORE

KEY_BLOCK = 512  # tokens; fixed, so that the order of summation does not depend on the query block


def flash_attention(
    query: Float[Array, "B P N H"],
    key: Float[Array, "B K P H"],
    value: Float[Array, "B K P H"],
    *,
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B P N H"]:
    """The output of `causal_attention` for a whole prompt, through `jax.nn.dot_product_attention`.

    Whole, because cuDNN's causal mask starts at token 0: a block that starts later would have to bring its
    mask, and cost what all pairs of tokens cost. The log-sum-exp that cuDNN returns through jax.nn is rounded
    to the query's 16 bits, too coarse to recover weights from: selectors use `causal_attention`.
    """
    return jax.nn.dot_product_attention(
        query,
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )


def flash_attention_from(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    *,
    first: Int[Array, ""],
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """The output of `causal_attention`, through `jax.nn.dot_product_attention`, which is given the mask.

    It costs what all pairs of a query and a slot cost. For few queries that is less than a loop over blocks
    of keys, of which a GPU starts every kernel anew and asks the host after each whether it was the last.
    """
    position, slot = first + jnp.arange(query.shape[1])[:, None], jnp.arange(key.shape[2])[None]
    visible = slot <= position
    if window is not None:
        visible &= slot > position - window
    # What is in slots that nobody sees may be another prompt's, and not a number.
    is_read = (slot[0] <= position[-1])[:, None]
    return jax.nn.dot_product_attention(
        query,
        *(jnp.where(is_read, x, 0).swapaxes(1, 2) for x in (key, value)),
        mask=visible[None, None],
        implementation=implementation,
    )


def has_flash(dtype: DTypeLike, dim: int) -> bool:
    """Whether cuDNN has flash attention for heads of `dim` channels on the default device."""
    capability = compute_capability(default_device())
    largest = 256 if capability >= 9 else 128
    return capability >= 8 and jnp.dtype(dtype).itemsize == 2 and dim <= largest and dim % 8 == 0


def causal_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    *,
    first: Int[Array, ""],
    window: int | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention of the tokens at positions first .. first + T - 1 over themselves and all before them.

    With a `window`, position t sees (t - window, t]. Slots of `key` past the last query are never read.
    Also returns the log-sum-exp of every query's scores, from which its weights can be had again.
    """
    batch, tokens, heads, dim = query.shape
    kv_heads, slots = key.shape[1:3]
    block = min(KEY_BLOCK, slots)
    grouped = query.reshape(batch, tokens, kv_heads, heads // kv_heads, dim)
    position = first + jnp.arange(tokens)

    def visit(i: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, top, denom = running
        score, visible, begin = _score_block(grouped, key, i, block, position, window)
        values = jax.lax.dynamic_slice_in_dim(value, begin, block, axis=2)
        new_top = jnp.maximum(top, score.max(-1))
        weight = jnp.where(visible, jnp.exp(score - new_top[..., None]), 0)
        decay = jnp.exp(top - new_top)
        added = jnp.einsum(
            "bkgts,bksh->bkgth", weight.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        return out * decay[..., None] + added, new_top, denom * decay + weight.sum(-1)

    shape = (batch, kv_heads, heads // kv_heads, tokens)
    nothing = (
        jnp.zeros((*shape, dim), jnp.float32),
        jnp.full(shape, NO_SCORE, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    oldest = jnp.zeros_like(first) if window is None else jnp.maximum(first - window + 1, 0)
    last = (first + tokens - 1) // block
    out, top, denom = jax.lax.fori_loop(oldest // block, last + 1, visit, nothing)
    out = (out / denom[..., None]).transpose(0, 3, 1, 2, 4).reshape(query.shape)
    log_sum_exp = (top + jnp.log(denom)).transpose(0, 3, 1, 2).reshape(query.shape[:3])
    return out.astype(query.dtype), log_sum_exp


def add_weights(
    total: Float[Array, "B K S"],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    log_sum_exp: Float[Array, "B T N"],
    observed: Bool[Array, "B T"],
    *,
    first: Int[Array, ""],
) -> Float[Array, "B K S"]:
    """`total` plus the softmax weights that the observed queries of a block give each token.

    Weights are summed over queries and over the query heads of a KV head. Arguments are those, and the
    log-sum-exp is that, of `causal_attention` without a window. Blocks with no observed query cost nothing.
    """
    batch, tokens, heads, dim = query.shape
    kv_heads, slots = key.shape[1:3]
    block = min(KEY_BLOCK, slots)
    shape = (batch, tokens, kv_heads, heads // kv_heads)
    grouped, position = query.reshape(*shape, dim), first + jnp.arange(tokens)
    norm = log_sum_exp.reshape(shape).transpose(0, 2, 3, 1)[..., None]

    def visit(i: Array, total: Array) -> Array:
        score, visible, begin = _score_block(grouped, key, i, block, position, None)
        counted = visible & observed[:, None, None, :, None]
        weight = jnp.where(counted, jnp.exp(score - norm), 0).sum((2, 3))
        held = jax.lax.dynamic_slice_in_dim(total, begin, block, axis=2)
        return jax.lax.dynamic_update_slice_in_dim(total, held + weight, begin, axis=2)

    blocks = jnp.where(observed.any(), (first + tokens - 1) // block + 1, 0)
    return jax.lax.fori_loop(0, blocks, visit, total)


def _score_block(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B K S H"],
    i: Int[Array, ""],
    block: int,
    position: Int[Array, "T"],
    window: int | None,
) -> tuple[Float[Array, "B K G T block"], Bool[Array, "1 1 1 T block"], Int[Array, ""]]:
    """Scaled scores against key block `i`, which are visible, and the block's first slot.

    The last block is moved back to fit; the slots it shares with the one before are not visible.
    """
    slots = key.shape[2]
    begin = jnp.minimum(i * block, slots - block)
    keys = jax.lax.dynamic_slice_in_dim(key, begin, block, axis=2)
    slot = begin + jnp.arange(block)
    visible = (slot[None, :] <= position[:, None]) & (slot >= i * block)[None, :]
    if window is not None:
        visible &= slot[None, :] > position[:, None] - window
    visible = visible[None, None, None]
    score = jnp.einsum("btkgh,bksh->bkgts", query, keys, preferred_element_type=jnp.float32)
    return jnp.where(visible, score * query.shape[-1] ** -0.5, NO_SCORE), visible, begin
