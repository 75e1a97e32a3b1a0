"""Causal attention of a block of prompt tokens, with bounded memory. Read `llama.py` next.

The prompt attends in full precision (KIVI quantizes only what is stored). Scores exist for one block of
queries against one block of keys at a time; blocks of keys that no query may see are not visited.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.partials import NO_SCORE

KEY_BLOCK = 512  # tokens; fixed, so that the order of summation does not depend on the query block


def causal_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    *,
    first: Int[Array, ""],
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Attention of the tokens at positions first .. first + T - 1 over themselves and all before them.

    With a `window`, position t sees (t - window, t]. Slots of `key` past the last query are never read.
    """
    batch, tokens, heads, dim = query.shape
    kv_heads, slots = key.shape[1:3]
    block = min(KEY_BLOCK, slots)
    grouped = query.reshape(batch, tokens, kv_heads, heads // kv_heads, dim)
    position = first + jnp.arange(tokens)

    def visit(i: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, top, denom = running
        # The last block is moved back to fit; the slots it shares with the one before are masked.
        begin = jnp.minimum(i * block, slots - block)
        keys, values = (jax.lax.dynamic_slice_in_dim(x, begin, block, axis=2) for x in (key, value))
        slot = begin + jnp.arange(block)
        visible = (slot[None, :] <= position[:, None]) & (slot >= i * block)[None, :]
        if window is not None:
            visible &= slot[None, :] > position[:, None] - window
        visible = visible[None, None, None]
        score = jnp.einsum("btkgh,bksh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
        score = jnp.where(visible, score * dim**-0.5, NO_SCORE)
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
    out, _, denom = jax.lax.fori_loop(oldest // block, (first + tokens - 1) // block + 1, visit, nothing)
    out = out / denom[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(query.shape).astype(query.dtype)
