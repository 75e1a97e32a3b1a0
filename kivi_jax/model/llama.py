"""The decoder of every family: parameters, and the three ways to run it. Read `generation/generate.py` next.

Modules hold `nnx.Param`s and static config, are built once and then only read. The cache is an ordinary
pytree that goes in and comes out: nothing here is mutated, so plain `jax.jit` is safe.

    model(tokens)                      logits of every position; no cache; differentiable
    model.prefill(tokens, lengths)     reads prompts into a cache; logits of each row's last token
    model.decode(token, cache)         one token per row against the cache
"""

import copy
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kivi_jax.cache import strategy as caches
from kivi_jax.cache.names import strategy_of
from kivi_jax.cache.prompt_selectors import Prompt
from kivi_jax.cache.segments import Segment, Step
from kivi_jax.cache.strategy import CacheStrategy, KVCache
from kivi_jax.checks import instance, whole
from kivi_jax.config import ModelConfig
from kivi_jax.mesh import add_parts, first_row_of, join_parts
from kivi_jax.model.attention import has_flash
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
from kivi_jax.model.reading import default_block, read_by_blocks, read_whole
from kivi_jax.model.rope import rotation
from kivi_jax.model.sharding import over_mesh, part_of
from pallas_kernels.ordering import after
from pallas_kernels.partials import normalize
from pallas_kernels.pytree import Flat


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
        block_tokens: int | None = None,
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
            block_tokens: tokens of a row that are processed together: by default 512; with cuDNN's flash
                attention more, up to 2048 of all rows.

        Raises:
            ValueError: shapes do not fit together, or the strategy does not fit the model; outside of a trace
                also where lengths or token ids are out of range.
        """
        capacity = whole("capacity", capacity)
        tokens, lengths = read_prompts(tokens, lengths, vocab_size=self.config.vocab_size)
        if tokens.shape[1] == 0:
            raise ValueError("prompts must have at least one token")
        if capacity < tokens.shape[1]:
            raise ValueError(f"{capacity=} must be at least the prompt's {tokens.shape[1]} tokens")
        if block_tokens is not None and (block_tokens := whole("block_tokens", block_tokens)) <= 0:
            raise ValueError(f"{block_tokens=} must be positive")
        strategy = strategy_of(cache)
        strategy.check(self.config)
        read = _read if self.mesh is None else _read_on_mesh
        return read(self, None, tokens, lengths, strategy, capacity, block_tokens)

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
        return self.decoder()(token, cache, active)

    def decoder(self) -> Callable[..., tuple[Float[Array, "B V"], KVCache]]:
        """`decode`, for many steps: what this module holds is looked up once.

        That takes milliseconds, as long as a step may take. Parameters replaced later are not seen.
        """
        return functools.partial(_append, Flat.of(self), self.config.vocab_size)

    def without_layers(self) -> "Llama":
        """The same embeddings and head alone, for programs that need no more: each argument costs time."""
        ends = copy.copy(self)
        vars(ends)["layers"] = None  # an assignment is refused in a trace, even to a copy
        return ends

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


class _OneKey(nnx.Rngs):
    """The same key each time. To count keys, flax looks for each through all that was traced before."""

    def params(self) -> Array:
        """For a parameter that is not drawn."""
        return jax.random.key(0)


def abstract_llama(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Llama:
    """A model whose parameters are shapes and types; none is made."""
    return nnx.clone(_abstract_llama(config, jnp.dtype(dtype)))


@functools.lru_cache(maxsize=2)  # loading asks twice
def _abstract_llama(config: ModelConfig, dtype: np.dtype) -> Llama:
    return nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=_OneKey()))


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


def _read(
    model: Llama,
    _: None,  # no cache yet
    tokens: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    strategy: CacheStrategy,
    capacity: int,
    block_tokens: int | None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """The programs of a prompt, one after the other: XLA would take seconds for all layers as one."""
    config = part_of(model.config, model.mesh)
    flash = has_flash(model.embed.embedding.dtype, config.head_dim)
    block = min(block_tokens or default_block(*tokens.shape, flash=flash), tokens.shape[1])
    ends = model.without_layers()
    x, turn = _embed_prompt(ends, tokens, lengths, block)
    layers: list[tuple[Segment, ...]] = []
    for index, layer in enumerate(model.layers):
        window, kind = config.window_of(index), config.first_like(index)
        observed, expects = strategy.asks_of(window)
        read = functools.partial(read_by_blocks, observed=observed, expects=expects)
        if not observed and not expects and flash:
            read = read_whole
        x, prompt = read(Flat.of(layer), kind, x, lengths, turn, config, block)
        alike = strategy.first_held_like(config, index, width=x.shape[1])
        held, turn = _hold(
            prompt, turn, np.int32(index), strategy, capacity, window, alike, config.num_layers
        )
        layers.append(held)
        del prompt  # else it is there until the next layer's is
    logits, lengths = _last_logits(ends, x, lengths)
    return logits, KVCache(tuple(layers), lengths, strategy, capacity)


@functools.partial(jax.jit, static_argnames=("strategy", "capacity", "block_tokens"))
def _read_on_mesh(
    model: Llama,
    _: None,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    strategy: CacheStrategy,
    capacity: int,
    block_tokens: int | None,
) -> tuple[Float[Array, "B V"], KVCache]:
    read = functools.partial(_read, strategy=strategy, capacity=capacity, block_tokens=block_tokens)
    return over_mesh(read, model, None, tokens, lengths)


@functools.partial(jax.jit, static_argnames=("block",))
def _embed_prompt(
    ends: Llama, tokens: Int[Array, "B P"], lengths: Int[Array, "B"], block: int
) -> tuple[Float[Array, "B padded D"], Int[Array, ""]]:
    """The residual stream before the first layer, padded to whole blocks; and that layer's `turn`."""
    # Padding may be anything, also what has no embedding: not a number times no weight is not nothing.
    tokens = jnp.where(jnp.arange(tokens.shape[1])[None] < lengths[:, None], tokens, 0)
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % block)))
    return ends.embedded(tokens), jnp.int32(0)


