"""A prompt read a chunk of tokens at a time, with other work in between. Read `generation/slots.py` next.

`Llama.prefill` goes through a prompt layer by layer, so that keys and values of one layer are in full
precision at a time. Here a chunk goes through all layers, so those of all layers are, in a buffer for one
prompt. Both compute the same; what this costs buys two things: reading can pause after any chunk, and what
has been read of a prompt is also the beginning of every other prompt that begins alike.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kivi_jax.cache.prompt_selectors import ALL_QUERIES
from kivi_jax.cache.segments import Segment
from kivi_jax.cache.strategy import CacheStrategy, KVCache
from kivi_jax.config import ModelConfig
from kivi_jax.mesh import add_replicas, is_first_replica
from kivi_jax.model.expected_queries import no_queries
from kivi_jax.model.llama import Llama
from kivi_jax.model.read import Read
from kivi_jax.model.reading import read_block
from kivi_jax.model.sharding import part_of

Reading = tuple[Read, ...]  # of one prompt: a layer each
Shared = tuple[tuple[Array, Array], ...]  # keys and values of a reading's first tokens


def blank_reading(config: ModelConfig, strategy: CacheStrategy, *, width: int, dtype: DTypeLike) -> Reading:
    """A buffer to read prompts into, with room for `width` tokens, those of a chunk's padding included."""
    shape = (1, config.num_kv_heads, width, config.head_dim)
    return tuple(
        Read(
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
            jnp.zeros(shape[:3], jnp.float32),
            no_queries(1, config.num_heads, config.head_dim)
            if strategy.asks_of(config.window_of(index))[1]
            else None,
        )
        for index in range(config.num_layers)
    )


def read_chunk(
    model: Llama,
    reading: Reading,
    tokens: Int[Array, "1 T"],
    *,
    first: Int[Array, ""],
    lengths: Int[Array, "1"],
    begins: Bool[Array, ""],
    strategy: CacheStrategy,
) -> tuple[Float[Array, "1 T D"], Reading]:
    """The residual stream of a prompt's tokens from number `first` on, and what is read with them.

    The prompt has `lengths` tokens in all; what the buffer holds before `first` are its own, or those of
    another one that begins alike. A chunk that `begins` a prompt forgets what another one's queries said.
    On a mesh, model and buffer are a device's own parts.
    """
    config, x = part_of(model.config, model.mesh), model.embedded(tokens)
    layers: list[Read] = []
    for index, (layer, read) in enumerate(zip(model.layers, reading, strict=True)):
        observed, expects = strategy.asks_of(config.window_of(index))
        if observed:  # a buffer's weights are of all replicas: only one of them goes on with what is known
            is_blank = begins | ~is_first_replica()
            read = read._replace(weights=jnp.where(is_blank, 0, read.weights))
        if expects:
            assert read.sums is not None
            read = read._replace(sums=type(read.sums)(*(jnp.where(begins, 0, x) for x in read.sums)))
        kind = config.first_like(index)
        x, read = read_block(layer, kind, x, read, first, lengths, config, observed=observed)
        if observed:
            read = read._replace(weights=add_replicas(read.weights))
        layers.append(read)
    return x, tuple(layers)


def hold_reading(
    config: ModelConfig,
    strategy: CacheStrategy,
    reading: Reading,
    lengths: Int[Array, "1"],
    *,
    width: int,
    context: int,
) -> KVCache:
    """The cache of a prompt that has been read, of at most `width` tokens, for a row of up to `context`.

    Its segments are as those of `width` = `context`, or begin as they do, with fewer slots.
    """
    layers: list[tuple[Segment, ...]] = []
    for index, read in enumerate(reading):
        window, kept = config.window_of(index), strategy.prompt
        keeps_all = window is not None or kept.keeps_all(width)
        most = width if keeps_all else kept.most(index, config.num_layers, width)
        part = Read(read.keys[:, :, :width], read.values[:, :, :width], read.weights[:, :, :width], read.sums)
        segments = strategy.hold_prompt(
            part.prompt(config, config.first_like(index), lengths),
            capacity=context + width - most,  # whatever is left out, a row may reach `context` tokens
            window=window,
            layer=index,
            layers=config.num_layers,
        )
        layers.append(segments)
    return KVCache(tuple(layers), lengths, strategy, context)


def copy_out(reading: Reading, width: int) -> Shared:
    """What has been read of the first `width` tokens."""
    return tuple((read.keys[:, :, :width], read.values[:, :, :width]) for read in reading)


def copy_in(reading: Reading, shared: Shared) -> Reading:
    """The buffer with what was read of another prompt at its beginning."""

    def write(held: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(held, new, 0, axis=2)

    return tuple(
        read._replace(keys=write(read.keys, keys), values=write(read.values, values))
        for read, (keys, values) in zip(reading, shared, strict=True)
    )


def sharable_tokens(config: ModelConfig, strategy: CacheStrategy, length: int) -> int:
    """Of how many of a prompt's first tokens what is read depends on nothing that follows.

    Not of those whose queries a selector observes, which are counted from the prompt's end. And RoPE of some
    kinds turns all tokens of a prompt that is longer than the trained context otherwise.
    """
    ropes = [rope for index in range(config.num_layers) if (rope := config.rope_of(index)) is not None]
    trained = (rope.original_max_position_embeddings or config.max_position_embeddings for rope in ropes)
    is_turned = length > min(trained, default=length) and any(
        r.kind in ("dynamic", "longrope") for r in ropes
    )
    if strategy.observed == ALL_QUERIES or strategy.expects or is_turned:
        return 0
    return max(length - max(strategy.observed, 1), 0)  # the last token's logits are always computed
