"""One layer reads a prompt: block by block, or all of it at once. Read `llama.py` next.

Layers that differ in their parameters alone are like one another, and share a compiled program.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kivi_jax.cache.prompt_selectors import ALL_QUERIES, Prompt
from kivi_jax.cache.segments import round_up
from kivi_jax.config import ModelConfig
from kivi_jax.mesh import add_replicas
from kivi_jax.model.attention import (
    add_weights,
    causal_attention,
    flash_attention,
    flash_attention_from,
    has_flash,
)
from kivi_jax.model.expected_queries import add_queries, no_queries
from kivi_jax.model.layer import Layer
from kivi_jax.model.read import Read
from kivi_jax.model.rope import rotation
from pallas_kernels.pytree import Flat

BLOCK = 512  # tokens of a row that are processed together, unless somebody says otherwise
_FLASH_TOKENS = 2048  # of all rows, where a GPU's matrix products are to be busy


def default_block(rows: int, tokens: int, *, flash: bool) -> int:
    """Tokens of a row that are processed together: few, but with flash attention as many as keep a GPU busy.

    There the blocks are of about one size, so that next to nothing is padding.
    """
    if not flash:
        return BLOCK
    blocks = -(-tokens // max(BLOCK, _FLASH_TOKENS // rows))
    return round_up(-(-tokens // blocks), 128)


@functools.partial(jax.jit, static_argnames=("index", "config", "observed"))
def read_block(
    layer: Layer,
    index: int,
    x: Float[Array, "B T D"],
    read: Read,
    first: Int[Array, ""],
    lengths: Int[Array, "B"],
    config: ModelConfig,
    *,
    observed: int,
) -> tuple[Array, Read]:
    """The residual stream of tokens `first` .. first + T - 1 after a layer like number `index`.

    They attend only to themselves and what has been `read` before, which they join. Of the last `observed`
    queries of a row of `lengths` tokens in all (0: none, `ALL_QUERIES`) the weights are summed.
    """
    position = first + jnp.arange(x.shape[1])[None]
    query, key, value = layer.project(x, rotation(config, index, lengths, position))
    keys, values, weights, sums = read
    if sums is not None:  # the same product again: XLA computes it once
        sums = add_queries(sums, layer.project(x, lambda x: x)[0], position < lengths[:, None])
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(held, new.swapaxes(1, 2), first, axis=2)
        for held, new in ((keys, key), (values, value))
    )
    window = config.window_of(index)
    if not observed and has_flash(query.dtype, config.head_dim):
        attended = flash_attention_from(query, keys, values, first=first, window=window)
        return layer.finish(x, attended), Read(keys, values, weights, sums)
    attended, log_sum_exp = causal_attention(query, keys, values, first=first, window=window)
    if observed:
        oldest = jnp.zeros_like(lengths) if observed == ALL_QUERIES else lengths - observed
        seen = (position >= oldest[:, None]) & (position < lengths[:, None])
        weights = add_weights(weights, query, keys, log_sum_exp, seen, first=first)
    return layer.finish(x, attended), Read(keys, values, weights, sums)


@functools.partial(
    jax.jit, static_argnames=("index", "config", "block", "observed", "expects"), donate_argnames=("x",)
)
def read_by_blocks(
    flat: Flat[Layer],
    index: int,
    x: Float[Array, "B P D"],
    lengths: Int[Array, "B"],
    turn: Int[Array, ""],
    config: ModelConfig,
    block: int,
    *,
    observed: int,
    expects: bool,
) -> tuple[Array, Prompt]:
    """The residual stream after a layer like number `index`, and what it holds of the prompt, block by block.

    A block attends only to itself and what is before it, so one pass over the blocks computes keys and
    values, attends and replaces the stream in place. See `read_block` for `observed`; if a selector `expects`
    them, the queries before RoPE are summed, too. `turn` is 0, known when a layer may begin.
    """
    layer, (batch, padded) = flat.tree(), x.shape[:2]
    # Zeros, but computed from the `turn`: the compiler makes constants of all layers at the start.
    blank = turn.astype(x.dtype)
    store = jnp.full((batch, config.num_kv_heads, padded, config.head_dim), blank)
    weights = jnp.full(store.shape[:3], blank.astype(jnp.float32))
    sums = no_queries(batch, config.num_heads, config.head_dim) if expects else None

    def advance(i: Array, state: tuple[Array, Read]) -> tuple[Array, Read]:
        x, read = state
        here = jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=1)
        here, read = read_block(layer, index, here, read, i * block, lengths, config, observed=observed)
        return jax.lax.dynamic_update_slice_in_dim(x, here, i * block, axis=1), read

    x, read = jax.lax.fori_loop(0, padded // block, advance, (x, Read(store, store, weights, sums)))
    if observed:
        read = read._replace(weights=add_replicas(read.weights))
    return x, read.prompt(config, index, lengths)


@functools.partial(jax.jit, static_argnames=("index", "config", "block"), donate_argnames=("x",))
def read_whole(
    flat: Flat[Layer],
    index: int,
    x: Float[Array, "B P D"],
    lengths: Int[Array, "B"],
    turn: Int[Array, ""],
    config: ModelConfig,
    block: int,
) -> tuple[Array, Prompt]:
    """As `read_by_blocks` without observed queries, where flash attention reads a whole prompt at once.

    Projections and the MLP are still done block by block. The queries of all tokens, and what they attended
    to, are as large as the residual stream each.
    """
    layer, (batch, padded) = flat.tree(), x.shape[:2]
    blank = turn.astype(x.dtype)
    held = jnp.full((batch, config.num_kv_heads, padded, config.head_dim), blank)
    asked = jnp.full((batch, padded, config.num_heads, config.head_dim), blank)

    def project(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        first = i * block
        rotate = rotation(config, index, lengths, first + jnp.arange(block)[None])
        here = jax.lax.dynamic_slice_in_dim(x, first, block, axis=1)
        query, key, value = layer.project(here, rotate)
        new = (query, key.swapaxes(1, 2), value.swapaxes(1, 2))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(all_blocks, one, first, axis)
            for all_blocks, one, axis in zip(state, new, (1, 2, 2), strict=True)
        )

    query, keys, values = jax.lax.fori_loop(0, padded // block, project, (asked, held, held))
    attended = flash_attention(query, keys, values, window=config.window_of(index))

    def finish(i: Array, x: Array) -> Array:
        here, seen = (jax.lax.dynamic_slice_in_dim(a, i * block, block, axis=1) for a in (x, attended))
        return jax.lax.dynamic_update_slice_in_dim(x, layer.finish(here, seen), i * block, axis=1)

    x = jax.lax.fori_loop(0, padded // block, finish, x)
    weights = jnp.zeros(keys.shape[:3])
    return x, Prompt(keys, values, weights, lengths)