@jax.jit
def _last_logits(
    ends: Llama, x: Float[Array, "B P D"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B V"], Int[Array, "B"]]:
    """The logits of each row's last token; and the lengths, in memory that decoding may consume."""
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return ends.logits(last[:, 0]), lengths


@functools.partial(jax.jit, static_argnames=("strategy", "capacity", "window", "alike", "layers"))
def _hold(
    prompt: Prompt,
    turn: Int[Array, ""],
    number: Int[Array, ""],
    strategy: CacheStrategy,
    capacity: int,
    window: int | None,
    alike: int,
    layers: int,
) -> tuple[tuple[Segment, ...], Int[Array, ""]]:
    """The segments of layer `number`, held as number `alike` is; and the next one's `turn`, known after them.

    A layer starts when the one before is packed: else, in one program, many layers' keys and values are kept.
    """
    held = strategy.hold_prompt(
        prompt, capacity=capacity, window=window, layer=alike, layers=layers, number=number
    )
    return held, after(held, turn)


def _append(
    flat: Flat[Llama],
    vocab_size: int,
    token: PerRow,
    cache: KVCache,
    active: Bool[Array, "B"] | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """See `Llama.decode`."""
    instance("cache", cache, KVCache, "pass what prefill or decode gave")
    rows = cache.lengths.shape[0]
    token = read_token(token, rows=rows, vocab_size=vocab_size)
    active = read_active(active, rows=rows)
    room = room_left(cache, active)
    if active is None:
        active = jnp.asarray(np.ones(rows, bool))  # a copy to the device, and no program
    logits, grown = _decode(flat, token, cache, active)
    return logits, note_room(grown, None if room is None else room - 1)


@functools.partial(jax.jit, donate_argnames=("cache",))
def _decode(
    flat: Flat[Llama], token: Int[Array, "B"], cache: KVCache, active: Bool[Array, "B"]
) -> tuple[Float[Array, "B V"], KVCache]:
    model = flat.tree()
    _check_shapes(model.config, cache)
    return over_mesh(decode_part, model, cache, token, active)


def decode_part(
    model: Llama, cache: KVCache, token: Int[Array, "B"], active: Bool[Array, "B"]
) -> tuple[Float[Array, "B V"], KVCache]:
    """What a device computes of `Llama.decode`, of its part of the model, the cache and the rows."""
    config = part_of(model.config, model.mesh)
    x = model.embedded(token)[:, None]
    alike = [cache.strategy.first_growing_like(config, index) for index in range(config.num_layers)]
    layers: list[tuple[Segment, ...]] = []
    for index, (layer, segments) in enumerate(zip(model.layers, cache.layers, strict=True)):
        kind = config.first_like(index)
        x, grown = _decode_layer(layer, x, segments, cache.lengths, active, config, cache.strategy, kind)
        layers.append(grown)
    return model.logits(x[:, 0]), KVCache(
        caches.settle(layers, active, alike),
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
    query, key, value = strategy.split_heads(*(part[:, 0] for part in layer.project(x, rope)))
    attended = caches.attend(segments, query, key, value)
    x = layer.finish(x, normalize(attended)[:, None])
    step = Step(query, key, value, attended.log_sum_exp, active, attended.out)
    return x, caches.append(segments, step)
