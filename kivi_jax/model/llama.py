"""The decoder of every family: parameters, and the three ways to run it. Read `generation/generate.py` next.

Modules hold `nnx.Param`s and static config, are built once and then only read. The cache is an ordinary
pytree that goes in and comes out: nothing here is mutated, so plain `jax.jit` is safe.

    model(tokens)                      logits of every position; no cache; differentiable
    model.prefill(tokens, lengths)     reads prompts into a cache; logits of each row's last token
    model.decode(token, cache)         one token per row against the cache
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kivi_jax.cache import strategy as caches
from kivi_jax.cache.names import strategy_of
from kivi_jax.cache.prompt_selectors import ALL_QUERIES, Prompt
from kivi_jax.cache.segments import Segment, Step, attend_token
from kivi_jax.cache.strategy import CacheStrategy, KVCache
from kivi_jax.checks import instance, whole
from kivi_jax.config import ModelConfig
from kivi_jax.mesh import add_parts, add_replicas, first_row_of, join_parts
from kivi_jax.model.attention import add_weights, causal_attention, flash_attention, has_flash
from kivi_jax.model.expected_queries import add_queries, no_queries
from kivi_jax.model.inputs import (
    PerRow,
    Prompts,
    note_room,
    read_active,
    read_prompts,
    read_token,
    read_tokens,
    room_left,
)
from kivi_jax.model.layer import Layer, RMSNorm, linear
from kivi_jax.model.ordering import after
from kivi_jax.model.read import Read
from kivi_jax.model.rope import rotation
from kivi_jax.model.sharding import over_mesh, part_of
from pallas_kernels.partials import merge, normalize


class Llama(nnx.Module):
    """A Llama-like decoder: see `ModelConfig` for what varies between families.

    On a `mesh`, parameters lie as `sharding.py` says, and every device computes its own part.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        """Create randomly initialized parameters of `dtype`; converters overwrite them."""
        self.config = config
        self.mesh: Mesh | None = None
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List[Layer](Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers))
        self.norm = RMSNorm(config, config.hidden_size, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = linear(False, dtype, rngs)(config.hidden_size, config.vocab_size)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Float32 logits of every position. No cache; differentiable; memory grows with T * V.

        Raises:
            ValueError: tokens are no rows of numbers; or, outside of a trace, not in the vocabulary.
        """
        tokens = read_tokens(tokens, vocab_size=self.config.vocab_size)
        return _forward(self, tokens) if self.mesh is None else _forward_on_mesh(self, tokens)

    def prefill(
        self,
        tokens: Prompts,
        lengths: PerRow,
        *,
        cache: CacheStrategy | str,
        capacity: int,
        block_tokens: int = 512,
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Read right-padded prompts: logits of each row's last token, and the cache.

        Attention is over the full-precision prompt. Each layer's keys and values are compressed before
        the next layer runs, and everything inside a layer is done `block_tokens` tokens at a time, so the
        peak is the compressed cache, one layer's keys and values, the hidden states and one block; with
        cuDNN's flash attention also a layer's queries and what they attended to, each as large as the hidden
        states. The result does not depend on `block_tokens`. Compiled once per shape and strategy.

        Args:
            tokens: token ids; what stands at and after a row's length is ignored.
            lengths: tokens of each row, from 1 to P.
            cache: how to hold them: a strategy, or its name ("kivi2").
            capacity: the number of tokens a row may reach while decoding, at least P.
            block_tokens: tokens of a row that are processed together.

        Raises:
            ValueError: shapes do not fit together, or the strategy does not fit the model; outside of a trace
                also where lengths or token ids are out of range.
        """
        capacity, block_tokens = whole("capacity", capacity), whole("block_tokens", block_tokens)
        tokens, lengths = read_prompts(tokens, lengths, vocab_size=self.config.vocab_size)
        if tokens.shape[1] == 0:
            raise ValueError("prompts must have at least one token")
        if capacity < tokens.shape[1]:
            raise ValueError(f"{capacity=} must be at least the prompt's {tokens.shape[1]} tokens")
        if block_tokens <= 0:
            raise ValueError(f"{block_tokens=} must be positive")
        strategy = strategy_of(cache)
        strategy.check(self.config)
        return _prefill(self, tokens, lengths, strategy, capacity, block_tokens)

    def decode(
        self, token: PerRow, cache: KVCache, active: Bool[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Append one token per row: float32 logits for the one after it, and the new cache.

        The cache passed in is consumed: its memory becomes the new cache's. Rows where `active` is false
        append nothing, and their logits mean nothing.

        Tokens on a device are not asked for: one outside of the vocabulary is not refused, and the row's
        logits mean nothing. Under a caller's `jit` that holds for rows beyond `capacity`, too.

        Raises:
            ValueError: the cache was consumed before or is another model's, a row that takes a token is full,
                there is not one token per row, or a token that the host holds is not in the vocabulary.
        """
        instance("cache", cache, KVCache, "pass what prefill or decode gave")
        rows = cache.lengths.shape[0]
        token = read_token(token, rows=rows, vocab_size=self.config.vocab_size)
        active = read_active(active, rows=rows)
        room = room_left(cache, active)
        if active is None:
            active = jnp.ones(token.shape, bool)
        logits, grown = _decode(self, token, cache, active)
        return logits, note_room(grown, None if room is None else room - 1)

    def embedded(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """The residual stream before the first layer."""
        x, multiplier = self._looked_up(tokens), self.config.embedding_multiplier
        return x if multiplier == 1 else x * jnp.asarray(multiplier, x.dtype)  # rounded, as Gemma does

    def _looked_up(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        held = self.embed.embedding.shape[0]
        if held == self.config.vocab_size:
            return self.embed(tokens)
        own = tokens - first_row_of(held)  # other devices have the other rows
        is_here = (own >= 0) & (own < held)
        return add_parts(jnp.where(is_here[..., None], self.embed(jnp.clip(own, 0, held - 1)), 0))

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits of the residual stream after the last layer."""
        x, cap = self.norm(x), self.config.logits_softcap
        head = self.embed.attend if self.config.tie_word_embeddings else self.lm_head
        logits = head(x)
        if logits.shape[-1] < self.config.vocab_size:
            logits = join_parts(logits)
        logits = logits.astype(jnp.float32) * self.config.logits_multiplier
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def _forward(model: Llama, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    config = part_of(model.config, model.mesh)
    length, position = jnp.full(tokens.shape[:1], tokens.shape[1]), jnp.arange(tokens.shape[1])[None]
    x = model.embedded(tokens)
    for index, layer in enumerate(model.layers):
        query, key, value = layer.project(x, rotation(config, index, length, position))
        window = config.window_of(index)
        attended = jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
        )
        x = layer.finish(x, attended)
    return model.logits(x)


@jax.jit
def _forward_on_mesh(model: Llama, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    return over_mesh(lambda part, _, tokens: (_forward(part, tokens), None), model, None, tokens)[0]


@functools.partial(jax.jit, static_argnames=("strategy", "capacity", "block_tokens"))
def _prefill(
    model: Llama,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    strategy: CacheStrategy,
    capacity: int,
    block_tokens: int,
) -> tuple[Float[Array, "B V"], KVCache]:
    read = functools.partial(_read, strategy=strategy, capacity=capacity, block_tokens=block_tokens)
    return over_mesh(read, model, None, tokens, lengths)


def _read(
    model: Llama,
    _: None,  # no cache yet
    tokens: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    *,
    strategy: CacheStrategy,
    capacity: int,
    block_tokens: int,
) -> tuple[Float[Array, "B V"], KVCache]:
    config = part_of(model.config, model.mesh)
    block = min(block_tokens, tokens.shape[1])
    # Padding may be anything, also what has no embedding: not a number times no weight is not nothing.
    tokens = jnp.where(jnp.arange(tokens.shape[1])[None] < lengths[:, None], tokens, 0)
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % block)))
    x = model.embedded(tokens)
    layers: list[tuple[Segment, ...]] = []
    hold = functools.partial(strategy.hold_prompt, capacity=capacity, layers=config.num_layers)
    for index, layer in enumerate(model.layers):
        # A layer starts when the one before is packed: else many layers' keys and values are kept.
        blocks = after(layers[-1:], jnp.int32(tokens.shape[1] // block))
        window, kind = config.window_of(index), config.first_like(index)
        observed, expects = strategy.asks_of(window)
        read = functools.partial(_prefill_layer, observed=observed, expects=expects)
        if not observed and not expects and has_flash(x.dtype, config.head_dim):
            read = _prefill_layer_whole
        x, prompt = read(layer, kind, x, lengths, blocks, config, block)
        layers.append(hold(prompt, window=window, layer=index))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return model.logits(last[:, 0]), KVCache(tuple(layers), lengths, strategy, capacity)


# As for decoding, below: layers that differ in their parameters alone are traced once.
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
    attended, log_sum_exp = causal_attention(query, keys, values, first=first, window=config.window_of(index))
    if observed:
        oldest = jnp.zeros_like(lengths) if observed == ALL_QUERIES else lengths - observed
        seen = (position >= oldest[:, None]) & (position < lengths[:, None])
        weights = add_weights(weights, query, keys, log_sum_exp, seen, first=first)
    return layer.finish(x, attended), Read(keys, values, weights, sums)


@functools.partial(jax.jit, static_argnames=("index", "config", "block", "observed", "expects"))
def _prefill_layer(
    layer: Layer,
    index: int,
    x: Float[Array, "B P D"],
    lengths: Int[Array, "B"],
    blocks: Int[Array, ""],
    config: ModelConfig,
    block: int,
    *,
    observed: int,
    expects: bool,
) -> tuple[Array, Prompt]:
    """The residual stream after a layer like number `index`, and what it holds of the prompt, block by block.

    A block attends only to itself and what is before it, so one pass over the blocks computes keys and
    values, attends and replaces the stream in place. See `read_block` for `observed`; if a selector `expects`
    them, the queries before RoPE are summed, too.
    """
    batch, padded = x.shape[:2]
    # Zeros, but computed from `blocks`: the compiler makes constants of all layers at the start.
    blank = jnp.where(blocks >= 0, 0, 1).astype(x.dtype)
    store = jnp.full((batch, config.num_kv_heads, padded, config.head_dim), blank)
    weights = jnp.full(store.shape[:3], blank.astype(jnp.float32))
    sums = no_queries(batch, config.num_heads, config.head_dim) if expects else None

    def advance(i: Array, state: tuple[Array, Read]) -> tuple[Array, Read]:
        x, read = state
        here = jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=1)
        here, read = read_block(layer, index, here, read, i * block, lengths, config, observed=observed)
        return jax.lax.dynamic_update_slice_in_dim(x, here, i * block, axis=1), read

    x, read = jax.lax.fori_loop(0, blocks, advance, (x, Read(store, store, weights, sums)))
    if observed:
        read = read._replace(weights=add_replicas(read.weights))
    return x, read.prompt(config, index, lengths)


@functools.partial(jax.jit, static_argnames=("index", "config", "block"))
def _prefill_layer_whole(
    layer: Layer,
    index: int,
    x: Float[Array, "B P D"],
    lengths: Int[Array, "B"],
    blocks: Int[Array, ""],
    config: ModelConfig,
    block: int,
) -> tuple[Array, Prompt]:
    """As `_prefill_layer` without observed queries, where flash attention reads a whole prompt at once.

    Projections and the MLP are still done block by block. The queries of all tokens, and what they attended
    to, are as large as the residual stream each.
    """
    batch, padded = x.shape[:2]
    blank = jnp.where(blocks >= 0, 0, 1).astype(x.dtype)
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

    query, keys, values = jax.lax.fori_loop(0, blocks, project, (asked, held, held))
    attended = flash_attention(query, keys, values, window=config.window_of(index))

    def finish(i: Array, x: Array) -> Array:
        here, seen = (jax.lax.dynamic_slice_in_dim(a, i * block, block, axis=1) for a in (x, attended))
        return jax.lax.dynamic_update_slice_in_dim(x, layer.finish(here, seen), i * block, axis=1)

    x = jax.lax.fori_loop(0, blocks, finish, x)
    weights = jnp.zeros(keys.shape[:3])
    return x, Prompt(keys, values, weights, lengths)


@functools.partial(jax.jit, donate_argnames=("cache",))
def _decode(
    model: Llama, token: Int[Array, "B"], cache: KVCache, active: Bool[Array, "B"]
) -> tuple[Float[Array, "B V"], KVCache]:
    _check_shapes(model.config, cache)
    return over_mesh(_step, model, cache, token, active)


def _step(
    model: Llama, cache: KVCache, token: Int[Array, "B"], active: Bool[Array, "B"]
) -> tuple[Float[Array, "B V"], KVCache]:
    config = part_of(model.config, model.mesh)
    x = model.embedded(token)[:, None]
    layers: list[tuple[Segment, ...]] = []
    for index, (layer, segments) in enumerate(zip(model.layers, cache.layers, strict=True)):
        kind = config.first_like(index)
        x, grown = _decode_layer(layer, x, segments, cache.lengths, active, config, cache.strategy, kind)
        layers.append(grown)
    return model.logits(x[:, 0]), KVCache(
        caches.settle(layers, active),
        cache.lengths + active.astype(jnp.int32),
        cache.strategy,
        cache.capacity,
    )


def _check_shapes(config: ModelConfig, cache: KVCache) -> None:
    """Some other model's cache would be broadcast, and give numbers."""
    _, heads, _, dim = jax.eval_shape(lambda: cache.layers[0][0].materialize().key).shape
    held = f"{len(cache.layers)} layers of {heads} KV heads of {dim} channels"
    own = f"{config.num_layers} layers of {config.num_kv_heads} KV heads of {config.head_dim} channels"
    if held != own:
        raise ValueError(f"the cache has {held}, the model {own}: pass one that this model's prefill gave")


# Layers that differ in their parameters alone are traced and lowered once; XLA inlines the calls.
@functools.partial(jax.jit, static_argnames=("config", "strategy", "index"))
def _decode_layer(
    layer: Layer,
    x: Float[Array, "B 1 D"],
    segments: tuple[Segment, ...],
    lengths: Int[Array, "B"],
    active: Bool[Array, "B"],
    config: ModelConfig,
    strategy: CacheStrategy,
    index: int,
) -> tuple[Array, tuple[Segment, ...]]:
    """The residual stream after a layer that computes as number `index` does, and its cache."""
    rope = rotation(config, index, lengths + 1, lengths[:, None])
    rotated = layer.project(x, lambda heads: strategy.turn(rope(heads)))
    query, key, value = (part[:, 0] for part in rotated)
    held = (segment.attend(query) for segment in segments)
    attended = merge(*held, attend_token(query, key, value))
    x = layer.finish(x, normalize(attended)[:, None])
    # Appending overwrites what attending reads: without the order, each layer's cache is copied.
    may_append = after(attended.out, active.astype(jnp.int32)) > 0
    step = Step(query, key, value, attended.log_sum_exp, active=may_append, counted=active)
    return x, caches.append(segments, step)
